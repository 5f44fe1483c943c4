"""The client against the real API: what it sends is what the service takes, and an outage is not an error."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from jobs import client as client_module
from jobs import queue
from jobs.client import ChecksumMismatch, Client, Unreachable, check_inside, connect, verify
from jobs.objectives import objectives
from jobs.settings import load
from peft_service.errors import (
    Conflict,
    InvalidRequest,
    InvalidTrainingFile,
    NotAuthenticated,
    NotFound,
    UnknownBase,
)
from peft_service.formats import FORMATS, format_of
from peft_service.variants import kind_of
from tests.jobs.rows import new_job
from tests.jobs.service import BASE, Service, publish, rows, serving

WEIGHTS = bytes(range(256)) * 12_000  # three chunks


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("service")) as running:
        yield running


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with service.client() as made:
        yield made


def training_file(client: Client, directory: Path, count: int = 12) -> str:
    path = directory / "train.jsonl"
    path.write_bytes(rows(count))
    return client.upload(path).id


# ------------------------------------------------------------------------------------------------- the API


def test_a_file_goes_up_and_comes_down_again_byte_by_byte(client: Client, tmp_path: Path) -> None:
    file = client.file(training_file(client, tmp_path))
    assert (file.filename, file.purpose) == ("train.jsonl", "fine-tune")
    assert b"".join(client.content(file.id)) == (tmp_path / "train.jsonl").read_bytes()
    assert file.id in [listed.id for listed in client.files()]
    client.delete_file(file.id)
    with pytest.raises(NotFound):
        client.file(file.id)


def test_a_large_file_goes_up_in_parts(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "PART_BYTES", 1000)
    path = tmp_path / "large.jsonl"
    path.write_bytes(rows(60))
    assert path.stat().st_size > 4000
    file = client.upload(path)
    assert b"".join(client.content(file.id)) == path.read_bytes()


def test_bad_lines_arrive_as_the_error_that_lists_them(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(rows(2) + b'{"messages": [{"role": "usr", "content": "x"}]}\nno json\n')
    with pytest.raises(InvalidTrainingFile) as caught:
        client.upload(path)
    assert [line["line"] for line in caught.value.details["errors"]][-1] == 4
    assert caught.value.details["error_count"] >= 2


def test_a_job_from_preflight_to_cancel(client: Client, tmp_path: Path) -> None:
    body = {"model": BASE, "training_file": training_file(client, tmp_path), "name": "sums"}
    assert client.preflight(body).reasons
    job = client.submit(body)
    assert (job.status, job.model, job.name) == ("queued", BASE, "sums")
    assert not job.final
    assert client.pause(job.id).status == "paused"
    assert client.resume(job.id).status == "queued"
    assert client.cancel(job.id).final
    with pytest.raises(Conflict):
        client.cancel(job.id)
    assert list(client.checkpoints(job.id)) == []
    assert client.log(job.id) == ""


def test_lists_go_on_past_a_page_without_a_gap(service: Service, client: Client) -> None:
    wanted = []
    for n in range(103):
        new = new_job(n, project="default", metadata={"page": "yes"})
        wanted.append(queue.submit(service.engine, new).id)
    assert [job.id for job in client.jobs({"page": "yes"})] == wanted[::-1]


def test_a_body_that_is_sent_again_makes_one_job(client: Client, tmp_path: Path) -> None:
    """The first answer is lost on the way: the retry must not make a second job."""
    body = {"model": BASE, "training_file": training_file(client, tmp_path), "metadata": {"lost": "yes"}}
    send, lost = client._http.send, []

    def lossy(request: Any, **options: Any) -> Any:
        response = send(request, **options)
        if not lost:
            lost.append(response)
            raise client_module.httpx.ReadError("connection reset by peer", request=request)
        return response

    client._http.send = lossy  # type: ignore[method-assign]
    job = client.submit(body)
    assert lost
    assert [found.id for found in client.jobs({"lost": "yes"})] == [job.id]
    client.cancel(job.id)


def test_following_shows_every_event_once_and_ends_with_the_job(
    service: Service, client: Client, tmp_path: Path
) -> None:
    job = client.submit({"model": BASE, "training_file": training_file(client, tmp_path), "seed": 7})
    seen: list[str] = []
    for count, update in enumerate(client.follow(job.id, poll=0.01)):
        seen += [event.id for event in update.events]
        if count < 3:
            with queue.writing(service.engine) as conn:
                for n in range(120):
                    queue.append_event(conn, job.id, queue.Event(f"event {count} {n}"))
        if count == 3:
            client.cancel(job.id)
    assert update.job.status == "cancelled"
    assert len(seen) == len(set(seen))
    assert seen == [event.id for event in client.events(job.id)][::-1]


def test_models_bases_and_methods_are_listed(client: Client) -> None:
    assert BASE in [model.id for model in client.models()]
    (base,) = client.base_models()
    assert base.id == BASE
    assert base.parameters > 0
    assert "lora" in [method.kind for method in client.methods()]
    known = {objective.kind: objective for objective in client.objectives()}
    assert known["grpo"].names == ["reinforcement", "grpo"]
    assert "ipo" in known["dpo"].names
    assert known["dpo"].formats == ["preference"]
    assert all(each.summary and each.formula and each.paper and each.measure for each in known.values())


GRADER = {
    "type": "string_check",
    "name": "right",
    "input": "{{sample.output_text}}",
    "operation": "eq",
    "reference": "4",
}


def test_every_objective_is_planned_and_accepted_on_every_format(client: Client, tmp_path: Path) -> None:
    ids = {}
    for format in map(format_of, map(kind_of, FORMATS)):
        lines = [format.sample]
        for key, other in (("label", "another"), ("labels", ["another"])):  # two classes at least
            if format.kind in ("classification", "multi_label") and key in json.loads(format.sample):
                lines.append(json.dumps(json.loads(format.sample) | {key: other}))
        path = tmp_path / f"{format.kind}.jsonl"
        path.write_text("\n".join(lines * 10) + "\n")
        file = client.upload(path)
        assert file.model_dump()["format"] == format.kind
        ids[format.kind] = file.id
    for kind, variant in objectives().items():
        beside = {"grader": GRADER, "teacher": BASE}
        part = {name: value for name, value in beside.items() if name in variant.model_fields}
        for name in variant.formats:
            body = {"model": BASE, "training_file": ids[name], "method": {"type": kind, kind: part}}
            told = client.preflight(body)
            assert told.plan is not None
            assert (told.steps or 0) > 0
            job = client.submit(body)
            assert (job.objective or {})["kind"] == kind
            client.cancel(job.id)


@pytest.mark.parametrize(
    ("change", "expected", "param"),
    [
        ({"model": "no/such"}, InvalidRequest, "model"),
        ({"training_file": "file-none"}, InvalidRequest, "training_file"),
        ({"trainin": {}}, InvalidRequest, "trainin"),
    ],
)
def test_a_refusal_is_the_services_own_error(
    client: Client, tmp_path: Path, change: dict[str, Any], expected: type[Exception], param: str
) -> None:
    body = {"model": BASE, "training_file": training_file(client, tmp_path)}
    with pytest.raises(expected) as caught:
        client.submit({**body, **change})
    assert caught.value.param == param  # type: ignore[attr-defined]
    assert caught.value.details["request_id"].startswith("req_")  # type: ignore[attr-defined]


def test_an_error_becomes_the_most_exact_class_for_its_code() -> None:
    assert client_module._class_of(400, "model_not_available") is UnknownBase
    assert client_module._class_of(400, "something_new") is InvalidRequest
    assert client_module._class_of(404, "fine_tune_not_found") is NotFound
    assert client_module._class_of(503, "store_unavailable") is Unreachable


def test_a_wrong_key_and_a_missing_one(service: Service, tmp_path: Path) -> None:
    with Client(service.url, "sk-wrong") as stranger, pytest.raises(NotAuthenticated):
        list(stranger.jobs())
    with pytest.raises(NotAuthenticated):
        connect(load({"PEFT_SERVICE_URL": service.url, "PEFT_SERVICE_DATA_DIR": str(tmp_path)}))
    with pytest.raises(Unreachable, match="peft-service up"):
        connect(load({"PEFT_SERVICE_DATA_DIR": str(tmp_path)}))


def test_the_local_service_is_found_by_its_data_directory(service: Service) -> None:
    state = service.settings.data_dir / "up.json"
    state.write_text(json.dumps({"url": service.url}))
    with connect(service.settings) as local:
        assert BASE in [model.id for model in local.models()]
    state.unlink()


# ------------------------------------------------------------------------------------------------- adapters


def test_pull_brings_every_byte(service: Service, client: Client, tmp_path: Path) -> None:
    files = {"adapter_model.safetensors": WEIGHTS, "adapter_config.json": b"{}", "sub/dir/x.json": b"[1]"}
    publish(service, "whole", 1, files)
    shown: list[tuple[int, int]] = []
    target = client.pull("whole@1", tmp_path / "new" / "adapter", lambda *seen: shown.append(seen))
    assert {name: (target / name).read_bytes() for name in files} == files
    assert shown[-1][0] == shown[-1][1] > len(WEIGHTS)
    assert [path.name for path in target.parent.iterdir()] == ["adapter"]
    assert verify(target)["files"]
    with pytest.raises(InvalidRequest, match="exists already"):
        client.pull("whole", target)


def test_the_newest_version_is_the_default(service: Service, client: Client) -> None:
    for version in (1, 2):
        publish(service, "versions", version, {"a": b"%d" % version})
    assert client.adapter("versions").version == 2
    assert client.adapter("versions@1").version == 1
    assert [adapter.reference for adapter in client.adapters("versions")] == ["versions@2", "versions@1"]
    with pytest.raises(NotFound):
        client.adapter("versions@3")


def test_a_changed_byte_in_the_bucket_is_found_and_nothing_is_left(
    service: Service, client: Client, tmp_path: Path
) -> None:
    adapter = publish(service, "changed", 1, {"adapter_model.safetensors": WEIGHTS})
    service.store.put(f"{adapter.location}/adapter_model.safetensors", WEIGHTS[:-1] + b"!")
    with pytest.raises(ChecksumMismatch, match=r"adapter_model\.safetensors"):
        client.pull("changed", tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_breaks_off_leaves_nothing(service: Service, client: Client, tmp_path: Path) -> None:
    publish(service, "broken", 1, {"adapter_model.safetensors": WEIGHTS})

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.pull("broken", tmp_path / "adapter", interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "path", ["../x", "/etc/x", "a/../../x", "", ".", "a//b", "a\\..\\x", "a/./b", "c:x", "a/"]
)
def test_a_path_out_of_the_directory_is_refused(path: str) -> None:
    with pytest.raises(InvalidRequest):
        check_inside(path)


def test_plain_paths_are_not_refused() -> None:
    for path in ("manifest.json", "sub/dir/file.bin", ".gitattributes", "a..b"):
        check_inside(path)


def test_verify_finds_what_was_added_removed_or_listed_differently(
    service: Service, client: Client, tmp_path: Path
) -> None:
    publish(service, "local", 1, {"a.json": b"{}", "b.json": b"[]"})
    target = client.pull("local", tmp_path / "adapter")
    (target / "extra").write_bytes(b"x")
    with pytest.raises(ChecksumMismatch, match="extra"):
        verify(target)
    (target / "extra").unlink()
    sums = (target / "SHA256SUMS").read_text()
    (target / "SHA256SUMS").write_text(sums.replace(sums[:8], "00000000", 1))
    with pytest.raises(ChecksumMismatch):
        verify(target)
    (target / "SHA256SUMS").write_text(sums)
    (target / "b.json").unlink()
    with pytest.raises(ChecksumMismatch, match=r"b\.json"):
        verify(target)


# --------------------------------------------------------------------------------------------------- outages


class Flaky(BaseHTTPRequestHandler):
    """Answers with the server's list of (status, headers), then with an empty page; keeps what was asked."""

    server: Any

    def _answer(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        self.rfile.read(length)
        self.server.asked.append((self.command, self.path, dict(self.headers)))
        status, headers = self.server.script.pop(0) if self.server.script else (200, {})
        error = {"message": "later", "type": "server_error", "param": None, "code": "x"}
        body = json.dumps({"data": [], "has_more": False} if status == 200 else {"error": error}).encode()
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = _answer

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    waits: list[float] = []
    monkeypatch.setattr(client_module.time, "sleep", waits.append)
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Flaky)
    server.asked, server.script, server.waits = [], [], waits
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_5xx_and_429_are_tried_again_as_long_as_the_service_asks(flaky: Any) -> None:
    flaky.script = [(500, {}), (503, {"retry-after": "3"}), (429, {"retry-after": "1"})]
    with Client(flaky.url, "sk-x") as client:
        assert list(client.files()) == []
    assert [wait for wait in flaky.waits if wait >= 1] == [3.0, 1.0]
    assert len(flaky.waits) == 3
    assert [int(headers.get("x-stainless-retry-count", 0)) for *_, headers in flaky.asked] == [0, 1, 2, 3]


@pytest.mark.parametrize(("status", "headers"), [(409, {}), (400, {}), (500, {"x-should-retry": "false"})])
def test_what_a_retry_cannot_help_is_not_tried_again(
    flaky: Any, status: int, headers: dict[str, str]
) -> None:
    flaky.script = [(status, headers)] * 5
    with Client(flaky.url, "sk-x") as client, pytest.raises(Exception, match="later"):
        list(client.files())
    assert len(flaky.asked) == 1


def test_all_tries_of_one_post_carry_one_key_and_two_posts_two(flaky: Any) -> None:
    flaky.script = [(500, {}), (502, {}), (200, {}), (200, {})]
    with Client(flaky.url, "sk-x") as client:
        for _ in range(2):
            client._json("POST", "fine_tuning/jobs", {})
    keys = [headers["Idempotency-Key"] for *_, headers in flaky.asked]
    assert keys[0] == keys[1] == keys[2] != keys[3]


def test_tries_end(flaky: Any) -> None:
    flaky.script = [(503, {})] * 50
    with Client(flaky.url, "sk-x", retries=4) as client, pytest.raises(Unreachable):
        list(client.files())
    assert len(flaky.asked) == 5


def test_nobody_there_is_one_sentence(flaky: Any) -> None:
    with Client("http://127.0.0.1:1", "sk-x") as client, pytest.raises(Unreachable) as caught:
        list(client.files())
    assert "127.0.0.1:1" in caught.value.message
    assert len(flaky.waits) == 4


def test_following_outlives_a_restart_of_the_service(service: Service, tmp_path: Path) -> None:
    with service.client(retries=0) as client:
        job = client.submit({"model": BASE, "training_file": training_file(client, tmp_path), "seed": 8})
        send, away = client._http.send, [False]

        def restarting(request: Any, **options: Any) -> Any:
            if away[0]:
                raise client_module.httpx.ConnectError("refused", request=request)
            return send(request, **options)

        client._http.send = restarting  # type: ignore[method-assign]
        problems = []
        for count, update in enumerate(client.follow(job.id, poll=0.01)):
            problems.append(update.problem)
            away[0] = 1 <= count < 4
            if count == 5:
                client.cancel(job.id)
        assert update.job.status == "cancelled"
        assert [problem is None for problem in problems[:6]] == [True, True, False, False, False, True]
        away[0] = True
        with pytest.raises(Unreachable):
            client.job(job.id)


def test_something_else_at_the_url_is_said_so(flaky: Any) -> None:
    flaky.script = [(404, {})]
    with Client(flaky.url, "sk-x") as client:
        with pytest.raises(NotFound, match="later"):
            list(client.files())
        flaky.RequestHandlerClass = _Page
        with pytest.raises(InvalidRequest, match="is a peft-service at this URL"):
            list(client.files())


class _Page(Flaky):
    def do_GET(self) -> None:
        self.send_error(404)
