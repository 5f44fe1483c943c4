"""The scheduler: decides who runs, starts attempts, listens to them, and settles what they leave.

It keeps nothing that matters in memory. Each pass reads what is true from the database, the store and the
cluster and takes the next step, and every step may be taken twice: kill a scheduler at any line, or run two,
and the jobs go on. No network call is made inside a transaction.

    claim -> input.json -> start -> [metrics]* -> outcome -> publish -> result files -> register + finish
      db       store      cluster    store->db     store      store        store         one transaction
"""

import contextlib
import csv
import hashlib
import io
import json
import logging
import math
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError
from sqlalchemy import Engine, select

from cluster import plan as planning
from cluster.dashboard import ClusterUnavailable
from cluster.launch import Launcher
from cluster.plan import Capacity, Plan
from jobs import queue
from jobs.db import capacity as capacity_table
from jobs.db import files, in_order, job_events, now, reading, writing
from jobs.policies import Explain, Fits, Holding, Policy, Start, Waiting
from jobs.policies import Snapshot as QueueSnapshot
from jobs.policies.priority_fifo import PriorityFIFO
from jobs.queue import Event, JobRow, Lease, LeaseLost, Live
from peft_service import adapter as adapter_files
from peft_service import catalog
from peft_service.errors import ObjectExists, ObjectNotFound, RunFailed, StoreError
from peft_service.spec import spec_of
from peft_service.store import Store

log = logging.getLogger(__name__)

ENDED = ("succeeded", "failed", "stopped", "lost")
PARTS_A_TIME = 100
"""Metrics parts applied in one transaction."""
UNREADABLE_PLAN = "its plan was made by another version of the service and cannot be read: submit it again"
CSV_HEADER = (
    "step",
    "train_loss",
    "train_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
    "train_mean_token_accuracy",
)
"""OpenAI's columns of a result file. What else an objective measures follows, sorted by name."""
NOT_IN_CSV = ("total_steps", "learning_rate", "grad_norm", "full_valid_loss")
NOT_MEASURED = (
    *("type", "time", "step", "total_steps", "learning_rate", "grad_norm"),
    *("tokens", "target_tokens", "seconds", "tokens_per_second"),
    *("train_loss", "train_mean_token_accuracy"),
)
"""Of a line about a step, all that every objective has."""


class Publish(Protocol):
    """`peft_service.adapter.publish`: staged files to their immutable place, manifest last; repeatable."""

    def __call__(
        self, store: Store, staged_prefix: str, target_prefix: str, record: dict[str, Any], /
    ) -> Any: ...


@dataclass(frozen=True)
class Pace:
    """How long things take. Seconds."""

    tick: float = 0.5
    lease: float = 15.0
    look: float = 2.0
    """A long-running attempt's files are looked at this seldom; a young one's more often."""
    capacity: float = 2.0
    """How old the view of the cluster may be."""
    grace: float = 120.0
    """From a pause to a forced stop: time for a checkpoint."""
    launch: float = 30.0
    """A request to start an attempt is certainly over after this time."""
    backoff: float = 2.0
    """Before the second attempt; doubles with each failure without progress."""
    backoff_most: float = 300.0


class Scheduler:
    """Any number of them may run on one database; see the module's docstring."""

    def __init__(
        self,
        engine: Engine,
        store: Store,
        launcher: Launcher,
        capacity: Callable[[], Capacity],
        *,
        pace: Pace = Pace(),
        policy: Policy | None = None,
        max_failures: int = 5,
        head: int = 64,
        threads: int = 8,
        fits: Fits = planning.fits,
        replan: Callable[[JobRow, Capacity], Plan | None] | None = None,
        publish: Publish | None = None,
        graders: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            store: not a `patient` one: a pass must not wait, the next pass comes anyway.
            capacity: the living nodes; raises ClusterUnavailable.
            max_failures: attempts in a row without a new checkpoint before the job fails.
            head: how much of the queue a pass looks at.
            replan: a plan on this smaller cluster for an elastic job, or None.
            graders: what they may use on the workers: `python_graders` and `judge_url` of an Attempt.
        """
        self.owner = queue.new_id("scheduler-")
        self._engine = engine
        self._store = store
        self._launcher = launcher
        self._read_capacity = capacity
        self._graders = dict(graders or {})
        self._pace = pace
        self._policy = policy or PriorityFIFO()
        self._max_failures = max_failures
        self._head = head
        self._threads = threads
        self._fits = fits
        self._replan = replan
        self._publish = publish or _publish
        self._leases: dict[str, Lease] = {}
        self._renewed = 0.0
        self._nodes: _View | None = None
        self._due: dict[str, float] = {}
        self._errors: dict[str, int] = {}
        self._lingering: dict[str, float] = {}
        self._busy: set[str] = set()
        self._pool: ThreadPoolExecutor | None = None
        self.ticked_at = time.monotonic()
        """When the last pass ended, by the monotonic clock."""

    def run(self, stop: threading.Event) -> None:
        """Pass after pass until `stop`; then lets go of its jobs: the next scheduler has them at once.

        Each job has its own thread while it is looked after: a slow store for one does not delay the others.
        """
        with ThreadPoolExecutor(self._threads, thread_name_prefix="scheduler") as self._pool:
            keeper = threading.Thread(target=self._keep_leases, args=(stop,), daemon=True)
            keeper.start()
            while not stop.is_set():
                try:
                    self.tick()
                except Exception:
                    log.exception("a pass of the scheduler failed; the next one starts over")
                self.ticked_at = time.monotonic()
                stop.wait(self._pace.tick)
            self._pool.shutdown(wait=True, cancel_futures=True)
            keeper.join()
        self._pool = None
        queue.release(self._engine, self._leases.values())
        self._leases.clear()

    def tick(self) -> None:
        """One pass over everything."""
        self._renew_and_adopt()
        lives = queue.live(self._engine)
        self._start(lives)
        for lease in list(self._leases.values()):
            self._dispatch(lease.job, self._look_after, lease)
        for live in lives:
            if live.job.state != "running":
                # By a key of its own: an attempt that was to be looked at in two seconds is stopped at once.
                self._dispatch(f"{live.job.id} end", self._end, live)
        self._end_lingering()
        self.ticked_at = time.monotonic()

    # ------------------------------------------------------------------------------------ leases

    def _keep_leases(self, stop: threading.Event) -> None:
        """Renews in its own thread, because a pass may take longer than a lease lasts."""
        while not stop.wait(self._pace.lease / 3):
            try:
                self._renew()
            except Exception:
                log.exception("renewing leases failed; trying again")

    def _renew_and_adopt(self) -> None:
        if time.monotonic() - self._renewed > self._pace.lease / 3:
            self._renew()
        for lease in queue.adopt(self._engine, self.owner, self._pace.lease):
            log.info("adopted %s attempt %d", lease.job, lease.attempt)
            self._leases[lease.job] = lease

    def _renew(self) -> None:
        leases = list(self._leases.values())
        kept = queue.renew(self._engine, leases, self._pace.lease)
        self._renewed = time.monotonic()
        for lease in leases:
            if lease.job not in kept:
                self._drop(lease)

    def _drop(self, lease: Lease) -> None:
        if self._leases.get(lease.job) == lease:
            del self._leases[lease.job]
        self._due.pop(lease.job, None)
        self._errors.pop(lease.job, None)

    def _dispatch(self, job: str, work: Callable[[Any], None], subject: Lease | Live) -> None:
        if self._pool is None:
            self._guard(job, work, subject)
            return
        if job in self._busy:
            return
        self._busy.add(job)

        def _in_thread() -> None:
            try:
                self._guard(job, work, subject)
            except Exception:
                log.exception("looking after %s failed", job)
            finally:
                self._busy.discard(job)

        self._pool.submit(_in_thread)

    def _guard(self, job: str, work: Callable[[Any], None], subject: Lease | Live) -> None:
        """An outage is not a failure of the job: say what is wrong, and look again later."""
        if time.monotonic() < self._due.get(job, 0.0):
            return
        try:
            work(subject)
            self._errors.pop(job, None)
            if isinstance(subject, Live):
                self._due.pop(job, None)
        except LeaseLost as lost:
            log.info("%s", lost.message)
            if isinstance(subject, Lease):
                self._drop(subject)
        except ClusterUnavailable as error:
            self._wait(job, subject, f"waiting for the training cluster, which does not answer: {error}")
        except StoreError as error:
            self._wait(job, subject, f"waiting for the store: {error.message}")
        except Exception as error:
            log.exception("looking after %s failed", job)
            self._wait(job, subject, f"internal error, trying again: {type(error).__name__}: {error}")

    def _wait(self, job: str, subject: Lease | Live, reason: str) -> None:
        count = self._errors.get(job, 0)
        self._errors[job] = count + 1
        self._due[job] = time.monotonic() + min(self._pace.tick * 2 ** min(count, 10), 15.0)
        if count == 0:
            log.warning("%s: %s", job, reason)
        if isinstance(subject, Lease):
            try:
                queue.report(self._engine, subject, values={"status_reason": reason[:2000]})
            except LeaseLost:
                self._drop(subject)

    # ------------------------------------------------------------------------------------- start

    def _start(self, lives: list[Live]) -> None:
        head = queue.waiting(self._engine, self._head)
        view = self._view(needed=bool(head))
        if not head or view is None:
            return
        if view.capacity is None:
            reason = f"waiting for the training cluster, which does not answer: {view.error}"
            queue.explain(self._engine, {row.id: reason for row in head if row.status_reason != reason})
            return
        nodes = view.capacity.nodes
        rows = {row.id: row for row in head}
        reasons: dict[str, str] = {}
        plans: dict[str, Plan] = {}
        for row in head:
            plan = self._plan_of(row, view.capacity)
            if plan is not None:
                plans[row.id] = plan
            elif row.status_reason != UNREADABLE_PLAN:
                reasons[row.id] = UNREADABLE_PLAN
        held = [(live.job.id, _plan(live.job)) for live in lives]
        snapshot = QueueSnapshot(
            waiting=[Waiting(id, rows[id].priority, rows[id].seq, plan.demand) for id, plan in plans.items()],
            holding=[Holding(job, plan.demand) for job, plan in held if plan is not None],
            nodes=nodes,
        )
        seen = {(live.job.id, live.attempt) for live in lives}
        for decision in self._policy.decide(snapshot, self._fits):
            row = rows[decision.job]
            if isinstance(decision, Explain):
                if row.status_reason != decision.reason:
                    reasons[row.id] = decision.reason
                continue
            assert isinstance(decision, Start)
            if not self._claim(row, plans[row.id], seen):
                # What the policy knew is no longer true, so neither are its other decisions.
                return
        queue.explain(self._engine, reasons)

    def _claim(self, row: JobRow, plan: Plan, seen: set[tuple[str, int]]) -> bool:
        before = _plan(row)
        changed = plan != before
        lease = queue.claim(
            self._engine,
            row.id,
            self.owner,
            self._pace.lease,
            plan=plan.model_dump(mode="json") if changed else None,
            seen=seen,
        )
        if lease is None:
            return False
        self._leases[row.id] = lease
        self._due.pop(row.id, None)
        seen.add((row.id, lease.attempt))
        if changed and before is not None:
            text = (
                f"Attempt {lease.attempt} runs on {_workers(plan.workers)} instead of "
                f"{_workers(before.workers)}: the living nodes cannot hold more. The result is the same."
            )
            queue.append_event(
                self._engine, row.id, Event(text, level="warn", dedupe=f"replanned:{lease.attempt}")
            )
        return True

    def _plan_of(self, row: JobRow, capacity: Capacity) -> Plan | None:
        """The plan it was submitted with; a smaller one if it ran before and the nodes it ran on are gone."""
        plan = _plan(row)
        if plan is None:
            return self._replan(row, capacity) if self._replan is not None else None
        if self._replan is None or row.attempt == 0 or self._fits([plan.demand], capacity.nodes):
            return plan
        if not row.spec.get("resources", {}).get("elastic", True):
            return plan
        return self._replan(row, capacity) or plan

    def _view(self, needed: bool) -> "_View | None":
        """The cluster as seen lately; fresh if `needed`. Other processes read it from the database."""
        age = time.monotonic() - self._nodes.at if self._nodes is not None else float("inf")
        if age <= (self._pace.capacity if needed else max(self._pace.capacity, 10.0)):
            return self._nodes
        try:
            capacity: Capacity | None = self._read_capacity()
            error = ""
        except ClusterUnavailable as unavailable:
            capacity, error = None, str(unavailable)
        self._nodes = _View(capacity, error, time.monotonic())
        if capacity is not None:
            _remember_capacity(self._engine, capacity)
        return self._nodes

    # ------------------------------------------------------------------------------------ attempts

    def _look_after(self, lease: Lease) -> None:
        row = queue.running(self._engine, lease)
        if row.launched_at is None:
            self._launch(lease, row)
            return
        name, prefix = name_of(row.id, lease.attempt), prefix_of(row.project_id, row.id, lease.attempt)
        # Asked before its outcome is read: an attempt that had ended by then will not write one any more.
        trouble = ""
        try:
            state = self._launcher.poll(name)
        except ClusterUnavailable as error:
            state, trouble = "running", f"waiting for the training cluster, which does not answer: {error}"
        outcome = self._outcome(prefix)
        self._listen(lease, row, prefix)
        if outcome is not None:
            self._settle(lease, row, prefix, outcome)
        elif state in ENDED:
            self._retry(lease, row, f"Attempt {lease.attempt} ended without a result ({state})")
        else:
            if row.status_reason != (trouble or None):
                queue.report(self._engine, lease, values={"status_reason": trouble[:2000] or None})
            self._due[row.id] = time.monotonic() + self._interval(row)

    def _interval(self, row: JobRow) -> float:
        """A run of minutes is looked at several times a second, a run of days every `look` seconds."""
        age = time.time() - (row.live_since or 0.0)
        return min(self._pace.look, max(0.0, age) / 100)

    def _launch(self, lease: Lease, row: JobRow) -> None:
        name, prefix = name_of(row.id, lease.attempt), prefix_of(row.project_id, row.id, lease.attempt)
        run = {
            "job": row.id,
            "attempt": lease.attempt,
            "project": row.project_id,
            "spec": row.spec,
            "plan": row.plan,
            **self._graders,
        }
        self._store.put(f"{prefix}/input.json", json.dumps(run, sort_keys=True).encode())
        self._launcher.start(name, prefix, Plan.model_validate(row.plan))
        try:
            queue.launched(self._engine, lease)
        except LeaseLost:
            # Cancelled or paused between the claim and here; whoever ends it may not have seen it start.
            self._launcher.stop(name)
            raise

    def _outcome(self, prefix: str) -> "_Ended | None":
        try:
            text = self._store.get(f"{prefix}/outcome.json")
        except ObjectNotFound:
            return None
        info = self._store.info(f"{prefix}/outcome.json")
        return _Ended(_parsed(text), info.modified if info else time.time())

    def _listen(self, holder: Lease | JobRow, row: JobRow, prefix: str) -> None:
        """Apply the metrics parts that are new, in order. Their keys are known, so nothing is listed."""
        part = row.metrics_part
        heard = _Heard(progress=dict(row.progress or {}))
        while True:
            try:
                text = self._store.get(f"{prefix}/metrics/{part + 1:08d}.jsonl")
            except ObjectNotFound:
                text = b""
            if text:
                part += 1
                heard.hear(text, f"{prefix}:{part}")
            if part - row.metrics_part >= PARTS_A_TIME or (not text and part > row.metrics_part):
                queue.report(
                    self._engine,
                    holder,
                    part=part,
                    values=heard.values(),
                    news=heard.news,
                    reached=heard.reached,
                )
                row = replace(row, metrics_part=part)
                heard = _Heard(progress=heard.progress)
            if not text:
                return

    def _retry(self, lease: Lease, row: JobRow, reason: str, error: Mapping[str, Any] | None = None) -> None:
        """Another attempt, later; or the end, after too many in a row that came no further."""
        name, prefix = name_of(row.id, lease.attempt), prefix_of(row.project_id, row.id, lease.attempt)
        self._launcher.stop(name)
        self._keep_log(name, prefix)
        further = queue.made_progress(self._engine, row.id, lease.attempt)
        failures = 1 if further else row.failures + 1
        if failures >= self._max_failures:
            self._fail(
                lease,
                row,
                {
                    "code": (error or {}).get("code") or "attempts_exhausted",
                    "message": f"{reason}. {failures} attempts in a row came no further than the one before; "
                    f"the log is at {prefix}/log.txt",
                    "param": (error or {}).get("param"),
                },
            )
            return
        delay = min(self._pace.backoff * 2 ** (failures - 1), self._pace.backoff_most)
        queue.requeue(
            self._engine,
            lease,
            f"{reason}; attempt {lease.attempt + 1} follows in {delay:g} s",
            delay,
            failures,
        )
        self._drop(lease)

    def _end(self, live: Live) -> None:
        """Stop the attempt of a job that was cancelled (at once) or paused (after a checkpoint)."""
        row = live.job
        name, prefix = name_of(row.id, live.attempt), prefix_of(row.project_id, row.id, live.attempt)
        state = self._launcher.poll(name)
        certain = row.launched_at is not None or live.stopping_seconds > self._pace.launch
        if state in ENDED and (state != "lost" or certain):
            if row.state != "cancelled":
                self._listen(row, row, prefix)
            self._withdraw(row)
            queue.stopped(self._engine, row.id, live.attempt)
        elif row.state == "cancelled" or live.stopping_seconds > self._pace.grace:
            self._launcher.stop(name)
        else:
            with contextlib.suppress(ObjectExists):
                self._store.put(f"{prefix}/stop", b"please write a checkpoint and stop\n", if_absent=True)

    # -------------------------------------------------------------------------------------- settle

    def _settle(self, lease: Lease, row: JobRow, prefix: str, ended: "_Ended") -> None:
        outcome = ended.outcome
        error = outcome.get("error") or {}
        if outcome["state"] == "succeeded":
            try:
                self._succeed(lease, row, prefix, ended)
            except ObjectNotFound as missing:
                self._retry(lease, row, f"Attempt {lease.attempt} left no whole adapter: {missing.message}")
            except RunFailed as failed:
                self._withdraw(row)
                self._fail(
                    lease, row, {"code": failed.code, "message": failed.message, "param": failed.param}
                )
        elif outcome["state"] == "failed" and not outcome.get("retryable"):
            self._fail(lease, row, {key: error.get(key) for key in ("code", "message", "param")})
        else:
            why = error.get("message") or f"it stopped at step {outcome.get('step')}"
            self._retry(lease, row, f"Attempt {lease.attempt} did not finish: {why}", error)

    def _fail(self, lease: Lease, row: JobRow, error: dict[str, Any]) -> None:
        news = [Event(f"The job failed: {error['message']}", level="error")]
        with writing(self._engine) as conn:
            queue.finish(conn, lease, "failed", error=error, news=news)
        self._settled(lease)

    def _succeed(self, lease: Lease, row: JobRow, prefix: str, ended: "_Ended") -> None:
        """Publish, write the result files, then say so in one transaction.

        Each step may have been taken before: version, ids and contents are the same at every try.
        """
        if row.phase != "publishing":
            queue.report(self._engine, lease, values={"phase": "publishing", "status_reason": None})
        spec = spec_of(row.spec)
        version = queue.reserve_version(self._engine, lease)
        location = catalog.location_of(
            row.project_id,
            spec.base.id,
            spec.name,
            version,
            row.id,
            servable=adapter_files.is_servable(self._store, f"{prefix}/adapter"),
        )
        id8 = catalog.id8_of(row.id)
        project = queue.project_name(self._engine, row.project_id)
        model = f"ft:{catalog.slug_of(spec.base.id)}:{project}:{spec.name}:{id8}"
        record = {
            "id": catalog.adapter_id_of(row.id),
            "project": row.project_id,
            "name": spec.name,
            "version": version,
            "model": model,
            "job": row.id,
            "attempt": lease.attempt,
            "created_at": ended.at,
            "spec": row.spec,
            "plan": row.plan,
            "step": ended.outcome["step"],
            "trained_tokens": ended.outcome["trained_tokens"],
            "metrics": {name: value for name, value in ended.outcome["metrics"].items() if value is not None},
        }
        self._publish(self._store, f"{prefix}/adapter", location, record)
        adapter = catalog.read(self._store, location)
        results = self._result_files(row, location, f"{spec.name}-v{version:04d}-{id8}")
        news = [
            Event(f"New fine-tuned model created: {model}", dedupe="created"),
            Event("The job has successfully completed", dedupe="completed"),
        ]
        with writing(self._engine) as conn:
            in_order(conn, row.project_id)
            queue.finish(
                conn,
                lease,
                "succeeded",
                fine_tuned_model=model,
                adapter_id=adapter.id,
                result_files=[result["id"] for result in results],
                trained_tokens=ended.outcome["trained_tokens"],
                news=news,
            )
            catalog.register(conn, adapter)
            conn.execute(files.insert().values(created_at=now(), status="processed"), results)
        self._settled(lease)

    def _settled(self, lease: Lease) -> None:
        self._drop(lease)
        self._lingering[name_of(lease.job, lease.attempt)] = time.monotonic() + self._pace.launch

    def _end_lingering(self) -> None:
        """After its outcome an attempt ends by itself. One that hangs instead would keep its GPUs."""
        for name, deadline in list(self._lingering.items()):
            if time.monotonic() < deadline:
                continue
            try:
                if self._launcher.poll(name) not in ENDED:
                    log.warning("%s has its outcome but does not end: stopping it", name)
                    self._launcher.stop(name)
            except ClusterUnavailable:
                continue
            self._lingering.pop(name, None)

    def _result_files(self, row: JobRow, location: str, stem: str) -> list[dict[str, Any]]:
        """Write both files to the store; returns their rows. The CSV comes first: clients read number 0."""
        with tempfile.TemporaryDirectory(prefix="peft-service-") as folder:
            table = Path(folder, "metrics.csv")
            table.write_text(metrics_csv(self._engine, row.id))
            archive = Path(folder, "adapter.tar")
            write_tar(self._store, location, archive)
            named = [("step_metrics.csv", table), (f"{stem}.tar", archive)]
            return [self._result_file(row, filename, path) for filename, path in named]

    def _result_file(self, row: JobRow, filename: str, path: Path) -> dict[str, Any]:
        digest = hashlib.sha256(f"{row.id}/{filename}".encode()).hexdigest()
        key = f"{row.project_id}/files/file-{digest[:24]}"
        self._store.put_file(key, path)
        with path.open("rb") as content:
            sha256 = hashlib.file_digest(content, "sha256").hexdigest()
        return {
            "id": f"file-{digest[:24]}",
            "project_id": row.project_id,
            "filename": filename,
            "purpose": "fine-tune-results",
            "bytes": path.stat().st_size,
            "sha256": sha256,
            "key": key,
        }

    def _withdraw(self, row: JobRow) -> None:
        """Remove what was published of a job that was cancelled or paused before it was registered."""
        if row.adapter_version is None:
            return
        base = row.spec["base"]["id"]
        for servable in (True, False):
            location = catalog.location_of(
                row.project_id, base, row.name, row.adapter_version, row.id, servable=servable
            )
            # The manifest first: without it the rest is no adapter.
            self._store.delete(f"{location}/manifest.json")
            for info in list(self._store.list(f"{location}/")):
                self._store.delete(info.key)

    def _keep_log(self, name: str, prefix: str) -> None:
        """Keep what a dead attempt printed; the cluster forgets it. Never worth failing for."""
        try:
            text = self._launcher.logs(name)
            if text:
                self._store.put(f"{prefix}/log.txt", text.encode(), if_absent=True)
        except (ClusterUnavailable, StoreError) as error:
            log.warning("the log of %s is not kept: %s", name, error)


@dataclass(frozen=True)
class _View:
    capacity: Capacity | None
    error: str
    at: float
    """By the monotonic clock."""


@dataclass(frozen=True)
class _Ended:
    outcome: dict[str, Any]
    at: float
    """When the outcome was written."""


@dataclass
class _Heard:
    """What some metrics parts say, as changes of the job."""

    progress: dict[str, Any]
    phase: str | None = None
    news: list[Event] = field(default_factory=list)
    reached: list[tuple[int, str, dict[str, Any]]] = field(default_factory=list)

    def values(self) -> dict[str, Any]:
        phase = {"phase": self.phase} if self.phase else {}
        return {**phase, **({"progress": self.progress} if self.progress else {})}

    def hear(self, text: bytes, part: str) -> None:
        for number, line in enumerate(text.splitlines()):
            try:
                self._line(_parsed(line), f"{part}:{number}")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                # It is the run's progress that is lost, not its result.
                log.warning("%s line %d is no metrics line (%r): %.100r", part, number + 1, error, line)

    def _line(self, said: dict[str, Any], place: str) -> None:
        kind = said["type"]
        if kind == "step":
            self._step(said)
        elif kind == "eval":
            self._eval(said)
        elif kind == "checkpoint":
            step, key = int(said["step"]), str(said["key"])
            self.reached.append((step, key, said.get("metrics") or {}))
            text = f"Checkpoint created at step {step}"
            self.news.append(Event(text, data={"step": step}, dedupe=f"checkpoint:{step}"))
        elif kind == "phase":
            self.phase = str(said["phase"])
        elif kind == "message":
            level: queue.Level = "warn" if said.get("level") in ("warn", "error") else "info"
            self.news.append(Event(str(said["message"]), level=level, dedupe=place))

    def _step(self, said: dict[str, Any]) -> None:
        step, total, loss = int(said["step"]), int(said["total_steps"]), said["train_loss"]
        data = {
            "step": step,
            "total_steps": total,
            "train_loss": loss,
            "train_mean_token_accuracy": said.get("train_mean_token_accuracy"),
            "learning_rate": said.get("learning_rate"),
            "grad_norm": said.get("grad_norm"),
            **_measured(said),
        }
        text = f"Step {step}/{total}: training loss={_shown(loss)}"
        self.news.append(Event(text, type="metrics", data=data, dedupe=f"step:{step}"))
        seconds = said.get("seconds") or 0.0
        # Smoothed: one slow step (a checkpoint, an evaluation) should not make the estimate jump.
        before = self.progress.get("seconds_per_step") or seconds
        smooth = 0.9 * before + 0.1 * seconds
        self.progress = {
            "step": step,
            "total_steps": total,
            "percent": round(100 * step / total, 1),
            "train_loss": loss,
            "tokens_per_second": said.get("tokens_per_second"),
            "seconds_per_step": smooth,
            "eta_seconds": round((total - step) * smooth, 1),
            **_measured(said),
        }

    def _eval(self, said: dict[str, Any]) -> None:
        step = int(said["step"])
        data = {key: value for key, value in said.items() if key not in ("type", "time")}
        total = self.progress.get("total_steps")
        at = f"Step {step}{f'/{total}' if total else ''}"
        if not said.keys() & {"valid_loss", "full_valid_loss"}:  # something else was measured
            told = ", ".join(f"{key}={_shown(value)}" for key, value in data.items() if key != "step")
            self.news.append(Event(f"{at}: {told}", type="metrics", data=data, dedupe=f"eval:{step}:{told}"))
            return
        loss = said.get("valid_loss", said.get("full_valid_loss"))
        text = f"{at}: validation loss={_shown(loss)}"
        self.news.append(Event(text, type="metrics", data=data, dedupe=f"eval:{step}"))
        scores = {key: value for key, value in data.items() if key.endswith("score")}
        self.progress = {**self.progress, "valid_loss": loss, **scores}


def name_of(job: str, attempt: int) -> str:
    """The attempt's name on the cluster."""
    return f"ft-{job}-{attempt}"


def prefix_of(project: str, job: str, attempt: int) -> str:
    """Where an attempt writes."""
    return f"{project}/runs/{job}/{attempt}"


def metrics_csv(engine: Engine, job: str) -> str:
    """The job's metrics by step, over all its attempts: OpenAI's columns, then all else that was measured."""
    steps: dict[int, dict[str, Any]] = {}
    for data in _metrics(engine, job):
        steps.setdefault(data["step"], {}).update(data)
    text = io.StringIO()
    further = {name for row in steps.values() for name in row} - {*CSV_HEADER, *NOT_IN_CSV}
    header = (*CSV_HEADER, *sorted(further))
    table = csv.DictWriter(text, header, restval="", extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    for step in sorted(steps):
        table.writerow({**steps[step], "train_accuracy": steps[step].get("train_mean_token_accuracy", "")})
    return text.getvalue()


def _metrics(engine: Engine, job: str) -> Iterator[dict[str, Any]]:
    query = (
        select(job_events.c.data)
        .where(job_events.c.job_id == job, job_events.c.type == "metrics")
        .order_by(job_events.c.seq)
    )
    with reading(engine) as conn:
        yield from conn.execute(query).scalars()


def write_tar(store: Store, location: str, path: Path) -> None:
    """The files of an adapter, flat and without times or owners: the same adapter, the same bytes."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for info in store.list(f"{location}/"):
            entry = tarfile.TarInfo(info.key.removeprefix(f"{location}/"))
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                local = Path(folder, "file")
                store.download(info.key, local)
                entry.size = local.stat().st_size
                with local.open("rb") as content:
                    archive.addfile(entry, content)


def _parsed(text: bytes) -> Any:
    """JSON, with None for NaN and infinities: Python writes those, but PostgreSQL refuses them."""

    def finite(number: str) -> float | None:
        value = float(number)
        return value if math.isfinite(value) else None

    return json.loads(text, parse_constant=lambda name: None, parse_float=finite)


def _measured(said: dict[str, Any]) -> dict[str, float | None]:
    """What a line about a step says beyond what every objective has: rewards, lengths of answers."""
    return {
        key: value
        for key, value in said.items()
        if key not in NOT_MEASURED and (value is None or isinstance(value, (int, float)))
    }


def _shown(loss: float | None) -> str:
    return "not a number" if loss is None else f"{loss:.2f}"


def _publish(store: Store, staged_prefix: str, target_prefix: str, record: dict[str, Any]) -> Any:
    from peft_service import adapter

    return adapter.publish(store, staged_prefix, target_prefix, record)


def _remember_capacity(engine: Engine, capacity: Capacity) -> None:
    values = {"snapshot": capacity.model_dump(mode="json"), "updated_at": now()}
    with writing(engine) as conn:
        queue.upsert(conn, capacity_table, {"id": 1}, values)


def _plan(row: JobRow) -> Plan | None:
    """None: written by a version of this code whose plans were others. One row must not stop the queue."""
    try:
        return Plan.model_validate(row.plan)
    except ValidationError:
        return None


def _workers(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"
