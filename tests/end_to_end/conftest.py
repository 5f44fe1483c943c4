"""One service for all tests that leave it as they found it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.service import Service, rows_file, service


@pytest.fixture(scope="package")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with service(tmp_path_factory.mktemp("service")) as started:
        yield started


@pytest.fixture(scope="package")
def training_file(live: Service, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Id of a small chat file, uploaded."""
    path = rows_file(tmp_path_factory.mktemp("rows") / "rows.jsonl")
    return live.client.upload(Path(path)).id
