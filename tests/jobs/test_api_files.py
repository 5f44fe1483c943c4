"""Uploads that are huge, broken or strange: constant memory, one envelope, nothing kept."""

import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import update

from jobs.db import files, uploads, writing
from tests.jobs.serving import CHAT, Service, serving

MIB = 1 << 20


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("service"), max_upload_bytes=80 * MIB) as service:
        yield service


@pytest.fixture
def http(service: Service) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {service.keys['a']}"}
    with httpx.Client(base_url=service.url, headers=headers, timeout=60) as client:
        yield client


BOUNDARY = "b"
TYPE = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}


def part(name: str, data: bytes, filename: str | None = None, extra: str = "") -> bytes:
    file = f'; filename="{filename}"' if filename is not None else ""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n{extra}\r\n'
    return head.encode() + data + b"\r\n"


END = f"--{BOUNDARY}--\r\n".encode()


def stream(size: int) -> Iterator[bytes]:
    """A form whose file is one line of `size` bytes."""
    yield part("purpose", b"fine-tune")
    yield f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'.encode()
    yield b'{"prompt": "'
    for _ in range(size // MIB):
        yield b"x" * MIB
    yield b'", "completion": "y"}\n\r\n' + END


class Peak:
    """The most memory that this process (client and server) has had since `__enter__`, above what it had."""

    def __enter__(self) -> "Peak":
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError as reason:
            pytest.skip(f"this system does not tell a process its peak memory: {reason}")
        self.before = self.now("VmRSS")
        return self

    def __exit__(self, *exc: object) -> None:
        self.growth = self.now("VmHWM") - self.before

    def now(self, name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found
        return int(found[1]) * 1024


@pytest.mark.parametrize("announced", [False, True])
def test_a_file_over_the_limit_is_refused_at_constant_memory(
    service: Service, announced: bool, http: httpx.Client
) -> None:
    before = service.contents()
    size = 600 * MIB if not announced else 200 * MIB
    length = {"content-length": str(sum(map(len, stream(0))) + size)} if announced else {}
    with Peak() as peak:
        answer = http.post("/files", content=stream(size), headers={**TYPE, **length})
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "too_large"
    assert peak.growth < 60 * MIB
    assert service.contents() == before
    assert not list((service.settings.data_dir / "incoming").iterdir())


def test_a_line_of_64_mib_is_a_problem_and_not_a_crash(service: Service, http: httpx.Client) -> None:
    before = service.contents()
    with Peak() as peak:
        answer = http.post("/files", content=stream(64 * MIB), headers=TYPE)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["error_count"]) == (400, "invalid_training_file", 1)
    assert error["errors"][0]["line"] == 1
    assert peak.growth < 100 * MIB
    assert service.contents() == before


@pytest.mark.parametrize("connection", ["keep-alive", "close"])
def test_a_client_that_has_not_sent_all_still_reads_the_refusal(service: Service, connection: str) -> None:
    """The 401 and the 413 arrive although the server answers before it has read the body."""
    size = 100 * MIB
    for key, status in (("sk-wrong", b" 401 "), (service.keys["a"], b" 413 ")):
        with socket.create_connection(("127.0.0.1", service.port), timeout=60) as raw:
            raw.sendall(
                f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
                f"Connection: {connection}\r\n"
                f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {size}\r\n\r\n".encode()
            )
            for _ in range(size // MIB):
                raw.sendall(b"x" * MIB)
            answer = raw.recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1" + status)


def test_a_client_that_asks_first_need_not_send_what_is_too_large(service: Service) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as raw:
        raw.sendall(
            f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {service.keys['a']}\r\n"
            f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {1 << 40}\r\n"
            "Expect: 100-continue\r\n\r\n".encode()
        )
        assert raw.recv(1 << 16).startswith(b"HTTP/1.1 413 ")


def test_a_client_that_hangs_up_leaves_nothing(service: Service, http: httpx.Client) -> None:
    before = service.contents()
    with socket.create_connection(("127.0.0.1", service.port)) as raw:
        raw.sendall(
            f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {service.keys['a']}\r\n"
            f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 100000\r\n\r\n".encode()
            + part("purpose", b"fine-tune")
        )
    assert http.get("/files").status_code == 200
    assert service.contents() == before


BROKEN: dict[str, tuple[bytes, dict[str, str], str]] = {
    "no purpose": (part("file", CHAT, "a") + END, TYPE, "purpose"),
    "an unknown purpose": (
        part("purpose", b"fine-tuning") + part("file", CHAT, "a") + END,
        TYPE,
        "fine-tune",
    ),
    "results cannot be uploaded": (
        part("purpose", b"fine-tune-results") + part("file", CHAT, "a") + END,
        TYPE,
        "purpose",
    ),
    "no file": (part("purpose", b"fine-tune") + END, TYPE, "no file"),
    "a file without a name": (part("purpose", b"fine-tune") + part("file", CHAT) + END, TYPE, "filename"),
    "two files": (part("purpose", b"batch") + part("file", b"a", "a") * 2 + END, TYPE, "twice"),
    "a field twice": (part("purpose", b"batch") * 2 + part("file", b"a", "a") + END, TYPE, "twice"),
    "an unknown field": (
        part("purpos", b"batch") + part("file", b"a", "a") + END,
        TYPE,
        "did you mean 'purpose'",
    ),
    "no end": (part("purpose", b"batch") + part("file", b"a", "a"), TYPE, "closing boundary"),
    "no boundary": (b"x", {"content-type": "multipart/form-data"}, "boundary"),
    "not multipart": (b"{}", {"content-type": "application/json"}, "multipart"),
    "no content type": (b"x", {}, "multipart"),
    "nothing": (b"", TYPE, "closing boundary"),
    "garbage": (b"\xff\x00garbage", TYPE, "cannot be read"),
    "base64": (
        part("purpose", b"batch") + part("file", b"a", "a", "Content-Transfer-Encoding: base64\r\n") + END,
        TYPE,
        "base64",
    ),
    "a path": (part("purpose", b"batch") + part("file", b"a", "../../etc/passwd") + END, TYPE, "file name"),
    "a NUL in a field": (part("purpose", b"batch\x00") + part("file", b"a", "a") + END, TYPE, "NUL"),
    "no UTF-8": (part("purpose", b"\xff") + part("file", b"a", "a") + END, TYPE, "UTF-8"),
    "a long boundary": (b"x", {"content-type": "multipart/form-data; boundary=" + "b" * 300}, "Boundary"),
    "many headers": (b"--b\r\n" + b"A: b\r\n" * 1000 + b"\r\n" + END, TYPE, "header"),
    "a huge field": (part("purpose", b"x" * 100_000) + part("file", b"a", "a") + END, TYPE, "bytes"),
    "many parts": (b"".join(part(f"p{n}", b"x") for n in range(100)) + END, TYPE, "unknown key"),
    "an expiry of words": (
        part("purpose", b"batch")
        + part("expires_after[anchor]", b"created_at")
        + part("expires_after[seconds]", b"soon")
        + part("file", b"a", "a")
        + END,
        TYPE,
        "whole number",
    ),
    "an expiry too far": (
        part("purpose", b"batch")
        + part("expires_after[anchor]", b"created_at")
        + part("expires_after[seconds]", b"99999999")
        + part("file", b"a", "a")
        + END,
        TYPE,
        "between",
    ),
    "an empty training file": (part("purpose", b"fine-tune") + part("file", b"", "a") + END, TYPE, ""),
    "binary for training": (
        part("purpose", b"fine-tune") + part("file", bytes(range(256)) * 40, "a") + END,
        TYPE,
        "",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_form_is_refused_with_a_reason(service: Service, http: httpx.Client, case: str) -> None:
    before = service.contents()
    content, headers, words = BROKEN[case]
    answer = http.post("/files", content=content, headers=headers)
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert words in error["message"]
    assert {"message", "type", "param", "code"} <= error.keys()
    assert service.contents() == before
    assert not list((service.settings.data_dir / "incoming").iterdir())


def test_any_bytes_that_are_not_for_training_are_kept_as_they_are(http: httpx.Client) -> None:
    every = bytes(range(256)) * 100
    answer = http.post("/files", files={"file": ("ä b'\"%.bin", every)}, data={"purpose": "user_data"})
    assert answer.status_code == 200
    made = answer.json()
    content = http.get(f"/files/{made['id']}/content")
    assert content.content == every
    assert content.headers["content-length"] == str(len(every))
    assert "attachment" in content.headers["content-disposition"]
    empty = http.post("/files", files={"file": ("empty", b"")}, data={"purpose": "user_data"}).json()
    assert http.get(f"/files/{empty['id']}/content").content == b""


def test_an_expired_file_is_gone_and_its_bytes_are_swept(service: Service, http: httpx.Client) -> None:
    made = http.post("/files", files={"file": ("t.jsonl", CHAT)}, data={"purpose": "fine-tune"}).json()["id"]
    key = f"a/files/{made}"
    with writing(service.engine) as conn:
        conn.execute(update(files).where(files.c.id == made).values(expires_at=1.0))
    assert http.get(f"/files/{made}").status_code == 404
    assert http.get(f"/files/{made}/content").status_code == 404
    assert http.delete(f"/files/{made}").status_code == 404
    assert made not in http.get("/files").text
    assert service.store.info(key) is not None
    http.post("/files", files={"file": ("x", b"x")}, data={"purpose": "user_data"})
    assert service.store.info(key) is None


def test_an_upload_that_was_left_open_expires(service: Service, http: httpx.Client) -> None:
    begun = {"bytes": 3, "filename": "a", "mime_type": "x/y", "purpose": "user_data"}
    upload = http.post("/uploads", json=begun).json()["id"]
    one = http.post(f"/uploads/{upload}/parts", files={"data": ("upload", b"abc")}).json()["id"]
    with writing(service.engine) as conn:
        conn.execute(update(uploads).where(uploads.c.id == upload).values(expires_at=1.0))
    for verb, options in (
        ("complete", {"json": {"part_ids": [one]}}),
        ("cancel", {}),
        ("parts", {"files": {"data": ("upload", b"x")}}),
    ):
        answer = http.post(f"/uploads/{upload}/{verb}", **options)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "upload_not_pending")
        assert "expired" in answer.json()["error"]["message"]
    assert list(service.store.list(f"a/uploads/{upload}/"))
    http.post("/uploads", json=begun)
    assert not list(service.store.list(f"a/uploads/{upload}/"))


def test_two_completions_at_once_make_one_file(service: Service, http: httpx.Client) -> None:
    upload = http.post(
        "/uploads", json={"bytes": 3, "filename": "a", "mime_type": "x/y", "purpose": "user_data"}
    ).json()["id"]
    one = http.post(f"/uploads/{upload}/parts", files={"data": ("upload", b"abc")}).json()["id"]
    count = len(http.get("/files").json()["data"])
    together = threading.Barrier(4)
    codes: list[int] = []

    def complete() -> None:
        together.wait()
        codes.append(http.post(f"/uploads/{upload}/complete", json={"part_ids": [one]}).status_code)

    threads = [threading.Thread(target=complete) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == [200, 409, 409, 409]
    found = http.get("/files").json()["data"]
    assert len(found) == count + 1
    assert {info.key for info in service.store.list("a/files/")} == {
        f"a/files/{file['id']}" for file in found
    }


BAD_UPLOADS: list[dict[str, Any]] = [
    {"bytes": 0},
    {"bytes": -1},
    {"bytes": "3"},
    {"bytes": 3.5},
    {"bytes": True},
    {"bytes": 2**70},
    {"filename": "a/b"},
    {"filename": ".."},
    {"filename": "a\u0000"},
    {"filename": "x" * 300},
    {"purpose": "nothing"},
    {"mime_type": 3},
    {"expires_after": {"anchor": "created_at", "seconds": 1}},
    {"expires_after": {"anchor": "now", "seconds": 3600}},
    {"extra": 1},
]


@pytest.mark.parametrize("change", BAD_UPLOADS, ids=str)
def test_a_bad_upload_is_not_begun(service: Service, http: httpx.Client, change: dict[str, Any]) -> None:
    before = service.contents()
    good = {"bytes": 3, "filename": "a", "mime_type": "x/y", "purpose": "user_data"}
    answer = http.post("/uploads", json={**good, **change})
    assert answer.status_code == 400, answer.text
    assert service.contents() == before
    too_large = http.post("/uploads", json={**good, "bytes": 81 * MIB})
    assert too_large.status_code == 413
