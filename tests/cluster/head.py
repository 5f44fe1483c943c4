"""A real Ray head of its own for tests: own ports and temporary directory, a token, ended by process id."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.dashboard import ClusterUnavailable, Dashboard

STARTING_SECONDS = 180


@dataclass(frozen=True)
class Head:
    url: str
    gcs: str
    token: Path
    cpus: int
    directory: Path

    def dashboard(self) -> Dashboard:
        return Dashboard(self.url, self.token.read_text, seconds=60)


@contextlib.contextmanager
def ray_head(cpus: int = 2) -> Iterator[Head]:
    directory = Path(tempfile.mkdtemp(prefix="peft-", dir="/tmp"))
    token = directory / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    gcs, dashboard, client, agent, metrics = _free_ports(5)
    mark = secrets.token_hex(8)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "TEST_HEAD": mark,
    }
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
                *("--disable-usage-stats", "--include-dashboard=true", "--no-monitor"),
                *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--num-cpus={cpus}"),
                *(f"--port={gcs}", f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}"),
                *(f"--dashboard-agent-listen-port={agent}", "--min-worker-port=0", "--max-worker-port=0"),
                *(f"--temp-dir={directory}", "--object-store-memory=100000000"),
            ],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    head = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", token, cpus, directory)
    try:
        _wait_for(head)
        yield head
    finally:
        for order in (signal.SIGTERM, signal.SIGKILL):
            for pid in _marked(mark, process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, order)
            deadline = time.monotonic() + 3
            while _marked(mark, process.pid) and time.monotonic() < deadline:
                time.sleep(0.05)
        process.wait()
        shutil.rmtree(directory, ignore_errors=True)


def _wait_for(head: Head) -> None:
    """Until it takes jobs: its node is alive, and the node's agent has announced itself."""
    deadline = time.monotonic() + STARTING_SECONDS
    while True:
        try:
            if head.dashboard().json("GET", "/api/v0/nodes")["data"]["result"]["result"]:
                return
        except ClusterUnavailable:
            pass
        assert time.monotonic() < deadline, (head.directory / "log").read_text()[-3000:]
        time.sleep(0.2)


def _marked(mark: str, session: int) -> list[int]:
    """Processes with our mark, or in our head's session: Ray's agents overwrite their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                marked = f"TEST_HEAD={mark}".encode() in (entry / "environ").read_bytes().split(b"\0")
                if stat[0] != "Z" and (marked or stat[3] == str(session)):
                    found.append(int(entry.name))
    return found


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
