"""The catalog: which adapters exist, by name, version and lineage.

The table is an index over the manifests in the store, which are the truth: `rebuild` makes it anew from
them. The connection is the caller's, so that an adapter is registered in the same transaction that finishes
its job.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Column,
    ColumnElement,
    Connection,
    Float,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    func,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import TypeEngine

from peft_service.errors import Conflict, GateFailed, NotFound, ObjectNotFound
from peft_service.store import Store

METADATA = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)
"""Every table of the service; jobs/db.py adds its own to it."""

Json: TypeEngine[Any] = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
Sequence: TypeEngine[int] = BigInteger().with_variant(Integer(), "sqlite")
"""A number that only grows. SQLite calls it rowid, and only if the column is a plain INTEGER."""

adapters = Table(
    "adapters",
    METADATA,
    Column("seq", Sequence, primary_key=True, autoincrement=True),
    Column("id", Text, nullable=False, unique=True),
    # No foreign keys: after the loss of the database the catalog comes back from the store, the jobs do not.
    Column("project_id", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("base_id", Text, nullable=False),
    Column("base_digest", Text),
    Column("method", Text, nullable=False),
    Column("job_id", Text, nullable=False, unique=True),
    Column("location", Text, nullable=False),
    Column("digest", Text, nullable=False),
    Column("manifest", Json, nullable=False),
    Column("metrics", Json, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("deleted_at", Float),
    UniqueConstraint("project_id", "name", "version"),
    CheckConstraint("version >= 1", name="version"),
    CheckConstraint("length(name) BETWEEN 1 AND 64", name="name"),
    CheckConstraint("bytes >= 0", name="bytes"),
    Index("ix_adapters_page", "project_id", "seq"),
    Index("ix_adapters_base", "project_id", "base_id", "seq"),
    sqlite_autoincrement=True,
)


def in_order(conn: Connection, project: str) -> None:
    """Wait for every other writer of this project's lists; the lock lasts until the transaction ends.

    A sequence number is drawn before its row commits. On PostgreSQL number 7 may therefore become visible
    after number 8, and whoever read up to 8 never sees 7. Drawing the number under this lock makes the
    order of the numbers the order of the commits. SQLite has one writer at a time anyway.
    Lock order everywhere: the project, then a job's row.
    """
    if conn.dialect.name == "postgresql":
        conn.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(f"project:{project}", 0))))


@dataclass(frozen=True)
class Adapter:
    """One published adapter. All but `seq` and `deleted_at` comes from its manifest and never changes."""

    id: str
    project_id: str
    name: str
    version: int
    base_id: str
    base_digest: str | None
    method: str
    job_id: str
    location: str
    """Key prefix in the store, without a slash at the end."""
    digest: str
    """sha256 of the weights; of several files, of their names and digests."""
    manifest: dict[str, Any]
    metrics: dict[str, Any]
    bytes: int
    created_at: float
    deleted_at: float | None = None
    seq: int = 0
    """Order in the catalog; the database gives it."""

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.version}"


def id8_of(job: str) -> str:
    """The short id in an adapter's folder and model name: the same however often a job is settled."""
    return job.removeprefix("ftjob-")[:8]


def adapter_id_of(job: str) -> str:
    return "adapter_" + job.removeprefix("ftjob-")


def slug_of(base_id: str) -> str:
    """A base's id as one path segment, which is also one segment of a model's name."""
    return base_id.replace("/", "--").replace(":", "--")


def location_of(
    project: str, base_id: str, name: str, version: int, job: str, *, servable: bool = True
) -> str:
    """Where an adapter lives in the store (design §6): `adapters/` is read by servers, `native/` by us."""
    folder = "adapters" if servable else "native"
    return f"{project}/{folder}/{slug_of(base_id)}/{name}-v{version:04d}-{id8_of(job)}"


def read(store: Store, location: str) -> Adapter:
    """The adapter at this prefix of the store, from its manifest alone.

    Raises:
        ObjectNotFound: no manifest: no adapter, or not yet a whole one.
        GateFailed: the manifest lacks what the catalog needs.
    """
    text = store.get(f"{location}/manifest.json")
    try:
        manifest = json.loads(text)
        record, listed = manifest["record"], manifest["files"]
        weights = sorted(
            (file["path"], file["sha256"]) for file in listed if file["path"].endswith(".safetensors")
        )
        digest = weights[0][1]
        if len(weights) > 1:
            digest = hashlib.sha256("".join(f"{sha}  {path}\n" for path, sha in weights).encode()).hexdigest()
        return Adapter(
            id=record["id"],
            project_id=record["project"],
            name=record["name"],
            version=record["version"],
            base_id=record["spec"]["base"]["id"],
            base_digest=record["spec"]["base"]["digest"],
            method=record["spec"]["method"]["kind"],
            job_id=record["job"],
            location=location,
            digest=digest,
            manifest=manifest,
            metrics=record["metrics"],
            bytes=sum(file["size"] for file in listed),
            created_at=record["created_at"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise GateFailed(
            f"{location}/manifest.json in {store.url} is no manifest of an adapter ({error!r})"
        ) from error


def rebuild(conn: Connection, store: Store, project: str) -> tuple[int, list[str]]:
    """Register every adapter of a project that the store holds and the catalog does not.

    Returns how many there are, and a sentence for each prefix that could not be registered. Oldest first, so
    that the catalog lists them as it once did.
    """
    found: list[Adapter] = []
    problems: list[str] = []
    for info in (info for folder in ("adapters", "native") for info in store.list(f"{project}/{folder}/")):
        if info.key.endswith("/manifest.json"):
            try:
                found.append(read(store, info.key.removesuffix("/manifest.json")))
            except (GateFailed, ObjectNotFound) as error:
                problems.append(error.message)
    registered = 0
    for adapter in sorted(found, key=lambda adapter: (adapter.created_at, adapter.id)):
        try:
            register(conn, adapter)
            registered += 1
        except Conflict as error:
            problems.append(error.message)
    return registered, problems


def lineage(adapter: Adapter) -> dict[str, Any]:
    """What the adapter was made from, and how, as its manifest tells it."""
    record: Mapping[str, Any] = adapter.manifest["record"]
    spec = record["spec"]
    return {
        "job": adapter.job_id,
        "attempt": record.get("attempt"),
        "base": spec["base"],
        "method": spec["method"],
        "objective": spec.get("objective"),
        "data": {name: file for name, file in (spec.get("data") or {}).items() if isinstance(file, dict)},
        "training": spec.get("training"),
        "operation": spec.get("operation"),
        "sources": spec.get("sources", []),
        "seed": spec.get("seed"),
        "steps": record.get("step"),
        "trained_tokens": record.get("trained_tokens"),
        "software": adapter.manifest.get("software"),
    }


def register(conn: Connection, adapter: Adapter) -> Adapter:
    """Add an adapter whose files are in the store. The same adapter twice is once.

    Raises:
        Conflict: another adapter has this name and version, or its job has another adapter.
    """
    in_order(conn, adapter.project_id)
    values = {
        column.name: getattr(adapter, column.name)
        for column in adapters.c
        if column.name not in ("seq", "deleted_at")
    }
    same = adapters.c.job_id == adapter.job_id
    taken = (
        (adapters.c.project_id == adapter.project_id)
        & (adapters.c.name == adapter.name)
        & (adapters.c.version == adapter.version)
    )
    for row in conn.execute(select(adapters).where(same | taken)):
        there = Adapter(**row._mapping)
        if (there.id, there.location, there.digest) != (adapter.id, adapter.location, adapter.digest):
            raise Conflict(
                f"{adapter.reference} of job {adapter.job_id} cannot be registered: {there.reference} of job "
                f"{there.job_id} is there, at {there.location}",
                code="adapter_exists",
            )
        return there
    conn.execute(adapters.insert().values(**values))
    return _one(conn, adapters.c.id == adapter.id)


def find(conn: Connection, project: str, reference: str) -> Adapter:
    """The adapter named by an id, `name@version`, `name` (its newest), or its model name `ft:…:<id8>`.

    Deleted adapters are found by id only.

    Raises:
        NotFound: there is none.
    """
    mine = adapters.c.project_id == project
    there = mine & adapters.c.deleted_at.is_(None)
    name, at, version = reference.partition("@")
    number = version.removeprefix("v")
    if reference.startswith("adapter_"):
        return _one(conn, mine & (adapters.c.id == reference), wanted=reference)
    if reference.startswith("ft:"):
        words = reference.split(":")
        if len(words) < 5:
            raise _missing(reference)
        model_name, tail = words[-2:]
        begins = (adapters.c.id >= f"adapter_{tail}") & (adapters.c.id < f"adapter_{tail}~")
        return _one(conn, there & begins & (adapters.c.name == model_name), wanted=reference)
    if at and not (number.isascii() and number.isdigit() and len(number) < 10):
        raise NotFound(
            f"no adapter {reference!r}: after the @ stands a version number, as in {name}@1", param="adapter"
        )
    if at:
        return _one(
            conn, there & (adapters.c.name == name) & (adapters.c.version == int(number)), wanted=reference
        )
    return _one(conn, there & (adapters.c.name == name), wanted=reference)


def page(
    conn: Connection,
    project: str,
    *,
    after: str | None = None,
    limit: int = 20,
    name: str | None = None,
    base: str | None = None,
    method: str | None = None,
    job: str | None = None,
) -> tuple[list[Adapter], bool]:
    """Adapters that are not deleted, newest first, and whether more follow.

    Raises:
        NotFound: `after` is no adapter of this project.
    """
    query = select(adapters).where(adapters.c.project_id == project, adapters.c.deleted_at.is_(None))
    wanted = {"name": name, "base_id": base, "method": method, "job_id": job}
    for column, value in wanted.items():
        if value is not None:
            query = query.where(adapters.c[column] == value)
    if after is not None:
        cursor = _one(conn, (adapters.c.project_id == project) & (adapters.c.id == after), wanted=after)
        query = query.where(adapters.c.seq < cursor.seq)
    rows = list(conn.execute(query.order_by(adapters.c.seq.desc()).limit(limit + 1)))
    return [Adapter(**row._mapping) for row in rows[:limit]], len(rows) > limit


def versions(conn: Connection, project: str, name: str) -> list[Adapter]:
    """Every version of a name that is not deleted, newest first; empty if there is none."""
    rows = conn.execute(
        select(adapters)
        .where(adapters.c.project_id == project, adapters.c.name == name, adapters.c.deleted_at.is_(None))
        .order_by(adapters.c.version.desc())
    )
    return [Adapter(**row._mapping) for row in rows]


def delete(conn: Connection, project: str, adapter: str, at: float) -> Adapter:
    """Mark it deleted; its version is never given again. Its files are the caller's affair.

    Raises:
        NotFound: no such adapter id, or it is deleted already.
    """
    there = (adapters.c.project_id == project) & (adapters.c.id == adapter) & adapters.c.deleted_at.is_(None)
    if conn.execute(update(adapters).where(there).values(deleted_at=at)).rowcount == 0:
        raise _missing(adapter)
    return _one(conn, adapters.c.id == adapter)


def _one(conn: Connection, where: ColumnElement[bool], wanted: str = "") -> Adapter:
    if "\0" in wanted:  # which PostgreSQL does not even compare with
        raise _missing(wanted)
    row = conn.execute(
        select(adapters).where(where).order_by(adapters.c.version.desc()).limit(1)
    ).one_or_none()
    if row is None:
        raise _missing(wanted)
    return Adapter(**row._mapping)


def _missing(reference: str) -> NotFound:
    return NotFound(
        f"no adapter {reference!r} in this project; GET /v1/adapters lists them", code="adapter_not_found"
    )
