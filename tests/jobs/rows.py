"""Jobs for tests, without a run behind them."""

import hashlib
import json
from typing import Any

from sqlalchemy import Engine

from jobs.db import now, projects, writing
from jobs.queue import NewJob
from peft_service.spec import FineTuneSpec

PROJECT = "team"


def add_project(engine: Engine, id: str = PROJECT, name: str = "Team") -> None:
    with writing(engine) as conn:
        conn.execute(projects.insert().values(id=id, name=name, created_at=now()))


def spec(name: str = "helper", **changes: Any) -> FineTuneSpec:
    file = {
        "id": "file-0123456789abcdef01234567",
        "key": "team/files/file-0123456789abcdef01234567",
        "sha256": "0" * 64,
        "rows": 8,
        "format": "chat",
    }
    value = {
        "name": name,
        "base": {"id": "org/tiny", "uri": "file:///nowhere", "digest": "d" * 64},
        "method": {"kind": "lora"},
        "data": {"training": file},
        "training": {"learning_rate": 1e-3, "batch_size": 2, "n_epochs": 1},
    }
    return FineTuneSpec.model_validate(value | changes)


def plan(workers: int = 1, cpus: float = 1, gpus: float = 0, memory_bytes: int = 1_000_000) -> dict[str, Any]:
    """A plan whose demand is this."""
    parts = dict.fromkeys(
        ("weights", "gradients", "optimizer", "activations", "logits", "runtime", "device"), 0
    )
    return {
        "workers": workers,
        "cpus_per_worker": cpus,
        "gpus_per_worker": gpus,
        "zero_stage": 0,
        "offload_optimizer": False,
        "offload_parameters": False,
        "precision": "fp32",
        "microbatch": 2,
        "gradient_accumulation": 1,
        "rows_per_step": 2,
        "steps": 4,
        "gradient_checkpointing": False,
        "trainable_parameters": 10,
        "memory": {**parts, "host": memory_bytes},
        "arithmetic": [],
    }


def new_job(body: Any = "a body", project: str = PROJECT, name: str = "helper", **options: Any) -> NewJob:
    text = json.dumps(body, sort_keys=True)
    values: dict[str, Any] = {
        "project_id": project,
        "spec": spec(name),
        "request": {"body": body},
        "body_hash": hashlib.sha256(text.encode()).hexdigest(),
        "plan": plan(),
    }
    return NewJob(**(values | options))
