"""The scheduler with a real store, a real database and real processes as attempts."""

import csv
import io
import json
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event, select, update

from cluster.dashboard import ClusterUnavailable
from cluster.plan import Capacity, Node, Plan
from jobs import queue
from jobs.db import adapters, connect, files, job_events, jobs, migrate, now, reading, writing
from jobs.queue import JobRow
from jobs.scheduler import Pace, Scheduler
from peft_service import catalog
from peft_service.adapter import verify
from peft_service.errors import StoreUnavailable
from peft_service.run import RunInput
from peft_service.spec import spec_of
from peft_service.store import open_store
from tests.jobs.rows import PROJECT, add_project, new_job, plan
from tests.launchers import ProcessLauncher

QUICK = Pace(tick=0.01, lease=0.05, look=0, capacity=0, grace=5, launch=0.2, backoff=0, backoff_most=0)
PATIENT = Pace(tick=0.01, lease=60, look=0, capacity=0, grace=5, launch=0.2, backoff=0, backoff_most=0)
ENDS = ("succeeded", "failed", "cancelled")

STARTED = [
    "Created fine-tuning job: {job}",
    "Validating training file: file-0123456789abcdef01234567",
    "Files validated, moving job to queued state",
    "Fine-tuning job started",
]
FOUR_STEPS = [
    "Step 1/4: training loss=1.00",
    "Step 2/4: training loss=0.50",
    "Step 2/4: validation loss=1.00",
    "Checkpoint created at step 2",
    "Step 3/4: training loss=0.33",
    "Step 4/4: training loss=0.25",
    "Step 4/4: validation loss=0.50",
    "Checkpoint created at step 4",
]
SUCCEEDED = ["New fine-tuned model created: {model}", "The job has successfully completed"]


class World:
    """A database, a store and a cluster of plain processes; schedulers come and go."""

    def __init__(self, folder: Path, engine: Engine, cpus: float = 8) -> None:
        self.engine = engine
        self.root = folder / "store"
        self.store = open_store(self.root.as_uri())
        self.launcher = ProcessLauncher(folder / "cluster", self.root)
        self.cpus = cpus

    def capacity(self) -> Capacity:
        return Capacity(nodes=(Node(cpus=self.cpus, memory_bytes=10**12),))

    def scheduler(self, pace: Pace = PATIENT, **parts: Any) -> Scheduler:
        parts = {"store": self.store, "launcher": self.launcher, "capacity": self.capacity} | parts
        return Scheduler(self.engine, pace=pace, **parts)

    def job(self, job: str) -> JobRow:
        return queue.get(self.engine, PROJECT, job)

    def messages(self, job: str) -> list[str]:
        return [
            event.message for event in reversed(queue.events(self.engine, PROJECT, job, limit=1000).items)
        ]

    def until(self, scheduler: Scheduler, what: Callable[[], object], seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, "this never came"
            scheduler.tick()
            time.sleep(0.005)

    def go(self) -> None:
        """Let the attempts that hang go on."""
        (self.root / "go").touch()

    def ends(self, scheduler: Scheduler, job: str) -> JobRow:
        self.until(scheduler, lambda: self.job(job).state in ENDS)
        return self.job(job)


@pytest.fixture
def world(tmp_path: Path, sqlite_engine: Engine) -> Iterator[World]:
    world = World(tmp_path, sqlite_engine)
    yield world
    world.launcher.close()


@pytest.fixture
def both(tmp_path: Path, engine: Engine) -> Iterator[World]:
    """On each database."""
    world = World(tmp_path, engine)
    yield world
    world.launcher.close()


# --------------------------------------------------------------------------------------- the main path


def test_a_job_goes_from_the_queue_into_the_catalog(both: World) -> None:
    world = both
    submitted = queue.submit(world.engine, new_job())
    row = world.ends(world.scheduler(), submitted.id)
    model = f"ft:org--tiny:Team:helper:{submitted.id[6:14]}"
    assert (row.state, row.error, row.fine_tuned_model) == ("succeeded", None, model)
    assert (row.attempt, row.live_attempt, row.trained_tokens, row.failures) == (1, None, 400, 0)
    assert row.progress is not None
    assert (row.progress["step"], row.progress["percent"], row.progress["eta_seconds"]) == (4, 100, 0)
    told = [message.format(job=row.id, model=model) for message in STARTED + FOUR_STEPS + SUCCEEDED]
    assert world.messages(row.id) == told
    assert [point.step for point in queue.list_checkpoints(world.engine, PROJECT, row.id).items] == [4, 2]
    metrics = queue.events(world.engine, PROJECT, row.id, limit=100).items
    assert next(e for e in metrics if e.type == "metrics" and e.message.startswith("Step 3")).data == {
        "step": 3,
        "total_steps": 4,
        "train_loss": 1 / 3,
        "train_mean_token_accuracy": 1 - 1 / 3,
        "learning_rate": 1e-3,
        "grad_norm": 1.0,
    }


def test_a_run_gets_its_spec_and_its_plan(world: World) -> None:
    row = world.ends(world.scheduler(), queue.submit(world.engine, new_job()).id)
    prefix = f"{PROJECT}/runs/{row.id}/1"
    given = RunInput.model_validate_json(world.store.get(f"{prefix}/input.json"))
    assert (given.job, given.attempt, given.project, given.prefix) == (row.id, 1, PROJECT, prefix)
    assert (given.spec.model_dump(mode="json"), given.plan) == (row.spec, row.plan)


def test_the_result_files_are_the_metrics_and_then_the_adapter(world: World) -> None:
    row = world.ends(world.scheduler(), queue.submit(world.engine, new_job()).id)
    with reading(world.engine) as conn:
        there = {file.id: file for file in conn.execute(select(files))}
        adapter = catalog.find(conn, PROJECT, "helper@1")
    assert verify(world.store, adapter.location) == adapter.manifest
    metrics, archive = (there[id] for id in row.result_files)
    assert (metrics.filename, archive.filename) == (
        "step_metrics.csv",
        f"helper-v0001-{row.id[6:14]}.tar",
    )
    table = list(csv.DictReader(io.StringIO(world.store.get(metrics.key).decode())))
    assert list(table[0]) == [
        "step",
        "train_loss",
        "train_accuracy",
        "valid_loss",
        "valid_mean_token_accuracy",
        "train_mean_token_accuracy",
    ]
    assert [row["step"] for row in table] == ["1", "2", "3", "4"]
    assert [row["valid_loss"] for row in table] == ["", "1.0", "", "0.5"]
    assert float(table[2]["train_loss"]) == 1 / 3
    with tarfile.open(fileobj=io.BytesIO(world.store.get(archive.key))) as tar:
        names = tar.getnames()
        assert {"adapter_model.safetensors", "adapter_config.json", "manifest.json"} <= set(names)
        for name in names:
            member = tar.extractfile(name)
            assert member is not None
            assert member.read() == world.store.get(f"{adapter.location}/{name}")
    for file in (metrics, archive):
        assert (file.purpose, file.status) == ("fine-tune-results", "processed")
        assert file.bytes == len(world.store.get(file.key))


def test_what_else_an_objective_measures_follows_openai_s_columns(world: World) -> None:
    step = {"type": "step", "step": 1, "total_steps": 4, "train_loss": 0.5, "reward": 0.25, "seconds": 1.0}
    lines = [
        json.dumps({**step, "tokens": 9, "loss_scale": None, "words": "no number"}),
        json.dumps(
            {"type": "eval", "step": 1, "valid_loss": 0.5, "full_valid_loss": 0.5, "valid_score": 0.75}
        ),
        json.dumps({"type": "eval", "step": 4, "forgetting_loss_before": 2.0, "forgetting_loss_after": 2.5}),
    ]
    world.launcher.behaviour = {"1": {"nonsense": lines}}
    row = world.ends(world.scheduler(), queue.submit(world.engine, new_job()).id)
    with reading(world.engine) as conn:
        key = conn.scalar(select(files.c.key).where(files.c.id == row.result_files[0]))
    table = list(csv.reader(io.StringIO(world.store.get(str(key)).decode())))
    assert table[0] == [
        *("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"),
        *("train_mean_token_accuracy", "forgetting_loss_after", "forgetting_loss_before"),
        *("loss_scale", "reward", "valid_score"),
    ]
    assert table[1] == ["1", "0.5", "", "0.5", "", "", "", "", "", "0.25", "0.75"]
    assert table[4][6:8] == ["2.5", "2.0"]
    assert "Step 4/4: forgetting_loss_before=2.00, forgetting_loss_after=2.50" in world.messages(row.id)


def test_the_catalog_can_be_rebuilt_from_the_store(world: World) -> None:
    scheduler = world.scheduler()
    made = [queue.submit(world.engine, new_job(n, name=f"n{n % 2}")).id for n in range(3)]
    for job in made:
        assert world.ends(scheduler, job).state == "succeeded"
    with writing(world.engine) as conn:
        before = conn.execute(select(adapters).order_by(adapters.c.seq)).all()
        conn.execute(adapters.delete())
        assert catalog.rebuild(conn, world.store, PROJECT) == (3, [])
        after = conn.execute(select(adapters).order_by(adapters.c.seq)).all()
        assert {row.id: row[2:] for row in after} == {row.id: row[2:] for row in before}
        assert catalog.rebuild(conn, world.store, PROJECT) == (3, []), "twice is once"


def test_an_operation_on_adapters_survives_a_crash_and_keeps_its_lineage(world: World) -> None:
    world.launcher.behaviour = {"1": {"die_at": 1}}
    source = {"reference": "a@1", "id": "adapter_1", "key": "k", "digest": "d" * 64, "method": "lora"}
    told = {
        "name": "both",
        "base": {"id": "org/tiny", "uri": "file:///nowhere", "digest": "d" * 64},
        "method": {"kind": "lora", "rank": 8},
        "operation": {"kind": "combine", "weights": [1.0]},
        "sources": [source],
    }
    row = world.ends(world.scheduler(), queue.submit(world.engine, new_job(spec=spec_of(told))).id)
    assert (row.state, row.attempt, row.error) == ("succeeded", 2, None)
    assert world.messages(row.id)[0] == f"Created job: {row.id}, combine of a@1"
    with writing(world.engine) as conn:
        adapter = catalog.find(conn, PROJECT, "both@1")
        assert catalog.lineage(adapter)["sources"] == [source]
        assert catalog.lineage(adapter)["operation"]["weights"] == [1.0]
        conn.execute(adapters.delete())
        assert catalog.rebuild(conn, world.store, PROJECT) == (1, [])
    assert adapter.location.startswith(f"{PROJECT}/adapters/")
    assert adapter.method == "lora"
    card = world.store.get(f"{adapter.location}/README.md").decode()
    assert "adapter_1" in card
    assert "weights" in card


# ------------------------------------------------------------------------------------------- failures


def test_an_attempt_that_dies_is_followed_by_one_that_goes_on(both: World) -> None:
    world = both
    world.launcher.behaviour = {"1": {"die_at": 3}}
    row = world.ends(world.scheduler(), queue.submit(world.engine, new_job()).id)
    assert (row.state, row.attempt) == ("succeeded", 2)
    told = world.messages(row.id)
    assert told.index("Attempt 2 started") == told.index("Step 3/4: training loss=0.33") + 2
    assert [message for message in told if message in FOUR_STEPS] == FOUR_STEPS, "no step is told twice"
    assert "this attempt dies now" in world.store.get(f"{PROJECT}/runs/{row.id}/1/log.txt").decode()
    assert len(list(csv.DictReader(io.StringIO(_csv(world, row))))) == 4


def _csv(world: World, row: JobRow) -> str:
    return world.store.get(f"{PROJECT}/files/{row.result_files[0]}").decode()


def test_a_job_whose_attempts_come_no_further_fails_in_words(world: World) -> None:
    world.launcher.behaviour = {"*": {"die_at": 1}}
    row = world.ends(world.scheduler(max_failures=3), queue.submit(world.engine, new_job()).id)
    assert (row.state, row.attempt) == ("failed", 3)
    assert row.error is not None
    assert row.error["code"] == "attempts_exhausted"
    assert "3 attempts in a row" in row.error["message"]
    assert row.live_attempt is None


def test_progress_forgives_earlier_failures(world: World) -> None:
    world.launcher.behaviour = {
        "1": {"die_at": 1},
        "2": {"die_at": 1},
        "3": {"die_at": 2},
        "4": {"die_at": 3},
    }
    row = world.ends(world.scheduler(max_failures=3), queue.submit(world.engine, new_job()).id)
    assert (row.state, row.attempt) == ("succeeded", 5)


def test_a_failed_outcome_fails_the_job_with_its_own_words(world: World) -> None:
    error = {"code": "loss_not_finite", "message": "the loss of step 4 is nan", "param": None}
    world.launcher.behaviour = {"1": {"outcome": "failed", "error": error}}
    row = world.ends(world.scheduler(), queue.submit(world.engine, new_job()).id)
    assert (row.state, row.error, row.attempt) == ("failed", error, 1)
    assert world.messages(row.id)[-1] == "The job failed: the loss of step 4 is nan"
    assert not (world.root / PROJECT / "adapters").exists()


def test_nonsense_in_the_metrics_costs_the_progress_not_the_job(both: World) -> None:
    world = both
    lines = [
        '{"type": "step", "step": 1, "total_steps": 4, "train_loss": NaN, "grad_norm": 1e999}',
        '{"type": "eval", "step": 1, "valid_loss": Infinity}',
        '{"type": "step", "step": "x", "total_steps": 4, "train_loss": 1}',
        '{"type": "step"}',
        '{"type": "later version"}',
        '{"type": "message", "message": "a \\u0000 b", "level": "shouting"}',
        "[]",
        "{",
        "",
    ]
    world.launcher.behaviour = {"1": {"nonsense": lines}}
    row = world.ends(world.scheduler(), queue.submit(world.engine, new_job()).id)
    assert row.state == "succeeded"
    told = world.messages(row.id)
    assert "Step 1/4: training loss=not a number" in told
    assert "Step 1/4: validation loss=not a number" in told
    assert "a \ufffd b" in told


def test_a_plan_of_another_version_holds_up_only_its_own_job(world: World) -> None:
    world.launcher.behaviour = {}
    old = queue.submit(world.engine, new_job(1, plan={"gpus": 1}, priority=90)).id
    new = queue.submit(world.engine, new_job(2)).id
    assert world.ends(world.scheduler(), new).state == "succeeded"
    assert "made by another version" in (world.job(old).status_reason or "")
    again = world.scheduler(replan=lambda row, there: Plan.model_validate(plan()))
    assert world.ends(again, old).state == "succeeded"


def test_an_adapter_that_is_not_the_one_that_was_proven_fails_the_job(world: World) -> None:
    world.launcher.behaviour = {"1": {"tamper": True}}
    row = world.ends(world.scheduler(), queue.submit(world.engine, new_job()).id)
    assert row.error is not None
    assert (row.state, row.error["code"]) == ("failed", "adapter_invalid")
    assert "is not the file that the gate checked" in row.error["message"]
    assert list(world.store.list(f"{PROJECT}/adapters/")) == [], "not even a part of it"


def test_an_outcome_without_its_adapter_is_tried_again(world: World) -> None:
    world.launcher.behaviour = {"1": {"forget": True}}
    row = world.ends(world.scheduler(), queue.submit(world.engine, new_job()).id)
    assert (row.state, row.attempt) == ("succeeded", 2)


def test_a_retryable_outcome_is_retried(world: World) -> None:
    error = {"code": "store_unavailable", "message": "the store was away", "param": None}
    world.launcher.behaviour = {"1": {"outcome": "failed", "error": error, "retryable": True}}
    row = world.ends(world.scheduler(), queue.submit(world.engine, new_job()).id)
    assert (row.state, row.attempt) == ("succeeded", 2)
    assert any("the store was away" in message for message in world.messages(row.id))


def test_after_a_failure_the_next_attempt_waits_its_time(world: World) -> None:
    world.launcher.behaviour = {"*": {"die_at": 1}}
    scheduler = world.scheduler(
        Pace(tick=0.01, lease=60, look=0, capacity=0, backoff=1000, backoff_most=1500)
    )
    job = queue.submit(world.engine, new_job()).id
    for failures, delay in [(1, 1000), (2, 1500)]:
        world.until(scheduler, lambda failures=failures: world.job(job).failures == failures)
        row = world.job(job)
        assert row.state == "queued"
        assert row.not_before == pytest.approx(time.time() + delay, abs=20)
        assert f"follows in {delay} s" in (row.status_reason or "")
        with writing(world.engine) as conn:
            conn.execute(update(jobs).values(not_before=now() - 1))


def test_an_attempt_that_ends_while_it_is_looked_at_is_not_taken_for_dead(world: World) -> None:
    """Ended, and no outcome: that means death only if the outcome was looked for after the end."""
    world.launcher.behaviour = {"*": {"seconds": 0.05}}

    def ended(name: str) -> None:
        deadline = time.monotonic() + 90
        while world.launcher.poll(name) == "running":
            assert time.monotonic() < deadline
            time.sleep(0.01)

    row = world.ends(
        world.scheduler(launcher=Before(world.launcher, "poll", ended)),
        queue.submit(world.engine, new_job()).id,
    )
    assert (row.state, row.attempt) == ("succeeded", 1)


# --------------------------------------------------------------------------------------------- outages


class Outage:
    """A store or a launcher that can be away."""

    def __init__(self, inner: Any, error: type[Exception]) -> None:
        self._inner = inner
        self._error = error
        self.away = False

    def __getattr__(self, name: str) -> Any:
        if self.away:
            raise self._error("no route to host")
        return getattr(self._inner, name)


def test_a_store_that_is_away_is_waited_for(world: World) -> None:
    world.launcher.behaviour = {"*": {"hang_at": 2}}
    store = Outage(world.store, StoreUnavailable)
    scheduler = world.scheduler(store=store)
    job = queue.submit(world.engine, new_job()).id
    world.until(scheduler, lambda: world.job(job).progress)
    store.away = True
    world.until(scheduler, lambda: (world.job(job).status_reason or "").startswith("waiting for the store"))
    world.go()
    world.until(scheduler, lambda: world.launcher.poll(f"ft-{job}-1") == "succeeded")
    scheduler.tick()
    assert world.job(job).state == "running"
    store.away = False
    row = world.ends(scheduler, job)
    assert (row.state, row.attempt, row.failures, row.status_reason) == ("succeeded", 1, 0, None)


def test_a_cluster_that_is_away_is_waited_for(world: World) -> None:
    world.launcher.behaviour = {"*": {"hang_at": 2}}
    launcher = Outage(world.launcher, ClusterUnavailable)
    away = False

    def capacity() -> Capacity:
        if away:
            raise ClusterUnavailable("no route to host")
        return world.capacity()

    scheduler = world.scheduler(launcher=launcher, capacity=capacity)
    running = queue.submit(world.engine, new_job("r")).id
    world.until(scheduler, lambda: world.job(running).progress)
    away = launcher.away = True
    waiting = queue.submit(world.engine, new_job("w")).id
    for job in (running, waiting):
        world.until(
            scheduler,
            lambda job=job: (world.job(job).status_reason or "").startswith(
                "waiting for the training cluster"
            ),
        )
    assert [world.job(job).state for job in (running, waiting)] == ["running", "queued"]
    away = launcher.away = False
    world.launcher.behaviour = {}
    assert world.ends(scheduler, waiting).state == "succeeded"
    world.until(scheduler, lambda: world.job(running).status_reason is None)
    assert (world.job(running).state, world.job(running).attempt) == ("running", 1)


def test_a_database_that_was_killed_and_comes_back_loses_nothing(tmp_path: Path, postgres: Any) -> None:
    url = postgres.database()
    migrate(url)
    engine = connect(url)
    add_project(engine)
    world = World(tmp_path, engine)
    world.launcher.behaviour = {"*": {"hang_at": 2}}
    job = queue.submit(engine, new_job()).id
    stop = threading.Event()
    pace = Pace(tick=0.02, lease=2, look=0, capacity=0, backoff=0)
    thread = threading.Thread(target=world.scheduler(pace).run, args=(stop,))
    thread.start()
    try:
        _soon(lambda: world.job(job).progress)
        postgres.kill()
        world.go()
        _soon(lambda: world.launcher.poll(f"ft-{job}-1") == "succeeded")
        postgres.start()
        _soon(lambda: world.job(job).state in ENDS)
    finally:
        stop.set()
        thread.join()
        engine.dispose()
        world.launcher.close()
    row = world.job(job)
    assert (row.state, row.attempt) == ("succeeded", 1)
    assert [message for message in world.messages(job) if message in FOUR_STEPS] == FOUR_STEPS
    engine.dispose()


def _soon(what: Callable[[], object], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ------------------------------------------------------------------------------ cancel, pause, resume


def test_a_cancelled_job_is_stopped_and_only_then_frees_its_room(world: World) -> None:
    world.cpus = 1
    world.launcher.behaviour = {"*": {"hang_at": 2}}
    scheduler = world.scheduler()
    first, second = (queue.submit(world.engine, new_job(n)).id for n in range(2))
    world.until(scheduler, lambda: world.job(first).progress)
    assert first in (world.job(second).status_reason or "")
    cancelled = queue.cancel(world.engine, PROJECT, first)
    assert cancelled.state == "cancelled"
    scheduler.tick()
    assert world.job(second).state == "queued", "the first one still holds the CPU"
    world.until(scheduler, lambda: world.job(second).state == "running")
    assert world.launcher.poll(f"ft-{first}-1") == "stopped"
    assert world.job(first).live_attempt is None


def test_a_paused_run_writes_a_checkpoint_and_goes_on_after_it(world: World) -> None:
    world.launcher.behaviour = {"1": {"hang_at": 3}}
    scheduler = world.scheduler()
    job = queue.submit(world.engine, new_job()).id
    world.until(scheduler, lambda: (world.job(job).progress or {}).get("step") == 3)
    assert queue.pause(world.engine, PROJECT, job).state == "paused"
    world.until(scheduler, lambda: world.job(job).live_attempt is None)
    assert queue.list_checkpoints(world.engine, PROJECT, job).items[0].step == 3, "told after the pause"
    queue.resume(world.engine, PROJECT, job)
    row = world.ends(scheduler, job)
    assert (row.state, row.attempt, row.failures) == ("succeeded", 2, 0)
    assert [message for message in world.messages(job) if message.startswith("Step 4")]


def test_a_run_that_does_not_hear_the_pause_is_stopped_in_the_end(world: World) -> None:
    world.launcher.behaviour = {"1": {"hang_at": 2, "deaf": True}}
    scheduler = world.scheduler(Pace(tick=0.01, lease=60, look=0, capacity=0, grace=0.3))
    job = queue.submit(world.engine, new_job()).id
    world.until(scheduler, lambda: world.job(job).progress)
    queue.pause(world.engine, PROJECT, job)
    world.until(scheduler, lambda: world.job(job).live_attempt is None)
    assert world.launcher.poll(f"ft-{job}-1") == "stopped"
    assert world.job(job).state == "paused"


class Before:
    """A store or a launcher that does something just before one of its methods is called the first time."""

    def __init__(self, inner: Any, method: str, deed: Callable[..., object]) -> None:
        self._inner, self._method, self._deed = inner, method, deed
        self.done = False

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)
        if name != self._method or self.done:
            return method

        def call(*arguments: Any, **options: Any) -> Any:
            if not self.done:
                self.done = True
                self._deed(*arguments)
            return method(*arguments, **options)

        return call


@pytest.mark.parametrize("move", ["cancel", "pause"])
def test_an_attempt_that_starts_after_its_job_was_ended_is_stopped(world: World, move: str) -> None:
    """The request to start is on its way when the user cancels: nothing may be left running."""
    world.launcher.behaviour = {"*": {"hang_at": 1, "deaf": True}}
    job = queue.submit(world.engine, new_job()).id
    launcher = Before(world.launcher, "start", lambda *_: getattr(queue, move)(world.engine, PROJECT, job))
    scheduler = world.scheduler(launcher=launcher)
    world.until(scheduler, lambda: launcher.done and world.job(job).live_attempt is None)
    assert world.launcher.started() == [f"ft-{job}-1"]
    assert world.launcher.poll(f"ft-{job}-1") == "stopped"
    assert world.job(job).state in ("cancelled", "paused")


def test_a_job_cancelled_before_its_start_leaves_the_queue_free(world: World) -> None:
    job = queue.submit(world.engine, new_job()).id
    assert queue.claim(world.engine, job, "a scheduler that dies now", 60) is not None
    queue.cancel(world.engine, PROJECT, job)
    world.scheduler(Pace(capacity=0, launch=1000)).tick()
    assert world.job(job).live_attempt == 1, "the request to start it may still be on its way"
    world.until(world.scheduler(), lambda: world.job(job).live_attempt is None)
    assert world.launcher.started() == []


@pytest.mark.parametrize("move", ["cancel", "pause"])
def test_nothing_of_a_job_that_ended_while_it_was_published_is_visible(world: World, move: str) -> None:
    job = queue.submit(world.engine, new_job()).id
    store = Before(world.store, "put_file", lambda *_: getattr(queue, move)(world.engine, PROJECT, job))
    scheduler = world.scheduler(store=store)
    world.until(scheduler, lambda: store.done and world.job(job).live_attempt is None)
    assert list(world.store.list(f"{PROJECT}/adapters/")) == []
    with reading(world.engine) as conn:
        assert conn.execute(select(adapters)).all() == []
        assert conn.execute(select(files)).all() == []
    if move == "pause":
        queue.resume(world.engine, PROJECT, job)
        row = world.ends(scheduler, job)
        assert (row.state, row.adapter_version) == ("succeeded", 1)
        with reading(world.engine) as conn:
            assert catalog.find(conn, PROJECT, "helper@1").job_id == job


# ------------------------------------------------------------------------------------- several of them


def test_a_scheduler_that_vanished_is_replaced_and_the_attempt_goes_on(both: World) -> None:
    world = both
    world.launcher.behaviour = {"*": {"hang_at": 2}}
    job = queue.submit(world.engine, new_job()).id
    gone = world.scheduler(QUICK)
    world.until(gone, lambda: world.job(job).progress)
    owner = world.job(job).lease_owner
    world.go()
    row = world.ends(world.scheduler(QUICK), job)
    assert (row.state, row.attempt) == ("succeeded", 1)
    assert owner == gone.owner
    assert world.launcher.started() == [f"ft-{job}-1"]
    assert [message for message in world.messages(job) if message in FOUR_STEPS] == FOUR_STEPS


def test_two_schedulers_at_once_start_nothing_twice_and_never_overfill_the_cluster(
    tmp_path: Path, engine: Engine
) -> None:
    world = World(tmp_path, engine, cpus=2)
    world.launcher.behaviour = {"1": {"die_at": 3, "seconds": 0.02}, "*": {"seconds": 0.02}}
    made = [queue.submit(engine, new_job(n)).id for n in range(6)]
    stop = threading.Event()
    pace = Pace(tick=0.02, lease=5, look=0, capacity=0, backoff=0)
    threads = [threading.Thread(target=world.scheduler(pace).run, args=(stop,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    most = 0
    deadline = time.monotonic() + 150
    while any(world.job(job).state not in ENDS for job in made):
        assert time.monotonic() < deadline
        most = max(most, len(queue.live(engine)))
        time.sleep(0.01)
    stop.set()
    for thread in threads:
        thread.join()
    world.launcher.close()
    assert most <= 2
    for job in made:
        row = world.job(job)
        assert (row.state, row.attempt) == ("succeeded", 2), row
        assert [message for message in world.messages(job) if message in FOUR_STEPS] == FOUR_STEPS
    assert world.launcher.started() == sorted(f"ft-{job}-{n}" for job in made for n in (1, 2))
    with reading(engine) as conn:
        assert sorted(conn.scalars(select(adapters.c.version))) == [1, 2, 3, 4, 5, 6]


def test_a_scheduler_that_is_told_to_stop_hands_its_jobs_over_at_once(world: World) -> None:
    world.launcher.behaviour = {"*": {"hang_at": 2}}
    job = queue.submit(world.engine, new_job()).id
    stop = threading.Event()
    thread = threading.Thread(target=world.scheduler().run, args=(stop,))
    thread.start()
    deadline = time.monotonic() + 90
    while not world.job(job).progress:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    stop.set()
    thread.join()
    heir = world.scheduler()
    heir.tick()
    assert world.job(job).lease_owner == heir.owner
    assert world.job(job).state == "running"


# --------------------------------------------------------------------------------------------- waiting


def test_jobs_start_by_priority_and_those_that_wait_say_why(world: World) -> None:
    world.cpus = 1
    world.launcher.behaviour = {"*": {"hang_at": 1}}
    scheduler = world.scheduler()
    low = queue.submit(world.engine, new_job("low", priority=10)).id
    high = queue.submit(world.engine, new_job("high", priority=90)).id
    scheduler.tick()
    assert [world.job(job).state for job in (low, high)] == ["queued", "running"]
    scheduler.tick()
    reason = world.job(low).status_reason
    needs = "needs 1 worker with 1 CPU + 1 MB"
    assert reason == f"1st in the queue; {needs}; 0 CPUs are free, 1 is used by {high}"


def test_an_elastic_job_goes_on_with_fewer_workers_when_its_nodes_are_gone(world: World) -> None:
    world.launcher.behaviour = {"1": {"die_at": 3}}

    def replan(row: JobRow, there: Capacity) -> Plan | None:
        return Plan.model_validate(plan(workers=int(there.cpus)))

    scheduler = world.scheduler(replan=replan)
    job = queue.submit(world.engine, new_job(plan=plan(workers=4))).id
    world.until(scheduler, lambda: world.job(job).progress)
    world.cpus = 2
    row = world.ends(scheduler, job)
    assert (row.state, row.attempt) == ("succeeded", 2)
    assert row.plan is not None
    assert row.plan["workers"] == 2
    (text,) = [message for message in world.messages(job) if "instead of 4 workers" in message]
    assert text.startswith("Attempt 2 runs on 2 workers")


def test_a_job_that_is_not_elastic_waits_for_its_nodes(world: World) -> None:
    world.launcher.behaviour = {"1": {"die_at": 3}}
    from tests.jobs.rows import spec

    scheduler = world.scheduler(replan=lambda row, there: Plan.model_validate(plan(workers=1)))
    rigid = spec(resources={"elastic": False})
    job = queue.submit(world.engine, new_job(plan=plan(workers=4), spec=rigid)).id
    world.until(scheduler, lambda: world.job(job).progress)
    world.cpus = 2
    world.until(scheduler, lambda: "waiting for nodes" in (world.job(job).status_reason or ""))
    world.cpus = 4
    assert world.ends(scheduler, job).attempt == 2


def test_a_pass_costs_the_same_beside_ten_thousand_jobs(world: World) -> None:
    """Counted in statements and store requests, which do not depend on how busy the machine is."""
    world.launcher.behaviour = {"*": {"hang_at": 1}}
    world.cpus = 1
    scheduler = world.scheduler()
    running = queue.submit(world.engine, new_job("running")).id
    world.until(scheduler, lambda: world.job(running).progress)
    template = world.job(running)
    with writing(world.engine) as conn:
        values = dict(conn.execute(select(jobs).where(jobs.c.id == template.id)).one()._mapping)
        ended = values | {"state": "cancelled", "finished_at": 1.0, "live_attempt": None}
        free = {"lease_token": None, "lease_owner": None, "lease_expires_at": None}
        waits = values | {"state": "queued", "live_attempt": None, "attempt": 0}
        rows = []
        for number in range(10_000):
            row = (waits if number % 10 == 0 else ended) | free | {"id": f"ftjob-{number:024d}"}
            del row["seq"]
            rows.append(row)
        conn.execute(jobs.insert(), rows)
    scheduler.tick()  # tells the head of the queue why it waits
    counts: Counter[str] = Counter()
    event.listen(world.engine, "before_cursor_execute", lambda *_: counts.update(["statements"]))
    for _ in range(10):
        scheduler.tick()
    assert counts["statements"] <= 10 * 20
    with reading(world.engine) as conn:
        told = conn.scalars(select(jobs.c.status_reason).where(jobs.c.state == "queued").distinct()).all()
    assert any("64th in the queue" in (reason or "") for reason in told)
    last = queue.get(world.engine, PROJECT, f"ftjob-{9990:024d}")
    assert queue.position(world.engine, last) == 1000


# --------------------------------------------------------------------------------------- fault injection


class Crash(BaseException):
    """Not an Exception: no handler of the scheduler may survive it, as none survives kill -9."""


READS = ("get", "read", "info", "list", "download", "presign", "poll", "logs")


class Faults:
    """Counts every call by which the scheduler changes the world, and can crash it just before number `at`.

    Reading changes nothing, and a crash takes all that was read with it: so to die before a read is to die
    before the next change.
    """

    def __init__(self, at: int | None) -> None:
        self.at = at
        self.calls: list[str] = []

    def call(self, name: str) -> None:
        self.calls.append(name)
        if len(self.calls) - 1 == self.at:
            raise Crash(name)

    def around(self, inner: Any) -> Any:
        return _Faulty(inner, self)


class _Faulty:
    def __init__(self, inner: Any, faults: Faults) -> None:
        self._inner, self._faults = inner, faults

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value) or name in READS:
            return value

        def call(*arguments: Any, **options: Any) -> Any:
            self._faults.call(f"{type(self._inner).__name__}.{name}")
            return value(*arguments, **options)

        return call


def play(folder: Path, at: int | None) -> tuple[World, str, Faults]:
    """A job whose first attempt dies; a scheduler that crashes at its call number `at`, and its successor."""
    url = f"sqlite:///{folder}/service.sqlite"
    migrate(url)
    engine = connect(url)
    add_project(engine)
    world = World(folder, engine)
    world.launcher.behaviour = {"1": {"die_at": 3}}
    job = queue.submit(engine, new_job()).id
    faults = Faults(at)
    event.listen(engine, "commit", lambda conn: faults.call("commit"))

    def scheduler() -> Scheduler:
        return world.scheduler(
            QUICK, store=faults.around(world.store), launcher=faults.around(world.launcher)
        )

    current = scheduler()
    deadline = time.monotonic() + 90
    while True:
        with engine.connect().execution_options(read_only=True) as conn:
            row = conn.execute(select(jobs.c.state, jobs.c.live_attempt)).one()
        if row.state in ENDS and row.live_attempt is None:
            break
        assert time.monotonic() < deadline, world.job(job)
        try:
            current.tick()
        except Crash:
            current = scheduler()
            continue
        # Wait for the process, so that every play makes the same calls.
        for name in world.launcher.started():
            while world.launcher.poll(name) in ("pending", "running"):
                time.sleep(0.002)
    return world, job, faults


def result_of(world: World, job: str) -> Any:
    """All that a user can see in the end."""
    row = world.job(job)
    with reading(world.engine) as conn:
        (adapter,) = conn.execute(select(adapters)).all()
        results = conn.execute(select(files).order_by(files.c.seq)).all()
        told = conn.execute(select(job_events.c.message).order_by(job_events.c.seq)).scalars().all()
        assert len(catalog.versions(conn, PROJECT, "helper")) == 1
    seen = (
        row.state,
        row.attempt,
        row.adapter_version,
        row.failures,
        row.progress and row.progress["step"],
        [file.filename.replace(row.id[6:14], "id8") for file in results],
        _csv(world, row),
        [message.replace(job, "job").replace(row.id[6:14], "id8") for message in told],
        [name.replace(job, "job") for name in world.launcher.started()],
        sorted(info.key.replace(row.id[6:14], "id8") for info in world.store.list(f"{PROJECT}/adapters/")),
    )
    assert [file.id for file in results] == row.result_files
    assert adapter.id == row.adapter_id
    return seen


@pytest.mark.timeout(900)
def test_kill_the_scheduler_at_any_call_and_the_job_ends_the_same(tmp_path: Path) -> None:
    quiet = tmp_path / "quiet"
    quiet.mkdir()
    world, job, faults = play(quiet, None)
    expected = result_of(world, job)
    assert expected[0] == "succeeded"
    world.engine.dispose()
    assert {"commit", "FileStore.put", "FileStore.put_file", "ProcessLauncher.start"} <= set(faults.calls)
    differing = {}
    for at, name in enumerate(faults.calls):
        folder = tmp_path / f"at{at}"
        folder.mkdir()
        world, job, crashed = play(folder, at)
        assert len(crashed.calls) > at, "it crashed"
        seen = result_of(world, job)
        if seen != expected:
            differing[f"{at} {name}"] = [
                pair for pair in zip(seen, expected, strict=True) if pair[0] != pair[1]
            ]
        world.engine.dispose()
    assert differing == {}
