"""kill -9 anything: the job ends `succeeded`, once, with the adapter of the uninterrupted run."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.client import Client
from jobs.up import up
from tests.end_to_end.service import Service, rows_file, service

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(900)]

STEPS = 48


@pytest.fixture(scope="module")
def reference(live: Service, training_file: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    job = live.succeeded(live.submit(training_file, steps=STEPS).id)
    return live.weights(job, tmp_path_factory.mktemp("reference") / "adapter")


def check(
    live: Service, job_id: str, reference: dict[str, Any], directory: Path, tolerance: float = 0
) -> None:
    job = live.succeeded(job_id)
    weights = live.weights(job, directory / "adapter")
    assert weights.keys() == reference.keys()
    for name, expected in reference.items():
        np.testing.assert_allclose(weights[name], expected, rtol=tolerance, atol=tolerance, err_msg=name)
    assert sum(adapter.job == job_id for adapter in live.client.adapters()) == 1
    steps = [
        event.data["step"] for event in live.client.events(job_id) if event.type == "metrics" and event.data
    ]
    trained = [step for step in steps if step is not None]
    assert sorted(set(trained)) == list(range(1, STEPS + 1)), "every step is reported"
    messages = [event.message for event in live.client.events(job_id)]
    assert sum("successfully completed" in message for message in messages) == 1


@pytest.mark.parametrize(
    ("words", "attempts"),
    [
        (("ray::", "RayTrainWorker"), 2),
        (("cluster.run",), 2),
        (("ray::ServeReplica", "Scheduler"), 1),
        (("ray::ServeReplica", "API"), 1),
    ],
    ids=["a train worker", "the driver", "the scheduler", "an API replica"],
)
def test_a_killed_process_changes_nothing(
    live: Service,
    training_file: str,
    reference: dict[str, Any],
    tmp_path: Path,
    words: tuple[str, ...],
    attempts: int,
) -> None:
    job_id = live.submit(training_file, steps=STEPS).id
    live.wait_for_step(job_id, 10)
    assert live.kill(*words) >= 1
    check(live, job_id, reference, tmp_path)
    assert live.client.job(job_id).attempt == attempts


def test_the_whole_service_is_killed(tmp_path: Path, reference: dict[str, Any]) -> None:
    with service(tmp_path / "data") as own:
        file_id = own.client.upload(rows_file(tmp_path / "rows.jsonl")).id
        job_id = own.submit(file_id, steps=STEPS).id
        queued = own.submit(file_id, steps=STEPS, resources={"workers": 2}, suffix="later").id
        own.wait_for_step(job_id, 10)
        assert own.kill() > 5
        running = up(own.settings)
        own.client = Client(running.url, running.key)
        assert own.client.job(queued).status in ("queued", "running")
        check(own, job_id, reference, tmp_path)
        own.succeeded(queued)


@pytest.fixture
def quick_health_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's head takes a silent node for dead after seconds instead of half a minute."""
    for name, value in (("initial_delay", 2000), ("period", 1000), ("timeout", 1000)):
        monkeypatch.setenv(f"RAY_health_check_{name}_ms", str(value))
    monkeypatch.setenv("RAY_health_check_failure_threshold", "4")


@pytest.fixture
def two_nodes(
    tmp_path: Path, quick_health_checks: None
) -> Iterator[tuple[Service, "subprocess.Popen[bytes]"]]:
    """A service whose cluster has one CPU on its head, and one on a second node."""
    with service(tmp_path / "data", local_cpus=1) as own:
        head = own.processes("gcs_server")[0]
        line = Path(f"/proc/{head}/cmdline").read_bytes().decode().split("\0")
        port = next(word.partition("=")[2] for word in line if word.startswith("--gcs_server_port"))
        environment = dict(
            item.split("=", 1)
            for item in Path(f"/proc/{head}/environ").read_text().split("\0")
            if "=" in item
        )
        node = subprocess.Popen(
            [
                sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats",
                f"--address=127.0.0.1:{port}", "--node-ip-address=127.0.0.2", "--num-cpus=1",
                "--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=100000000",
            ],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            yield own, node
        finally:
            _kill_group(node)


def test_the_second_node_is_killed(
    two_nodes: tuple[Service, "subprocess.Popen[bytes]"], reference: dict[str, Any], tmp_path: Path
) -> None:
    own, node = two_nodes
    file_id = own.client.upload(rows_file(tmp_path / "rows.jsonl")).id
    deadline = time.monotonic() + 120
    while True:  # the service learns of a new node by looking, a moment later
        try:
            job_id = own.submit(file_id, steps=STEPS, resources={"workers": 2}).id
            break
        except Exception:
            assert time.monotonic() < deadline
            time.sleep(1)
    own.wait_for_step(job_id, 10)
    _kill_group(node)
    check(own, job_id, reference, tmp_path, tolerance=1e-4)


def _kill_group(node: "subprocess.Popen[bytes]") -> None:
    """kill -9 a whole node: its raylet and everything below it."""
    import psutil

    try:
        children = psutil.Process(node.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for process in [*children, psutil.Process(node.pid)]:
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    node.wait(30)
