"""One suite for every store: what a caller may rely on, on file://, on Swift and on Ceph alike."""

import hashlib
import http.client
import http.server
import logging
import multiprocessing
import os
import pickle
import posixpath
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_service import store as store_module
from peft_service.errors import (
    InvalidRequest,
    ObjectExists,
    ObjectNotFound,
    StoreDenied,
    StoreError,
    StoreUnavailable,
)
from peft_service.store import FileStore, S3Store, Store, check_key, open_store, patient
from tests.servers import S3Server, wait_until

MiB = 1024 * 1024
S3 = [
    pytest.param("s3_swift", marks=pytest.mark.s3, id="swift"),
    pytest.param("s3_ceph", marks=pytest.mark.s3, id="ceph"),
]

_buckets: dict[str, str] = {}


def use(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """Point this process at `server`, as an operator does; the URL of an empty prefix there."""
    for name, value in server.env().items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    bucket = _buckets.setdefault(server.endpoint, "") or server.bucket()
    _buckets[server.endpoint] = bucket
    return f"s3://{bucket}/{uuid.uuid4().hex[:8]}/team"


@pytest.fixture(params=[pytest.param("file", id="file"), *S3])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    if request.param == "file":
        return open_store((tmp_path / "my store").as_uri())
    return open_store(use(request.getfixturevalue(request.param), monkeypatch))


@pytest.fixture(params=S3)
def server(request: pytest.FixtureRequest) -> Iterator[S3Server]:
    """A server that the test may stop or kill."""
    found: S3Server = request.getfixturevalue(request.param)
    yield found
    if not any(process.poll() is None for process in found.processes.running.values()):
        found.start()


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def keys(store: Store, prefix: str = "") -> list[str]:
    return [info.key for info in store.list(prefix)]


# ------------------------------------------------------------------------------------------------------
# What is written is what is read


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 9000], ids=["empty", "byte", "2MB"])
def test_what_is_put_is_got(store: Store, tmp_path: Path, data: bytes) -> None:
    store.put("a/b", data)
    assert store.get("a/b") == data
    chunks = list(store.read("a/b"))
    assert b"".join(chunks) == data
    assert all(0 < len(chunk) <= MiB for chunk in chunks)
    store.download("a/b", tmp_path / "new folder" / "copy")
    assert (tmp_path / "new folder" / "copy").read_bytes() == data
    info = store.info("a/b")
    assert info is not None
    assert (info.key, info.size) == ("a/b", len(data))
    assert abs(info.modified - time.time()) < 60
    assert list(store.list("")) == [info]


def test_the_last_write_wins(store: Store) -> None:
    store.put("k", b"first, and longer")
    store.put("k", b"second")
    assert store.get("k") == b"second"
    assert keys(store) == ["k"]


def test_a_large_file_goes_up_in_parts_and_comes_back_whole(store: Store, tmp_path: Path) -> None:
    data = noise(17 * MiB + 123)
    (tmp_path / "source").write_bytes(data)
    store.put_file("big", tmp_path / "source")
    store.download("big", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    if isinstance(store, S3Store):
        tag = store._client().head_object(**store._place("big"))["ETag"]
        assert tag.strip('"').endswith("-3"), "it went up in one part: the test tests nothing"


def test_a_range_is_a_slice(store: Store) -> None:
    data = noise(100)
    store.put("k", data)
    for start in (0, 1, 99, 100, 101):
        for size in (None, 0, 1, 100, 1000):
            expected = data[start:] if size is None else data[start : start + size]
            assert b"".join(store.read("k", start, size)) == expected, (start, size)
            assert b"".join(patient(store, 5).read("k", start, size)) == expected, (start, size)


def test_a_negative_range_is_refused(store: Store) -> None:
    store.put("k", b"abc")
    for start, size in ((-1, None), (0, -1)):
        with pytest.raises(InvalidRequest):
            store.read("k", start, size)


ODD = [
    "a b/c d",
    "a+b",
    "a%2Fb",
    "100%",
    "what?x=1&y=2#z",
    "quote'\"<>.txt",
    "ümläut/日本語/🙂.txt",
    "*[a-z]",
    "~/..hidden../...",
    "-rf",
    "semi;colon:and=equals,@",
    "x" * 255,
]


def test_odd_characters_in_keys_survive_everything(store: Store) -> None:
    for n, key in enumerate(ODD):
        store.put(key, str(n).encode())
    assert keys(store) == sorted(ODD)
    for n, key in enumerate(ODD):
        assert store.get(key) == str(n).encode()
        assert keys(store, key) == [key]
        store.copy(key, "copies/" + key[:200])
        assert store.get("copies/" + key[:200]) == str(n).encode()
        store.delete(key)
    assert all(key.startswith("copies/") for key in keys(store))


# ------------------------------------------------------------------------------------------------------
# What is not there


def test_what_is_not_there_is_not_found_at_the_call(store: Store, tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"as it was")
    store.put("folder/object", b"")
    for missing in ("no", "no/where", "folder", "folder/object/below"):
        assert store.info(missing) is None
        for ask in (
            lambda key: store.get(key),
            lambda key: store.read(key),
            lambda key: store.read(key, 5, 0),
            lambda key: patient(store, 5).read(key),
            lambda key: store.copy(key, "target"),
            lambda key: store.download(key, tmp_path / "kept"),
        ):
            with pytest.raises(ObjectNotFound, match=missing):
                ask(missing)
        store.delete(missing)
    assert keys(store) == ["folder/object"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["kept"]
    assert (tmp_path / "kept").read_bytes() == b"as it was"


def test_deleting_twice_is_deleting_once(store: Store) -> None:
    store.put("a/b/c", b"1")
    store.delete("a/b/c")
    store.delete("a/b/c")
    assert store.info("a/b/c") is None
    assert keys(store) == []
    store.put("a/b", b"the name of the folder is free again")


# ------------------------------------------------------------------------------------------------------
# Conditional writes


@pytest.mark.parametrize("size", [10, 9 * MiB], ids=["small", "in-parts"])
def test_if_absent_leaves_what_is_there(store: Store, tmp_path: Path, size: int) -> None:
    (tmp_path / "source").write_bytes(noise(size))
    store.put_file("k", tmp_path / "source", if_absent=True)
    writes: list[Callable[[], None]] = [
        lambda: store.put_file("k", tmp_path / "source", if_absent=True),
        lambda: store.put("k", b"other", if_absent=True),
        lambda: patient(store, 5).put("k", b"other", if_absent=True),
    ]
    for write in writes:
        with pytest.raises(ObjectExists, match="'k'"):
            write()
    assert hashlib.sha256(store.get("k")).digest() == hashlib.sha256(noise(size)).digest()


def test_if_absent_respects_what_came_while_it_was_uploading(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "source").write_bytes(noise(17 * MiB))
    step = "fsync" if isinstance(store, FileStore) else "pread"  # what an upload calls when it is half done
    real = getattr(os, step)

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.setattr(os, step, real)
        store.put("k", b"another writer")
        return real(*arguments)

    monkeypatch.setattr(os, step, meanwhile)
    with pytest.raises(ObjectExists):
        store.put_file("k", tmp_path / "source", if_absent=True)
    assert store.get("k") == b"another writer"


def test_one_of_many_writers_wins(store: Store, request: pytest.FixtureRequest) -> None:
    start = threading.Barrier(8)
    store.info("warm up")  # so that they do start together

    def write(n: int) -> bool:
        start.wait()
        try:
            store.put("lock", str(n).encode(), if_absent=True)
        except ObjectExists:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    winner = int(store.get("lock"))
    assert won[winner]
    if (
        "swift" not in request.node.callspec.id
    ):  # Swift checks and writes in two steps: see the module's docstring
        assert won.count(True) == 1


# ------------------------------------------------------------------------------------------------------
# Listing and copying


TREE = [
    "a",
    "b/1.5/x",
    "b/1",
    "b-1",
    "b.1",
    "b/1.x",
    "b0",
    "b/c/d",
    "b/c-d",
    "b/c.d",
    "ba/1",
    "c/d/e/f/g",
    "ü",
    "z",
]


def test_a_listing_is_every_key_with_that_prefix_in_order(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(S3Store, "page_size", 5)
    for key in TREE:
        store.put(key, key.encode())
    for prefix in ("", "b", "b/", "b/c", "b/c/", "b/1", "c/d/e/f/g", "nothing/", "zz", "ü"):
        expected = sorted(key for key in TREE if key.startswith(prefix))
        assert keys(store, prefix) == expected
        assert keys(patient(store, 5), prefix) == expected
        assert [info.size for info in store.list(prefix)] == [len(key.encode()) for key in expected]


def test_a_store_sees_nothing_outside_its_prefix(store: Store) -> None:
    store.put("x", b"1")
    beside, inside = open_store(store.url + "-more"), open_store(store.url + "/x-files")
    beside.put("y", b"2")
    inside.put("z", b"3")
    assert keys(store) == ["x", "x-files/z"]
    assert keys(beside) == ["y"]
    assert keys(inside) == ["z"]


def test_a_copy_is_the_same_bytes(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = noise(11 * MiB + 1)
    (tmp_path / "source").write_bytes(data)
    store.put_file("a", tmp_path / "source")
    store.put("b/c", b"was here before")
    store.copy("a", "b/c")
    store.copy("a", "a")
    monkeypatch.setattr(
        S3Store, "copy_size", 5 * MiB
    )  # the least that S3 takes; now it is done in three parts
    store.copy("a", "d")
    assert store.get("a") == store.get("b/c") == store.get("d") == data
    store.delete("a")
    assert store.get("d") == data


# ------------------------------------------------------------------------------------------------------
# Whole or not at all


def test_a_reader_sees_one_version_or_the_other(store: Store) -> None:
    size = 2 * MiB
    versions = [bytes([n]) * size for n in range(4)]
    store.put("k", versions[0])
    done = threading.Event()

    def watch() -> int:
        seen = 0
        while not done.is_set():
            data = store.get("k")
            assert len(data) == size
            assert data == data[:1] * size
            seen += 1
        return seen

    with ThreadPoolExecutor(2) as pool:
        watchers = [pool.submit(watch) for _ in range(2)]
        for n in range(8):
            store.put("k", versions[n % 4])
        done.set()
        assert all(watcher.result() for watcher in watchers)


def test_the_upload_of_a_writer_that_was_killed_is_never_visible(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(noise(25 * MiB))
    script = """
import os, shutil, signal, sys, pathlib
from peft_service import store
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1].startswith("file:"):
    os.fsync = die  # every byte is written, nothing is published
else:
    read, count = os.pread, []
    os.pread = lambda *a: (count.append(1), len(count) > 3 and die(), read(*a))[-1]  # some parts are sent
store.open_store(sys.argv[1]).put_file("k", pathlib.Path(sys.argv[2]))
"""
    done = subprocess.run([sys.executable, "-c", script, store.url, source], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert store.info("k") is None
    assert keys(store) == []
    store.put_file("k", source, if_absent=True)
    assert keys(store) == ["k"]


def test_a_failing_source_leaves_nothing(store: Store, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        store.put_file("k", tmp_path / "missing")
    with pytest.raises(IsADirectoryError):
        store.put_file("k", tmp_path)
    assert keys(store) == []


# ------------------------------------------------------------------------------------------------------
# Processes, threads, memory


def _get_in_child(store: Store, answers: Any) -> None:
    inherited = vars(store).get("_made")
    value = store.get("k")
    # Two processes that write requests to one socket go wrong only now and then: so look, too.
    answers.put((value, inherited is None or vars(store)["_made"][1] is not inherited[1]))


def test_a_store_works_after_a_fork_in_threads_and_after_pickling(store: Store) -> None:
    store.put("k", b"value")  # the connection is open now
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    children = [context.Process(target=_get_in_child, args=(store, answers)) for _ in range(2)]
    for child in children:
        child.start()
    assert store.get("k") == b"value"
    assert [answers.get(timeout=60) for _ in children] == [(b"value", True)] * 2
    for child in children:
        child.join(60)

    fresh = pickle.loads(pickle.dumps(patient(store, 7)))
    assert repr(fresh) == repr(patient(store, 7))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: fresh.get("k"), range(16))) == [b"value"] * 16


@pytest.mark.timeout(180)
def test_memory_stays_constant(store: Store, tmp_path: Path) -> None:
    script = """
import pathlib, resource, sys
from peft_service.store import open_store, patient
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
folder = pathlib.Path(sys.argv[2])
store = patient(open_store(sys.argv[1]), 60)
store.put("small", b"x")
store.get("small")
(folder / "big").touch()
with open(folder / "big", "r+b") as file:
    file.truncate(int(sys.argv[3]))
before = peak()
store.put_file("big", folder / "big")
up = peak()
assert sum(map(len, store.read("big"))) == int(sys.argv[3])
store.download("big", folder / "back")
store.copy("big", "copy")
print(before, up, peak())
"""
    size = 112 * MiB
    command = [sys.executable, "-c", script, store.url, str(tmp_path), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr
    before, up, down = map(int, done.stdout.split())
    assert up - before < 80, "MiB: four parts of 8 MiB at a time, with botocore's copies"
    assert down - up < 20
    for key in ("big", "copy"):
        store.delete(key)


# ------------------------------------------------------------------------------------------------------
# Keys and URLs

_nasty = st.sampled_from(
    ["", ".", "..", "...", "a", "b c", ".tmp", "\\", "a\0", "\n", "é", "\x7f", "\ud800", "x" * 256]
)
_keys = st.one_of(
    st.lists(st.one_of(_nasty, st.text(max_size=5)), max_size=5).map("/".join),
    st.text(max_size=20),
    st.integers(880, 920).map(lambda n: ("k" * 99 + "/") * 9 + "k" * (n - 900)),
)


@given(key=_keys)
@settings(deadline=None)
def test_a_key_is_good_exactly_if_it_stays_in_the_store_under_its_own_name(
    key: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    good = (
        key.isprintable() or not any(character in key for character in map(chr, [*range(32), 127]))
    ) and posixpath.normpath("/" + key) == "/" + key != "/"
    good = good and not key.startswith("/") and "\\" not in key and ".tmp" not in key.split("/")
    try:
        good = good and len(key.encode()) <= 900 and all(len(part.encode()) < 256 for part in key.split("/"))
    except UnicodeEncodeError:
        good = False
    if not good:
        with pytest.raises(InvalidRequest):
            check_key(key)
        return
    root = tmp_path_factory.mktemp("keys")
    store = FileStore((root / "inside").as_uri())
    store.put(key, b"1")
    assert store.get(key) == b"1"
    assert keys(store) == keys(store, key[:1]) == keys(store, key) == [key]
    assert [path.name for path in root.iterdir()] == ["inside"]


def test_no_method_takes_a_bad_key(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    asks: list[Callable[[str], Any]] = [
        lambda key: store.put(key, b""),
        lambda key: store.put_file(key, tmp_path / "file"),
        lambda key: store.get(key),
        lambda key: store.read(key),
        lambda key: store.read(key, 0, 0),
        lambda key: store.download(key, tmp_path / "file"),
        lambda key: store.info(key),
        lambda key: store.copy(key, "good"),
        lambda key: store.copy("good", key),
        lambda key: store.delete(key),
        lambda key: store.presign(key, 60),
    ]
    for key in ("", "/a", "a/", "a//b", "../a", "a/../b", "./a", "a\\b", "a\0", "a/.tmp/b"):
        for ask in asks:
            with pytest.raises(InvalidRequest, match="object key"):
                ask(key)
    for prefix in ("/", "../", "a//", "a/../", "\0", "./"):
        for either in (store, patient(store, 1)):
            with pytest.raises(InvalidRequest, match="can start with"):
                either.list(prefix)


@pytest.mark.parametrize(
    "url",
    [
        *(
            "",
            "/tmp/x",
            "file://relative/x",
            "file:/x",
            "http://x/y",
            "s3://",
            "s3:///x",
            "s3://b",
            "gs://bucket/x",
        ),
        *("s3://bucket/../x", "s3://bucket//x", "s3://key:hunter2@bucket/x", "https://key:hunter2@host/x"),
    ],
)
def test_a_bad_store_url_is_refused_without_echoing_a_password(url: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        open_store(url)
    assert "hunter2" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------
# Only files


def test_a_file_store_holds_plain_files_that_other_programs_can_read(tmp_path: Path) -> None:
    store = open_store(tmp_path.as_uri())
    store.put("adapters/m/a-v0001/adapter_config.json", b"{}")
    assert (tmp_path / "adapters/m/a-v0001/adapter_config.json").read_bytes() == b"{}"
    assert store.presign("adapters/m/a-v0001/adapter_config.json", 60) is None


def test_a_name_cannot_be_an_object_and_a_folder(tmp_path: Path) -> None:
    store = open_store(tmp_path.as_uri())
    store.put("a/b", b"1")
    writes: list[Callable[[], None]] = [
        lambda: store.put("a", b""),
        lambda: store.put("a/b/c", b""),
        lambda: store.copy("a/b", "a/b/c/d"),
    ]
    for write in writes:
        with pytest.raises(StoreError, match="both a folder and an object") as caught:
            write()
        assert caught.value.code == "key_conflict"
    assert keys(store) == ["a/b"]


def test_what_a_killed_writer_left_is_hidden_and_goes_away(tmp_path: Path) -> None:
    store = open_store(tmp_path.as_uri())
    store.put("a", b"1")
    old, new = tmp_path / ".tmp" / "old", tmp_path / ".tmp" / "new"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    assert keys(store) == ["a"]
    store.put("b", b"2")
    assert not old.exists()
    assert new.exists(), "it may be a write that goes on"


def test_a_write_and_the_folders_it_made_reach_the_disk_before_put_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    store = open_store(tmp_path.as_uri())
    store.put("warm/up", b"")
    monkeypatch.setattr(os, "fsync", fsync)
    store.put("x/y/z", b"1")
    assert synced[0].parent == tmp_path / ".tmp", "the bytes first"
    assert synced[1:] == [tmp_path, tmp_path / "x", tmp_path / "x/y"]


def test_a_full_disk_is_unavailable_and_leaves_nothing(tmp_path: Path) -> None:
    script = """
import resource, sys
from peft_service.store import open_store
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
store = open_store(sys.argv[1])
try:
    store.put("k", b"x" * 2000)
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path.as_uri()], capture_output=True, text=True)
    assert done.stdout.startswith("StoreUnavailable 'k' in file://"), done
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_directory_without_permission_is_denied(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    open_store(folder.as_uri()).put("k", b"1")
    folder.chmod(0)
    script = """
import os, sys
from peft_service.store import open_store
store = open_store(sys.argv[1])
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
puts, gets = lambda: store.put("k", b""), lambda: store.get("k")
asks = [puts, gets, lambda: store.info("k"), lambda: list(store.list(""))]
for ask in asks:
    try:
        ask()
    except Exception as error:
        print(type(error).__name__, "give the user" in str(error))
"""
    done = subprocess.run([sys.executable, "-c", script, folder.as_uri()], capture_output=True, text=True)
    folder.chmod(0o755)
    assert done.stdout.split("\n")[:-1] == ["StoreDenied True"] * 4, done


# ------------------------------------------------------------------------------------------------------
# Only S3


@pytest.mark.parametrize("filename", [None, "adapter.tar", 'a "b" ü/日本;x.txt'])
def test_a_presigned_url_gives_the_object_to_anyone_for_a_while(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, filename: str | None
) -> None:
    store = open_store(use(server, monkeypatch))
    store.put("a b/ü", b"data")
    url = store.presign("a b/ü", 60, filename)
    assert url is not None
    assert server.secret_key not in url
    with urllib.request.urlopen(url, timeout=30) as answer:
        assert answer.read() == b"data"
        disposition = answer.headers["Content-Disposition"]
    if filename is not None:
        from email.message import EmailMessage  # an independent reader of RFC 6266

        header = EmailMessage()
        header["Content-Disposition"] = disposition
        assert header.get_content_disposition() == "attachment"
        assert "filename*=UTF-8''" + urllib.parse.quote(filename, safe="") in disposition
        assert store_module.attachment(filename) == disposition


def test_a_presigned_url_ends(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(use(server, monkeypatch))
    store.put("k", b"data")
    url = store.presign("k", 1)
    assert url is not None

    def refused() -> bool:
        try:
            urllib.request.urlopen(url, timeout=30).close()
        except urllib.error.HTTPError as error:
            return error.code == 403
        return False

    wait_until("the URL ended", refused, 20)
    for seconds in (0, -1, 8 * 86400):
        with pytest.raises(InvalidRequest, match="7 days"):
            store.presign("k", seconds)


def everything(store: Store) -> dict[str, Callable[[], Any]]:
    return {
        "put": lambda: store.put("k", b"1"),
        "get": lambda: store.get("k"),
        "read": lambda: store.read("k"),
        "info": lambda: store.info("k"),
        "list": lambda: next(store.list(""), None),
        "copy": lambda: store.copy("k", "l"),
        "delete": lambda: store.delete("k"),
        "patient": lambda: patient(store, 300).get("k"),
    }


@pytest.mark.parametrize("wrong", ["secret", "key", "bucket", "nothing"])
def test_wrong_credentials_are_denied_at_once_and_never_shown(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    url = use(server, monkeypatch)
    open_store(url).put("k", b"1")
    if wrong == "secret":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2hunter2")
        expected = "AWS_SECRET_ACCESS_KEY"
    elif wrong == "key":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "who:who")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2hunter2")
        expected = "AWS_ACCESS_KEY_ID"
    elif wrong == "bucket":
        url = "s3://no-such-bucket-here/x"
        expected = "no bucket 'no-such-bucket-here'"
    else:
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        expected = "no credentials"
    store = open_store(url)
    for name, ask in everything(store).items():
        if (wrong, name) == ("bucket", "delete"):
            continue  # Swift says that what is in no bucket is deleted already
        with pytest.raises(StoreDenied) as caught:
            ask()
        # a HEAD cannot say which part of the credentials is wrong
        assert expected in str(caught.value) or (name in ("info", "copy") and "AWS_" in str(caught.value)), (
            name
        )
        assert "hunter2" not in str(caught.value) + repr(caught.value) + repr(store) + repr(vars(store))
        assert server.secret_key not in str(caught.value) + repr(vars(store))


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials, and no server."""
    for name, value in {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("nowhere")
def test_a_server_of_one_s_own_needs_no_dns_name_per_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://storage.example.org:9000")
    url = open_store("s3://bucket/x").presign("k", 60)
    assert str(url).startswith("https://storage.example.org:9000/bucket/x/k?")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    url = open_store("s3://bucket/x").presign("k", 60)
    assert re.match(r"https://bucket\.s3\.(eu-west-1\.)?amazonaws\.com/x/k\?", str(url))


@pytest.mark.usefixtures("nowhere")
def test_a_wrong_endpoint_is_denied_and_a_silent_one_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "not a url")
    with pytest.raises(StoreDenied, match="AWS_ENDPOINT_URL"):
        open_store("s3://bucket/x").get("k")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StoreUnavailable, match="does not answer"):
        open_store("s3://bucket/x").get("k")


@pytest.mark.usefixtures("nowhere")
def test_patience_ends(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    store = patient(open_store("s3://bucket/x"), 1.0)
    began = time.monotonic()
    with (
        caplog.at_level(logging.INFO, "peft_service"),
        pytest.raises(StoreUnavailable, match=r"tried \d+ times"),
    ):
        store.get("k")
    assert 1.0 <= time.monotonic() - began < 30
    assert len([record for record in caplog.records if record.name == "peft_service.store"]) == 1


# ------------------------------------------------------------------------------------------------------
# Outages


@pytest.fixture
def reviving(server: S3Server) -> Iterator[Callable[[], None]]:
    """Call it to start the stopped server again, a moment later, from another thread."""
    threads: list[threading.Timer] = []

    def soon() -> None:
        threads.append(threading.Timer(0.7, server.start))
        threads[-1].start()

    yield soon
    for thread in threads:
        thread.join()


def test_patience_outlasts_an_outage_and_says_so_once(
    server: S3Server,
    reviving: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    plain = open_store(use(server, monkeypatch))
    store = patient(plain, 60)
    plain.put("before", b"1")
    (tmp_path / "file").write_bytes(noise(9 * MiB))
    server.stop()
    with pytest.raises(StoreUnavailable, match="does not answer"):
        plain.get("before")
    reviving()
    with caplog.at_level(logging.INFO, "peft_service"), ThreadPoolExecutor(5) as pool:
        asked: list[Any] = [
            pool.submit(store.get, "before"),
            pool.submit(store.put, "during", b"2", if_absent=True),
            pool.submit(lambda: keys(store, "bef")),
            pool.submit(store.put_file, "file", tmp_path / "file", if_absent=True),
            pool.submit(lambda: store.info("before") is not None),
        ]
        assert [answer.result() for answer in asked] == [b"1", None, ["before"], None, True]
    assert plain.get("during") == b"2"
    assert plain.get("file") == noise(9 * MiB)
    said = [record.message for record in caplog.records if record.name == "peft_service.store"]
    assert sum("does not answer" in line for line in said) == 1, said
    assert sum("answers again" in line for line in said) == 1, said


def test_an_upload_cut_by_a_crash_is_invisible_and_patience_completes_it(
    server: S3Server, reviving: Callable[[], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = open_store(use(server, monkeypatch))
    source = tmp_path / "source"
    source.write_bytes(noise(33 * MiB))
    real, lock, reads = os.pread, threading.Lock(), 0
    seen: list[Any] = []

    def pread(descriptor: int, size: int, start: int) -> bytes:
        nonlocal reads
        with lock:
            reads += 1
            if reads == 4:  # some parts are there, some on their way
                server.kill()
                reviving()
            elif reads > 4 and start == 0:  # it begins again: the server is back, with what it had
                seen.append((plain.info("k"), keys(plain)))
        return real(descriptor, size, start)

    monkeypatch.setattr(os, "pread", pread)
    patient(plain, 60).put_file("k", source, if_absent=True)
    assert seen == [(None, [])]
    assert plain.get("k") == noise(33 * MiB)


def test_a_read_goes_on_where_it_was_cut_but_never_mixes_two_versions(
    server: S3Server, reviving: Callable[[], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = open_store(use(server, monkeypatch))
    data = noise(24 * MiB)  # does not fit into the buffers of a socket: it will be cut indeed
    (tmp_path / "source").write_bytes(data)
    plain.put_file("k", tmp_path / "source")
    plain.copy("k", "replaced")

    impatient = plain.read("k")
    assert next(impatient) == data[:MiB]
    chunks = patient(plain, 60).read("k", 7)
    got = [next(chunks)]
    mixed = patient(plain, 60).read("replaced")
    next(mixed)

    server.kill()
    with pytest.raises(StoreUnavailable):
        list(impatient)
    reviving()
    got += chunks
    assert b"".join(got) == data[7:]
    plain.put("replaced", b"another")
    with pytest.raises(StoreError, match="was replaced while it was being read"):
        list(mixed)


@dataclass
class Fault:
    """What a proxy before the real server does to the next requests."""

    method: str
    kind: str  # "lose" the answer, "overloaded", "cut" the body of the answer, "html" instead of XML
    times: int


@pytest.fixture
def proxied(
    s3_swift: S3Server, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Store, list[Fault], list[str]]]:
    """A store on Swift behind a proxy that misbehaves as told, and the requests that it saw."""
    faults: list[Fault] = []
    seen: list[str] = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            seen.append(f"{self.command} {self.path}")
            fault = faults[0].kind if faults and faults[0].method == self.command else ""
            if fault:
                faults[0].times -= 1
                if not faults[0].times:
                    faults.pop(0)
            if fault == "overloaded":
                return self.answer(503, {}, b"<Error><Code>SlowDown</Code><Message>slow</Message></Error>")
            if fault == "html":
                return self.answer(200, {}, b"<html><p>Welcome to the hotel wifi")
            upstream = http.client.HTTPConnection("127.0.0.1", s3_swift.port, timeout=60)
            upstream.request(self.command, self.path, body, dict(self.headers))
            answer = upstream.getresponse()
            data = answer.read()
            upstream.close()
            if fault == "lose":
                self.close_connection = True
                return None
            headers = {
                k: v for k, v in answer.getheaders() if k.lower() not in ("connection", "transfer-encoding")
            }
            if self.command != "HEAD":
                headers["Content-Length"] = str(len(data))
            if fault == "cut":
                data = data[: len(data) // 2]
                self.close_connection = True
            return self.answer(answer.status, headers, data)

        def answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
            self.send_response_only(status)
            for name, value in ({"Content-Length": str(len(data))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = pass_on

        def log_message(self, *_: Any) -> None:
            pass

    url = use(s3_swift, monkeypatch)
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
    yield open_store(url), faults, seen
    proxy.shutdown()
    proxy.server_close()


@pytest.mark.s3
@pytest.mark.parametrize("times", [1, 3], ids=["botocore-retries", "we-retry"])
def test_a_write_whose_answer_was_lost_is_still_ours(
    proxied: tuple[Store, list[Fault], list[str]], times: int
) -> None:
    store, faults, _ = proxied
    faults.append(Fault("PUT", "lose", times))
    patient(store, 30).put("k", b"ours", if_absent=True)
    assert faults == []
    assert store.get("k") == b"ours"
    faults.append(Fault("PUT", "lose", times))
    with pytest.raises(ObjectExists):
        patient(store, 30).put("k", b"theirs", if_absent=True)


@pytest.mark.s3
@pytest.mark.parametrize("kind", ["overloaded", "lose", "html"])
def test_a_server_in_trouble_is_unavailable_and_worth_waiting_for(
    proxied: tuple[Store, list[Fault], list[str]], kind: str
) -> None:
    store, faults, _ = proxied
    store.put("k", b"1")
    faults.append(Fault("GET", kind, 3))
    with pytest.raises(StoreUnavailable):
        keys(store)
    faults[:] = [Fault("GET", kind, 4)]
    assert keys(patient(store, 30)) == ["k"]


@pytest.mark.s3
def test_a_cut_answer_is_never_taken_for_the_object(
    proxied: tuple[Store, list[Fault], list[str]], tmp_path: Path
) -> None:
    store, faults, _ = proxied
    data = noise(5 * MiB)
    store.put("k", data)
    for ask in (
        lambda: store.get("k"),
        lambda: b"".join(store.read("k")),
        lambda: store.download("k", tmp_path / "file"),
    ):
        faults[:] = [Fault("GET", "cut", 1)]
        with pytest.raises(StoreUnavailable):
            ask()
    assert list(tmp_path.iterdir()) == []
    faults[:] = [Fault("GET", "cut", 2)]
    patient(store, 30).download("k", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == data


@pytest.mark.s3
@pytest.mark.parametrize("page", [1, 2])
def test_a_listing_cut_between_pages_goes_on_without_gap_or_repetition(
    proxied: tuple[Store, list[Fault], list[str]], page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, faults, _ = proxied
    monkeypatch.setattr(S3Store, "page_size", 2)
    for n in range(6):
        store.put(f"k{n}", b"")
    listing = patient(store, 30).list("k")
    got = [next(listing).key for _ in range(page)]
    faults.append(Fault("GET", "overloaded", 3))  # botocore gives up: we start again
    got += [info.key for info in listing]
    assert faults == []
    assert got == [f"k{n}" for n in range(6)]
