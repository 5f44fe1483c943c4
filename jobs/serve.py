"""The Ray Serve application: API replicas, and one scheduler.

`jobs.serve:app` is what Serve imports; `python -m jobs.serve deploy` runs it on a cluster.
Each replica reads its settings where it runs, so no secret passes through a Serve configuration.
"""

import argparse
import json
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.settings import PREFIX, Settings, load
from peft_service.errors import InvalidRequest

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application

    from cluster.dashboard import Dashboard
    from cluster.launch import Launcher
    from jobs.scheduler import Scheduler

NAME = "peft-service"
HANDED_OVER = "settings.json"
"""File in the data directory with the settings of `up`, for replicas on a cluster that was running before."""
SILENT_SECONDS = 60
"""A scheduler that has not finished a pass for so long is replaced."""

log = logging.getLogger("jobs.serve")


def app(arguments: dict[str, str] | None = None) -> "Application":
    """Build the application. `arguments`: variables for the replicas' environment; nothing secret.

    Serve calls this when it is given `jobs.serve:app` as the import path.
    """
    from ray import serve

    settings = load()
    options = {"num_cpus": 0, "runtime_env": {"env_vars": arguments or {}}}
    api = serve.deployment(
        name="API",
        num_replicas=settings.api_replicas,
        max_ongoing_requests=100,
        graceful_shutdown_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
        ray_actor_options=options,
    )(serve.ingress(api_app)(API))
    scheduler = serve.deployment(
        name="Scheduler",
        # One is enough, and two do no harm: what they do is guarded by leases.
        num_replicas=1,
        graceful_shutdown_timeout_s=10,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
        health_check_timeout_s=30,
        ray_actor_options=options,
    )(SchedulerReplica)
    built: Application = api.bind(scheduler.bind())
    return built


def config(settings: Settings) -> dict[str, Any]:
    """The same application as a Serve config file, for KubeRay's `serveConfigV2` or `serve deploy`."""
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": settings.port},
        "applications": [
            {
                "name": NAME,
                "route_prefix": "/",
                "import_path": "jobs.serve:app",
                "deployments": [
                    {"name": "API", "num_replicas": settings.api_replicas},
                    {"name": "Scheduler", "num_replicas": 1},
                ],
            }
        ],
    }


class API:
    """A replica of the REST API. Serve wraps it around the ASGI application of `api_app`."""

    def __init__(self, scheduler: Any) -> None:
        """`scheduler` is not called: binding it here is what makes it part of this application."""


def api_app() -> "FastAPI":
    """The ASGI application, made inside the replica."""
    from jobs.api import create_app
    from jobs.db import connect
    from peft_service.store import open_store

    settings = settings_here()
    engine, store = connect(settings.database_url), open_store(settings.store_url)
    return create_app(settings, engine, store, launcher_of(settings).logs)


def scheduler_of(settings: Settings) -> "Scheduler":
    """The scheduler with everything it works with."""
    from cluster import capacity
    from cluster.plan import Capacity, Plan, make_plan, operation_plan, shrink
    from jobs import base_models
    from jobs.db import connect
    from jobs.queue import JobRow
    from jobs.scheduler import Pace, Scheduler
    from peft_service.spec import OperationSpec, spec_of
    from peft_service.store import open_store

    engine = connect(settings.database_url)
    dashboard = training_dashboard(settings)

    def replan(row: JobRow, nodes: Capacity) -> Plan | None:
        spec = spec_of(row.spec)
        shape = base_models.measured(engine, base_models.get(engine, spec.base.id)).model_shape
        if isinstance(spec, OperationSpec):
            return operation_plan(spec, shape, nodes)
        if not row.plan:
            return make_plan(spec, shape, nodes)
        return shrink(Plan.model_validate(row.plan), spec, shape, nodes)

    return Scheduler(
        engine,
        open_store(settings.store_url),
        launcher_of(settings),
        lambda: capacity.read(dashboard, settings.cluster_max),
        pace=Pace(
            tick=settings.tick_seconds, lease=settings.lease_seconds, grace=settings.stop_grace_seconds
        ),
        max_failures=settings.max_failures,
        replan=replan,
        graders={"python_graders": settings.python_graders, "judge_url": settings.judge_url},
    )


def launcher_of(settings: Settings) -> "Launcher":
    from cluster.launch import RayJobsLauncher

    return RayJobsLauncher(
        training_dashboard(settings),
        settings.store_url,
        settings.worker_python,
        settings.store_patience_seconds,
    )


def training_dashboard(settings: Settings) -> "Dashboard":
    """The cluster that trains: one of its own, or the one we run on (whose GCS Ray tells its workers)."""
    from cluster.dashboard import Dashboard

    address = settings.train_ray_address or settings.ray_address
    if address is None:
        raise InvalidRequest(
            "no training cluster: set PEFT_SERVICE_TRAIN_RAY_ADDRESS to its dashboard, http://host:8265",
            code="invalid_settings",
        )
    return Dashboard(address, lambda: settings.train_ray_token, settings.cluster_seconds)


class SchedulerReplica:
    """The scheduler, on a thread of a Serve replica, so that Serve replaces it when it dies or hangs."""

    def __init__(self) -> None:
        self._scheduler = scheduler_of(settings_here())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._scheduler.run, args=(self._stop,), daemon=True)
        self._thread.start()

    def check_health(self) -> None:
        """
        Raises:
            RuntimeError: the thread has ended, or has been silent for too long.
        """
        if not self._thread.is_alive():
            raise RuntimeError("the scheduler's thread has ended")
        silent = time.monotonic() - self._scheduler.ticked_at
        if silent > SILENT_SECONDS:
            raise RuntimeError(f"the scheduler has not finished a pass for {silent:.0f} s")

    def __del__(self) -> None:
        if hasattr(self, "_stop"):
            self._stop.set()


def settings_here() -> Settings:
    """The settings on this node: what `up` handed over, if it did, else this process's environment."""
    settings = load()
    handed_over = settings.data_dir / HANDED_OVER
    return load(json.loads(handed_over.read_text())) if handed_over.exists() else settings


def deploy(arguments: dict[str, str], host: str, port: int) -> None:
    """Run the application on the cluster of RAY_ADDRESS, beside whatever else runs there.

    A REST deployment (`PUT /api/serve/applications`) would remove every other application of the cluster.
    """
    from ray import serve

    serve.start(
        proxy_location="HeadOnly", http_options={"host": host, "port": port, "request_timeout_s": 600}
    )
    serve.run(app(arguments), name=NAME, route_prefix="/")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.serve", description=__doc__)
    parser.add_argument("what", choices=("deploy", "delete"))
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--patience", type=float, default=0, help="seconds to wait for the cluster to start")
    parser.add_argument(
        "--data-dir", type=Path, help="for the replicas, where it is not in their environment"
    )
    parser.add_argument("--after-line", action="store_true", help="deploy once a line can be read from stdin")
    options = parser.parse_args(argv)
    # Import while the cluster is still starting: both take seconds.
    import ray
    from ray import serve

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stdout)
    _connect(ray, options.patience)
    log.info("connected to the cluster")
    if options.what == "delete":
        serve.delete(NAME)
        return 0
    if options.after_line and not sys.stdin.readline():
        return 1
    arguments = {} if options.data_dir is None else {f"{PREFIX}DATA_DIR": os.fspath(options.data_dir)}
    deploy(arguments, options.host, options.port)
    log.info("deployed")
    return 0


def _connect(ray: Any, patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        try:
            ray.init(namespace="serve", log_to_driver=False, logging_level=logging.ERROR)
            return
        except (ConnectionError, RuntimeError, ValueError):
            # What Ray raises while its GCS or its first node is not there yet depends on the moment.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
