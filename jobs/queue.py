"""The queue: a job's row from submit to its end, and who may change it when.

    state                who moves it on
    validating_files     (only if a job is accepted before its file is checked)
    queued               a scheduler claims it: attempt + 1
    running              its lease holder finishes or requeues it; a user cancels or pauses it
    paused               a user resumes or cancels it
    succeeded failed cancelled    nobody, ever

Every change is a compare-and-set in one statement: it applies only to a row that is still what the caller
believes it to be. Whoever looks after a running job holds a lease, and its token is in the WHERE of all that
it writes; after a cancel, a pause or an adoption the token is gone and those writes do nothing. Lease and
attempt are different things: a dead scheduler costs a lease, not the GPUs.

Events, jobs and adapters are numbered in the order in which they commit (`in_order`, and the job's row lock
for its events), so a reader who asks for what follows number n never misses one.
"""

import secrets
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Generic, Literal, TypeVar

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    Table,
    and_,
    case,
    exists,
    func,
    literal_column,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from jobs.db import (
    PRIORITY_NORMAL,
    Source,
    adapters,
    checkpoints,
    in_order,
    job_events,
    job_metadata,
    jobs,
    now,
    projects,
    reading,
    writing,
)
from peft_service.errors import Conflict, InvalidRequest, NotFound, PeftServiceError
from peft_service.spec import FineTuneSpec, OperationSpec

RETRY_WINDOW_SECONDS = 600
"""The OpenAI client retries a POST without an idempotency key: within this time the body is the key."""

State = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
Level = Literal["info", "warn", "error"]


class LeaseLost(PeftServiceError):
    """Somebody else looks after the job now, or nobody should: drop what you were about to write."""

    default_code = "lease_lost"


@dataclass(frozen=True)
class NewJob:
    project_id: str
    spec: FineTuneSpec | OperationSpec
    request: dict[str, Any]
    """The body as the client sent it, for the answer."""
    body_hash: str
    """sha256 (hex) of the canonical body: equal bodies, equal hash."""
    plan: dict[str, Any]
    """cluster.plan.Plan as JSON."""
    priority: int = PRIORITY_NORMAL
    metadata: Mapping[str, str] = field(default_factory=dict)
    idempotency_key: str | None = None
    retry_count: int = 0
    """What the client's `x-stainless-retry-count` header says."""


@dataclass(frozen=True)
class JobRow:
    """A job as the table has it; times are unix seconds."""

    seq: int
    id: str
    project_id: str
    name: str
    state: State
    priority: int
    spec: dict[str, Any]
    request: dict[str, Any]
    plan: dict[str, Any] | None
    attempt: int
    live_attempt: int | None
    live_since: float | None
    launched_at: float | None
    stopping_since: float | None
    lease_owner: str | None
    lease_token: str | None
    lease_expires_at: float | None
    metrics_part: int
    failures: int
    not_before: float | None
    phase: str | None
    status_reason: str | None
    progress: dict[str, Any] | None
    error: dict[str, Any] | None
    fine_tuned_model: str | None
    adapter_id: str | None
    adapter_version: int | None
    result_files: list[str]
    trained_tokens: int | None
    body_hash: str
    idempotency_key: str | None
    retry_count: int
    created_at: float
    started_at: float | None
    finished_at: float | None
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EventRow:
    seq: int
    id: str
    job_id: str
    created_at: float
    level: Level
    type: Literal["message", "metrics"]
    message: str
    data: dict[str, Any] | None


@dataclass(frozen=True)
class CheckpointRow:
    seq: int
    id: str
    job_id: str
    attempt: int
    """The first attempt that reached this step."""
    step: int
    key: str
    metrics: dict[str, Any]
    created_at: float


T = TypeVar("T")


@dataclass(frozen=True)
class Page(Generic[T]):
    """Newest first; `has_more` says whether older ones follow."""

    items: list[T]
    has_more: bool


@dataclass(frozen=True)
class Event:
    message: str
    level: Level = "info"
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] | None = None
    dedupe: str | None = None
    """A job never has two events with the same key: what an attempt repeats is not told twice."""


@dataclass(frozen=True)
class Lease:
    """The right to look after a running job, for as long as the token is the row's."""

    job: str
    project_id: str
    attempt: int
    token: str
    owner: str


def new_id(prefix: str) -> str:
    """`prefix` and 24 random hex digits; the prefix brings its own separator ("ftjob-", "ftckpt_")."""
    return prefix + secrets.token_hex(12)


# ---------------------------------------------------------------------------------------------- users


def submit(source: Source, new: NewJob) -> JobRow:
    """Add a job, or return the one that this very request has already made.

    An `Idempotency-Key` decides alone where there is one. Without it, a request that the client calls a retry
    is the job with the same body of the last ten minutes; and an original that arrives after its own retry is
    that retry's job, once. Two originals with the same body are two jobs.

    Raises:
        Conflict: the idempotency key was used for another body.
        InvalidRequest: a text that no database can hold.
    """
    for text in _texts([new.request, dict(new.metadata), new.idempotency_key]):
        if not _storable(text):
            raise InvalidRequest(f"{text[:100]!r} has a NUL or half a surrogate pair in it: remove it")
    with writing(source) as conn:
        # Also the lock that makes "is it there?" and "then add it" one thing for two racing retries.
        in_order(conn, new.project_id)
        earlier = _same_request(conn, new)
        if earlier is not None:
            return earlier
        job = new_id("ftjob-")
        conn.execute(
            jobs.insert().values(
                id=job,
                project_id=new.project_id,
                name=new.spec.name,
                state="queued",
                priority=new.priority,
                spec=new.spec.model_dump(mode="json"),
                request=new.request,
                plan=new.plan,
                status_reason="waiting for the scheduler to look at it",
                result_files=[],
                body_hash=new.body_hash,
                idempotency_key=new.idempotency_key,
                retry_count=new.retry_count,
                created_at=now(),
            )
        )
        if new.metadata:
            rows = [{"job_id": job, "key": key, "value": value} for key, value in new.metadata.items()]
            conn.execute(job_metadata.insert(), rows)
        _append(conn, job, [Event(message) for message in _created(job, new.spec)])
        return _one(conn, jobs.c.id == job)


def _created(job: str, spec: FineTuneSpec | OperationSpec) -> list[str]:
    if isinstance(spec, OperationSpec):
        names = ", ".join(source.reference for source in spec.sources)
        return [f"Created job: {job}, {spec.operation.kind} of {names}"]
    checked = [file.id for file in (spec.data.training, spec.data.validation) if file is not None]
    return [
        f"Created fine-tuning job: {job}",
        f"Validating training file: {checked[0]}",
        *(f"Validating validation file: {id}" for id in checked[1:]),
        "Files validated, moving job to queued state",
    ]


def _same_request(conn: Connection, new: NewJob) -> JobRow | None:
    if new.idempotency_key is not None:
        row = conn.execute(
            select(jobs.c.id, jobs.c.body_hash).where(
                jobs.c.project_id == new.project_id, jobs.c.idempotency_key == new.idempotency_key
            )
        ).one_or_none()
        if row is None:
            return None
        if row.body_hash != new.body_hash:
            raise Conflict(
                f"Idempotency-Key {new.idempotency_key!r} was used for job {row.id}, whose body was another; "
                "use a new key for a new job",
                code="idempotency_key_reused",
                param="Idempotency-Key",
            )
        return _one(conn, jobs.c.id == row.id)
    row = conn.execute(
        select(jobs.c.id, jobs.c.retry_count)
        .where(
            jobs.c.project_id == new.project_id,
            jobs.c.body_hash == new.body_hash,
            jobs.c.idempotency_key.is_(None),
            jobs.c.created_at > now() - RETRY_WINDOW_SECONDS,
        )
        .order_by(jobs.c.seq.desc())
        .limit(1)
    ).one_or_none()
    if row is None or (new.retry_count == 0 and row.retry_count == 0):
        return None
    if new.retry_count == 0:
        # The original has arrived at last. The next one with this body is meant as another job.
        conn.execute(update(jobs).where(jobs.c.id == row.id).values(retry_count=0))
    return _one(conn, jobs.c.id == row.id)


def get(source: Source, project: str, job: str) -> JobRow:
    """
    Raises:
        NotFound: no such job in this project.
    """
    with reading(source) as conn:
        return _one(conn, jobs.c.id == job, jobs.c.project_id == project, wanted=job)


def page(
    source: Source,
    project: str,
    *,
    after: str | None = None,
    limit: int = 20,
    metadata: Mapping[str, str] | None = None,
) -> Page[JobRow]:
    """Jobs of a project, newest first. `metadata`: all these pairs; `{}` means jobs that have none.

    Raises:
        NotFound: `after` is no job of this project.
    """
    with reading(source) as conn:
        if not all(_storable(text) for text in _texts(dict(metadata or {}))):
            return Page([], False)
        query = select(jobs).where(jobs.c.project_id == project)
        if metadata is not None and not metadata:
            query = query.where(~exists().where(job_metadata.c.job_id == jobs.c.id))
        for key, value in (metadata or {}).items():
            pair = and_(job_metadata.c.key == key, job_metadata.c.value == value)
            query = query.where(exists().where(job_metadata.c.job_id == jobs.c.id, pair))
        if after is not None:
            query = query.where(
                jobs.c.seq < _one(conn, jobs.c.id == after, jobs.c.project_id == project, wanted=after).seq
            )
        rows, more = _limited(conn, query.order_by(jobs.c.seq.desc()), limit)
        return Page(_job_rows(conn, rows), more)


def events(
    source: Source, project: str, job: str, *, after: str | None = None, limit: int = 20
) -> Page[EventRow]:
    """Events of a job, newest first.

    Raises:
        NotFound: no such job in this project, or `after` is no event of it.
    """
    columns = [job_events.c[name.name] for name in fields(EventRow)]
    with reading(source) as conn:
        rows, more = _page_of(conn, job_events, columns, project, job, after, limit)
        return Page([EventRow(**row._mapping) for row in rows], more)


def list_checkpoints(
    source: Source, project: str, job: str, *, after: str | None = None, limit: int = 10
) -> Page[CheckpointRow]:
    """Checkpoints of a job, newest first.

    Raises:
        NotFound: no such job in this project, or `after` is no checkpoint of it.
    """
    columns = [checkpoints.c[name.name] for name in fields(CheckpointRow)]
    with reading(source) as conn:
        rows, more = _page_of(conn, checkpoints, columns, project, job, after, limit)
        return Page([CheckpointRow(**row._mapping) for row in rows], more)


@dataclass(frozen=True)
class Move:
    """What a user may ask for, from which states, and what it comes to."""

    allowed: tuple[State, ...]
    to: State
    code: str
    message: str
    done: str


MOVES = {
    "cancel": Move(
        ("validating_files", "queued", "running", "paused"),
        "cancelled",
        "job_not_cancellable",
        "Fine-tuning job cancelled",
        "cancelled",
    ),
    "pause": Move(
        ("validating_files", "queued", "running"),
        "paused",
        "job_not_pausable",
        "Fine-tuning job paused",
        "paused",
    ),
    "resume": Move(("paused",), "queued", "job_not_resumable", "Fine-tuning job resumed", "resumed"),
}


def cancel(source: Source, project: str, job: str) -> JobRow:
    """End the job at once; the scheduler stops its attempt on the cluster soon after.

    Raises:
        NotFound: no such job in this project.
        Conflict: it has already ended.
    """
    return _move(source, project, job, MOVES["cancel"], {"status_reason": None, "finished_at": now()})


def pause(source: Source, project: str, job: str) -> JobRow:
    """Keep the job where it is; a running attempt is asked to write a checkpoint and stop.

    Raises:
        NotFound: no such job in this project.
        Conflict: it is paused already, or has ended.
    """
    return _move(
        source, project, job, MOVES["pause"], {"status_reason": "paused by request; resume it to go on"}
    )


def resume(source: Source, project: str, job: str) -> JobRow:
    """Put a paused job back into the queue, in its old place; it goes on from its newest checkpoint.

    Raises:
        NotFound: no such job in this project.
        Conflict: it is not paused.
    """
    fresh = {"status_reason": "resumed; waiting for the scheduler", "failures": 0, "not_before": None}
    return _move(source, project, job, MOVES["resume"], fresh)


def _move(source: Source, project: str, job: str, move: Move, values: dict[str, Any]) -> JobRow:
    if not _storable(job):
        raise _missing(job)
    with writing(source) as conn:
        moved = conn.execute(
            update(jobs)
            .where(jobs.c.id == job, jobs.c.project_id == project, jobs.c.state.in_(move.allowed))
            .values(
                state=move.to,
                phase=None,
                stopping_since=_if_live(func.coalesce(jobs.c.stopping_since, now())),
                **_NO_LEASE,
                **values,
            )
        )
        if moved.rowcount == 0:
            row = _one(conn, jobs.c.id == job, jobs.c.project_id == project, wanted=job)
            raise Conflict(
                f"job {job} is {row.state}: only a job that is {_either(move.allowed)} can be {move.done}",
                code=move.code,
            )
        _append(conn, job, [Event(move.message)])
        return _one(conn, jobs.c.id == job)


def position(source: Source, job: JobRow) -> int | None:
    """The place of a queued job in the whole queue, 1 is next; None if it is not queued."""
    if job.state != "queued":
        return None
    with reading(source) as conn:
        ahead = conn.scalar(
            select(func.count())
            .select_from(jobs)
            .where(
                _QUEUED,
                or_(
                    jobs.c.priority > job.priority,
                    and_(jobs.c.priority == job.priority, jobs.c.seq < job.seq),
                ),
            )
        )
    return 1 + int(ahead or 0)


# ----------------------------------------------------------------------------------------- schedulers


def waiting(source: Source, limit: int) -> list[JobRow]:
    """The head of the queue: jobs that could start now if there were room, highest priority first, then
    oldest."""
    with reading(source) as conn:
        return [_plain(row) for row in conn.execute(waiting_query(limit))]


def waiting_query(limit: int) -> Select[Any]:
    return select(jobs).where(_startable()).order_by(jobs.c.priority.desc(), jobs.c.seq).limit(limit)


@dataclass(frozen=True)
class Live:
    """A job whose attempt may still hold resources, whatever its state."""

    job: JobRow
    attempt: int
    stopping_seconds: float
    """How long ago a user asked it to end; 0 if nobody did."""


def live(source: Source) -> list[Live]:
    with reading(source) as conn:
        rows = conn.execute(live_query()).all()
    return [
        Live(
            JobRow(**{name: value for name, value in row._mapping.items() if name != "stopping_seconds"}),
            row.live_attempt,
            row.stopping_seconds or 0.0,
        )
        for row in rows
    ]


def live_query() -> Select[Any]:
    seconds = (now() - jobs.c.stopping_since).label("stopping_seconds")
    return select(jobs, seconds).where(jobs.c.live_attempt.is_not(None)).order_by(jobs.c.seq)


def claim(
    source: Source,
    job: str,
    owner: str,
    ttl: float,
    *,
    plan: dict[str, Any] | None = None,
    seen: Container[tuple[str, int]] | None = None,
) -> Lease | None:
    """queued -> running as the next attempt, under a lease of `ttl` seconds.

    None: it is no longer startable; or an attempt has become live that is not among `seen`, the (job,
    attempt) pairs that the decision counted: another scheduler has used the room meanwhile, so decide again.

    `plan` replaces the row's plan, for an attempt that runs on another shape than the last one.
    """
    token = secrets.token_hex(16)
    with writing(source) as conn:
        if seen is not None:
            if conn.dialect.name == "postgresql":
                conn.execute(select(func.pg_advisory_xact_lock(func.hashtextextended("claim", 0))))
            pairs = select(jobs.c.id, jobs.c.live_attempt).where(jobs.c.live_attempt.is_not(None))
            if any((id, attempt) not in seen for id, attempt in conn.execute(pairs)):
                return None
        row = conn.execute(
            update(jobs)
            .where(jobs.c.id == job, _startable())
            .values(
                state="running",
                attempt=jobs.c.attempt + 1,
                live_attempt=jobs.c.attempt + 1,
                live_since=now(),
                launched_at=None,
                stopping_since=None,
                metrics_part=0,
                started_at=func.coalesce(jobs.c.started_at, now()),
                phase="starting",
                status_reason=None,
                not_before=None,
                lease_owner=owner,
                lease_token=token,
                lease_expires_at=now() + ttl,
                **({"plan": plan} if plan is not None else {}),
            )
            .returning(jobs.c.project_id, jobs.c.attempt)
        ).one_or_none()
        if row is None:
            return None
        again = [Event(f"Attempt {row.attempt} started")] if row.attempt > 1 else []
        _append(conn, job, [Event("Fine-tuning job started", dedupe="started"), *again])
        return Lease(job, row.project_id, row.attempt, token, owner)


def adopt(source: Source, owner: str, ttl: float, limit: int = 100) -> list[Lease]:
    """Take over running jobs whose owner has stopped renewing: a new token, the same attempt."""
    with reading(source) as conn:
        expired = conn.execute(expired_query(limit)).all()
    leases = []
    for job, project, attempt, token in expired:
        fresh = secrets.token_hex(16)
        with writing(source) as conn:
            taken = conn.execute(
                update(jobs)
                .where(jobs.c.id == job, jobs.c.lease_token == token, jobs.c.lease_expires_at < now())
                .values(lease_owner=owner, lease_token=fresh, lease_expires_at=now() + ttl)
            )
        if taken.rowcount:
            leases.append(Lease(job, project, attempt, fresh, owner))
    return leases


def expired_query(limit: int) -> Select[Any]:
    return (
        select(jobs.c.id, jobs.c.project_id, jobs.c.attempt, jobs.c.lease_token)
        .where(_RUNNING, jobs.c.lease_expires_at < now())
        .order_by(jobs.c.lease_expires_at)
        .limit(limit)
    )


def renew(source: Source, leases: Iterable[Lease], ttl: float) -> set[str]:
    """Extend these leases to `ttl` seconds from now; returns the jobs that are still ours."""
    tokens = {lease.token: lease.job for lease in leases}
    if not tokens:
        return set()
    with writing(source) as conn:
        kept = conn.execute(
            update(jobs)
            .where(jobs.c.state == "running", jobs.c.id.in_(tokens.values()), jobs.c.lease_token.in_(tokens))
            .values(lease_expires_at=now() + ttl)
            .returning(jobs.c.id)
        ).scalars()
        return set(kept)


def release(source: Source, leases: Iterable[Lease]) -> None:
    """Let another scheduler adopt these at once: for an orderly shutdown, which is no failure."""
    renew(source, leases, -1)


def running(source: Source, lease: Lease) -> JobRow:
    """
    Raises:
        LeaseLost: the job is no longer ours.
    """
    with reading(source) as conn:
        row = conn.execute(select(jobs).where(_held(lease))).one_or_none()
        if row is None:
            raise _lost(lease)
        return _plain(row)


def report(
    source: Source,
    holder: Lease | JobRow,
    *,
    part: int | None = None,
    values: Mapping[str, Any] | None = None,
    news: Sequence[Event] = (),
    reached: Sequence[tuple[int, str, dict[str, Any]]] = (),
) -> None:
    """What an attempt has told us up to metrics part number `part`, in one transaction.

    `values` are columns of the job (progress, phase, status_reason, trained_tokens); `reached` are
    checkpoints (step, key, metrics). An attempt that is being stopped has no lease any more, so its row
    itself may be the holder, while that attempt is still the live one. Told twice is told once.

    Raises:
        LeaseLost: the job is no longer ours, or the attempt has been stopped meanwhile.
    """
    job, attempt = (
        (holder.job, holder.attempt) if isinstance(holder, Lease) else (holder.id, holder.live_attempt)
    )
    guard = (
        _held(holder)
        if isinstance(holder, Lease)
        else and_(jobs.c.id == job, jobs.c.live_attempt == attempt, jobs.c.state != "running")
    )
    changes: dict[str, Any] = dict(values or {})
    if part is not None:
        changes["metrics_part"] = part
        guard = and_(guard, jobs.c.metrics_part <= part)
    with writing(source) as conn:
        # `attempt = attempt` so that the guard is asked, and the row locked, even where nothing changes.
        told = conn.execute(update(jobs).where(guard).values(attempt=jobs.c.attempt, **changes))
        if told.rowcount == 0:
            raise _lost(holder)
        for step, key, metrics in reached:
            row = _insert(conn, checkpoints).values(
                id=new_id("ftckpt_"),
                job_id=job,
                attempt=attempt,
                step=step,
                key=key,
                metrics=metrics,
                created_at=now(),
            )
            again = {"key": row.excluded.key, "metrics": row.excluded.metrics}
            conn.execute(row.on_conflict_do_update(index_elements=["job_id", "step"], set_=again))
        _append(conn, job, news)


def requeue(source: Source, lease: Lease, reason: str, delay: float, failures: int) -> None:
    """running -> queued, not to start before `delay` seconds from now. The attempt must have ended.

    Raises:
        LeaseLost: the job is no longer ours.
    """
    with writing(source) as conn:
        done = conn.execute(
            update(jobs)
            .where(_held(lease))
            .values(
                state="queued",
                phase=None,
                status_reason=_cut(reason, 2000),
                failures=failures,
                not_before=now() + delay,
                **_NOT_LIVE,
                **_NO_LEASE,
            )
        )
        if done.rowcount == 0:
            raise _lost(lease)
        _append(conn, lease.job, [Event(reason, level="warn", dedupe=f"requeued:{lease.attempt}")])


def made_progress(source: Source, job: str, attempt: int) -> bool:
    """Whether this attempt left a checkpoint beyond those of the attempts before it."""
    with reading(source) as conn:
        return bool(
            conn.scalar(
                select(func.count())
                .select_from(checkpoints)
                .where(checkpoints.c.job_id == job, checkpoints.c.attempt == attempt)
            )
        )


def reserve_version(source: Source, lease: Lease) -> int:
    """The version that this job's adapter has or will have; the same at every call, and no other job's.

    Raises:
        LeaseLost: the job is no longer ours.
    """
    with writing(source) as conn:
        in_order(conn, lease.project_id)
        row = conn.execute(select(jobs.c.name, jobs.c.adapter_version).where(_held(lease))).one_or_none()
        if row is None:
            raise _lost(lease)
        if row.adapter_version is not None:
            return int(row.adapter_version)
        highest = 0
        for table, column in ((adapters, adapters.c.version), (jobs, jobs.c.adapter_version)):
            same_name = and_(table.c.project_id == lease.project_id, table.c.name == row.name)
            highest = max(highest, conn.scalar(select(func.max(column)).where(same_name)) or 0)
        taken = conn.execute(update(jobs).where(_held(lease)).values(adapter_version=highest + 1))
        if taken.rowcount == 0:
            raise _lost(lease)
        return highest + 1


def finish(
    conn: Connection,
    lease: Lease,
    state: Literal["succeeded", "failed"],
    *,
    news: Sequence[Event] = (),
    **values: Any,
) -> None:
    """End the job. Call it in the transaction that registers the adapter; `values` are columns of the row.

    Raises:
        LeaseLost: the job is no longer ours; nothing this attempt made may be published. Roll back.
    """
    done = conn.execute(
        update(jobs)
        .where(_held(lease))
        .values(
            state=state,
            finished_at=now(),
            phase=None,
            **{"status_reason": None, **values},
            **_NOT_LIVE,
            **_NO_LEASE,
        )
    )
    if done.rowcount == 0:
        raise _lost(lease)
    _append(conn, lease.job, news)


def launched(source: Source, lease: Lease) -> None:
    """The cluster has accepted the attempt.

    Raises:
        LeaseLost: the job is no longer ours. The attempt runs all the same: stop it.
    """
    with writing(source) as conn:
        values = {"launched_at": now()}
        # Even without the lease: whoever has to stop this attempt may now trust what the cluster says of it.
        same = and_(jobs.c.id == lease.job, jobs.c.live_attempt == lease.attempt)
        conn.execute(update(jobs).where(same, jobs.c.launched_at.is_(None)).values(**values))
        held = conn.scalar(select(func.count()).select_from(jobs).where(_held(lease)))
    if not held:
        raise _lost(lease)


def stopped(source: Source, job: str, attempt: int) -> bool:
    """The attempt of a cancelled or paused job has ended on the cluster: its resources are free again."""
    with writing(source) as conn:
        done = conn.execute(
            update(jobs)
            .where(jobs.c.id == job, jobs.c.live_attempt == attempt, jobs.c.state != "running")
            .values(**_NOT_LIVE)
        )
        return bool(done.rowcount)


def explain(source: Source, reasons: Mapping[str, str]) -> None:
    """Tell waiting jobs why they wait. Jobs that no longer wait keep what they say."""
    if not reasons:
        return
    with writing(source) as conn:
        # Sorted: two schedulers that lock the same rows in another order would wait for each other forever.
        for job, reason in sorted(reasons.items()):
            conn.execute(
                update(jobs)
                .where(jobs.c.id == job, jobs.c.state == "queued")
                .values(status_reason=_cut(reason, 2000))
            )


def append_event(source: Source, job: str, event: Event) -> None:
    """Add one event to a job, in any state."""
    with writing(source) as conn:
        _append(conn, job, [event])


def project_name(source: Source, project: str) -> str:
    with reading(source) as conn:
        return str(conn.scalar(select(projects.c.name).where(projects.c.id == project)) or project)


# --------------------------------------------------------------------------------------------- inside

# Written out in the SQL: a partial index serves a query only if the planner sees the value, not a parameter.
_QUEUED = jobs.c.state == literal_column("'queued'")
_RUNNING = jobs.c.state == literal_column("'running'")

_NO_LEASE = {"lease_owner": None, "lease_token": None, "lease_expires_at": None}
_NOT_LIVE = {"live_attempt": None, "live_since": None, "launched_at": None, "stopping_since": None}


def _held(lease: Lease) -> ColumnElement[bool]:
    return and_(jobs.c.id == lease.job, jobs.c.state == "running", jobs.c.lease_token == lease.token)


def _startable() -> ColumnElement[bool]:
    return and_(
        _QUEUED,
        jobs.c.live_attempt.is_(None),
        or_(jobs.c.not_before.is_(None), jobs.c.not_before <= now()),
    )


def _if_live(value: Any) -> ColumnElement[Any]:
    return case((jobs.c.live_attempt.is_not(None), value), else_=null())


def _lost(holder: Lease | JobRow) -> LeaseLost:
    job = holder.job if isinstance(holder, Lease) else holder.id
    return LeaseLost(
        f"job {job} attempt {holder.attempt} is no longer looked after from here: it was cancelled, paused "
        "or adopted by another scheduler"
    )


def _append(conn: Connection, job: str, news: Sequence[Event]) -> None:
    if not news:
        return
    # The row lock orders the writers of one job's events: see the module's docstring. FOR NO KEY UPDATE
    # leaves rows that refer to the job (metadata, checkpoints) alone.
    conn.execute(select(jobs.c.id).where(jobs.c.id == job).with_for_update(key_share=True))
    rows = [
        {
            "id": new_id("ftevent-"),
            "job_id": job,
            "level": event.level,
            "type": event.type,
            "message": _cut(event.message, 4000),
            "data": event.data,
            "dedupe": event.dedupe,
        }
        for event in news
    ]
    conn.execute(_insert(conn, job_events).values(created_at=now()).on_conflict_do_nothing(), rows)


def upsert(conn: Connection, table: Table, key: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Insert the row `key`, or give it these `values` if it is there."""
    row = _insert(conn, table).values(**key, **values)
    conn.execute(row.on_conflict_do_update(index_elements=list(key), set_=dict(values)))


def _insert(conn: Connection, table: Table) -> Any:
    """An INSERT that knows ON CONFLICT; the two databases spell it alike, SQLAlchemy does not."""
    return (postgresql if conn.dialect.name == "postgresql" else sqlite).insert(table)


def _one(conn: Connection, *where: ColumnElement[bool], wanted: str = "") -> JobRow:
    row = conn.execute(select(jobs).where(*where)).one_or_none() if _storable(wanted) else None
    if row is None:
        raise _missing(wanted)
    return _job_rows(conn, [row])[0]


def _missing(job: str) -> NotFound:
    return NotFound(
        f"no fine-tuning job {job!r} in this project", code="fine_tune_not_found", param="fine_tune_id"
    )


def _job_rows(conn: Connection, rows: Sequence[Row[Any]]) -> list[JobRow]:
    pairs: dict[str, dict[str, str]] = {}
    if rows:
        ids = [row.id for row in rows]
        for job, key, value in conn.execute(
            select(job_metadata).where(job_metadata.c.job_id.in_(ids)).order_by(job_metadata.c.key)
        ):
            pairs.setdefault(job, {})[key] = value
    return [JobRow(**row._mapping, metadata=pairs.get(row.id, {})) for row in rows]


def _plain(row: Row[Any]) -> JobRow:
    return JobRow(**row._mapping)


def _page_of(
    conn: Connection,
    table: Table,
    columns: Sequence[Any],
    project: str,
    job: str,
    after: str | None,
    limit: int,
) -> tuple[list[Row[Any]], bool]:
    _one(conn, jobs.c.id == job, jobs.c.project_id == project, wanted=job)
    query = select(*columns).where(table.c.job_id == job)
    if after is not None:
        same = select(table.c.seq).where(table.c.id == after, table.c.job_id == job)
        seq = conn.scalar(same) if _storable(after) else None
        if seq is None:
            raise NotFound(f"`after` is {after!r}, which job {job} does not have", param="after")
        query = query.where(table.c.seq < seq)
    return _limited(conn, query.order_by(table.c.seq.desc()), limit)


def _limited(conn: Connection, query: Select[Any], limit: int) -> tuple[list[Row[Any]], bool]:
    rows = list(conn.execute(query.limit(limit + 1)))
    return rows[:limit], len(rows) > limit


def _texts(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts([key, inner])
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _storable(text: str) -> bool:
    """PostgreSQL refuses NUL, and UTF-8 has no lone surrogates; JSON and URLs can bring both."""
    return "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)


def _cut(text: str, length: int) -> str:
    text = "".join(letter if _storable(letter) else "\ufffd" for letter in text)
    return text if len(text) <= length else text[: length - 1] + "…"


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
