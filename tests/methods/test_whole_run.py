"""A request for every method, all the way to a published artifact and the catalog, in one process.

Request, spec, plan, tokenising, training, checkpoint, staging, gate, manifest and catalog are the real ones;
only Ray and the gate's own process are left out, which `tests/end_to_end/test_methods.py` has.
"""

import hashlib
import json
import time
import zlib

import pytest

from cluster.plan import Capacity, Node, make_plan
from jobs.request import Files, Known, read, resolve
from peft_service import adapter, artifact, base_model, catalog, gate, methods
from peft_service.errors import InvalidRequest
from peft_service.formats import format_of
from peft_service.methods import METHODS, SERVERS
from peft_service.run import RunInput, run_locally
from peft_service.spec import Base, DataFile, Source
from peft_service.store import open_store
from peft_service.variants import kind_of
from tests.methods import bases, checks
from tests.methods.test_conformance import EVERY, ROOT

VARIANTS = {kind_of(variant): variant for variant in METHODS}
SERVED = {"lora", "lora_plus", "lora_fa", "dylora", "delta_lora", "lora_drop", "lorahub"}
"""Methods whose artifact is what vLLM, Ray Serve LLM and LoRAX call an adapter."""
CAPACITY = Capacity(nodes=(Node(cpus=4, memory_bytes=64 << 30),))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return open_store(f"file://{tmp_path_factory.mktemp('store')}")


@pytest.fixture
def gate_here(monkeypatch):
    """The gate's checks in this process: its libraries would be loaded forty times."""

    monkeypatch.setattr(gate, "_asked", lambda arguments, process: tuple(gate.checks_of(**arguments)))


def uploaded(store, task, tasks, count=24):
    """The file of a task's rows, as the API would have it."""
    rows = bases.rows(task, count, tasks)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    key = f"p/files/{task}-{len(tasks)}"
    store.put(key, data)
    format = bases.format_of_task(task)
    assert not any(format_of(format).problems(row) for row in rows)
    return DataFile(
        id="file-1", key=key, sha256=hashlib.sha256(data).hexdigest(), rows=count, format=format,
        labels=bases.labels_of(task, tasks), tasks=tasks,
    )  # fmt: skip


@pytest.fixture(scope="module")
def published():
    """(kind, base, task) -> the Source of an adapter that is in the store."""
    return {}


def run(store, tmp_path, published, trial, adapter_request, sources, name, **training):
    """Request to catalog; the entry and the manifest."""
    directory = checks.directory_of(trial.base, ROOT)
    shape = base_model.shape_of_directory(directory)
    body = {
        "model": f"tiny/{trial.base}",
        "training_file": "file-1",
        "name": name,
        "adapter": adapter_request,
        "training": {"n_epochs": 50, "max_steps": 5, "batch_size": 4, "max_seq_len": 64, **training},
    }
    wanted = read(body)
    known = Known(Base(id=f"tiny/{trial.base}", uri=f"file://{directory}"), context_length=128)
    file = uploaded(store, trial.task, trial.tasks)
    spec = resolve(wanted, Files(file), known, shape, sources).spec
    plan = make_plan(spec, shape, CAPACITY)
    assert plan.trainable_parameters >= 0
    job = f"ftjob-{zlib.crc32(name.encode()):012x}"
    given = RunInput(job=job, attempt=1, project="p", spec=spec, plan=plan.model_dump(mode="json"))
    outcome = run_locally(given, store, tmp_path / "run")
    assert outcome.state == "succeeded", outcome.error
    staged = f"{given.prefix}/adapter"
    location = catalog.location_of(
        "p", spec.base.id, name, 1, job, servable=adapter.is_servable(store, staged)
    )
    record = {
        "id": catalog.adapter_id_of(job), "project": "p", "name": name, "version": 1, "model": f"ft:{name}",
        "job": job, "attempt": 1, "created_at": time.time(), "spec": spec.model_dump(mode="json"),
        "plan": None, "step": outcome.step, "trained_tokens": outcome.trained_tokens,
        "metrics": outcome.metrics,
    }  # fmt: skip
    manifest = adapter.publish(store, staged, location, record)
    adapter.verify(store, location)
    return catalog.read(store, location), manifest


def source_of(store, tmp_path, published, kind, trial):
    """A published adapter of this kind on the trial's base."""
    made = []
    for number in range(2):
        key = (kind, trial.base, trial.task, number)
        if key not in published:
            of = checks.Trial(checks.example(VARIANTS[kind]), trial.base, trial.task)
            entry, _ = run(
                store, tmp_path / f"source-{number}", published, of, asked(VARIANTS[kind]), (),
                f"{kind.replace('_', '-')}-{trial.base}-{number}", max_steps=40, learning_rate=1e-2,
            )  # fmt: skip
            published[key] = Source(
                reference=f"{entry.name}@1", id=entry.id, key=entry.location, digest=entry.digest, method=kind
            )
        made.append(published[key])
    return made


def asked(variant):
    return {"kind": kind_of(variant)} | json.loads(json.dumps(dict(variant.small)))


@pytest.mark.parametrize("kind", sorted(VARIANTS))
def test_from_a_request_to_the_catalog(kind, store, published, gate_here, tmp_path):
    variant = VARIANTS[kind]
    trial = next(trial for trial in EVERY if trial.method.kind == kind and not trial.name)
    request, sources = asked(variant), ()
    if variant.sources_of:
        found = source_of(store, tmp_path, published, variant.sources_of[0], trial)
        sources = tuple(found[: len(request["sources"])])
        request["sources"] = [source.reference for source in sources]
    entry, manifest = run(store, tmp_path, published, trial, request, sources, kind.replace("_", "-"))
    assert entry.method == kind
    assert {check["name"] for check in manifest["gate"]} == {
        "finite", "nonzero", "shapes_and_count", "logits_equal", "template_round_trip"
    }  # fmt: skip
    said = manifest["compatibility"]
    assert set(said) == set(SERVERS)
    for server, told in said.items():
        assert told["ok"] or len(told["reason"]) > 10, (server, told)
    assert said["peft"]["ok"] == ("peft" in trial.method.can.servers)
    assert said["vllm"]["ok"] == (kind in SERVED or kind in ("full", "loraprune")), said["vllm"]
    assert ("/adapters/" in f"/{entry.location}") == (kind in SERVED)
    card = store.get(f"{entry.location}/README.md").decode()
    assert trial.method.title in card
    assert artifact.TASK in {file["path"] for file in manifest["files"]}


@pytest.mark.parametrize(
    ("base", "task"),
    [("bert", "sequence_classification"), ("llama", "token_classification"), ("t5", "seq2seq_lm")],
)
def test_four_bits_go_the_whole_way(base, task, store, published, gate_here, tmp_path):
    """A new head beside a base in 4 bits, in training and in the gate's fresh base."""
    trial = checks.Trial(checks.example(VARIANTS["lora"]), base, task)
    request = {"kind": "qlora", "rank": 4, "alpha": 8}
    entry, manifest = run(store, tmp_path, published, trial, request, (), f"qlora-{base}")
    assert all(check["passed"] for check in manifest["gate"])
    assert manifest["record"]["spec"]["base"]["quantize"] == "nf4"
    assert artifact.TASK in {file["path"] for file in manifest["files"]}
    assert entry.method == "lora"


@pytest.mark.parametrize(
    ("base", "adapter_request", "words"),
    [
        ("llama", {"kind": "bitfit"}, "bias"),
        ("t5", {"kind": "bitfit"}, "bias"),
        ("llama", {"kind": "xattn"}, "encoder-decoder"),
        ("bert", {"kind": "xattn"}, "encoder-decoder"),
        ("llama", {"kind": "adalora", "rank": 8, "initial_rank": 8}, "rank"),
        ("llama", {"kind": "poly"}, "task"),
        ("llama", {"kind": "adapter_soup"}, "operation"),
        ("llama", {"kind": "lorra"}, "did you mean"),
        ("bert", {"kind": "longlora"}, "longlora"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_with_what_does(base, adapter_request, words, store):
    directory = checks.directory_of(base, ROOT)
    shape = base_model.shape_of_directory(directory)
    task = {"decoder": "causal_lm", "encoder": "sequence_classification"}.get(
        bases.ARCHITECTURES[base], "seq2seq_lm"
    )
    known = Known(Base(id=f"tiny/{base}", uri=f"file://{directory}"), context_length=128)
    file = uploaded(store, task, ())

    def asked_for():
        wanted = read({"model": "tiny", "training_file": "file-1", "adapter": adapter_request})
        return resolve(wanted, Files(file), known, shape)

    with pytest.raises(InvalidRequest) as refused:
        asked_for()
    assert words in refused.value.message
    assert refused.value.param


def test_gradient_checkpointing_and_4_bits_are_refused_where_they_cannot_be():
    shape = checks.shape_of("llama", ROOT)
    prefix = checks.example(VARIANTS["prefix_tuning"])
    with pytest.raises(InvalidRequest, match="gradient checkpointing"):
        methods.admit(prefix, shape, methods.Case(gradient_checkpointing=True))
    with pytest.raises(InvalidRequest, match="nf4"):
        methods.admit(checks.example(VARIANTS["full"]), shape, methods.Case(quantize="nf4"))
