"""Session fixtures: each server starts when the first test asks for it, and once."""

from collections.abc import Iterator

import pytest

from tests import servers


@pytest.fixture(scope="session")
def postgres() -> Iterator[servers.PostgresServer]:
    """A server that the test may kill, as long as it starts it again."""
    try:
        server = servers.PostgresServer()
    except servers.Unavailable as reason:
        pytest.skip(str(reason))
    yield server
    server.close()


@pytest.fixture
def postgres_url(postgres: servers.PostgresServer) -> str:
    """SQLAlchemy URL of a new, empty database for this test alone."""
    return postgres.database()


@pytest.fixture(scope="session")
def s3_swift() -> Iterator[servers.SwiftServer]:
    """OpenStack Swift; pass its `env()` on. A test that stops it starts it again."""
    try:
        server = servers.SwiftServer()
    except servers.Unavailable as reason:
        pytest.skip(str(reason))
    yield server
    server.close()


@pytest.fixture(scope="session")
def s3_ceph() -> Iterator[servers.CephServer]:
    """Ceph's radosgw; pass its `env()` on. A test that stops it starts it again."""
    try:
        server = servers.CephServer()
    except servers.Unavailable as reason:
        pytest.skip(str(reason))
    yield server
    server.close()
