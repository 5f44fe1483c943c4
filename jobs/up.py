"""`up` and `down`: the service on this machine, on a Ray cluster of its own or on one that is running.

What `up` started is written to `up.json` in the data directory before anything is waited for, so that `down`,
or the next `up`, can end exactly that, whatever was killed in between. `down` stops no run for good: jobs are
in the database, and the scheduler goes on with them at the next `up`.
"""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from cluster.dashboard import ClusterUnavailable, Dashboard
from cluster.launch import is_this_machine
from jobs.serve import HANDED_OVER
from jobs.settings import Settings, child_environment
from peft_service.errors import PeftServiceError

STARTING_SECONDS = 180
"""How long the whole may take; a slow machine needs half a minute."""
ENDING_SECONDS = 2
DYING_SECONDS = 20
CAPACITY_SECONDS = 10
MARK = "PEFT_UP"
"""Variable in the environment of everything that `up` starts: it tells our processes from all others."""
OBJECT_STORE_BYTES = 200_000_000
"""Runs pass nothing through Ray's object store."""


class NotStarted(PeftServiceError):
    default_code = "not_started"


@dataclass(frozen=True)
class Running:
    """The service as `up` left it."""

    url: str
    key: str
    dashboard: str
    """Of the Ray cluster."""
    joined: bool
    """The cluster was there before."""
    started: bool
    """This call started it; False: it was running already."""
    seconds: float


@dataclass(frozen=True)
class State:
    """What is written to `up.json`."""

    url: str
    dashboard: str
    joined: bool
    mark: str
    head: int | None
    """Process id of the Ray head."""
    head_started: str | None
    """When that process started: a process id alone may be another's by now."""
    temp_dir: str | None


def up(settings: Settings, say: Callable[[str], None] = lambda text: None) -> Running:
    """Start the service, or answer with the one that runs. Safe to call from several processes at once.

    Raises:
        NotStarted: with the end of the log of what did not start.
        ClusterUnavailable: there is no cluster at `ray_address`.
    """
    began = time.monotonic()
    settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _locked(settings.data_dir):
        state = _read(settings.data_dir)
        if state is not None and _alive(state) and _healthy(state.url):
            return _running(settings, state, started=False, began=began)
        if state is not None:
            say("cleaning up what is left of an earlier start")
            _end(settings, state)
        since = time.time()
        try:
            state = (_join if settings.ray_address else _start)(settings, say)
        except BaseException:
            begun = _read(settings.data_dir)
            if begun is not None:
                _end(settings, begun)
            raise
        _wait_for_capacity(settings, since)
        say(f"ready after {time.monotonic() - began:.1f} s")
        return _running(settings, state, started=True, began=began)


def down(settings: Settings) -> bool:
    """End what `up` started, and nothing else. False: nothing was running."""
    if not settings.data_dir.exists():
        return False
    with _locked(settings.data_dir):
        state = _read(settings.data_dir)
        if state is None:
            return False
        _end(settings, state)
        return True


def running(settings: Settings) -> Running | None:
    """The service that `up` started from this data directory, if it answers."""
    state = _read(settings.data_dir)
    if state is None or not _alive(state) or not _healthy(state.url):
        return None
    return _running(settings, state, started=False, began=time.monotonic())


def _start(settings: Settings, say: Callable[[str], None]) -> State:
    """A Ray cluster of our own. The head, its Serve driver and the database start side by side."""
    token = settings.data_dir / "ray-token"
    if not token.exists():
        descriptor = os.open(token, os.O_WRONLY | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    port = settings.port or _free_ports(1)[0]
    _refuse_taken(settings.host, port)
    gcs, dashboard, client, agent, metrics = _free_ports(5)
    mark = secrets.token_hex(8)
    # Unix sockets below it must stay under 107 characters.
    temp_dir = tempfile.mkdtemp(prefix="peft-", dir="/tmp")
    ours = settings.model_copy(
        update={
            "port": port,
            "ray_address": f"http://127.0.0.1:{dashboard}",
            "ray_auth_token": None,
            "ray_auth_token_path": token,
        }
    )
    environment = child_environment(
        {
            **ours.environment(),
            MARK: mark,
            # Always explicit: what Ray does by default differs between its commands.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            # Ray would run everything at 15, the API too; only the training gives way (see cluster.worker).
            "RAY_worker_niceness": "0",
            "PYTHONWARNINGS": "ignore::FutureWarning",
        },
        without=("RAY_ADDRESS", "RAY_AUTH_TOKEN"),
    )
    (settings.data_dir / HANDED_OVER).unlink(missing_ok=True)
    say("starting Ray")
    head_log = settings.data_dir / "ray-head.log"
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    head = _spawn(
        [
            *(*ray, "start", "--head", "--block", "--disable-usage-stats", "--include-dashboard=true"),
            *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
            *(f"--port={gcs}", f"--ray-client-server-port={client}", "--no-monitor"),
            *(f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"),
            *("--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={temp_dir}"),
            *(f"--object-store-memory={OBJECT_STORE_BYTES}",),
            *((f"--num-cpus={settings.local_cpus}",) if settings.local_cpus else ()),
        ],
        environment,
        head_log,
    )
    state = State(
        url=_url(settings.host, port),
        dashboard=f"http://127.0.0.1:{dashboard}",
        joined=False,
        mark=mark,
        head=head.pid,
        head_started=_started(head.pid),
        temp_dir=temp_dir,
    )
    _write(settings.data_dir, state)
    deploy_log = settings.data_dir / "deploy.log"
    deploy = _spawn(
        [
            *(sys.executable, "-m", "jobs.serve", "deploy", "--host", settings.host, "--port", str(port)),
            *("--patience", str(STARTING_SECONDS), "--after-line"),
        ],
        {**environment, "RAY_ADDRESS": f"127.0.0.1:{gcs}"},
        deploy_log,
        stdin=subprocess.PIPE,
    )
    _prepare_database(settings)
    assert deploy.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        deploy.stdin.write(b"\n")
        deploy.stdin.close()
    say("deploying the API and the scheduler")
    deadline = time.monotonic() + STARTING_SECONDS
    while not _healthy(state.url):
        if head.poll() is not None:
            raise _not_started("the Ray head has ended", head_log)
        if deploy.poll() not in (None, 0):
            raise _not_started("the Serve application was not deployed", deploy_log)
        if time.monotonic() > deadline:
            raise _not_started(f"not ready after {STARTING_SECONDS} s", deploy_log)
        time.sleep(0.1)
    return state


def _join(settings: Settings, say: Callable[[str], None]) -> State:
    """Deploy onto a cluster that runs, beside whatever else it does, by a Ray Job of a few seconds."""
    assert settings.ray_address is not None
    dashboard = Dashboard(settings.ray_address, lambda: settings.ray_token, settings.cluster_seconds)
    dashboard.json("GET", "/api/version")
    here = is_this_machine(dashboard.url)
    state = State(
        url=_url(settings.host if here else urlsplit(dashboard.url).hostname or "", settings.port),
        dashboard=dashboard.url,
        joined=True,
        mark="",
        head=None,
        head_started=None,
        temp_dir=None,
    )
    _prepare_database(settings)
    if here:
        handed_over = settings.data_dir / HANDED_OVER
        handed_over.touch(mode=0o600)
        ours = settings.model_copy(update={"ray_address": dashboard.url})
        handed_over.write_text(json.dumps(ours.environment()))
    _write(settings.data_dir, state)
    say("deploying the API and the scheduler")
    arguments = ["deploy", "--host", settings.host, "--port", str(settings.port)]
    said = _driver(
        settings, dashboard, [*arguments, *(("--data-dir", str(settings.data_dir)) if here else ())]
    )
    deadline = time.monotonic() + STARTING_SECONDS
    while not _healthy(state.url):
        if time.monotonic() > deadline:
            raise NotStarted(f"{state.url}/healthz does not answer; the deployment said:\n{said[-2000:]}")
        time.sleep(0.2)
    return state


def _driver(settings: Settings, dashboard: Dashboard, arguments: list[str]) -> str:
    """Run `python -m jobs.serve …` as a Ray Job, and return what it printed.

    Raises:
        NotStarted: it failed.
    """
    import shlex

    here = is_this_machine(dashboard.url)
    python = settings.worker_python or (sys.executable if here else "python")
    name = f"peft-service-{arguments[0]}-{secrets.token_hex(4)}"
    body = {"submission_id": name, "entrypoint": shlex.join([python, "-m", "jobs.serve", *arguments])}
    dashboard.json("POST", "/api/jobs/", body)
    deadline = time.monotonic() + STARTING_SECONDS
    while (status := dashboard.json("GET", f"/api/jobs/{name}")["status"]) in ("PENDING", "RUNNING"):
        if time.monotonic() > deadline:
            break
        time.sleep(0.3)
    said = str(dashboard.json("GET", f"/api/jobs/{name}/logs")["logs"])
    if status != "SUCCEEDED":
        raise NotStarted(f"`jobs.serve {arguments[0]}` on {dashboard.url} ended {status}:\n{said[-3000:]}")
    return said


def _prepare_database(settings: Settings) -> None:
    """Tables, the first project with its key, and the base model that ships with the package."""
    from jobs.base_models import register
    from jobs.db import connect, migrate
    from jobs.keys import ensure_first_key
    from peft_service import shipped

    migrate(settings.database_url)
    engine = connect(settings.database_url)
    try:
        ensure_first_key(engine, settings.data_dir)
        register(engine, (), shipped.SHIPPED_ID, shipped.uri(), move=True)
    finally:
        engine.dispose()


def _wait_for_capacity(settings: Settings, since: float) -> None:
    """Until the scheduler has seen the cluster: then a submitted job is planned, or refused, at once.

    Not for long, because a training cluster that is away is no reason not to take jobs.
    """
    from sqlalchemy import select

    from jobs.db import capacity, connect, reading

    engine = connect(settings.database_url)
    deadline = time.monotonic() + CAPACITY_SECONDS
    try:
        while time.monotonic() < deadline:
            with reading(engine) as conn:
                if (conn.scalar(select(capacity.c.updated_at)) or 0) >= since:
                    return
            time.sleep(0.1)
    finally:
        engine.dispose()


def _end(settings: Settings, state: State) -> None:
    """Bring down what the state names; it may be gone already, in part or whole."""
    if state.joined:
        dashboard = Dashboard(state.dashboard, lambda: settings.ray_token, settings.cluster_seconds)
        with contextlib.suppress(ClusterUnavailable):
            _driver(settings, dashboard, ["delete"])
        (settings.data_dir / HANDED_OVER).unlink(missing_ok=True)
    elif state.head is not None:
        # All at once: asked politely, the head waits for its raylet, and that for its actors, for very long.
        for order, seconds in ((signal.SIGTERM, ENDING_SECONDS), (signal.SIGKILL, DYING_SECONDS)):
            told = [(pid, began) for pid in _ours(state) if (began := _started(pid)) is not None]
            for pid, _ in told:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, order)
            deadline = time.monotonic() + seconds
            # One that is about to end has no environment any more, by which it could be known as ours.
            while time.monotonic() < deadline and (
                any(_started(pid) == began for pid, began in told) or _ours(state)
            ):
                time.sleep(0.05)
    if state.temp_dir:
        shutil.rmtree(state.temp_dir, ignore_errors=True)
    (settings.data_dir / "up.json").unlink(missing_ok=True)


def _ours(state: State) -> list[int]:
    """Processes that are alive and ours; without /proc, the head alone.

    Ours carry our mark, or are in the session of our head: Ray's agents overwrite the memory that /proc shows
    as their environment, its workers may leave the session.
    """
    assert state.head is not None
    known = _started(state.head)
    if not Path("/proc/self/stat").exists():
        return [state.head] if known == state.head_started else []
    # While a session has a process its number is given to no other, so only a different head is not ours.
    session = str(state.head) if known in (None, state.head_started) else ""
    wanted = f"{MARK}={state.mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            fields = _stat(int(entry.name))
            marked = wanted in (entry / "environ").read_bytes().split(b"\0")
            if fields[0] != "Z" and (marked or fields[3] == session):
                found.append(int(entry.name))
    return found


def _stat(pid: int) -> list[str]:
    """Fields of /proc/<pid>/stat from the third on: state, parent, group, session, ... start at index 19."""
    # The name, in brackets, may contain anything.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _started(pid: int) -> str | None:
    """When the process started, in the system's own words; None if there is no such process, or a zombie."""
    if Path("/proc/self/stat").exists():
        try:
            fields = _stat(pid)
        except OSError:
            return None
        return None if fields[0] == "Z" else fields[19]
    answer = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True)
    return answer.stdout.strip() or None


def _alive(state: State) -> bool:
    return state.joined or (state.head is not None and _started(state.head) == state.head_started)


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def _running(settings: Settings, state: State, *, started: bool, began: float) -> Running:
    return Running(
        url=state.url,
        key=(settings.data_dir / "key").read_text().strip(),
        dashboard=state.dashboard,
        joined=state.joined,
        started=started,
        seconds=time.monotonic() - began,
    )


def _not_started(what: str, log: Path) -> NotStarted:
    text = log.read_text(errors="replace")[-3000:]
    return NotStarted(f"{what}; the end of {log}:\n{text}")


def _spawn(
    command: list[str], environment: Mapping[str, str], log: Path, stdin: int = subprocess.DEVNULL
) -> "subprocess.Popen[bytes]":
    """In a session of its own: Ctrl-C in the terminal and the end of this process do not reach it."""
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            env=dict(environment),
            stdin=stdin,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; all are held until the last is found, so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]


def _refuse_taken(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise NotStarted(
                f"{host}:{port} cannot be used ({error.strerror}); "
                "set PEFT_SERVICE_PORT to another port, or to 0 for any free one"
            ) from error


def _url(host: str, port: int) -> str:
    return f"http://{'127.0.0.1' if host in ('0.0.0.0', '') else host}:{port}"


@contextlib.contextmanager
def _locked(data_dir: Path) -> Iterator[None]:
    with (data_dir / "up.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(data_dir: Path) -> State | None:
    try:
        return State(**json.loads((data_dir / "up.json").read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _write(data_dir: Path, state: State) -> None:
    partial = data_dir / "up.json.new"
    partial.write_text(json.dumps(asdict(state), indent=1) + "\n")
    partial.replace(data_dir / "up.json")
