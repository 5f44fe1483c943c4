"""`make bench`: the README's figures, measured on this machine and printed as a table.

Not a test: nothing here passes or fails. Beside the service's figures stands the machine's own ceiling: the
same requests to an empty route, and the same run in one process without a service.
"""

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from jobs.db import connect
from jobs.queue import NewJob, submit
from peft_service.shipped import SHIPPED_ID
from peft_service.spec import FineTuneSpec
from peft_service.store import open_store
from tests.end_to_end.service import Service, rows_file, service

SUBMITS = 300
JOBS = 10_000
RUNS = 3


def main() -> int:
    machine = platform.processor() or platform.machine()
    say(f"{machine}, {os.cpu_count()} cores, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        # The scheduler rests: jobs stay queued, so that the API is measured and not the training beside it.
        with service(Path(folder, "api"), tick_seconds=1e6) as resting:
            api(resting, Path(folder))
        with service(Path(folder, "runs")) as working:
            runs(working, Path(folder))
    return 0


def api(live: Service, folder: Path) -> None:
    """Submit latency, and listing at 10,000 jobs."""
    headers = {"Authorization": f"Bearer {live.running.key}"}
    file_id = live.client.upload(rows_file(folder / "rows.jsonl")).id
    with httpx.Client(base_url=live.running.url, headers=headers, timeout=60) as http:
        body = {"model": SHIPPED_ID, "training_file": file_id}
        for _ in range(20):
            http.get("/healthz")
        empty = timed(lambda: http.get("/healthz"), SUBMITS)
        submits = timed(lambda: http.post("/v1/fine_tuning/jobs", json=body).raise_for_status(), SUBMITS)
        row("an empty route (ceiling)", f"p50 {ms(empty, 0.5)}, p99 {ms(empty, 0.99)}")
        row("submit", f"p50 {ms(submits, 0.5)}, p99 {ms(submits, 0.99)}")

        first = http.get("/v1/fine_tuning/jobs", params={"limit": 1}).json()["data"][0]["id"]
        engine = connect(live.settings.database_url)
        copy_of(engine, first, JOBS - SUBMITS)
        began, count, after = time.perf_counter(), 0, None
        while True:
            query = {"limit": 100, **({"after": after} if after else {})}
            page = http.get("/v1/fine_tuning/jobs", params=query).json()
            count += len(page["data"])
            if not page["has_more"]:
                break
            after = page["data"][-1]["id"]
        seconds = time.perf_counter() - began
        assert count == JOBS, count
        row(f"list {JOBS:,} jobs by 100", f"{count / seconds:,.0f} jobs/s ({seconds:.1f} s)")
        pages = timed(lambda: http.get("/v1/fine_tuning/jobs", params={"limit": 20}), 100)
        row(f"first page of {JOBS:,}", f"p50 {ms(pages, 0.5)}, p99 {ms(pages, 0.99)}")
        submits = timed(lambda: http.post("/v1/fine_tuning/jobs", json=body).raise_for_status(), 100)
        row(f"submit with {JOBS:,} queued", f"p50 {ms(submits, 0.5)}, p99 {ms(submits, 0.99)}")
        engine.dispose()


def copy_of(engine: Any, job_id: str, count: int) -> None:
    """`count` more jobs like this one, through the queue's own function."""
    from jobs.queue import get

    job = get(engine, "default", job_id)
    new = NewJob(
        project_id=job.project_id,
        spec=FineTuneSpec.model_validate(job.spec),
        request=job.request,
        body_hash="0" * 64,
        plan=job.plan or {},
    )
    for _ in range(count):
        submit(engine, new)


def runs(live: Service, folder: Path) -> None:
    """From submit to the first step, and what of a job's wall time is not training."""
    file_id = live.client.upload(rows_file(folder / "rows.jsonl", count=160)).id
    parts: dict[str, list[float]] = {}
    for _ in range(RUNS):
        asked = time.time()
        job = live.succeeded(
            live.submit(file_id, steps=40, training={"batch_size": 16, "max_seq_len": 256}).id
        )
        done = time.time()
        for name, seconds in breakdown(live, job.id, asked, done).items():
            parts.setdefault(name, []).append(seconds)
    for name, values in parts.items():
        row(
            name,
            f"{statistics.median(values):.1f} s"
            if "share" not in name
            else f"{statistics.median(values):.0%}",
        )


def breakdown(live: Service, job_id: str, asked: float, done: float) -> dict[str, float]:
    """Seconds by phase, from the metrics lines that the run wrote to the store."""
    store = open_store(live.settings.store_url)
    lines = []
    for info in store.list(""):
        if f"/runs/{job_id}/" in info.key and "/metrics/" in info.key:
            lines += [json.loads(line) for line in store.get(info.key).decode().splitlines()]
    steps = [line for line in lines if line["type"] == "step"]
    phases = {line["phase"]: line["time"] for line in lines if line["type"] == "phase"}
    first = steps[0]["time"]
    training = sum(line["seconds"] for line in steps)
    started = sorted(phases.items(), key=lambda item: item[1])
    result = {"submit to the first step": first - asked}
    previous = ("  until the driver writes its first line", asked)
    for name, when in started:
        if when <= first:
            result[previous[0]] = when - previous[1]
            previous = (f"  {name}", when)
    result[previous[0]] = first - previous[1]
    result["the steps themselves"] = training
    result["last step to succeeded"] = done - steps[-1]["time"]
    result["whole job"] = done - asked
    result["share of the wall time that is not steps"] = 1 - training / (done - asked)
    return result


def timed(action: Callable[[], Any], count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)


def ms(ordered: list[float], share: float) -> str:
    return f"{ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000:.1f} ms"


def row(name: str, value: str) -> None:
    say(f"| {name} | {value} |")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
