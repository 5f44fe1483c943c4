"""Other machinery than the laptop's: S3 that goes away, PostgreSQL, a second cluster that trains."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_service.store import open_store
from tests.cluster.head import ray_head
from tests.end_to_end.service import Service, rows_file, service
from tests.servers import S3Server

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.long, pytest.mark.timeout(1200)]

STEPS = 36


@pytest.fixture(scope="module")
def reference(live: Service, training_file: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    job = live.succeeded(live.submit(training_file, steps=STEPS).id)
    return live.weights(job, tmp_path_factory.mktemp("reference") / "adapter")


@pytest.fixture(params=["s3_swift", "s3_ceph"])
def s3(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    server: S3Server = request.getfixturevalue(request.param)
    for name, value in server.env().items():
        monkeypatch.setenv(name, value)  # the service and its Ray nodes inherit it, as pods do
    yield server
    server.start()


def same(weights: dict[str, Any], reference: dict[str, Any]) -> None:
    assert weights.keys() == reference.keys()
    for name, expected in reference.items():
        np.testing.assert_array_equal(weights[name], expected, err_msg=name)


def test_the_bucket_goes_away_in_the_middle_of_a_run(
    s3: S3Server, postgres_url: str, reference: dict[str, Any], tmp_path: Path
) -> None:
    """Issue 2, what must hold 6, with the database and the store that a team has."""
    url = f"s3://{s3.bucket()}/team"
    with service(tmp_path / "data", store_url=url, database_url=postgres_url) as own:
        file_id = own.client.upload(rows_file(tmp_path / "rows.jsonl")).id
        job_id = own.submit(file_id, steps=STEPS).id
        own.wait_for_step(job_id, 8)
        s3.kill()
        waiting = own.wait(job_id, lambda job: "store" in (job.status_reason or ""))
        assert waiting.status == "running"
        s3.start()
        store = open_store(url)
        while not (job := own.client.job(job_id)).final:
            # An adapter is visible with its manifest or not at all, at whatever moment one looks.
            known = list(own.client.adapters())
            manifests = [info for info in store.list("") if info.key.endswith("manifest.json")]
            assert len(known) <= sum("/adapters/" in info.key for info in manifests)
            time.sleep(0.3)
        same(own.weights(own.succeeded(job_id), tmp_path / "adapter"), reference)
        assert job.attempt == 1, "the run waited; it was not started again"


def test_a_second_cluster_trains(reference: dict[str, Any], tmp_path: Path) -> None:
    """The split of infra/kubernetes: the API's cluster never trains, the other is reached by the Jobs API."""
    with (
        ray_head(cpus=2) as training,
        service(
            tmp_path / "data",
            train_ray_address=training.url,
            train_ray_auth_token_path=training.token,
            local_cpus=1,
        ) as own,
    ):
        file_id = own.client.upload(rows_file(tmp_path / "rows.jsonl")).id
        job_id = own.submit(file_id, steps=STEPS).id
        own.wait_for_step(job_id, 2)
        assert not own.processes("RayTrainWorker"), "it trains on the API's cluster"
        same(own.weights(own.succeeded(job_id), tmp_path / "adapter"), reference)


def test_joining_a_cluster_that_runs(reference: dict[str, Any], tmp_path: Path) -> None:
    """RAY_ADDRESS: `up` deploys beside what is there, `down` takes only that away."""
    with ray_head(cpus=2) as there:
        with service(
            tmp_path / "data", ray_address=there.url, ray_auth_token_path=there.token, port=18765
        ) as own:
            file_id = own.client.upload(rows_file(tmp_path / "rows.jsonl")).id
            same(
                own.weights(own.succeeded(own.submit(file_id, steps=STEPS).id), tmp_path / "adapter"),
                reference,
            )
        assert there.dashboard().json("GET", "/api/version")
