"""A real service of a test's own: `up`, the processes it consists of, and what its jobs made."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from jobs import demo_data
from jobs.client import Client, Job
from jobs.settings import Settings, load
from jobs.up import Running, down, up

PATIENCE = 420.0
"""Seconds for anything: a loaded machine of two cores restarts workers in a minute."""


@dataclass
class Service:
    settings: Settings
    running: Running
    client: Client

    def submit(self, training_file: str, *, steps: int = 24, **more: Any) -> Job:
        """A LoRA job on the shipped base; float32, a checkpoint every 4 steps."""
        from peft_service.shipped import SHIPPED_ID

        body: dict[str, Any] = {
            "model": SHIPPED_ID,
            "training_file": training_file,
            "suffix": "e2e",
            "seed": 7,
            "adapter": {"kind": "lora", "rank": 8, "alpha": 16},
        }
        training = {
            "n_epochs": 50, "max_steps": steps, "batch_size": 8, "learning_rate": 2e-3, "checkpoint_steps": 4,
            "max_seq_len": 128, **more.pop("training", {}),
        }  # fmt: skip
        return self.client.submit({**body, "training": training, **more})

    def wait(self, job_id: str, until: Callable[[Job], bool] = lambda job: job.final) -> Job:
        """Poll until the job is so; through moments when the service does not answer."""
        deadline = time.monotonic() + PATIENCE
        job = None
        while time.monotonic() < deadline:
            with contextlib.suppress(Exception):
                job = self.client.job(job_id)
                if until(job):
                    return job
                if job.final:
                    raise AssertionError(f"{job_id} ended as {job.status}: {job.error}")
            if job is not None and job.final:
                break
            time.sleep(0.3)
        events = [event.message for event in self.client.events(job_id)]
        raise AssertionError(f"{job_id} did not get there: {job}\n" + "\n".join(reversed(events)))

    def wait_for_step(self, job_id: str, step: int) -> Job:
        return self.wait(
            job_id, lambda job: bool(job.progress) and (job.progress or {}).get("step", 0) >= step
        )

    def succeeded(self, job_id: str) -> Job:
        job = self.wait(job_id)
        assert job.status == "succeeded", (job.error, self.client_log(job_id))
        return job

    def client_log(self, job_id: str) -> str:
        return "\n".join(event.message for event in self.client.events(job_id))

    def weights(self, job: Job, directory: Path) -> dict[str, Any]:
        """The pulled adapter's tensors, as the catalog has it."""
        assert job.adapter is not None
        target = self.client.pull(job.adapter["id"], directory)
        return dict(load_file(target / "adapter_model.safetensors"))

    def processes(self, *words: str) -> list[int]:
        """Ids of this service's processes whose command line has all the words."""
        mark = json.loads((self.settings.data_dir / "up.json").read_text())["mark"]
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and f"PEFT_UP={mark}".encode() in (entry / "environ").read_bytes():
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if all(word in line for word in words):
                        found.append(int(entry.name))
        return found

    def kill(self, *words: str) -> int:
        """kill -9 all processes whose command line has the words; how many there were."""
        victims = self.processes(*words)
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(victims)


@contextlib.contextmanager
def service(data_dir: Path, **settings: Any) -> Iterator[Service]:
    """Up on entry, down on exit."""
    chosen = load({}, **{"data_dir": data_dir, "port": 0, **settings})
    running = up(chosen)
    client = Client(running.url, running.key)
    try:
        yield Service(chosen, running, client)
    finally:
        client.close()
        down(chosen)


def rows_file(path: Path, count: int = 64, seed: int = 1) -> Path:
    """A chat file of the demo's rows."""
    rows = demo_data.training_rows(seed)[:count]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
