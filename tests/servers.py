"""Real servers for tests, private to one run: PostgreSQL, and two S3-compatible stores, Swift and Ceph.

Each keeps all its state in one temporary directory, listens on free ports of 127.0.0.1, and can be stopped,
killed and started again with its data. No server is ever found by name: each is a process group that its
object started.
"""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


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
    """Process groups started by one server, each with its log file in `folder`.

    Beside each waits a shell at the end of a pipe: it kills the group if this process ends without doing so.
    (Linux could signal the group itself, but does when the *thread* ends that started it.)
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.environment = dict(environment)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._guards: dict[int, subprocess.Popen[bytes]] = {}

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
        group = self.running[name].pid
        script = f"read line; kill -9 -{group}"
        self._guards[group] = subprocess.Popen(
            ["sh", "-c", script], stdin=subprocess.PIPE, start_new_session=True
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
            guard = self._guards.pop(process.pid)
            guard.kill()
            guard.communicate()
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


class S3Server:
    """An S3-compatible server with one user who may make buckets. Subclasses start and stop its processes."""

    access_key = "ftaccess"
    secret_key = "ftsecretkey"
    folder: Path
    processes: Processes
    port: int

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def env(self) -> dict[str, str]:
        """The AWS_* variables for a process that is to use this server, and none of the user's own setup."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> Any:
        """boto3's own client with the user's credentials, for what a store does not do."""
        import boto3
        from botocore.config import Config

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}),
        )

    def bucket(self) -> str:
        """The name of a new bucket."""
        name = f"test-{uuid.uuid4().hex[:16]}"
        self.client().create_bucket(Bucket=name)
        return name

    def start(self) -> None:
        """Start, or start again with the data there was; returns when it answers."""
        raise NotImplementedError

    def stop(self) -> None:
        """Stop serving; clients are refused from now on."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Die in the middle of everything."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        self.processes.end(how=how)

    def close(self) -> None:
        """End everything and remove the data."""
        self.processes.end(how=signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)


class SwiftServer(S3Server):
    """OpenStack Swift with its s3api, from pip alone: a proxy; an account, a container, an object server."""

    access_key = "ft:ft"  # account:user
    kinds = ("account", "container", "object")

    def __init__(self) -> None:
        self.programs = Path(sys.executable).parent
        if not (self.programs / "swift-proxy-server").exists():
            raise Unavailable("OpenStack Swift is not installed (pip install swift)")
        self.folder = Path(tempfile.mkdtemp(prefix="swift-"))
        environment = dict(os.environ) | {"SWIFT_DIR": str(self.folder)}
        self.processes = Processes(self.folder, environment)
        try:
            self._configure()
            self.start()
        except BaseException:
            self.close()
            raise

    def _configure(self) -> None:
        self.port, *ports = free_ports(4)
        for name in ("srv/d1", "cache"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "swift.conf").write_text(SWIFT)
        settings = {"folder": self.folder, "user": pwd.getpwuid(os.geteuid()).pw_name}
        for kind, port in zip(self.kinds, ports, strict=True):
            text = SWIFT_SERVER.format(**settings, port=port) + SWIFT_STORAGE.format(kind=kind)
            (self.folder / f"{kind}.conf").write_text(text)
        text = SWIFT_SERVER.format(**settings, port=self.port) + SWIFT_PROXY.format(secret=self.secret_key)
        (self.folder / "proxy.conf").write_text(text)
        # In one process of its own, because importing swift changes the logging of whoever imports it.
        rings = [f"{kind}:{port}" for kind, port in zip(self.kinds, ports, strict=True)]
        _call(self.processes.environment, sys.executable, "-c", SWIFT_RINGS, *rings, cwd=self.folder)

    def start(self) -> None:
        for kind in (*self.kinds, "proxy"):
            program = self.programs / f"swift-{kind}-server"
            self.processes.start(kind, sys.executable, program, self.folder / f"{kind}.conf")
        wait_until("Swift is up", self._ready)

    def _ready(self) -> bool:
        self.processes.alive()
        # The proxy is there before the servers behind it are.
        if not _answers(self.endpoint + "/healthcheck"):
            return False
        try:
            self.client().list_buckets()
        except Exception:  # whatever it is, only the deadline can end the waiting
            return False
        return True


SWIFT = """
[swift-hash]
swift_hash_path_suffix = x
swift_hash_path_prefix = y
[storage-policy:0]
name = p0
default = yes
[swift-constraints]
max_file_size = 5368709122
"""

SWIFT_RINGS = """
import sys
from swift.common.ring import RingBuilder
for kind, port in (word.split(":") for word in sys.argv[1:]):
    builder = RingBuilder(4, 1, 0)
    place = {"region": 1, "zone": 1, "ip": "127.0.0.1", "port": int(port), "device": "d1"}
    builder.add_dev(place | {"id": 0, "weight": 1})
    builder.rebalance()
    builder.get_ring().save(kind + ".ring.gz")
"""

SWIFT_SERVER = """
[DEFAULT]
devices = {folder}/srv
mount_check = false
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {folder}
log_address = /nonexistent
log_level = WARNING
recon_cache_path = {folder}/cache
fallocate_reserve = 0
eventlet_debug = false
"""

SWIFT_STORAGE = """
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
"""

SWIFT_PROXY = """
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck cache listing_formats bulk s3api tempauth copy slo dlo \
  versioned_writes symlink proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
[filter:tempauth]
use = egg:swift#tempauth
user_ft_ft = {secret} .admin
[filter:s3api]
use = egg:swift#s3api
s3_acl = false
location = us-east-1
check_bucket_owner = false
min_segment_size = 5242880
allow_multipart_uploads = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:healthcheck]
use = egg:swift#healthcheck
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:1
connect_timeout = 0.05
error_suppression_limit = 1
error_suppression_interval = 86400
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:bulk]
use = egg:swift#bulk
[filter:copy]
use = egg:swift#copy
[filter:slo]
use = egg:swift#slo
min_segment_size = 1
[filter:dlo]
use = egg:swift#dlo
[filter:versioned_writes]
use = egg:swift#versioned_writes
allow_versioned_writes = true
allow_object_versioning = true
[filter:symlink]
use = egg:swift#symlink
"""


class CephServer(S3Server):
    """Ceph's S3 gateway, radosgw, before one monitor and one OSD that keeps its data in memory.

    stop() and kill() end the gateway only: an outage for clients, that keeps the data.
    """

    def __init__(self) -> None:
        for program in ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "ceph", "monmaptool"):
            if shutil.which(program) is None:
                packages = "radosgw ceph-mon ceph-osd ceph-common"
                raise Unavailable(f"{program} is not installed (apt-get install {packages})")
        # /tmp, because the path of a unix socket must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="ceph-", dir="/tmp"))
        environment = dict(os.environ) | {"CEPH_CONF": str(self.folder / "ceph.conf")}
        self.processes = Processes(self.folder, environment)
        try:
            self._start_cluster()
            self.start()
            names = ("--uid=ft", "--display-name=ft")
            keys = (f"--access-key={self.access_key}", f"--secret-key={self.secret_key}")
            self._call("radosgw-admin", "-n", "client.rgw", "user", "create", *names, *keys)
        except BaseException:
            self.close()
            raise

    def _start_cluster(self) -> None:
        self.port, monitor = free_ports(2)
        cluster, osd = str(uuid.uuid4()), str(uuid.uuid4())
        for name in ("mon", "osd0", "run", "log"):
            (self.folder / name).mkdir()
        text = CEPH.format(folder=self.folder, port=self.port, monitor=monitor, cluster=cluster)
        (self.folder / "ceph.conf").write_text(text)
        keyring, monmap = self.folder / "keyring", self.folder / "monmap"
        self._call(
            "ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *"
        )
        rights = [word for what in ("mon", "osd", "mgr") for word in ("--cap", what, "allow *")]
        for name in ("client.admin", "client.rgw", "osd.0"):
            # Ceph's authentication stays on: without it radosgw waits for ever.
            self._call("ceph-authtool", keyring, "--gen-key", "-n", name, *rights)
        address = f"[v2:127.0.0.1:{monitor}]"
        self._call("monmaptool", "--create", "--clobber", "--addv", "a", address, "--fsid", cluster, monmap)
        self._call("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
        self.processes.start("mon", "ceph-mon", "-i", "a", "-f")
        self._call("ceph", "--connect-timeout", "20", "osd", "new", osd)
        self._call("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)  # the same id, or it never boots
        self.processes.start("osd", "ceph-osd", "-i", "0", "-f")

    def _call(self, *command: str | Path) -> None:
        _call(self.processes.environment, *command)

    def start(self) -> None:
        self.processes.start("gateway", "radosgw", "-n", "client.rgw", "-f")
        wait_until("radosgw is up", self._ready)

    def _ready(self) -> bool:
        self.processes.alive()
        return _answers(self.endpoint)

    def _end(self, how: signal.Signals) -> None:
        self.processes.end("gateway", how=how)


CEPH = """
[global]
fsid = {cluster}
mon host = [v2:127.0.0.1:{monitor}]
mon initial members = a
public addr = 127.0.0.1
cluster addr = 127.0.0.1
run dir = {folder}/run
admin socket = {folder}/run/$name.asok
log file = {folder}/log/$name.log
pid file = {folder}/run/$name.pid
keyring = {folder}/keyring
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon max pg per osd = 2000
mon data avail crit = 1
mon data avail warn = 1
paxos propose interval = 0.05
paxos min wait = 0.01
osd crush chooseleaf type = 0
[mon.a]
mon data = {folder}/mon
[osd]
osd objectstore = memstore
memstore device bytes = 4294967296
osd data = {folder}/osd$id
osd op num shards = 2
osd op num threads per shard = 1
[client.rgw]
rgw data = {folder}/rgw
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw thread pool size = 32
rgw lc debug interval = 10
"""
