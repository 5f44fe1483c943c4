"""An attempt is started once whatever happens, watched and stopped, through a real Ray Jobs API."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.dashboard import ClusterUnavailable, Dashboard
from cluster.launch import Progress, RayJobsLauncher, environment, is_this_machine
from cluster.plan import Memory, Plan
from peft_service.store import open_store
from tests.cluster.head import Head

pytestmark = pytest.mark.ray

PLAN = Plan(
    workers=1,
    cpus_per_worker=1,
    gpus_per_worker=0,
    zero_stage=0,
    offload_optimizer=False,
    offload_parameters=False,
    precision="fp32",
    microbatch=1,
    gradient_accumulation=1,
    rows_per_step=1,
    steps=1,
    gradient_checkpointing=False,
    trainable_parameters=1,
    memory=Memory(weights=0, gradients=0, optimizer=0, activations=0, logits=0, runtime=0, device=0, host=0),
    arithmetic=(),
)


def launcher(head: Head, tmp_path: Path, script: str | None = None) -> RayJobsLauncher:
    """`script` stands for the interpreter: the launcher cannot know what its attempt does."""
    python = None
    if script is not None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        python = str(path)
    return RayJobsLauncher(head.dashboard(), f"file://{tmp_path}/store", python, patience=1)


def until(poll: Callable[[], Progress], *wanted: Progress, seconds: float = 90) -> Progress:
    deadline = time.monotonic() + seconds
    while (seen := poll()) not in wanted:
        assert time.monotonic() < deadline, f"still {seen}"
        time.sleep(0.2)
    return seen


def name() -> str:
    return f"ft-ftjob-{os.urandom(6).hex()}-1"


def test_the_same_name_twice_attaches_and_never_runs_twice(head: Head, tmp_path: Path) -> None:
    attempts = launcher(head, tmp_path, f'echo "$@" >> {tmp_path}/ran; echo "hello from the run"')
    attempt = name()
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(attempts.start, attempt, "p/runs/j/1", PLAN) for _ in range(4)]:
            future.result()
    assert until(lambda: attempts.poll(attempt), "succeeded", "failed") == "succeeded"
    attempts.start(attempt, "p/runs/j/1", PLAN)
    assert attempts.poll(attempt) == "succeeded", "a finished attempt is not started again"
    arguments = (tmp_path / "ran").read_text().splitlines()
    assert arguments == [f"-m cluster.run --store file://{tmp_path}/store --run p/runs/j/1 --patience 1"]
    assert "hello from the run" in attempts.logs(attempt)


def test_a_stopped_attempt_is_gone_with_its_processes(head: Head, tmp_path: Path) -> None:
    attempts = launcher(head, tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 600")
    attempt = name()
    attempts.start(attempt, "p/runs/j/1", PLAN)
    until(lambda: attempts.poll(attempt), "running")
    until(lambda: "succeeded" if (tmp_path / "pid").exists() else "running", "succeeded")
    attempts.stop(attempt)
    assert until(lambda: attempts.poll(attempt), "stopped", "failed", "succeeded") == "stopped"
    pid = int((tmp_path / "pid").read_text())
    assert not Path(f"/proc/{pid}").exists()
    attempts.stop(attempt)


def test_the_environment_of_an_attempt_names_no_secret(head: Head, tmp_path: Path) -> None:
    attempts = launcher(head, tmp_path, "env")
    attempt = name()
    attempts.start(attempt, "p/runs/j/1", PLAN)
    until(lambda: attempts.poll(attempt), "succeeded")
    seen = attempts.logs(attempt)
    for variable, value in environment(PLAN).items():
        assert f"{variable}={value}" in seen
    told = head.dashboard().json("GET", f"/api/jobs/{attempt}")
    assert set(told["runtime_env"]["env_vars"]) == set(environment(PLAN))
    assert "AWS" not in str(told)


def test_an_attempt_with_an_outcome_is_left_alone(head: Head, tmp_path: Path) -> None:
    """The real driver: a second one for the same attempt must not touch what may be published already."""
    store = open_store(f"file://{tmp_path}/store")
    store.put("p/runs/j/1/outcome.json", b"{}")
    attempts = launcher(head, tmp_path)
    attempt = name()
    attempts.start(attempt, "p/runs/j/1", PLAN)
    assert until(lambda: attempts.poll(attempt), "succeeded", "failed") == "succeeded", attempts.logs(attempt)
    assert [info.key for info in store.list("p/")] == ["p/runs/j/1/outcome.json"]


def test_an_attempt_without_input_ends_without_an_outcome(head: Head, tmp_path: Path) -> None:
    attempts = launcher(head, tmp_path)
    attempt = name()
    attempts.start(attempt, "p/runs/j/1", PLAN)
    assert until(lambda: attempts.poll(attempt), "succeeded", "failed") == "failed"
    assert "input.json" in attempts.logs(attempt)


def test_an_unknown_attempt_is_lost_and_stopping_it_is_no_error(head: Head, tmp_path: Path) -> None:
    attempts = launcher(head, tmp_path)
    assert attempts.poll("ft-nobody-1") == "lost"
    attempts.stop("ft-nobody-1")
    assert attempts.logs("ft-nobody-1") == ""


def test_silence_is_not_the_loss_of_an_attempt(tmp_path: Path) -> None:
    attempts = RayJobsLauncher(Dashboard("http://127.0.0.1:1"), "file:///x", None, patience=1)
    for ask in (
        lambda: attempts.poll("ft-a-1"),
        lambda: attempts.start("ft-a-1", "p/runs/a/1", PLAN),
        lambda: attempts.stop("ft-a-1"),
    ):
        with pytest.raises(ClusterUnavailable):
            ask()


def test_our_own_python_is_used_on_this_machine_only(head: Head) -> None:
    assert is_this_machine(head.url)
    assert is_this_machine("http://localhost:8265")
    assert not is_this_machine("http://203.0.113.7:8265")
