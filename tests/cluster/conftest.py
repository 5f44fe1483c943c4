"""A real Ray head for the tests of this package."""

from collections.abc import Iterator

import pytest

from tests.cluster.head import Head, ray_head


@pytest.fixture(scope="session")
def head() -> Iterator[Head]:
    """A Ray cluster of one node, for every test of this package that needs a real one."""
    with ray_head() as head:
        yield head
