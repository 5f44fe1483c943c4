"""Launcher: starts, watches and ends one attempt on the training cluster. The seam to whatever runs it."""

import shlex
import socket
import sys
from typing import Literal, Protocol
from urllib.parse import urlsplit

from cluster.dashboard import ClusterUnavailable, Dashboard
from cluster.plan import Plan

Progress = Literal["pending", "running", "succeeded", "failed", "stopped", "lost"]
"""`lost`: the cluster answers and knows no such attempt (its head was restarted). Worth a new attempt."""


class Launcher(Protocol):
    """Every method raises ClusterUnavailable when the cluster does not answer; then nothing is known."""

    def start(self, name: str, run_prefix: str, plan: Plan) -> None:
        """Start the attempt, or attach to it where it was started before: a name never runs twice."""

    def poll(self, name: str) -> Progress: ...

    def stop(self, name: str) -> None:
        """Ask the attempt to end now; `poll` tells when it has. Idempotent; an unknown name is no error."""

    def logs(self, name: str) -> str: ...


class RayJobsLauncher:
    """Attempts as Ray Jobs: `name` is the submission id, which Ray itself keeps unique."""

    def __init__(self, dashboard: Dashboard, store_url: str, python: str | None, patience: float) -> None:
        """
        Args:
            python: runs the attempt on the cluster; None: this interpreter if the cluster is on this machine.
            patience: seconds a run waits for a store that does not answer.
        """
        self._dashboard = dashboard
        self._store_url = store_url
        self._python = python
        self._patience = patience

    def start(self, name: str, run_prefix: str, plan: Plan) -> None:
        python = self._python or (sys.executable if is_this_machine(self._dashboard.url) else "python")
        entrypoint = [python, "-m", "cluster.run", "--store", self._store_url, "--run", run_prefix]
        body = {
            "submission_id": name,
            "entrypoint": shlex.join([*entrypoint, "--patience", f"{self._patience:g}"]),
            "entrypoint_num_cpus": 0,
            "runtime_env": {"env_vars": environment(plan)},
            "metadata": {"peft-service-run": run_prefix},
        }
        response = self._dashboard.request("POST", "/api/jobs/", body)
        # The dashboard answers 500 and a traceback for a name that exists; the check is atomic on its side.
        if response.is_success or "already exists" in response.text:
            return
        raise ClusterUnavailable(f"the cluster refused to start {name}: {response.text[-500:]}")

    def poll(self, name: str) -> Progress:
        response = self._dashboard.request("GET", f"/api/jobs/{name}")
        if response.status_code == 404:
            return "lost"
        if not response.is_success:
            raise ClusterUnavailable(
                f"asking for {name} answered {response.status_code}: {response.text[-500:]}"
            )
        status: Progress = response.json()["status"].lower()
        return status

    def stop(self, name: str) -> None:
        response = self._dashboard.request("POST", f"/api/jobs/{name}/stop")
        if not response.is_success and response.status_code != 404:
            raise ClusterUnavailable(
                f"stopping {name} answered {response.status_code}: {response.text[-500:]}"
            )

    def logs(self, name: str) -> str:
        response = self._dashboard.request("GET", f"/api/jobs/{name}/logs")
        return str(response.json()["logs"]) if response.is_success else ""


def environment(plan: Plan) -> dict[str, str]:
    """Variables of an attempt's processes. No secret among them: Ray shows them to everyone who may look."""
    return {
        "DS_ACCELERATOR": "cuda" if plan.gpus_per_worker else "cpu",
        "OMP_NUM_THREADS": str(max(1, int(plan.cpus_per_worker))),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "PYTHONUNBUFFERED": "1",
        # Ray Train looks at its workers only this often; the default of 2 s delays the end of every run.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
        # A process less a run; with Ray Train's own retries off, nobody would act on what it sees.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        # Otherwise every printed line appears twice in the log.
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    }


def is_this_machine(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    if host in ("localhost", "::1") or host.startswith("127."):
        return True
    try:
        # Ray announces its dashboard by the machine's own address. Only an address of ours can be bound.
        with socket.socket() as probe:
            probe.bind((host, 0))
        return True
    except OSError:
        return False
