"""An empty database of each kind, SQLite and PostgreSQL, for the tests of this package."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from jobs.db import connect, migrate
from tests.jobs.rows import add_project


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind. All that the queue promises is tested on both."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/db/service.sqlite"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """A migrated database with one project."""
    migrate(database_url)
    engine = connect(database_url)
    add_project(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def sqlite_engine(tmp_path: Path) -> Iterator[Engine]:
    """For tests of what does not depend on the database."""
    url = f"sqlite:///{tmp_path}/db/service.sqlite"
    migrate(url)
    engine = connect(url)
    add_project(engine)
    yield engine
    engine.dispose()
