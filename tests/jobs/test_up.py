"""`up` starts a service once, `down` ends exactly that, and a killed one starts anew with all it knew."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from sqlalchemy import select

from jobs import serve, up
from jobs.db import capacity, connect, reading
from jobs.settings import Settings, load
from peft_service.shipped import SHIPPED_ID
from tests.cluster.head import ray_head


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return load({}, data_dir=tmp_path_factory.mktemp("up"), port=0)


@pytest.fixture(scope="module")
def service(settings: Settings) -> Iterator[up.Running]:
    running = up.up(settings)
    yield running
    up.down(settings)
    assert up.running(settings) is None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(running: up.Running, path: str, key: str | None = None) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.get(running.url + path, headers=headers, timeout=30, trust_env=False)


def state_of(settings: Settings) -> up.State:
    return up.State(**json.loads((settings.data_dir / "up.json").read_text()))


@pytest.mark.ray
def test_up_answers_only_when_the_api_the_scheduler_and_the_capacity_are_there(
    service: up.Running, settings: Settings
) -> None:
    assert service.started
    assert get(service, "/healthz").status_code == 200
    bases = get(service, "/v1/base_models", service.key)
    assert SHIPPED_ID in [base["id"] for base in bases.json()["data"]]
    assert get(service, "/v1/base_models").status_code == 401
    with reading(connect(settings.database_url)) as conn:
        snapshot = conn.scalar(select(capacity.c.snapshot))
    assert snapshot["nodes"][0]["cpus"] == os.cpu_count()


@pytest.mark.ray
def test_up_again_answers_with_the_running_service(service: up.Running, settings: Settings) -> None:
    began = time.monotonic()
    again = up.up(settings)
    assert (again.url, again.key, again.started) == (service.url, service.key, False)
    assert time.monotonic() - began < 10


@pytest.mark.ray
def test_secrets_are_for_the_owner_only(service: up.Running, settings: Settings) -> None:
    for name in ("key", "ray-token"):
        assert (settings.data_dir / name).stat().st_mode & 0o077 == 0, name
    assert httpx.get(f"{service.dashboard}/api/version", trust_env=False).status_code == 401
    token = (settings.data_dir / "ray-token").read_text()
    applications = httpx.get(
        f"{service.dashboard}/api/serve/applications/",
        headers={"Authorization": f"Bearer {token}"},
        timeout=30,
        trust_env=False,
    ).text
    for secret in (token, service.key, "sqlite:"):
        assert secret not in applications


@pytest.mark.ray
def test_after_kill_9_of_everything_up_starts_anew_with_the_same_key(
    service: up.Running, settings: Settings
) -> None:
    before = state_of(settings)
    victims = up._ours(before)
    assert len(victims) > 5
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):  # a raylet's end takes its workers with it
            os.kill(pid, signal.SIGKILL)
    again = up.up(settings)
    assert again.started
    assert again.key == service.key
    assert get(again, "/v1/base_models", again.key).status_code == 200
    assert not Path(str(before.temp_dir)).exists(), "what the dead one left is gone"
    ours = up._ours(state_of(settings))
    assert up.down(settings)
    assert not [pid for pid in ours if Path(f"/proc/{pid}").exists() and up._started(pid)]
    assert not up.down(settings), "nothing is left to stop"


def test_down_never_ends_a_process_that_has_the_old_number(tmp_path: Path) -> None:
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        settings = load({}, data_dir=tmp_path)
        state = up.State(
            url="http://127.0.0.1:1",
            dashboard="http://127.0.0.1:1",
            joined=False,
            mark="nobody",
            head=bystander.pid,
            head_started="1",
            temp_dir=None,
        )
        up._write(tmp_path, state)
        assert up.running(settings) is None
        assert up.down(settings)
        assert bystander.poll() is None
        assert up._started(bystander.pid) not in (None, "1")
        assert up._alive(replace(state, head_started=up._started(bystander.pid)))
    finally:
        bystander.kill()
        bystander.wait()
    assert up._started(bystander.pid) is None


def test_a_taken_port_is_told_before_anything_is_started(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(up.NotStarted, match=f"{port}.*PEFT_SERVICE_PORT"):
            up.up(load({}, data_dir=tmp_path, port=port))
    assert not (tmp_path / "up.json").exists()


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")
def test_the_serve_config_is_one_that_serve_accepts() -> None:
    from ray.serve.schema import ServeDeploySchema

    config = serve.config(load({"PEFT_SERVICE_API_REPLICAS": "3"}))
    schema = ServeDeploySchema.model_validate(config)
    assert schema.applications[0].import_path == "jobs.serve:app"
    module, _, name = schema.applications[0].import_path.partition(":")
    assert callable(getattr(__import__(module, fromlist=[name]), name))


@pytest.mark.ray
@pytest.mark.long
def test_up_joins_a_running_cluster_and_down_leaves_it_running(tmp_path: Path) -> None:
    with ray_head() as head:
        settings = load(
            {"RAY_ADDRESS": head.url, "RAY_AUTH_TOKEN_PATH": str(head.token)},
            data_dir=tmp_path,
            port=free_port(),
        )
        running = up.up(settings)
        assert running.joined
        assert get(running, "/v1/base_models", running.key).status_code == 200
        assert up.down(settings)
        assert up.running(settings) is None
        assert not (tmp_path / serve.HANDED_OVER).exists()
        assert head.dashboard().json("GET", "/api/version")["ray_version"]
