"""The catalog: which adapters exist, by name, version and lineage.

The table is an index over the manifests in the store, which are the truth: `rebuild` makes it anew from
them. The connection is the caller's, so that an adapter is registered in the same transaction that finishes
its job.
"""

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Column,
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
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import TypeEngine

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
