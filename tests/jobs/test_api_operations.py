"""Operations on adapters over REST: what there is, what is refused, and the job that comes of the rest."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from jobs import queue
from peft_service import catalog
from peft_service.methods.lora import LoRA
from peft_service.operations import OPERATIONS
from peft_service.spec import OperationSpec, spec_of
from peft_service.variants import kind_of
from tests.jobs.serving import BASE, CHAT, Service, serving, write_base

LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("service")) as service:
        yield service


@pytest.fixture(scope="module")
def http(service: Service) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {service.keys['a']}"}
    with httpx.Client(base_url=service.url, headers=headers, timeout=60) as client:
        other = write_base(service.directory / "bases" / "other", hidden=32)
        for id, uri in ((BASE, service.base_uri), ("tiny/other", other)):
            assert client.post("/base_models", json={"id": id, "uri": uri}).status_code == 200
        yield client


@pytest.fixture(scope="module")
def adapters(service: Service, http: httpx.Client) -> dict[str, catalog.Adapter]:
    file = http.post("/files", files={"file": ("t", CHAT)}, data={"purpose": "fine-tune"}).json()["id"]

    def publish(name: str, model: str = BASE, **parts: Any) -> catalog.Adapter:
        job = http.post(
            "/fine_tuning/jobs", json={"model": model, "training_file": file, "name": name}
        ).json()
        extra = {path: json.dumps(value).encode() for path, value in parts.items()}
        return service.succeed(service.run(job["id"]), {k.replace("__", "."): v for k, v in extra.items()})

    task = {"task": "causal_lm", "labels": []}
    tags = {"task": "sequence_classification", "labels": ["x", "y"]}
    return {
        "one": publish("one", adapter_config__json=LORA, task__json=task),
        "two": publish("two", adapter_config__json=LORA | {"r": 8}, task__json=task),
        "elsewhere": publish("elsewhere", "tiny/other", adapter_config__json=LORA, task__json=task),
        "labels": publish("labels", adapter_config__json=LORA, task__json=tags),
        "delta": publish("delta", task__json=task),
    }


def asked(http: httpx.Client, operation: dict[str, Any], *adapters: str, **more: Any) -> httpx.Response:
    return http.post("/adapters/operations", json={"operation": operation, "adapters": adapters, **more})


def test_the_list_says_of_each_whether_it_is_exact(http: httpx.Client) -> None:
    listed = {each["kind"]: each for each in http.get("/operations").json()["data"]}
    assert set(listed) == {kind_of(variant) for variant in OPERATIONS}
    ways = {way["name"]: way["exact"] for way in listed["combine"]["ways"]}
    assert (ways["cat"], ways["svd"], ways["linear"], ways["ties_svd"]) == (True, True, False, False)
    assert set(ways) == set(listed["combine"]["schema"]["properties"]["how"]["enum"])
    assert (listed["merge"]["exact"], listed["unmerge"]["exact"], listed["convert"]["exact"]) == (
        True,
        True,
        False,
    )
    assert listed["convert"]["schema"]["properties"]["max_error"]["default"] == 0.05
    assert all(each["summary"] and each["title"] for each in listed.values())


def test_an_operation_is_a_job_with_its_sources(
    service: Service, http: httpx.Client, adapters: dict[str, catalog.Adapter]
) -> None:
    answer = asked(http, {"kind": "combine", "weights": [0.5, 2]}, "one@1", adapters["two"].id, name="both")
    assert answer.status_code == 200, answer.text
    job = answer.json()
    assert (job["object"], job["status"], job["name"]) == ("fine_tuning.job", "queued", "both")
    assert job["operation"]["how"] == "cat"
    assert job["operation"]["weights"] == [0.5, 2]
    assert [source["reference"] for source in job["sources"]] == ["one@1", "two@1"]
    assert [source["digest"] for source in job["sources"]] == [adapters[n].digest for n in ("one", "two")]
    assert (job["adapter"]["kind"], job["adapter"]["rank"]) == ("lora", 12), "4 and 8 stacked"
    assert (job["model"], job["training_file"], job["training"]) == (BASE, "", {})
    assert (job["plan"]["workers"], job["plan"]["gpus_per_worker"]) == (1, 0)
    assert http.get(f"/fine_tuning/jobs/{job['id']}").json()["operation"] == job["operation"]
    assert http.get("/fine_tuning/jobs").json()["data"][0]["id"] == job["id"]
    events = [each["message"] for each in http.get(f"/fine_tuning/jobs/{job['id']}/events").json()["data"]]
    assert events == [f"Created job: {job['id']}, combine of one@1, two@1"]
    spec = spec_of(queue.get(service.engine, "a", job["id"]).spec)
    assert isinstance(spec, OperationSpec)
    assert isinstance(spec.method, LoRA)
    base = http.get(f"/base_models/{BASE}").json()
    assert (spec.base.uri, spec.base.digest) == (base["uri"], base["digest"])

    made = service.succeed(service.run(job["id"]))
    shown = http.get(f"/adapters/{made.id}").json()
    assert (shown["name"], shown["version"], shown["method"]) == ("both", 1, "lora")
    lineage = catalog.lineage(made)
    assert [source["id"] for source in lineage["sources"]] == [adapters[n].id for n in ("one", "two")]
    assert lineage["operation"]["kind"] == "combine"
    assert lineage["data"] == {}


def test_the_same_key_is_the_same_job(http: httpx.Client, adapters: dict[str, catalog.Adapter]) -> None:
    body = {"operation": {"kind": "merge"}, "adapters": ["one"]}
    first, again = (
        http.post("/adapters/operations", json=body, headers={"idempotency-key": "k1"}).json()
        for _ in range(2)
    )
    assert first["id"] == again["id"]
    assert first["name"] == "one-merge"
    assert http.post(f"/fine_tuning/jobs/{first['id']}/cancel").json()["status"] == "cancelled"


def test_unmerging_finds_the_adapter_by_the_lineage(
    service: Service, http: httpx.Client, adapters: dict[str, catalog.Adapter]
) -> None:
    job = asked(http, {"kind": "merge"}, "one", name="whole").json()
    service.succeed(service.run(job["id"]))
    back = asked(http, {"kind": "unmerge"}, "whole", name="back").json()
    assert [source["reference"] for source in back["sources"]] == ["whole@1", "one@1"]
    assert back["adapter"]["kind"] == "lora"
    refused = asked(http, {"kind": "unmerge"}, "one").json()["error"]
    assert refused["code"] == "not_a_merge"


@pytest.mark.parametrize(
    ("operation", "names", "code", "param", "words"),
    [
        ({"kind": "combine"}, ["one", "elsewhere"], "other_base", "adapters", "an adapter of tiny/other"),
        ({"kind": "combine"}, ["one", "labels"], "other_task", "adapters", "with the labels x"),
        ({"kind": "combine"}, ["one", "nobody"], "adapter_not_found", r"adapters[1]", "nobody"),
        ({"kind": "combine", "how": "linear"}, ["one", "two"], "invalid_value", "operation.how", "one rank"),
        ({"kind": "combine", "weights": [1]}, ["one", "two"], "invalid_value", "operation.weights", "1 we"),
        ({"kind": "combine"}, ["delta", "one"], "not_a_lora", "adapters", "delta@1 is no LoRA"),
        ({"kind": "convert"}, ["delta"], "not_convertible", "adapters", "no PEFT adapter"),
        ({"kind": "convert", "max_error": 2}, ["one"], "invalid_value", "operation.max_error", "less than"),
        ({"kind": "truncate", "rank": 5}, ["one"], "invalid_value", "operation.rank", "no rank 5"),
        ({"kind": "merge", "dtpye": "x"}, ["one"], "unknown_parameter", "operation.dtpye", "'dtype'"),
        ({"kind": "merge"}, ["one", "two"], "invalid_value", "adapters", "takes 1 adapter, and 2"),
        ({"kind": "merge"}, [], "invalid_value", "adapters", "at least 1"),
        ({"kind": "soup"}, ["one"], "invalid_value", "adapters", "takes 2 to 64"),
        ({"kind": "combine"}, ["one"] * 17, "invalid_value", "adapters", "takes 1 to 16"),
        ({"kind": "soup"}, ["one"] * 63 + ["nobody"], "adapter_not_found", "adapters[63]", "nobody"),
        ({"kind": "combine", "weights": []}, ["one", "two"], "invalid_value", "operation.weights", "1 item"),
        ({"kind": "combine", "weights": [0, 0]}, ["one", "two"], "invalid_value", "operation.weights", "all"),
        ({"kind": "combine", "weights": [1e300, 1]}, ["one", "two"], "invalid_value",
         "operation.weights[0]", "1000"),
        ({"kind": "soup", "weights": [1, -1]}, ["one", "one"], "invalid_value", "operation.weights", "not 0"),
        ({"kind": "soup"}, ["one", "two"], "invalid_value", "adapters", "differ in r"),
        ({"kind": "arrow", "general": 1}, ["one", "one"], "invalid_value", "operation.general", "to 0"),
        ({"kind": "convert", "max_error": 0}, ["one"], "invalid_value", "operation.max_error", "0.000001"),
        ({"kind": "add"}, ["one"], "invalid_value", "operation", "'merge'"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_with_the_reason(
    service: Service,
    http: httpx.Client,
    adapters: dict[str, catalog.Adapter],
    operation: dict[str, Any],
    names: list[str],
    code: str,
    param: str,
    words: str,
) -> None:
    before = service.contents()
    answer = asked(http, operation, *names)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, code, param), error
    assert words in error["message"]
    assert service.contents() == before


def test_another_projects_adapters_are_not_there(
    service: Service, http: httpx.Client, adapters: dict[str, catalog.Adapter]
) -> None:
    theirs = {"authorization": f"Bearer {service.keys['b']}"}
    body = {"operation": {"kind": "merge"}, "adapters": [adapters["one"].id]}
    assert (
        http.post("/adapters/operations", json=body, headers=theirs).json()["error"]["code"]
        == "adapter_not_found"
    )


def test_an_adapter_of_a_method_that_cannot_be_merged_says_why(
    service: Service, http: httpx.Client, adapters: dict[str, catalog.Adapter]
) -> None:
    job = asked(http, {"kind": "merge"}, "two", name="big").json()
    service.succeed(service.run(job["id"]))
    for kind in ("merge", "convert"):
        error = asked(http, {"kind": kind}, "big").json()["error"]
        assert error["code"] == "not_mergeable"
        assert "whole model already" in error["message"]


def test_what_no_node_can_hold_is_refused_with_the_numbers(
    service: Service, http: httpx.Client, adapters: dict[str, catalog.Adapter]
) -> None:
    service.see_cluster(nodes=3, cpus=0.5)
    try:
        error = asked(http, {"kind": "merge"}, "one").json()["error"]
    finally:
        service.see_cluster(nodes=1)
    assert error["code"] == "does_not_fit"
    assert "1 CPU, 2.6 GB memory" in error["message"]
    assert "0.5 CPUs" in error["message"]
    assert error["needed"]["memory_bytes"] > 2_600_000_000


def test_a_deleted_adapter_is_not_operated_on(http: httpx.Client, service: Service) -> None:
    file = http.post("/files", files={"file": ("t", CHAT)}, data={"purpose": "fine-tune"}).json()["id"]
    job = http.post("/fine_tuning/jobs", json={"model": BASE, "training_file": file, "name": "gone"}).json()
    adapter = service.succeed(service.run(job["id"]))
    assert http.delete(f"/adapters/{adapter.id}").status_code == 200
    assert asked(http, {"kind": "merge"}, adapter.id).json()["error"]["code"] == "adapter_deleted"


def test_a_method_starts_from_adapters_that_it_can_start_from(
    service: Service, http: httpx.Client, adapters: dict[str, catalog.Adapter]
) -> None:
    """As with operations: what is no source of it is refused when it is asked for, not when it runs."""
    file = http.post("/files", files={"file": ("t", CHAT)}, data={"purpose": "fine-tune"}).json()["id"]

    def asked(adapter: dict[str, Any], name: str = "started") -> dict[str, Any]:
        body = {"model": BASE, "training_file": file, "name": name, "adapter": adapter}
        told: dict[str, Any] = http.post("/fine_tuning/jobs", json=body).json()
        return told

    job = asked({"kind": "prompt_tuning", "virtual_tokens": 5}, "prompt")
    prompt = service.succeed(service.run(job["id"]))
    for adapter, code, param, words in (
        ({"kind": "spot", "sources": ["nobody@1"]}, "adapter_not_found", "adapter.sources[0]", "nobody"),
        ({"kind": "spot", "sources": ["prompt@1", "elsewhere@1"], "virtual_tokens": 5}, "other_base",
         "adapter.sources[1]", "an adapter of tiny/other"),
        ({"kind": "spot", "sources": ["one@1"]}, "method_not_applicable", "adapter.sources[0]", "prompt_tun"),
        ({"kind": "spot", "sources": []}, "invalid_value", "adapter.sources", "at least 1"),
        ({"kind": "spot", "sources": ["prompt@1"]}, "invalid_value", "adapter.virtual_tokens", "tokens to 5"),
        ({"kind": "attempt", "sources": ["prompt@1"]}, "invalid_value", "adapter.virtual_tokens", "20"),
        ({"kind": "arrow", "sources": ["one@1", "prompt@1"]}, "method_not_applicable", "adapter.sources[1]",
         "lora"),
    ):  # fmt: skip
        error = asked(adapter)["error"]
        assert (error["code"], error["param"]) == (code, param), error
        assert words in error["message"]
    job = asked({"kind": "spot", "sources": ["prompt"], "virtual_tokens": 5})
    assert [source["id"] for source in job["sources"]] == [prompt.id], job


def test_the_command_line_starts_one(
    service: Service, adapters: dict[str, catalog.Adapter], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from jobs.cli import app

    monkeypatch.setenv("PEFT_SERVICE_URL", service.url.removesuffix("/v1"))
    monkeypatch.setenv("PEFT_SERVICE_API_KEY", service.keys["a"])
    run = CliRunner().invoke(
        app,
        [
            "operate",
            "combine",
            "one",
            "two",
            "--set",
            "how=svd",
            "--set",
            "rank=6",
            "--name",
            "cli",
            "--json",
        ],
    )
    assert run.exit_code == 0, run.output
    job = json.loads(run.stdout)
    assert (job["name"], job["status"], job["adapter"]["rank"]) == ("cli", "queued", 6)
    listed = CliRunner().invoke(app, ["operate"])
    assert "combine cat" in listed.stdout
    assert "truncate" in listed.stdout
    nothing = CliRunner().invoke(app, ["operate", "merge"])
    assert nothing.exit_code == 2
