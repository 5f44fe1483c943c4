"""What came out: adapters, their files, their models; methods, bases, logs, and what a preflight says."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import update

from jobs import base_models, db
from peft_service.methods import METHODS
from peft_service.store import FileStore
from peft_service.variants import kind_of
from tests.jobs.serving import BASE, CHAT, Service, serving, write_base


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("service")) as service:
        yield service


@pytest.fixture(scope="module")
def http(service: Service) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {service.keys['a']}"}
    with httpx.Client(base_url=service.url, headers=headers, timeout=60) as client:
        assert client.post("/base_models", json={"id": BASE, "uri": service.base_uri}).status_code == 200
        yield client


@pytest.fixture(scope="module")
def file(http: httpx.Client) -> str:
    return str(http.post("/files", files={"file": ("t", CHAT)}, data={"purpose": "fine-tune"}).json()["id"])


def publish(service: Service, http: httpx.Client, file: str, name: str) -> dict[str, Any]:
    """The adapter of a new job, as the API shows it."""
    job = http.post("/fine_tuning/jobs", json={"model": BASE, "training_file": file, "suffix": name}).json()
    adapter = service.succeed(service.run(job["id"]))
    answer: dict[str, Any] = http.get(f"/adapters/{adapter.id}").json()
    return answer


def test_an_adapter_has_versions_and_many_names(service: Service, http: httpx.Client, file: str) -> None:
    first, second, other = (publish(service, http, file, name) for name in ("bot", "bot", "other"))
    assert [first["version"], second["version"], other["version"]] == [1, 2, 1]
    assert http.get("/adapters/bot").json() == second
    for reference in ("bot@1", "bot@v1", first["id"], first["model"]):
        assert http.get(f"/adapters/{reference}").json() == first
    assert first["manifest"]["record"]["job"] == first["job"]
    assert first["url"].startswith(service.settings.store_url)
    versions = http.get("/adapters/bot/versions").json()["data"]
    assert [each["reference"] for each in versions] == ["bot@2", "bot@1"]

    def listed(query: str) -> list[str]:
        return [each["reference"] for each in http.get(f"/adapters?{query}").json()["data"]]

    assert listed("") == ["other@1", "bot@2", "bot@1"]
    assert listed("name=bot") == ["bot@2", "bot@1"]
    assert listed(f"job={first['job']}") == ["bot@1"]
    assert listed(f"base={BASE}&method=lora") == listed("")
    assert listed("method=nothing") == []
    page = http.get("/adapters?limit=2").json()
    assert page["has_more"] is True
    assert listed(f"limit=2&after={page['data'][-1]['id']}") == ["bot@1"]

    refused = http.delete("/adapters/bot")
    assert refused.status_code == 400
    assert "several versions" in refused.json()["error"]["message"]
    assert http.delete("/adapters/bot@1").json()["id"] == first["id"]
    assert http.delete("/adapters/bot@1").status_code == 404
    assert http.get(f"/adapters/{first['id']}").status_code == 404
    assert listed("name=bot") == ["bot@2"]
    assert http.get("/adapters/bot").json() == second
    assert publish(service, http, file, "bot")["version"] == 3  # a version is never given again
    assert http.delete("/adapters/other").status_code == 200


def test_every_file_of_an_adapter_is_what_its_checksum_says(
    service: Service, http: httpx.Client, file: str
) -> None:
    publish(service, http, file, "pulled")
    listed = http.get("/adapters/pulled/files").json()["data"]
    assert {each["path"] for each in listed} == {"adapter_model.safetensors", "README.md", "manifest.json"}
    for each in listed:
        content = http.get(f"/adapters/pulled/files/{each['path']}")
        assert len(content.content) == each["bytes"] == int(content.headers["content-length"])
        assert hashlib.sha256(content.content).hexdigest() == each["sha256"]
    refused = http.get("/adapters/pulled/files/README.md?presign=true").json()["error"]
    assert refused["code"] == "presign_unsupported"


def test_a_store_with_urls_of_its_own_presigns(
    service: Service, http: httpx.Client, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = publish(service, http, file, "signed")
    monkeypatch.setattr(
        FileStore, "presign", lambda self, key, seconds, name: f"https://s3/{key}?{seconds}&{name}"
    )
    url = http.get("/adapters/signed/files/README.md?presign=true").json()["url"]
    place = adapter["url"].removeprefix(service.settings.store_url + "/")
    assert url == f"https://s3/{place}/README.md?3600&README.md"


def test_a_model_name_must_be_right_from_end_to_end(service: Service, http: httpx.Client, file: str) -> None:
    adapter = publish(service, http, file, "exact")
    tail = adapter["model"].rsplit(":", 1)[1]
    before = service.contents()
    for wrong in (
        f"ft:other:a:exact:{tail}",
        f"ft:{tail}",
        "ft:",
        f"ft::::{tail[:3]}",
        adapter["model"][:-1],
    ):
        assert http.delete(f"/models/{wrong}").status_code == 404, wrong
        assert http.get(f"/models/{wrong}").status_code == 404
        assert http.get(f"/adapters/{wrong}").status_code == 404
    assert service.contents() == before
    assert http.delete(f"/models/{adapter['model']}").json() == {
        "id": adapter["model"],
        "object": "model",
        "deleted": True,
    }


def test_every_method_is_described(http: httpx.Client) -> None:
    listed = http.get("/methods").json()["data"]
    assert [each["kind"] for each in listed] == sorted(kind_of(method) for method in METHODS)
    for each in listed:
        assert http.get(f"/methods/{each['kind']}").json() == each
        required = set(each["schema"].get("required", ()))
        assert each["schema"]["properties"].keys() - required == each["defaults"].keys()
        assert required <= {"kind", "sources", "parts", "type", "template"}
        assert each["learning_rate"] > 0
        assert each["summary"]


def test_the_log_comes_from_the_cluster_while_it_runs_and_from_the_store_after(
    service: Service, http: httpx.Client, file: str
) -> None:
    job = http.post("/fine_tuning/jobs", json={"model": BASE, "training_file": file}).json()["id"]
    path = f"/fine_tuning/jobs/{job}/logs"
    assert http.get(path).text == ""
    lease = service.run(job)
    service.logs[f"ft-{job}-1"] = "step 1\n"
    assert http.get(path).text == "step 1\n"
    assert http.get(path).headers["content-type"].startswith("text/plain")
    service.store.put(f"a/runs/{job}/1/log.txt", "all of it: ä\n".encode())
    service.cluster_answers = False
    assert http.get(path).text == "all of it: ä\n"
    service.succeed(lease)
    assert http.get(path).text == http.get(f"{path}?attempt=1").text == "all of it: ä\n"
    assert http.get(f"{path}?attempt=2").status_code == 404


def test_a_preflight_resolves_everything_and_starts_nothing(
    service: Service, http: httpx.Client, file: str
) -> None:
    elsewhere = write_base(service.directory / "bases" / "unseen", hidden=8)
    before = service.contents()
    body = {
        "model": elsewhere,
        "training_file": file,
        "adapter": {"kind": "qlora", "r": 4},
        "hyperparameters": {"learning_rate_multiplier": 2},
        "resources": {"workers": 2},
    }
    answer = http.post("/preflight", json=body).json()
    assert service.contents() == before
    assert answer["base"]["id"] == "unseen"
    assert answer["base"]["quantize"] == "nf4"
    assert answer["plan"]["workers"] == 2
    assert answer["arithmetic"] == answer["plan"]["arithmetic"]
    assert answer["training_file"]["rows"] == 40
    assert answer["training_file"]["statistics"]
    assert answer["hyperparameters"]["learning_rate"] == pytest.approx(4e-4)
    assert answer["reasons"].keys() == {"n_epochs", "batch_size", "learning_rate", "max_seq_len"}
    job = http.post("/fine_tuning/jobs", json=body).json()
    assert job["plan"] == answer["plan"]
    assert job["training"] == answer["training"]
    assert http.get("/base_models/unseen").json()["uri"] == elsewhere


def test_without_a_cluster_a_preflight_says_so_and_a_submit_is_worth_a_retry(
    service: Service, http: httpx.Client, file: str
) -> None:
    service.see_cluster(nodes=0)
    before = service.contents()
    body = {"model": BASE, "training_file": file}
    answer = http.post("/preflight", json=body).json()
    assert answer["plan"] is None
    assert "no plan" in answer["warnings"][0]
    refused = http.post("/fine_tuning/jobs", json=body)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
    assert refused.json()["error"]["code"] == "capacity_unknown"
    assert service.contents() == before
    service.see_cluster(nodes=1)


# ---------------------------------------------------------------------------------------------- bases


def test_a_base_is_registered_once_and_only_the_operator_moves_it(
    service: Service, http: httpx.Client, tmp_path: Path
) -> None:
    first, second = write_base(tmp_path / "x" / "same"), write_base(tmp_path / "y" / "same", hidden=8)
    body = {"id": "org/same", "uri": first}
    made = http.post("/base_models", json=body).json()
    assert http.post("/base_models", json={**body, "uri": first + "/../same/"}).json() == made
    refused = http.post("/base_models", json={**body, "uri": second})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "base_exists")
    assert http.get("/base_models/org/same").json() == http.get("/base_models/org%2Fsame").json() == made
    assert made["parameters"] == 64 * 16 + 4 * 16 * 16
    moved = base_models.register(service.engine, (), "org/same", second, move=True)
    assert moved.uri == second
    assert http.get("/base_models/org/same").json()["parameters"] == 64 * 8 + 4 * 8 * 8


def test_a_base_of_an_earlier_release_is_measured_anew_once(
    service: Service, http: httpx.Client, tmp_path: Path
) -> None:
    uri = write_base(tmp_path / "earlier")
    assert http.post("/base_models", json={"id": "earlier", "uri": uri}).status_code == 200
    now = base_models.get(service.engine, "earlier")
    known = {name: now.shape[name] for name in ("layers", "hidden", "vocab", "linears", "parameters", "bytes",
                                                "dtype", "tied")}  # fmt: skip
    assert known != now.shape

    def store(**values: Any) -> None:
        with service.engine.begin() as conn:
            conn.execute(update(db.base_models).where(db.base_models.c.id == "earlier").values(**values))

    store(shape=known)
    for name in ("earlier", uri):
        assert base_models.resolve(service.engine, (), name).shape == now.shape
        assert base_models.get(service.engine, "earlier") == now
        store(shape=known)
    store(digest="f" * 64)
    assert base_models.resolve(service.engine, (), "earlier").shape == known, "it is another base now"


def test_a_uri_as_model_gets_an_id_of_its_own(
    service: Service, http: httpx.Client, file: str, tmp_path: Path
) -> None:
    bases = [write_base(tmp_path / name / "tail") for name in ("x", "y")]
    ids = []
    for uri in (*bases, *bases):
        job = http.post("/fine_tuning/jobs", json={"model": uri, "training_file": file})
        ids.append(job.json()["model"])
    assert ids[:2] == ids[2:]
    assert ids[0] == "tail"
    assert ids[1].startswith("tail-")


def test_only_allowed_places_are_read(tmp_path: Path) -> None:
    write_base(tmp_path / "good" / "base")
    write_base(tmp_path / "good-not" / "base")
    allow = (f"file://{tmp_path}/good",)
    with serving(tmp_path / "service", base_models_allow=allow) as service:
        http = httpx.Client(base_url=service.url, headers={"authorization": f"Bearer {service.keys['a']}"})
        file = http.post("/files", files={"file": ("t", CHAT)}, data={"purpose": "fine-tune"}).json()["id"]
        codes = {}
        for path in ("good/base", "good-not/base", "good/../good-not/base"):
            uri = f"file://{tmp_path}/{path}"
            job = http.post("/fine_tuning/jobs", json={"model": uri, "training_file": file})
            base = http.post("/base_models", json={"id": "x", "uri": uri})
            codes[path] = (job.status_code, base.status_code)
        # The operator's list does not bind what is registered already, nor the operator.
        base_models.register(service.engine, (), "mine", service.base_uri)
        job = http.post("/fine_tuning/jobs", json={"model": "mine", "training_file": file})
    assert codes == {
        "good/base": (200, 200),
        "good-not/base": (403, 403),
        "good/../good-not/base": (403, 403),
    }
    assert job.status_code == 200


@pytest.mark.parametrize(
    "config",
    [
        "[]",
        "{",
        '{"architectures": 3}',
        '{"architectures": [null]}',
        '{"architectures": ["LlamaForCausalLM"], "text_config": 3}',
        "\ud800",
    ],
)
def test_a_base_with_nonsense_inside_is_refused(http: httpx.Client, tmp_path: Path, config: str) -> None:
    uri = write_base(tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_bytes(config.encode("utf-8", "surrogatepass"))
    answer = http.post("/base_models", json={"id": "broken", "uri": uri})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "model_not_available"), answer.text
    assert http.get("/base_models/broken").status_code == 404


def test_ids_that_cannot_be_a_folder_are_refused() -> None:
    for good in ("a", "org/name", "Qwen/Qwen3-0.6B", "a_b.c"):
        assert base_models.check_id(good) == good
    assert base_models.id_of("hf://org/name@main") == "org/name"
    assert base_models.id_of("s3://bucket/a/b:c/") == "b-c"
    for uri in ("file:///", "s3://b/..", "hf://@x", "s3://b/äö", "file:///" + "x" * 500):
        assert base_models.check_id(base_models.id_of(uri))
