"""The real API behind a real HTTP server, in a thread: SQLite, file store, no cluster.

What a scheduler and a cluster would do to a job is done by calling the queue as they do.
"""

import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import uvicorn
from safetensors.numpy import save_file
from sqlalchemy import Engine, select

from cluster.dashboard import ClusterUnavailable
from jobs import keys, queue
from jobs.api import create_app
from jobs.db import METADATA, capacity, connect, files, in_order, migrate, now, writing
from jobs.settings import Settings
from peft_service import catalog
from peft_service.spec import spec_of
from peft_service.store import Store, open_store

CHAT = "".join(
    json.dumps(
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]}
    )
    + "\n"
    for n in range(40)
).encode()
BASE = "tiny/llama-1"


class Service:
    """A running service with two projects, `a` and `b`."""

    def __init__(
        self, directory: Path, wrap: Callable[[Any], Any] = lambda app: app, **settings: Any
    ) -> None:
        self.directory = directory
        self.settings = Settings(data_dir=directory / "data", **settings)
        migrate(self.settings.database_url)
        self.engine: Engine = connect(self.settings.database_url)
        self.store: Store = open_store(self.settings.store_url)
        self.keys = {project: keys.create(self.engine, project)[1] for project in ("a", "b")}
        self.logs: dict[str, str] = {}
        self.cluster_answers = True
        self.app = create_app(self.settings, self.engine, self.store, launcher_logs=self.log_of)
        self.base_uri = write_base(directory / "bases" / "llama")
        self.see_cluster(nodes=1)
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            self.port = taken.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.server = uvicorn.Server(
            uvicorn.Config(
                wrap(self.app), host="127.0.0.1", port=self.port, log_level="warning", lifespan="off"
            )
        )
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> "Service":
        self.thread.start()
        deadline = time.monotonic() + 60
        while not self.server.started:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        self.engine.dispose()

    def log_of(self, name: str) -> str:
        if not self.cluster_answers:
            raise ClusterUnavailable("no answer")
        return self.logs.get(name, "")

    def see_cluster(self, nodes: int, cpus: float = 4) -> None:
        """What a scheduler writes after it has looked at the training cluster."""
        node = {"id": "n", "cpus": cpus, "gpus": 0, "memory_bytes": 16 << 30}
        snapshot = {"nodes": [{**node, "id": f"n{index}"} for index in range(nodes)]}
        with writing(self.engine) as conn:
            conn.execute(capacity.delete())
            conn.execute(capacity.insert().values(id=1, snapshot=snapshot, updated_at=now()))

    def contents(self) -> dict[str, Any]:
        """All rows of all tables and all objects of the store: for "nothing has changed"."""
        with self.engine.connect() as conn:
            tables = {
                table.name: [tuple(row) for row in conn.execute(select(table).order_by(*table.primary_key))]
                for table in METADATA.sorted_tables
            }
        return {**tables, "store": [(info.key, info.size) for info in self.store.list("")]}

    def run(self, job: str, project: str = "a") -> queue.Lease:
        """Claim the job as a scheduler does."""
        lease = queue.claim(self.engine, job, "test", 60)
        assert lease is not None
        return lease

    def succeed(self, lease: queue.Lease, extra: dict[str, bytes] | None = None) -> catalog.Adapter:
        """Publish an adapter for a running job and end it, as the scheduler does."""
        row = queue.get(self.engine, lease.project_id, lease.job)
        spec = spec_of(row.spec)
        version = queue.reserve_version(self.engine, lease)
        place = catalog.location_of(row.project_id, spec.base.id, spec.name, version, row.id)
        contents = {"adapter_model.safetensors": b"weights" * 1000, "README.md": b"# card", **(extra or {})}
        for name, data in contents.items():
            self.store.put(f"{place}/{name}", data)
        model = f"ft:{catalog.slug_of(spec.base.id)}:{row.project_id}:{spec.name}:{catalog.id8_of(row.id)}"
        record = {
            "id": catalog.adapter_id_of(row.id),
            "project": row.project_id,
            "name": spec.name,
            "version": version,
            "model": model,
            "job": row.id,
            "created_at": time.time(),
            "spec": row.spec,
            "metrics": {"train_loss": 0.5},
        }
        listed = [
            {"path": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in contents.items()
        ]
        self.store.put(f"{place}/manifest.json", json.dumps({"record": record, "files": listed}).encode())
        adapter = catalog.read(self.store, place)
        csv = b"step,train_loss\n1,0.5\n"
        result = queue.new_id("file-")
        key = f"{row.project_id}/files/{result}"
        self.store.put(key, csv)
        with writing(self.engine) as conn:
            in_order(conn, row.project_id)
            queue.finish(
                conn,
                lease,
                "succeeded",
                fine_tuned_model=model,
                adapter_id=adapter.id,
                result_files=[result],
                trained_tokens=123,
                news=[queue.Event(f"New fine-tuned model created: {model}")],
            )
            catalog.register(conn, adapter)
            conn.execute(
                files.insert().values(
                    id=result,
                    project_id=row.project_id,
                    filename="step_metrics.csv",
                    purpose="fine-tune-results",
                    bytes=len(csv),
                    sha256=hashlib.sha256(csv).hexdigest(),
                    key=key,
                    created_at=now(),
                    status="processed",
                )
            )
        return adapter


@contextmanager
def serving(directory: Path, **options: Any) -> Iterator[Service]:
    with Service(directory, **options) as service:
        yield service


def write_base(directory: Path, hidden: int = 16) -> str:
    """A Llama of one layer, as files; returns its URI. No torch needed."""
    directory.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": 1,
        "vocab_size": 64,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    square = numpy.ones((hidden, hidden), numpy.float32)
    tensors = {"model.embed_tokens.weight": numpy.ones((64, hidden), numpy.float32)}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        tensors[f"model.layers.0.self_attn.{name}.weight"] = square
    save_file(tensors, directory / "model.safetensors")
    return f"file://{directory}"
