"""One folder of tiny bases for all tests of methods."""

import pytest


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")
