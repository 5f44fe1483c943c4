"""Uploads that are huge, broken or strange: constant memory, one envelope, nothing kept."""

import gzip
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, update

from jobs import files as file_rows
from jobs import queue
from jobs.db import files, uploads, writing
from peft_service.errors import Conflict
from peft_service.run import tokenised_key
from peft_service.store import open_store
from tests.jobs.rows import PROJECT, new_job, spec
from tests.jobs.serving import BASE, CHAT, Service, serving

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


# ------------------------------------------------------------------------------------ what is in a file


def upload(http: httpx.Client, name: str, data: bytes) -> dict[str, Any]:
    answer = http.post("/files", files={"file": (name, data)}, data={"purpose": "fine-tune"})
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


QUESTIONS = b"".join(b'{"question": "%d?", "answer": "%d!"}\n' % (n, n) for n in range(30))


@pytest.fixture(scope="module")
def base(service: Service) -> str:
    headers = {"authorization": f"Bearer {service.keys['a']}"}
    body = {"id": BASE, "uri": service.base_uri}
    assert httpx.post(f"{service.url}/base_models", json=body, headers=headers).status_code == 200
    return BASE


def test_a_file_of_no_known_format_goes_in_and_a_job_says_what_its_columns_mean(
    service: Service, http: httpx.Client, base: str
) -> None:
    file = upload(http, "questions.jsonl", QUESTIONS)
    assert (file["status"], file["format"], file["rows"]) == ("processed", None, 30)
    assert (file["container"], file["columns"]) == ("jsonl", {"question": 30, "answer": 30})
    assert any('{"prompt": "question", "completion": "answer"}' in words for words in file["warnings"])
    job = {"model": base, "training_file": file["id"]}
    refused = http.post("/fine_tuning/jobs", json=job).json()["error"]
    assert (refused["code"], refused["param"]) == ("unknown_format", "training_file")
    assert refused["columns"] == ["question", "answer"]
    assert '{"prompt": "question", "completion": "answer"}' in refused["message"]

    columns = {"prompt": "question", "completion": "answer"}
    made = http.post("/fine_tuning/jobs", json={**job, "data": {"columns": columns}}).json()
    assert made["data"]["training"]["format"] == "prompt_completion"
    assert made["data"]["training"]["columns"] == columns
    assert made["data"]["training"]["name"] == "questions.jsonl"
    assert made["data"]["training"]["rows"] == 30
    assert made["method"]["type"] == "supervised"

    bad = http.post(
        "/preflight", json={**job, "data": {"columns": {"prompt": "question", "completion": "a"}}}
    )
    error = bad.json()["error"]
    assert (error["code"], error["param"], error["error_count"]) == (
        "invalid_training_file",
        "training_file",
        30,
    )
    assert error["errors"][0]["code"] == "column_not_found"
    assert error["errors"][0]["line"] == 1


def test_what_was_found_under_a_mapping_is_kept_and_goes_with_the_file(
    service: Service, http: httpx.Client, base: str
) -> None:
    file = upload(http, "q.jsonl", QUESTIONS + b'{"question": "30?", "answer": "30!"}\n')
    prefix = f"a/files/{file['id']}"
    body = {
        "model": base,
        "training_file": file["id"],
        "validation_file": file["id"],
        "data": {"columns": {"prompt": "question", "completion": "answer"}},
    }
    first = http.post("/preflight", json=body).json()
    kept = [info.key for info in service.store.list(f"{prefix}.reading-")]
    assert len(kept) == 2  # what was found, and the rows for the overlap
    # What is there is taken: even if the bytes could not be read any more.
    service.store.delete(prefix)
    assert http.post("/preflight", json=body).json() == first
    assert http.delete(f"/files/{file['id']}").status_code == 200
    assert list(service.store.list(prefix)) == []


def test_tokens_of_a_file_go_with_the_last_file_of_its_bytes(service: Service, http: httpx.Client) -> None:
    data = CHAT + CHAT.splitlines()[0] + b"\n"
    first, second = upload(http, "a.jsonl", data), upload(http, "b.jsonl", data)
    tokens = tokenised_key("a", first["sha256"], "0" * 64)
    others = tokenised_key("b", first["sha256"], "0" * 64)
    for key in (tokens, others):
        service.store.put(key, b"tokens")
    assert http.delete(f"/files/{first['id']}").status_code == 200
    assert service.store.info(tokens) is not None
    assert http.delete(f"/files/{second['id']}").status_code == 200
    assert service.store.info(tokens) is None
    assert service.store.info(others) is not None


def test_every_data_set_of_a_job_is_in_use_until_it_ends(http: httpx.Client, base: str) -> None:
    names = ("training", "held-out", "more", "known")
    ids = {name: upload(http, f"{name}.jsonl", CHAT)["id"] for name in names}
    body = {
        "model": base,
        "training_file": ids["training"],
        "validation_file": ids["held-out"],
        "data": {"sources": [{"file": ids["more"], "limit": 7}], "forgetting_file": ids["known"]},
    }
    job = http.post("/fine_tuning/jobs", json=body).json()
    assert [source["rows"] for source in job["data"]["mixture"]] == [7]
    for file in ids.values():
        refused = http.delete(f"/files/{file}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "file_in_use")
    http.post(f"/fine_tuning/jobs/{job['id']}/cancel")
    for file in ids.values():
        assert http.delete(f"/files/{file}").status_code == 200


def test_a_file_is_found_in_every_place_of_a_spec_on_both_databases(engine: Engine, tmp_path: Path) -> None:
    store = open_store((tmp_path / "store").as_uri())
    (tmp_path / "file").write_bytes(b"x")
    options: dict[str, Any] = {"filename": "f", "purpose": "user_data", "size": 1, "expires_after": None}
    made = [
        file_rows.add(engine, store, PROJECT, tmp_path / "file", sha256=str(n) * 64, **options).id
        for n in range(5)
    ]
    data: dict[str, Any] = spec().data.training.model_dump()
    training, more, held_out, known = ({**data, "id": id} for id in made[:4])
    whole = {"training": training, "mixture": [more], "validation": held_out, "forgetting": known}
    job = queue.submit(engine, new_job(spec=spec(data=whole)))
    for id in made[:4]:
        with pytest.raises(Conflict):
            file_rows.remove(engine, store, PROJECT, id)
    file_rows.remove(engine, store, PROJECT, made[4])
    queue.cancel(engine, PROJECT, job.id)
    for id in made[:4]:
        file_rows.remove(engine, store, PROJECT, id)


def test_preflight_says_what_the_data_is_and_what_is_in_both_files(http: httpx.Client, base: str) -> None:
    lines = CHAT.splitlines(keepends=True)
    training = upload(http, "t.jsonl.gz", gzip.compress(b"".join(lines[:30])))
    held_out = upload(http, "v.json", b"[" + b",".join(lines[28:36]) + b"]")
    more = upload(http, "m.jsonl", b"".join(lines[35:36]) * 2)
    body = {
        "model": base,
        "training_file": training["id"],
        "validation_file": held_out["id"],
        "training": {"n_epochs": 2, "batch_size": 4},
    }
    told = http.post("/preflight", json=body).json()
    assert (told["training_file"]["container"], told["validation_file"]["container"]) == (
        "jsonl+gzip",
        "json_array",
    )
    assert (told["rows"], told["steps"]) == (30, 16)
    assert told["overlap"]["rows"] == 2
    assert [line for _, line in told["overlap"]["lines"]] == [1, 2]
    assert any("word for word" in words for words in told["warnings"])
    assert told["training_file"]["statistics"]["characters"]["max"] == len(lines[29]) - 1
    mixed = http.post("/preflight", json={**body, "data": {"sources": [{"file": more["id"]}]}}).json()
    assert (mixed["rows"], mixed["overlap"]["rows"]) == (32, 3)
    assert mixed["sources"][0]["statistics"]["duplicate_rows"] == 1
    short = http.post("/preflight", json={**body, "data": {"limit": 29}}).json()
    assert (short["rows"], short["overlap"]["rows"]) == (29, 1)


def test_plain_text_is_read_by_line_paragraph_or_file(http: httpx.Client, base: str) -> None:
    text = upload(http, "tales.txt", b"Once upon\na time.\n\nThe end.\n\n\nReally.\n")
    body = {"model": base, "training_file": text["id"]}
    rows = {
        documents: http.post("/preflight", json={**body, "data": {"documents": documents}}).json()["rows"]
        for documents in ("line", "paragraph", "file")
    }
    assert rows == {"line": 4, "paragraph": 3, "file": 1}
    told = http.post("/preflight", json=body).json()
    assert (told["rows"], told["objective"]["kind"]) == (4, "pretraining")
    chat = upload(http, "chat.jsonl", CHAT)
    refused = http.post(
        "/preflight", json={**body, "training_file": chat["id"], "data": {"documents": "file"}}
    )
    assert refused.json()["error"]["param"] == "data.documents"


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
    stored = {info.key for info in service.store.list("a/files/")}
    assert {key for key in stored if ".reading-" not in key} == {f"a/files/{file['id']}" for file in found}


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
