"""The tables, and how to reach them: SQLite by default, PostgreSQL 15+ for more than one machine.

Every table that is listed page by page has `seq`: it alone orders pages, newest first. Timestamps are for
people. The tables refuse nonsense by themselves (CHECK), so that a mistake in the code is an error and not a
wrong row. Times are unix seconds, by the database's clock wherever two machines compare them (`now`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    make_url,
    text,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from peft_service.catalog import METADATA, Json, Sequence, adapters, in_order
from peft_service.errors import InvalidRequest

__all__ = [
    "METADATA",
    "Source",
    "adapters",
    "api_keys",
    "base_models",
    "capacity",
    "checkpoints",
    "connect",
    "files",
    "in_order",
    "job_events",
    "job_metadata",
    "jobs",
    "migrate",
    "now",
    "projects",
    "reading",
    "upload_parts",
    "uploads",
    "writing",
]

Source = Engine | Connection
"""Where a function reads or writes: an engine (its own transaction) or the caller's open transaction."""

PRIORITY_LOWEST, PRIORITY_NORMAL, PRIORITY_HIGHEST = 0, 50, 100

STATES = ("validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled")
TERMINAL = ("succeeded", "failed", "cancelled")


def _one_of(column: str, values: tuple[str, ...]) -> str:
    return f"{column} IN ({', '.join(repr(value) for value in values)})"


def _seq() -> Column[Any]:
    return Column("seq", Sequence, primary_key=True, autoincrement=True)


def _id() -> Column[Any]:
    return Column("id", Text, nullable=False, unique=True)


def _project() -> Column[Any]:
    return Column("project_id", Text, ForeignKey("projects.id"), nullable=False)


projects = Table(
    "projects",
    METADATA,
    _seq(),
    _id(),
    Column("name", Text, nullable=False, unique=True),
    Column("created_at", Float, nullable=False),
    CheckConstraint("length(id) BETWEEN 1 AND 64", name="id"),
    CheckConstraint("length(name) BETWEEN 1 AND 64", name="name"),
    sqlite_autoincrement=True,
)

api_keys = Table(
    "api_keys",
    METADATA,
    _seq(),
    _id(),
    _project(),
    Column("name", Text, nullable=False),
    Column("hash", Text, nullable=False, unique=True),
    Column("prefix", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("revoked_at", Float),
    CheckConstraint("length(hash) = 64", name="hash"),
    CheckConstraint("length(name) <= 64", name="name"),
    Index("ix_api_keys_page", "project_id", "seq"),
    sqlite_autoincrement=True,
)

files = Table(
    "files",
    METADATA,
    _seq(),
    _id(),
    _project(),
    Column("filename", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("status", Text, nullable=False),
    Column("format", Text),
    Column("rows", BigInteger),
    Column("report", Json),
    Column("deleted_at", Float),
    CheckConstraint(_one_of("status", ("uploaded", "processed", "error")), name="status"),
    CheckConstraint("bytes >= 0", name="bytes"),
    CheckConstraint("length(sha256) = 64", name="sha256"),
    CheckConstraint("length(filename) <= 1024", name="filename"),
    Index("ix_files_page", "project_id", "seq"),
    Index("ix_files_expiry", "expires_at"),
    sqlite_autoincrement=True,
)

uploads = Table(
    "uploads",
    METADATA,
    _seq(),
    _id(),
    _project(),
    Column("filename", Text, nullable=False),
    Column("mime_type", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("status", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("file_expires_after", Float),
    Column("file_id", Text, ForeignKey("files.id")),
    CheckConstraint(_one_of("status", ("pending", "completed", "cancelled", "expired")), name="status"),
    CheckConstraint("bytes >= 0", name="bytes"),
    CheckConstraint("length(filename) <= 1024", name="filename"),
    Index("ix_uploads_page", "project_id", "seq"),
    Index("ix_uploads_expiry", "status", "expires_at"),
    sqlite_autoincrement=True,
)

upload_parts = Table(
    "upload_parts",
    METADATA,
    _seq(),
    _id(),
    Column("upload_id", Text, ForeignKey("uploads.id"), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    CheckConstraint("bytes >= 0", name="bytes"),
    CheckConstraint("length(sha256) = 64", name="sha256"),
    Index("ix_upload_parts_page", "upload_id", "seq"),
    sqlite_autoincrement=True,
)

base_models = Table(
    "base_models",
    METADATA,
    _seq(),
    _id(),
    Column("uri", Text, nullable=False),
    Column("revision", Text),
    Column("digest", Text),
    Column("shape", Json, nullable=False),
    Column("info", Json, nullable=False),
    Column("created_at", Float, nullable=False),
    CheckConstraint("length(id) BETWEEN 1 AND 256", name="id"),
    sqlite_autoincrement=True,
)

jobs = Table(
    "jobs",
    METADATA,
    _seq(),
    _id(),
    _project(),
    Column("name", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("spec", Json, nullable=False),
    Column("request", Json, nullable=False),
    Column("plan", Json),
    Column("attempt", Integer, nullable=False, server_default=text("0")),
    # The attempt that may still hold resources on the cluster. It outlives `running`: a cancelled or paused
    # job keeps it until the scheduler has seen that attempt end, and cannot start again before.
    Column("live_attempt", Integer),
    Column("live_since", Float),
    # When the cluster accepted the live attempt. Before that, "the cluster knows no such attempt" proves
    # nothing: the request to start it may still be on its way.
    Column("launched_at", Float),
    Column("stopping_since", Float),
    Column("lease_owner", Text),
    Column("lease_token", Text),
    Column("lease_expires_at", Float),
    Column("metrics_part", Integer, nullable=False, server_default=text("0")),
    Column("failures", Integer, nullable=False, server_default=text("0")),
    Column("not_before", Float),
    Column("phase", Text),
    Column("status_reason", Text),
    Column("progress", Json),
    Column("error", Json),
    Column("fine_tuned_model", Text),
    Column("adapter_id", Text),
    Column("adapter_version", Integer),
    Column("result_files", Json, nullable=False),
    Column("trained_tokens", BigInteger),
    Column("body_hash", Text, nullable=False),
    Column("idempotency_key", Text),
    Column("retry_count", Integer, nullable=False, server_default=text("0")),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("finished_at", Float),
    UniqueConstraint("project_id", "idempotency_key"),
    # A version belongs to one job from the moment it is reserved, published or not.
    UniqueConstraint("project_id", "name", "adapter_version"),
    CheckConstraint(_one_of("state", STATES), name="state"),
    CheckConstraint("(state = 'running') = (lease_token IS NOT NULL)", name="lease"),
    CheckConstraint("(lease_token IS NULL) = (lease_owner IS NULL)", name="lease_owner"),
    CheckConstraint("(lease_token IS NULL) = (lease_expires_at IS NULL)", name="lease_expires_at"),
    CheckConstraint(f"(finished_at IS NOT NULL) = ({_one_of('state', TERMINAL)})", name="finished"),
    CheckConstraint(
        "state <> 'running' OR (live_attempt IS NOT NULL AND live_attempt = attempt)", name="running_is_live"
    ),
    CheckConstraint("state <> 'succeeded' OR adapter_id IS NOT NULL", name="succeeded_has_adapter"),
    CheckConstraint("state <> 'failed' OR error IS NOT NULL", name="failed_has_error"),
    CheckConstraint(f"priority BETWEEN {PRIORITY_LOWEST} AND {PRIORITY_HIGHEST}", name="priority"),
    CheckConstraint("attempt >= 0", name="attempt"),
    CheckConstraint("live_attempt BETWEEN 1 AND attempt", name="live_attempt"),
    CheckConstraint("failures >= 0", name="failures"),
    CheckConstraint("retry_count >= 0", name="retry_count"),
    CheckConstraint("adapter_version >= 1", name="adapter_version"),
    CheckConstraint("length(name) BETWEEN 1 AND 64", name="name"),
    CheckConstraint("length(idempotency_key) BETWEEN 1 AND 255", name="idempotency_key"),
    CheckConstraint("length(body_hash) BETWEEN 1 AND 64", name="body_hash"),
    CheckConstraint("length(status_reason) <= 2000", name="status_reason"),
    Index("ix_jobs_page", "project_id", "seq"),
    Index("ix_jobs_body", "project_id", "body_hash", "seq"),
    sqlite_autoincrement=True,
)
# Partial indexes hold only the rows a scheduler asks for, so a pass costs the same beside 10 or 10 million
# finished jobs.
Index(
    "ix_jobs_waiting",
    jobs.c.priority.desc(),
    jobs.c.seq,
    sqlite_where=jobs.c.state == "queued",
    postgresql_where=jobs.c.state == "queued",
)
Index(
    "ix_jobs_lease",
    jobs.c.lease_expires_at,
    sqlite_where=jobs.c.state == "running",
    postgresql_where=jobs.c.state == "running",
)
Index(
    "ix_jobs_live",
    jobs.c.seq,
    sqlite_where=jobs.c.live_attempt.is_not(None),
    postgresql_where=jobs.c.live_attempt.is_not(None),
)

job_metadata = Table(
    "job_metadata",
    METADATA,
    Column("job_id", Text, ForeignKey("jobs.id"), nullable=False),
    Column("key", Text, nullable=False),
    Column("value", Text, nullable=False),
    PrimaryKeyConstraint("job_id", "key"),
    CheckConstraint("length(key) BETWEEN 1 AND 64", name="key"),
    CheckConstraint("length(value) <= 512", name="value"),
    Index("ix_job_metadata_value", "key", "value", "job_id"),
)

job_events = Table(
    "job_events",
    METADATA,
    _seq(),
    _id(),
    Column("job_id", Text, ForeignKey("jobs.id"), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("level", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("data", Json),
    Column("dedupe", Text),
    UniqueConstraint("job_id", "dedupe"),
    CheckConstraint(_one_of("level", ("info", "warn", "error")), name="level"),
    CheckConstraint(_one_of("type", ("message", "metrics")), name="type"),
    CheckConstraint("length(message) <= 4000", name="message"),
    Index("ix_job_events_page", "job_id", "seq"),
    sqlite_autoincrement=True,
)

checkpoints = Table(
    "checkpoints",
    METADATA,
    _seq(),
    _id(),
    Column("job_id", Text, ForeignKey("jobs.id"), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("step", Integer, nullable=False),
    Column("key", Text, nullable=False),
    Column("metrics", Json, nullable=False),
    Column("created_at", Float, nullable=False),
    UniqueConstraint("job_id", "step"),
    CheckConstraint("attempt >= 1", name="attempt"),
    CheckConstraint("step >= 0", name="step"),
    Index("ix_checkpoints_page", "job_id", "seq"),
    sqlite_autoincrement=True,
)

capacity = Table(
    "capacity",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("snapshot", Json, nullable=False),
    Column("updated_at", Float, nullable=False),
    CheckConstraint("id = 1", name="one_row"),
)


class now(FunctionElement[float]):
    """The database's clock, unix seconds. Leases and delays are compared by this one clock only: the
    machines that run schedulers need not agree on the time."""

    type = Float()
    inherit_cache = True


@compiles(now, "sqlite")
def _now_in_sqlite(element: now, compiler: Any, **arguments: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _now_in_postgresql(element: now, compiler: Any, **arguments: Any) -> str:
    # clock_timestamp, not now(): a transaction that waited for a lock must not act on the time before.
    return "extract(epoch from clock_timestamp())::double precision"


def connect(url: str) -> Engine:
    """An engine for `sqlite:////abs/path.db` or `postgresql+psycopg://…`; makes SQLite's folder.

    Raises:
        InvalidRequest: another kind of database, or SQLite in memory (each connection would see its own).
    """
    parsed = make_url(url)
    kind = parsed.get_backend_name()
    if kind == "postgresql":
        return create_engine(
            parsed.set(drivername="postgresql+psycopg"), pool_pre_ping=True, pool_size=10, max_overflow=20
        )
    if kind != "sqlite" or not parsed.database or parsed.database == ":memory:":
        raise InvalidRequest(
            f"database URL {parsed.render_as_string()!r}: use sqlite:////absolute/path.db or postgresql+psycopg://…",
            param="DATABASE_URL",
        )
    Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(parsed, connect_args={"timeout": 30}, pool_size=10, max_overflow=20)

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, record: Any) -> None:
        # The driver must not begin transactions by itself: it would begin them deferred (see below).
        connection.isolation_level = None
        connection.execute("PRAGMA busy_timeout = 30000")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A deferred transaction that reads and then writes fails at once, without waiting, if another wrote
        # in between. So whoever may write takes the write lock first; `reading` says that it will not.
        deferred = connection.get_execution_options().get("read_only")
        connection.exec_driver_sql("BEGIN" if deferred else "BEGIN IMMEDIATE")

    return engine


@contextmanager
def writing(source: Source) -> Iterator[Connection]:
    """A transaction that commits at the end of the block; the caller's own, if `source` is a connection."""
    if isinstance(source, Connection):
        yield source
    else:
        with source.begin() as conn:
            yield conn


@contextmanager
def reading(source: Source) -> Iterator[Connection]:
    """A transaction that only reads: on SQLite it never waits for a writer."""
    if isinstance(source, Connection):
        yield source
    else:
        with source.connect().execution_options(read_only=True) as conn:
            yield conn


def migrate(url: str) -> None:
    """Bring the database to this version's tables. Safe to call from several processes at once."""
    from alembic import command
    from alembic.config import Config

    engine = connect(url)
    config = Config()
    config.set_main_option("script_location", "jobs:migrations")
    try:
        with engine.begin() as conn:
            if conn.dialect.name == "postgresql":
                conn.execute(text("SELECT pg_advisory_xact_lock(hashtextextended('migrate', 0))"))
            config.attributes["connection"] = conn
            command.upgrade(config, "head")
    finally:
        engine.dispose()
