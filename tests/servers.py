"""Real servers for tests, private to one run: PostgreSQL, and two S3-compatible stores, Swift and Ceph.

Each keeps all its state in one temporary directory, listens on free ports of 127.0.0.1, and can be stopped,
killed and started again with its data. No server is ever found by name: each is a process group that its object
started.
"""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ACCESS_DENIED = {"AWS_ACCESS_KEY_ID": "nobody:nobody", "AWS_SECRET_ACCESS_KEY": "not-the-secret"}


class Unavailable(Exception):
    """The server's programs are not installed; the message says how to get them."""


def free_ports(count: int) -> list[int]:
    """`count` different TCP ports of 127.0.0.1 that nobody listens on."""
    # A port that the kernel gives to bind(0) may be taken by an outgoing connection before the server starts,
    # or while a stopped server waits for its restart. So look below the range of those.
    found: list[int] = []
    start = 20000 + (os.getpid() * 37 + int.from_bytes(os.urandom(2), "big")) % 11000
    for port in range(start, 32700):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"no {count} free ports from {start} on")


def wait_until(what: str, ready: Callable[[], bool], seconds: float = 60.0) -> None:
    """Poll until `ready()`; raises TimeoutError naming `what`."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} not after {seconds:.0f} s")
        time.sleep(0.05)


class Processes:
    """Process groups started by one server, each with its log file in `folder`."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.environment = dict(environment)
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: str | Path, **options: Any) -> None:
        with (self.folder / f"{name}.out").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,  # the group is what gets the signals: servers have children
                **options,
            )

    def alive(self) -> None:
        """Raises RuntimeError with the end of the log of a process that ended by itself."""
        for name, process in self.running.items():
            if process.poll() is not None:
                log = (self.folder / f"{name}.out").read_text(errors="replace")
                raise RuntimeError(f"{name} ended with {process.returncode}:\n{log[-3000:]}")

    def end(self, *names: str, how: signal.Signals = signal.SIGTERM) -> None:
        """Signal these groups (all if none is named), wait, and make sure that nothing of them is left."""
        chosen = [self.running.pop(name) for name in names or list(self.running) if name in self.running]
        for process in reversed(chosen):
            _signal(process, how)
        for process in reversed(chosen):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            _signal(process, signal.SIGKILL)
            process.wait(10)


def _signal(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)


def _call(environment: Mapping[str, str], *command: str | Path, **options: Any) -> None:
    done = subprocess.run(
        [str(word) for word in command],
        env=dict(environment),
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


class PostgresServer:
    """PostgreSQL, without fsync. As root it runs as `nobody`, which PostgreSQL insists on."""

    def __init__(self) -> None:
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
        initdb = str(found[-1]) if found else shutil.which("initdb")
        if initdb is None:
            raise Unavailable("PostgreSQL is not installed (apt-get install postgresql)")
        self.programs = Path(initdb).parent
        # /tmp, because a user's own TMPDIR may be closed to `nobody`.
        self.folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
        self.folder.chmod(0o755)
        self.port = free_ports(1)[0]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PG")}
        self.processes = Processes(self.folder, environment | {"LC_ALL": "C.UTF-8", "TZ": "UTC"})
        self.options: dict[str, Any] = {"cwd": self.folder}
        if os.geteuid() == 0:
            user = pwd.getpwnam("nobody")
            os.chown(self.folder, user.pw_uid, user.pw_gid)
            self.options |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        try:
            _call(
                self.processes.environment,
                *(self.programs / "initdb", "-D", self.folder / "data", "-U", "ft", "-A", "trust"),
                *("--no-sync", "-E", "UTF8", "--no-locale"),
                **self.options,
            )
            self.start()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """SQLAlchemy URL of the database that is always there."""
        return f"postgresql+psycopg://ft@127.0.0.1:{self.port}/postgres"

    def database(self) -> str:
        """SQLAlchemy URL of a new empty database, which takes ~50 ms to make."""
        import psycopg

        name = f"t{uuid.uuid4().hex}"
        with psycopg.connect(
            f"postgresql://ft@127.0.0.1:{self.port}/postgres", autocommit=True
        ) as connection:
            connection.execute(f'create database "{name}" template template0'.encode())
        return f"postgresql+psycopg://ft@127.0.0.1:{self.port}/{name}"

    def start(self) -> None:
        settings = {
            "listen_addresses": "127.0.0.1",
            "fsync": "off",
            "synchronous_commit": "off",
            "full_page_writes": "off",
            "shared_buffers": "32MB",
            "max_connections": "100",
        }
        self.processes.start(
            "postgres",
            self.programs / "postgres",
            *("-D", self.folder / "data", "-p", str(self.port), "-k", self.folder),
            *(word for name, value in settings.items() for word in ("-c", f"{name}={value}")),
            **self.options,
        )
        wait_until("PostgreSQL is up", self._ready)

    def _ready(self) -> bool:
        self.processes.alive()
        question = [str(self.programs / "pg_isready"), "-q", "-h", str(self.folder), "-p", str(self.port)]
        return subprocess.run(question, timeout=10).returncode == 0

    def stop(self) -> None:
        self.processes.end(how=signal.SIGINT)  # to the postmaster: fast shutdown

    def kill(self) -> None:
        self.processes.end(how=signal.SIGKILL)

    def close(self) -> None:
        self.processes.end(how=signal.SIGINT)
        shutil.rmtree(self.folder, ignore_errors=True)
