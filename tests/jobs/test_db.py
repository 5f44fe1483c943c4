"""The tables, on both databases."""

import threading
import time
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, inspect, select, text, update
from sqlalchemy.exc import IntegrityError

from jobs import queue
from jobs.db import METADATA, connect, jobs, migrate, now, projects, reading, writing
from peft_service.errors import InvalidRequest
from tests.jobs.rows import PROJECT, new_job


def test_migrating_an_empty_database_gives_the_tables_of_the_code(database_url: str) -> None:
    migrate(database_url)
    engine = connect(database_url)
    with writing(engine) as conn:
        context = MigrationContext.configure(conn, opts={"compare_type": True})
        assert compare_metadata(context, METADATA) == []
        migrated = {table: _checks(conn, table) for table in METADATA.tables}
        conn.execute(text("DROP TABLE alembic_version"))
        METADATA.drop_all(conn)
        METADATA.create_all(conn)
        # Alembic does not compare CHECK constraints.
        assert migrated == {table: _checks(conn, table) for table in METADATA.tables}
    assert migrated["jobs"]
    engine.dispose()


def _checks(conn: object, table: str) -> dict[str | None, str]:
    return {check["name"]: check["sqltext"] for check in inspect(conn).get_check_constraints(table)}  # type: ignore[union-attr]


def test_migrating_twice_or_at_once_changes_nothing(database_url: str) -> None:
    problems: list[BaseException] = []

    def one() -> None:
        try:
            migrate(database_url)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    migrate(database_url)
    assert problems == []


@pytest.mark.parametrize(
    ("changes", "constraint"),
    [
        ({"state": "sleeping"}, "state"),
        ({"lease_token": "t", "lease_owner": "o", "lease_expires_at": 1.0}, "lease"),
        ({"state": "running", "attempt": 1, "live_attempt": 1}, "lease"),
        ({"lease_owner": "o"}, "lease_owner"),
        ({"state": "cancelled"}, "finished"),
        ({"finished_at": 1.0}, "finished"),
        ({"state": "succeeded", "finished_at": 1.0}, "succeeded_has_adapter"),
        ({"state": "failed", "finished_at": 1.0}, "failed_has_error"),
        (
            {"state": "running", "lease_token": "t", "lease_owner": "o", "lease_expires_at": 1.0},
            "running_is_live",
        ),
        ({"priority": 101}, "priority"),
        ({"priority": -1}, "priority"),
        ({"attempt": -1}, "attempt"),
        ({"live_attempt": 1}, "live_attempt"),
        ({"failures": -1}, "failures"),
        ({"adapter_version": 0}, "adapter_version"),
        ({"name": "n" * 65}, "name"),
        ({"idempotency_key": "k" * 256}, "idempotency_key"),
        ({"status_reason": "r" * 2001}, "status_reason"),
    ],
)
def test_the_table_refuses_nonsense(engine: Engine, changes: dict[str, object], constraint: str) -> None:
    job = queue.submit(engine, new_job())
    with pytest.raises(IntegrityError, match=f"ck_jobs_{constraint}"), writing(engine) as conn:
        conn.execute(update(jobs).where(jobs.c.id == job.id).values(**changes))
    assert queue.get(engine, PROJECT, job.id) == job


def test_a_job_needs_a_project(engine: Engine) -> None:
    with pytest.raises(IntegrityError):
        queue.submit(engine, new_job(project="nobody"))


def test_the_databases_clock_is_the_time(engine: Engine) -> None:
    with reading(engine) as conn:
        assert abs(float(conn.scalar(select(now())) or 0) - time.time()) < 2


def test_a_reader_sees_the_past_while_a_writer_writes(engine: Engine) -> None:
    with writing(engine) as writer:
        writer.execute(projects.insert().values(id="second", name="Second", created_at=now()))
        with reading(engine) as reader:
            assert len(reader.execute(select(projects)).all()) == 1
    with reading(engine) as reader:
        assert len(reader.execute(select(projects)).all()) == 2


def test_writers_wait_for_each_other_and_lose_nothing(engine: Engine) -> None:
    """Read, then write: with deferred transactions SQLite fails here at once ("database is locked")."""

    def count(times: int) -> None:
        for _ in range(times):
            with writing(engine) as conn:
                row = conn.execute(select(projects.c.name).with_for_update()).scalar_one()
                conn.execute(update(projects).values(name=str(int(row) + 1)))

    with writing(engine) as conn:
        conn.execute(update(projects).values(name="0"))
    threads = [threading.Thread(target=count, args=(20,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with reading(engine) as conn:
        assert conn.scalar(select(projects.c.name)) == "80"


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "mysql://root@127.0.0.1/x"])
def test_another_database_is_refused_in_words(url: str) -> None:
    with pytest.raises(InvalidRequest, match="use sqlite:////absolute"):
        connect(url)


def test_a_password_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as refused:
        connect("mysql://root:geheim@127.0.0.1/x")
    assert "geheim" not in refused.value.message
