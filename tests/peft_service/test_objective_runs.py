"""A request for every objective, all the way through the gate, in one process.

Request, spec, plan, tokenising, training, staging and checks are the real ones; Ray, REST and the gate's own
process are in tests/end_to_end/test_objectives.py.
"""

import hashlib
import json
import zlib
from dataclasses import replace

import pytest

from cluster.plan import Capacity, Node, make_plan
from jobs.request import Files, Known, read, resolve
from peft_service import base_model, gate
from peft_service.formats import format_of
from peft_service.objectives import OBJECTIVES
from peft_service.run import RunInput, run_locally
from peft_service.spec import Base, DataFile
from peft_service.store import open_store
from peft_service.variants import kind_of
from tests.methods import bases

CAPACITY = Capacity(nodes=(Node(cpus=4, memory_bytes=64 << 30),))
WORDS = bases.WORDS
GRADER = {
    "type": "string_check",
    "name": "says",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "operation": "like",
}


def pair(number: int) -> tuple[str, str, str]:
    """(question, right answer, wrong answer): what is right depends on the question."""
    one, two = WORDS[number % 12], WORDS[(number * 7 + 3) % 12]
    return f"{one} {two}:", f" {two}", f" {one}"


def rows(kind: str, count: int) -> list[dict]:
    made = []
    for number in range(count):
        asked, good, bad = pair(number)
        made.append(
            {
                "text": {"text": f"{asked}{good} and so on{good}"},
                "pairs": {"prompt": asked, "chosen": good, "rejected": bad},
                "unpaired": {
                    "prompt": asked,
                    "completion": (good, bad)[number % 2],
                    "label": number % 2 == 0,
                },
                "prompts": {"prompt": asked, "answer": good.strip()},
                "values": {"text": asked, "score": 0.25 * (number % 4)},
                "class_sets": {"text": asked, "labels": [("a", "b", "c")[number % 3]] * (number % 4 > 0)},
                "answers": {"prompt": asked, "completion": good},
            }[kind]
        )
    return made


TRIALS = {
    "sft": ("llama", "answers", {}),
    "pretraining": ("llama", "text", {}),
    "dpo": ("llama", "pairs", {}),
    "ipo": ("llama", "pairs", {}),
    "simpo": ("llama", "pairs", {}),
    "orpo": ("llama", "pairs", {}),
    "cpo": ("t5", "pairs", {}),
    "kto": ("llama", "unpaired", {}),
    "reward": ("llama", "pairs", {}),
    "regression": ("bert", "values", {}),
    "multi_label": ("bert", "class_sets", {}),
    "distillation": ("llama", "answers", {"teacher": "tiny/teacher"}),
    "grpo": ("llama", "prompts", {"grader": GRADER}),
}
"""`method.type` -> base, rows, and what its object has beside hyperparameters."""
ELSEWHERE = {"classification", "token_classification", "question_answering"}
"""tests/methods/test_whole_run.py has these, with every method."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    directory = tmp_path_factory.mktemp("objectives")
    for kind in ("llama", "t5", "bert"):
        bases.save(kind, directory / kind)
    bases.model("llama", seed=7).save_pretrained(directory / "teacher")
    bases.tokenizer("llama").save_pretrained(directory / "teacher")
    return directory


@pytest.fixture(autouse=True)
def gate_here(monkeypatch):
    monkeypatch.setattr(gate, "_asked", lambda arguments, process: tuple(gate.checks_of(**arguments)))


def uploaded(store, kind: str, count: int) -> DataFile:
    data = "".join(json.dumps(row) + "\n" for row in rows(kind, count)).encode()
    sha256 = hashlib.sha256(data).hexdigest()
    store.put(f"p/files/{sha256}", data)
    from peft_service.formats import detect

    found = detect(rows(kind, 1)[0])
    assert not any(format_of(found.kind).problems(row) for row in rows(kind, count))
    labels = tuple(sorted({label for row in rows(kind, count) for label in found.labels(row)}))
    return DataFile(
        id=f"file-{sha256[:8]}", key=f"p/files/{sha256}", sha256=sha256, rows=count, format=found.kind,
        labels=labels, name="rows.jsonl",
    )  # fmt: skip


def run(
    root,
    tmp_path,
    kind: str,
    body: dict | None = None,
    forgetting: bool = False,
    mixture: int = 0,
    **training,
):
    base, data, more = TRIALS[kind]
    store = open_store(f"file://{tmp_path / 'store'}")
    shape = base_model.shape_of_directory(root / base)
    numbers = {"max_new_tokens": 4, "group_size": 4} if kind == "grpo" else {}
    raw = {
        "model": f"tiny/{base}",
        "training_file": "file-1",
        "method": {"type": kind, kind: {"hyperparameters": numbers, **more}},
        "name": kind,
        "training": {
            "n_epochs": 9, "max_steps": 4, "batch_size": 6, "max_seq_len": 48, "learning_rate": 3e-3,
            **training,
        },
        **(body or {}),
    }  # fmt: skip
    if training.get("eval_steps"):
        raw["validation_file"] = "file-2"
    validation = uploaded(store, data, 6) if "validation_file" in raw else None
    probe = uploaded(store, "answers", 8) if forgetting else None
    files = Files(uploaded(store, data, 24), validation=validation, forgetting=probe)
    if mixture:
        more = uploaded(store, data, mixture).model_copy(update={"weight": 1.0})
        files = replace(files, training=files.training.model_copy(update={"weight": 3.0}), mixture=(more,))
        raw["data"] = {"weight": 3.0, "sources": [{"file": "file-4", "weight": 1.0}]}
    teacher = Base(id="tiny/teacher", uri=f"file://{root / 'teacher'}") if "teacher" in more else None
    known = Known(Base(id=f"tiny/{base}", uri=f"file://{root / base}"), context_length=128)
    spec = resolve(read(raw), files, known, shape, teacher=teacher).spec
    plan = make_plan(spec, shape, CAPACITY)
    told = RunInput(
        job=f"ftjob-{zlib.crc32(kind.encode()):012x}", attempt=1, project="p", spec=spec,
        plan=plan.model_dump(mode="json"),
    )  # fmt: skip
    return told, store, run_locally(told, store, tmp_path / "work")


def test_every_objective_has_a_trial():
    kinds = {kind_of(variant) for variant in OBJECTIVES} - ELSEWHERE
    assert kinds == set(TRIALS) - {"ipo"}


@pytest.mark.parametrize("kind", TRIALS)
def test_a_request_becomes_a_proven_adapter(root, tmp_path, kind):
    told, store, outcome = run(root, tmp_path, kind)
    assert (outcome.state, outcome.error) == ("succeeded", None)
    assert outcome.step == 4
    checks = json.loads(store.get(f"{told.prefix}/adapter.json"))["checks"]
    assert {check["name"] for check in checks} >= {"logits_equal", "template_round_trip"}
    assert all(check["passed"] for check in checks)


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
def test_packing_changes_nothing_but_the_layout(root, tmp_path, kind):
    plain = run(root, tmp_path / "plain", kind)[2]
    packed = run(root, tmp_path / "packed", kind, packing=True)[2]
    assert packed.state == plain.state == "succeeded"
    assert packed.metrics["train_loss"] == pytest.approx(plain.metrics["train_loss"], rel=1e-4)
    assert packed.trained_tokens == plain.trained_tokens


def test_sources_are_mixed_by_weight_and_a_second_run_finds_them_tokenised(root, tmp_path):
    first = run(root, tmp_path, "sft", mixture=10)
    _, store, outcome = first
    assert (outcome.state, outcome.error) == ("succeeded", None)
    (together,) = (info.key for info in store.list("p/runs/") if "/data-" in info.key)
    made = [info.key for info in store.list("p/tokenised/")]
    assert len(made) == 2
    again = run(root, tmp_path, "sft", mixture=10)[2]
    assert again.metrics == outcome.metrics
    assert [info.key for info in store.list("p/tokenised/")] == made
    assert store.info(together) is not None


def test_the_best_evaluation_is_what_is_published_and_patience_ends_a_run(root, tmp_path):
    """Nothing is so much better than the first evaluation: two more, and it is over."""
    told, store, outcome = run(
        root, tmp_path, "sft", max_steps=12, eval_steps=2, best_checkpoint=True,
        early_stopping_patience=2, early_stopping_threshold=100.0,
    )  # fmt: skip
    assert (outcome.state, outcome.step) == ("succeeded", 6)
    lines = [
        json.loads(line)
        for info in sorted(store.list(f"{told.prefix}/metrics/"), key=lambda info: info.key)
        for line in store.get(info.key).decode().splitlines()
    ]
    assert [line["step"] for line in lines if line.get("type") == "eval"] == [2, 4, 6]
    assert "step 2" in " ".join(line.get("message", "") for line in lines)
    # The published weights are those of the checkpoint of step 2, bit for bit.
    of_step = store.get(f"{told.prefix}/checkpoints/step-00000002/adapter/adapter_model.safetensors")
    assert store.get(f"{told.prefix}/adapter/adapter_model.safetensors") == of_step


def test_answers_to_held_out_prompts_are_graded_while_it_trains(root, tmp_path):
    """Of a supervised job, too; and a GRPO job says what its graders said of the answers it learned from."""
    grader = {**GRADER, "reference": "{{item.completion}}"}
    body = {"evaluation": {"grader": grader, "max_new_tokens": 4, "rows": 5}}
    outcome = run(root, tmp_path / "sft", "sft", body, eval_steps=2, select_by="score")[2]
    assert 0 <= outcome.metrics["valid_score"] <= 1
    outcome = run(root, tmp_path / "grpo", "grpo", eval_steps=2)[2]
    assert {"reward", "valid_score"} <= outcome.metrics.keys()


def test_what_the_base_could_do_is_measured_before_and_after(root, tmp_path):
    outcome = run(root, tmp_path, "dpo", {"data": {"forgetting_file": "file-3"}}, forgetting=True)[2]
    assert outcome.state == "succeeded"
    before, after = (outcome.metrics[f"forgetting_loss_{when}"] for when in ("before", "after"))
    assert before > 0
    assert after != before


def test_a_probe_that_is_too_long_is_an_error_of_its_own_key_beside_documents_that_are_split(root, tmp_path):
    body = {"data": {"forgetting_file": "file-3"}}
    assert run(root, tmp_path / "fits", "pretraining", body, forgetting=True)[2].state == "succeeded"
    outcome = run(root, tmp_path / "long", "pretraining", body, forgetting=True, max_seq_len=8)[2]
    assert outcome.state == "failed"
    assert outcome.error["code"] == "invalid_training_file"
    assert outcome.error["param"] == "data.forgetting_file"
