"""Bad input of every kind: a 4xx in the envelope, and nothing changes. 500 never."""

import json
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs import keys
from jobs.body import MAX_JSON_BYTES
from tests.jobs.serving import BASE, CHAT, Service, serving


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    options = {}
    if request.param == "postgresql":
        options["database_url"] = request.getfixturevalue("postgres").database()
    with serving(tmp_path_factory.mktemp("service"), **options) as service:
        yield service


@pytest.fixture(scope="module")
def http(service: Service) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {service.keys['a']}"}
    with httpx.Client(base_url=service.url, headers=headers, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def things(service: Service, http: httpx.Client) -> dict[str, str]:
    """Ids of project a's things, one of every kind, by the name of the path parameter that takes it."""
    assert http.post("/base_models", json={"id": BASE, "uri": service.base_uri}).status_code == 200
    file = http.post("/files", files={"file": ("t.jsonl", CHAT)}, data={"purpose": "fine-tune"}).json()["id"]
    body = {"model": BASE, "training_file": file, "suffix": "secret", "metadata": {"k": "v"}}
    done = http.post("/fine_tuning/jobs", json=body).json()["id"]
    lease = service.run(done)
    adapter = service.succeed(lease)
    job = http.post("/fine_tuning/jobs", json=body).json()["id"]
    upload = http.post(
        "/uploads", json={"bytes": 3, "filename": "a", "mime_type": "x/y", "purpose": "user_data"}
    ).json()["id"]
    part = http.post(f"/uploads/{upload}/parts", files={"data": ("upload", b"abc")}).json()["id"]
    return {
        "file_id": file,
        "job_id": job,
        "upload_id": upload,
        "model": adapter.manifest["record"]["model"],
        "adapter": adapter.id,
        "path": "README.md",
        "id": BASE,
        "kind": "lora",
        "part": part,
        "done": done,
    }


@pytest.fixture(scope="module")
def document(service: Service, http: httpx.Client) -> dict[str, Any]:
    answer = http.get(service.url.replace("/v1", "/openapi.json"))
    document: dict[str, Any] = answer.json()
    return document


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


def check_envelope(answer: httpx.Response) -> dict[str, Any]:
    assert 400 <= answer.status_code < 500, (answer.request.url, answer.text)
    assert answer.headers["x-request-id"].startswith("req_")
    assert answer.headers["content-type"] == "application/json"
    error: dict[str, Any] = answer.json()["error"]
    assert error["message"]
    assert isinstance(error["type"], str)
    assert {"param", "code"} <= error.keys()
    assert answer.status_code != 409 or answer.headers["x-should-retry"] == "false"
    return error


# ------------------------------------------------------------------------------------------------- keys


def test_every_route_but_health_needs_a_key(
    service: Service, document: dict[str, Any], things: dict[str, str]
) -> None:
    expired = keys.create(service.engine, "a", expires_at=time.time() + 0.05)[1]
    revoked_key, revoked = keys.create(service.engine, "a")
    keys.revoke(service.engine, revoked_key.id)
    time.sleep(0.06)
    before = service.contents()
    headers: list[dict[str, str]] = [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Bearer sk-wrong"},
        {"authorization": f"Basic {service.keys['a']}"},
        {"authorization": f"Bearer {expired}"},
        {"api-key": revoked},
        {"api-key": "x" * 5000},
    ]
    root = service.url.removesuffix("/v1")
    with httpx.Client(base_url=root) as anyone:
        for method, path, _ in operations(document):
            if path == "/healthz":
                continue
            for given_headers in headers:
                answer = anyone.request(method, path.format(**things), headers=given_headers)
                assert answer.status_code == 401, (method, path)
                assert check_envelope(answer)["code"] == "invalid_api_key"
        assert anyone.get("/healthz").json() == {"status": "ok"}
        for path in ("/", "/openapi.json", "/nowhere", "/openai/files", "/v1"):
            assert anyone.get(path).status_code == 401
        said = anyone.get("/v1/files", headers={"authorization": f"Bearer {expired}"}).json()["error"][
            "message"
        ]
        assert "expired" in said
    assert service.contents() == before


def test_no_key_is_stored(service: Service) -> None:
    kept = str(service.contents()["api_keys"])
    assert not any(key in kept or key[10:] in kept for key in service.keys.values())


def test_the_first_key_is_kept_in_a_file_that_only_its_owner_reads(service: Service, tmp_path: Path) -> None:
    first = keys.ensure_first_key(service.engine, tmp_path)
    assert keys.ensure_first_key(service.engine, tmp_path) == first
    path = tmp_path / "key"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text().strip() == first
    assert keys.verify(service.engine, first).project_id == "default"
    keys.revoke(service.engine, keys.verify(service.engine, first).id)
    second = keys.ensure_first_key(service.engine, tmp_path)
    assert second != first
    assert keys.verify(service.engine, second)


# -------------------------------------------------------------------------------------------- isolation


def test_a_key_never_sees_another_project(
    service: Service, document: dict[str, Any], things: dict[str, str], http: httpx.Client
) -> None:
    """Every route, with project a's ids and project b's key: not found, nothing told, nothing changed."""
    shared = {"id", "kind"}
    secrets = [value for name, value in things.items() if name not in shared and name != "path"]
    before = service.contents()
    bodies = {
        "/v1/uploads/{upload_id}/complete": {"json": {"part_ids": [things["part"]]}},
        "/v1/uploads/{upload_id}/parts": {"files": {"data": ("upload", b"abc")}},
        "/v1/fine_tuning/jobs": {"json": {"model": BASE, "training_file": things["file_id"]}},
        "/v1/preflight": {"json": {"model": BASE, "training_file": things["file_id"]}},
        "/v1/preview": {"json": {"model": BASE, "training_file": things["file_id"]}},
        "/v1/files/import": {"json": {"uri": things["file_id"]}},
        "/v1/fine_tuning/alpha/graders/run": {"json": {}},
        "/v1/fine_tuning/alpha/graders/validate": {"json": {}},
        "/v1/adapters/operations": {
            "json": {"operation": {"kind": "merge"}, "adapters": [things["adapter"]]}
        },
    }
    asked = 0
    with httpx.Client(headers={"authorization": f"Bearer {service.keys['b']}"}) as other:
        for method, path, _ in operations(document):
            if path in ("/healthz", "/v1/files", "/v1/uploads", "/v1/base_models") and method == "post":
                continue
            alternatives = [things]
            if "{job_id}" in path:
                alternatives.append({**things, "job_id": things["done"]})
            if "{adapter}" in path:
                alternatives += [
                    {**things, "adapter": name} for name in ("secret", "secret@1", things["model"])
                ]
            for ids in alternatives:
                url = service.url.removesuffix("/v1") + path.format(**ids)
                answer = other.request(method, url, **bodies.get(path, {}))
                if (method, path) == ("get", "/v1/fine_tuning/jobs"):
                    assert answer.json()["data"] == []
                    continue
                named = "{" in path and not any(f"{{{name}}}" in path for name in shared)
                assert answer.status_code in ((400, 404) if named or path in bodies else (200, 404, 405)), (
                    path,
                    answer,
                )
                if answer.status_code == 200:
                    assert not any(secret in answer.text for secret in secrets), path
                asked += 1
        for query in ("after=" + things["job_id"], "metadata[k]=v"):
            answer = other.get(f"{service.url}/fine_tuning/jobs?{query}")
            assert answer.status_code == 404 or answer.json()["data"] == []
        assert other.get(f"{service.url}/files?after={things['file_id']}").status_code == 404
        assert other.get(f"{service.url}/adapters?after={things['adapter']}").status_code == 404
    assert asked > 30
    assert service.contents() == before
    assert http.get(f"/fine_tuning/jobs/{things['job_id']}").status_code == 200


# ---------------------------------------------------------------------------------------------- bad input

DEEP = b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BAD_JSON: dict[str, bytes] = {
    "nothing": b"",
    "spaces": b"  ",
    "broken": b'{"model": ',
    "an array": b"[]",
    "a string": b'"x"',
    "null": b"null",
    "two values": b"{} {}",
    "a comment": b"{} // x",
    "deep": DEEP,
    "deep enough": b'{"a":' * 40 + b"1" + b"}" * 40,
    "not UTF-8": b'{"model": "\xff"}',
    "UTF-16": '{"model": "x"}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"model": "x"}',
    "half a pair": b'{"model": "\\ud800"}',
    "half a pair in a key": b'{"\\udfff": 1}',
    "NUL": b'{"model": "a\\u0000b"}',
    "NUL in a key": b'{"a\\u0000": 1}',
    "a raw NUL": b'{"model": "\x00"}',
    "NaN": b'{"seed": NaN}',
    "infinity": b'{"seed": -Infinity}',
    "a huge number": b'{"seed": 1e999}',
    "a huge integer": b'{"seed": ' + b"9" * 5000 + b"}",
    "2**63": b'{"seed": 9223372036854775808}',
    "a key twice": b'{"model": "a", "model": "b"}',
    "a key twice inside": b'{"metadata": {"a": "x", "a": "y"}}',
    "too large": b'{"model": "' + b"x" * MAX_JSON_BYTES + b'"}',
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_json_is_refused_on_every_route_that_reads_it(
    service: Service, http: httpx.Client, document: dict[str, Any], things: dict[str, str], case: str
) -> None:
    before = service.contents()
    routes = [
        path
        for method, path, operation in operations(document)
        if "application/json" in operation.get("requestBody", {}).get("content", {})
    ]
    assert len(routes) >= 10
    for path in routes:
        url = service.url.removesuffix("/v1") + path.format(**things)
        answer = http.post(url, content=BAD_JSON[case], headers={"content-type": "application/json"})
        check_envelope(answer)
        assert answer.status_code == (413 if case == "too large" else 400)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        answer = http.post("/fine_tuning/jobs", content=b"{}", headers={"content-type": kind})
        assert check_envelope(answer)["code"] == "unsupported_content_type"
    assert service.contents() == before


GRADER = {
    "type": "string_check",
    "name": "right",
    "input": "{{sample.output_text}}",
    "operation": "eq",
    "reference": "4",
}


def bad_jobs(things: dict[str, str]) -> list[dict[str, Any]]:
    names = [
        "../x",
        "a/b",
        "a:b",
        ".a",
        "a.",
        "",
        "x" * 65,
        "ä",
        "a b",
        "a\n",
        "..",
        "a..b",
        3,
        True,
        [],
        {"a": 1},
    ]
    hyper = [
        *({"n_epochs": value} for value in (0, -2, 1.5, "3", True, 1001, None.__class__.__name__, [])),
        *({"batch_size": value} for value in (0, 65537, "all")),
        *({"learning_rate_multiplier": value} for value in (0, -3, "x", 1e9)),
        *(
            {"lora_r": 0},
            {"lora_r": 513},
            {"lora_r": "8"},
            {"lora": False},
            {"lora_dropout": 1},
            {"packing": 1},
        ),
        *({"n_epoch": 3}, {"learning_rate": 1e-4, "learning_rate_multiplier": 2}, {"warmup_ratio": 2}),
        {"learning_rate": 10},
    ]
    return [
        *(
            {"model": value}
            for value in ("nothing", "", 3, None, "hf:/x", "http://x/y", "file://etc", "../..", "a:b")
        ),
        *({"model": value} for value in ("file:///nowhere", "file:///etc/passwd", "file:///etc", "gs://b/x")),
        *({"training_file": value} for value in ("file-none", "", 3, None, "../x", things["job_id"])),
        *({"validation_file": value} for value in ("file-none", "", 3)),
        *({"suffix": value} for value in names),
        *({"name": value} for value in names),
        {"name": "a", "suffix": "b"},
        *({"seed": value} for value in (-1, 2**31, "1", 1.0, True)),
        *(
            {"metadata": value}
            for value in ({"a": 1}, {"a": None}, {"": "x"}, {"a" * 65: "x"}, {"a": "x" * 513}, [])
        ),
        {"metadata": {str(n): "x" for n in range(17)}},
        *({"metadata": value} for value in ({"a": "x\0"}, {"a\0": "x"})),
        *({"model": "a\0"}, {"training_file": "a\0"}, {"suffix": "a\0"}),
        *({"hyperparameters": value} for value in (*hyper, [], "auto")),
        *(
            {"training": value}
            for value in ({"zero_stage": 4}, {"microbatch": 0}, {"precision": "fp8"}, {"lr": 1})
        ),
        *({"training": value} for value in ({"max_seq_len": 4096}, {"max_seq_len": 1}, {"schedule": "step"})),
        {"training": {"n_epochs": 2}, "hyperparameters": {"n_epochs": 3}},
        {"training": {"zero_stage": 0, "precision": "bf16"}},
        {"method": {"type": "dpo"}},
        {"method": {"type": "reinforcement", "reinforcement": {}}},
        {"method": {"type": "supervised", "dpo": {}}},
        *(
            {"method": {"type": value}}
            for value in ("kto", "regression", "distillation", "", "x" * 300, 3, [], {})
        ),
        *(
            {"method": {"type": "distillation", "distillation": {"teacher": value}}}
            for value in ("", "no/such", 3)
        ),
        *(
            {"method": {"type": "reinforcement", "reinforcement": {"grader": value}}}
            for value in (
                None,
                [],
                "x",
                {"type": "string_check"},
                {"type": "python", "name": "p", "source": "("},
            )
        ),
        {
            "method": {
                "type": "reinforcement",
                "reinforcement": {"grader": GRADER, "hyperparameters": {"beta": -0.5}},
            }
        },
        {
            "method": {
                "type": "reinforcement",
                "reinforcement": {"grader": {**GRADER, "input": "{{item.none}}"}},
            }
        },
        {"method": {"a" * 1000: {}}},
        *(
            {"data": value}
            for value in (
                {"columns": {"prompt": "none", "completion": "messages"}},
                {"columns": {"text": "messages"}},
                {"columns": {"prompt": "messages[0].content["}},
                {"columns": []},
                {"columns": {str(n): "a" for n in range(65)}},
                {"documents": "file"},
                {"documents": "page"},
                {"limit": 0},
                {"weight": 1},
                {"sources": [{"file": "file-none"}]},
                {"sources": [{"file": things["file_id"], "weight": 1}]},
                {"sources": [{}]},
                {"sources": "x"},
                {"forgetting_file": "file-none"},
                {"template": {"name": "../../etc/passwd"}},
                {"template": {"jinja": "{% include '/etc/passwd' %}"}},
                {"template": {"jinja": "{{" * 10_000}},
                {"too_long": "split"},
                {"tools": [{"type": "x"}]},
                {"train_on": "everything"},
            )
        ),
        *({"evaluation": value} for value in ({"rows": 0}, {"grader": GRADER}, {"grader": {}}, [], "x")),
        *(
            {"training_file": value}
            for value in ("gs://b/x", "file:///etc/passwd", "https://127.0.0.1/x", "x://")
        ),
        *({"training": {name: 1}} for name in ("early_stopping_patience", "best_checkpoint", "packing")),
        {"method": {"type": "magic"}},
        {"method": {"supervised": {"hyperparameters": {"epochs": 3}}}},
        {"method": "supervised"},
        *(
            {"adapter": value}
            for value in ({"kind": "lorra"}, {"kind": 3}, {"rnak": 3}, {"rank": "8"}, {"rank": 0})
        ),
        *(
            {"adapter": value}
            for value in ({"targets": ["nothing"]}, {"targets": []}, {"targets": "q"}, {"r": 4, "rank": 8})
        ),
        *({"adapter": value} for value in ({"kind": "lora", "type": "other"}, "lora", [], {"dropout": 1.5})),
        {"adapter": {"kind": "qlora"}, "base": {"quantize": "none"}},
        {"adapter": {"rank": 4}, "hyperparameters": {"lora_r": 8}},
        *(
            {"base": value}
            for value in ({"quantize": "int8"}, {"uri": "file:///etc"}, {"revision": "x"}, {"url": "x"})
        ),
        *({"data": value} for value in ({"too_long": "cut"}, {"mask": 1})),
        *(
            {"resources": value}
            for value in ({"workers": 0}, {"workers": 10**6}, {"workers": 64}, {"workers": "all"})
        ),
        *(
            {"resources": value}
            for value in ({"gpus_per_worker": 1}, {"cpus_per_worker": 2000}, {"cpus_per_worker": 64})
        ),
        *({"resources": value} for value in ({"gpus": 1}, {"gpus_per_worker": 8}, {"elastic": 1})),
        *({"priority": value} for value in (101, -101, "high", 0.5)),
        *({"integrations": value} for value in ([{"type": "wandb"}], "wandb")),
        {"traning": {}},
        {"": 1},
        {"model" * 1000: 1},
    ]


def test_a_bad_job_is_refused_and_changes_nothing(
    service: Service, http: httpx.Client, things: dict[str, str]
) -> None:
    good = {"model": BASE, "training_file": things["file_id"]}
    before = service.contents()
    for change, path in product(bad_jobs(things), ("/fine_tuning/jobs", "/preflight")):
        answer = http.post(path, json={**good, **change})
        assert answer.status_code in (400, 403, 409), (change, answer.text)
        error = check_envelope(answer)
        assert len(error["message"]) < 3000
        assert "\n" not in error["message"]
    assert service.contents() == before
    preflight = http.post("/preflight", json=good)
    assert preflight.status_code == 200
    assert preflight.json()["plan"]["workers"] == 1
    assert preflight.json()["arithmetic"]
    assert service.contents() == before


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"training": {"n_epoch": 1}}, "training.n_epoch", "did you mean 'n_epochs'"),
        ({"resources": {"worker": 1}}, "resources.worker", "did you mean 'workers'"),
        ({"adapter": {"kind": "lora", "alfa": 1}}, "adapter.alfa", "did you mean 'alpha'"),
        ({"hyperparameters": {"lora_alpha": 0}}, "hyperparameters.lora_alpha", "greater than or equal to 1"),
        (
            {"method": {"supervised": {"hyperparameters": {"n_epochs": 0}}}},
            "method.supervised.hyperparameters.n_epochs",
            "or",
        ),
        ({"modle": "x"}, "modle", "did you mean 'model'"),
        ({"method": {"type": "dop"}}, "method.type", "did you mean 'dpo'"),
        ({"method": {"type": "dpo"}}, "training_file", "method.type supervised"),
        (
            {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": "x"}}}},
            "method.dpo.hyperparameters.beta",
            "'auto'",
        ),
        ({"data": {"sources": [{"fil": "x"}]}}, "data.sources[0].fil", "did you mean 'file'"),
        ({"data": {"columns": {"prompt": "a b c["}}}, "data.columns.prompt", "no path"),
        ({"data": {"columns": {"prompt": "mesages", "completion": "x"}}}, "training_file", "did you mean"),
        ({"evaluation": {"grader": GRADER}}, "evaluation", "validation_file"),
        (
            {"method": {"type": "grpo", "grpo": {"grader": {**GRADER, "reference": "{{item.anser}}"}}}},
            "method.grpo.grader.reference",
            "anser",
        ),
        (
            {"method": {"type": "grpo", "grpo": {"grader": {"type": "python", "name": "p", "source": "x"}}}},
            "method.grpo.grader.type",
            "operator",
        ),
        ({"adapter": {"kind": "lore"}}, "adapter.kind", "did you mean 'lora'"),
        ({"adapter": {"type": "xyz"}}, "adapter.type", "known are"),
        ({"suffix": "a/b"}, "suffix", "letters, digits"),
        ({"seed": "1"}, "seed", "not '1'"),
    ],
)
def test_the_message_names_the_key_and_the_way_out(
    http: httpx.Client, things: dict[str, str], change: dict[str, Any], param: str, words: str
) -> None:
    error = check_envelope(
        http.post("/preflight", json={"model": BASE, "training_file": things["file_id"], **change})
    )
    assert error["param"] == param
    assert words in error["message"]


PATHS = [
    "/", "/v1", "/v1/", "/v1/files/", "/v2/files", "//v1/files", "/v1//files", "/v1/files/../jobs",
    "/v1/%00", "/v1/files/%00", "/v1/files/a%00b/content", "/v1/files/%ff", "/v1/files/a/b/c",
    "/v1/fine_tuning/jobs/x/y", "/v1/models/%2F", "/v1/models/..%2f..%2fetc", "/v1/models/ft:",
    "/v1/models/ft:x", "/v1/base_models/a:b", "/v1/base_models/%F0%9F%92%A9", "/v1/adapters/a@",
    "/v1/adapters/a@x", "/v1/adapters/@1", "/v1/adapters/a@999999999999", "/v1/adapters/ft:",
    "/v1/adapters/adapter_", "/v1/adapters/a/files", "/v1/methods/x",
    "/v1/fine_tuning/checkpoints/x/permissions", "/v1/fine_tuning/jobs?limit=0",
    "/v1/fine_tuning/jobs?limit=101", "/v1/fine_tuning/jobs?limit=x", "/v1/fine_tuning/jobs?limit=1e9",
    "/v1/fine_tuning/jobs?after=", "/v1/fine_tuning/jobs?after=%00", "/v1/fine_tuning/jobs?after=x%27--",
    "/v1/fine_tuning/jobs?limti=3", "/v1/fine_tuning/jobs?metadata=x", "/v1/fine_tuning/jobs?metadata[a=1",
    "/v1/fine_tuning/jobs?limit=1&limit=2", "/v1/files?limit=10001", "/v1/files?order=up",
    "/v1/files?after=%ff", "/v1/files?purpose=a&x=1", "/v1/adapters?limit=1000",
    "/v1/base_models?after=none", "/openai", "/openai/v1/x", "/openai/deployments",
    "/openai/deployments/x/chat/completions", "/openai/v1/v1/files",
]  # fmt: skip
PATHS += ["/v1/files/" + "x" * 3000, "/v1/fine_tuning/jobs?limit=" + "9" * 5000]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path[:50])
def test_a_bad_url_is_refused(
    service: Service, http: httpx.Client, things: dict[str, str], path: str
) -> None:
    check_envelope(http.get(service.url.removesuffix("/v1") + path))


def test_a_job_s_lists_and_an_adapter_s_files_refuse_what_is_not_theirs(
    http: httpx.Client, things: dict[str, str]
) -> None:
    job = f"/fine_tuning/jobs/{things['job_id']}"
    for path in (
        *(
            f"{job}/{part}?{query}"
            for part in ("events", "checkpoints")
            for query in ("limit=0", "limit=101", "after=x")
        ),
        *(f"{job}/logs?attempt={value}" for value in ("0", "9", "x", "-1")),
        *(
            f"/adapters/{things['adapter']}/files/{path}"
            for path in ("nothing", "../x", "%2e%2e/manifest.json", "a%00")
        ),
        f"/adapters/{things['adapter']}/files/README.md?presign=true",
        f"/adapters/{things['adapter']}/files/README.md?presign=maybe",
    ):
        check_envelope(http.get(path))


def test_every_method_that_a_route_has_not_is_405(
    service: Service, http: httpx.Client, document: dict[str, Any]
) -> None:
    for path, methods in document["paths"].items():
        for method in {"get", "put", "post", "delete", "patch"} - methods.keys():
            if "{" in path:
                continue
            answer = http.request(method, service.url.removesuffix("/v1") + path)
            # There the last segment is the name of something that is not there.
            named = path in ("/v1/adapters/operations", "/v1/files/import") and method in ("get", "delete")
            assert answer.status_code == (404 if named else 405)
            check_envelope(answer)


def test_the_openapi_document_is_valid_and_the_answers_match_it(
    http: httpx.Client, document: dict[str, Any], things: dict[str, str], service: Service
) -> None:
    text = json.dumps(document)
    assert "HTTPValidationError" not in text
    assert "x-model" not in text
    references = [word.split('"')[0] for word in text.split('"$ref": "#/components/schemas/')[1:]]
    assert set(references) <= document["components"]["schemas"].keys()
    checked = 0
    for method, path, operation in operations(document):
        assert operation["summary"]
        if path != "/healthz":
            assert operation["security"]
        schema = operation["responses"]["200"]["content"].get("application/json", {}).get("schema")
        if method != "get" or not schema or "/files/{path}" in path:
            continue
        answer = http.get(service.url.removesuffix("/v1") + path.format(**things))
        assert answer.status_code == 200, (path, answer.text)
        validator = jsonschema.Draft202012Validator({**schema, "components": document["components"]})
        validator.validate(answer.json())
        checked += 1
    assert checked >= 17


# -------------------------------------------------------------------------------------------------- fuzz

TEXT = st.text(max_size=20) | st.sampled_from(
    ["auto", "lora", BASE, "../x", "\0", "é" * 40, "-1", "null", "%00"]
)
ODD = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
JSON = st.recursive(
    ODD, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)


@st.composite
def requests(draw: st.DrawFn, document: dict[str, Any], things: dict[str, str]) -> dict[str, Any]:
    """A request that has the outline of a real one and wrong things in it."""
    method, path, operation = draw(st.sampled_from(operations(document)))
    ids = {name: draw(st.sampled_from([value, "none"]) | TEXT) for name, value in things.items()}
    quoted = {
        name: "".join(f"%{byte:02x}" for byte in value.encode("utf-8", "replace"))
        for name, value in ids.items()
    }
    query = {}
    for parameter in operation.get("parameters", []):
        if parameter["in"] == "query" and draw(st.booleans()):
            query[parameter["name"]] = draw(TEXT | st.integers().map(str)).encode("utf-8", "replace").decode()
    request: dict[str, Any] = {"method": method, "url": path.format(**quoted), "params": query}
    content = operation.get("requestBody", {}).get("content", {})
    if "application/json" in content:
        name = content["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
        known = document["components"]["schemas"][name]["properties"]
        body = draw(st.fixed_dictionaries({}, optional=dict.fromkeys(known, JSON)))
        if "training_file" in known and draw(st.booleans()):
            body |= {"model": BASE, "training_file": things["file_id"]}
        request["content"] = json.dumps(body).encode("utf-8", "surrogatepass")
        request["headers"] = {
            "content-type": draw(st.sampled_from(["application/json", "application/json", "x"]))
        }
    elif "multipart/form-data" in content:
        names = [*content["multipart/form-data"]["schema"]["properties"], "other"]
        request["data"] = {
            name: draw(TEXT).encode("utf-8", "replace").decode() for name in names if draw(st.booleans())
        }
        request["files"] = {
            name: (draw(TEXT), draw(st.binary(max_size=50))) for name in names if draw(st.booleans())
        }
    elif draw(st.booleans()):
        request["content"] = draw(st.binary(max_size=50))
    return request


def test_no_request_is_ever_answered_with_500(
    service: Service, http: httpx.Client, document: dict[str, Any], things: dict[str, str]
) -> None:
    seen: dict[int, int] = {}
    state = {"contents": service.contents()}

    @settings(
        max_examples=120,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(request=requests(document, things))
    def sweep(request: dict[str, Any]) -> None:
        url = service.url.removesuffix("/v1") + request.pop("url")
        try:
            answer = http.request(url=url, **request)
        except (httpx.InvalidURL, UnicodeEncodeError):
            return  # the client cannot even say it
        seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
        contents = service.contents()
        if answer.status_code >= 400:
            check_envelope(answer)
            assert contents == state["contents"], answer.text
        state["contents"] = contents

    sweep()
    assert sum(seen.values()) > 60
    assert seen.get(400, 0) > 15
