"""Four dialects of one request, every objective, how data is read, and what "auto" becomes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import peft_service
from jobs import objectives
from jobs.request import (
    CreateJob,
    Files,
    Known,
    Resolved,
    auto_batch_size,
    auto_epochs,
    default_name,
    hyperparameters_of,
    read,
    resolve,
)
from peft_service.base_model import ModelShape
from peft_service.errors import InvalidRequest
from peft_service.formats import FORMATS
from peft_service.methods.lora import LoRA
from peft_service.spec import NAME_PATTERN, Base, DataFile, FineTuneSpec, Training
from peft_service.variants import kind_of

KNOWN = Known(Base(id="org/base", uri="file:///base"), context_length=4096)
SHAPE = ModelShape(
    layers=1,
    hidden=8,
    vocab=16,
    linears=(("model.layers.0.self_attn.q_proj", 8, 8),),
    parameters=64,
    bytes=256,
    dtype="float32",
    tied=True,
)


LLAMA = SHAPE.model_copy(update={"model_type": "llama"})
GRADER = {
    "type": "string_check",
    "name": "right",
    "input": "{{sample.output_text}}",
    "operation": "eq",
    "reference": "{{item.answer}}",
}


def data_file(rows: int, format: str = "chat", **more: Any) -> DataFile:
    return DataFile(id="file-1", key="p/files/file-1", sha256="0" * 64, rows=rows, format=format, **more)


def resolved(
    rows: int = 1000,
    known: Known = KNOWN,
    *,
    format: str = "chat",
    mixture: tuple[DataFile, ...] = (),
    validation: DataFile | None = None,
    forgetting: DataFile | None = None,
    teacher: Base | None = None,
    **body: Any,
) -> Resolved:
    wanted = read({"model": "org/base", "training_file": "file-1", **body})
    labels = ("no", "yes") if format in LABELLED else ()
    files = Files(data_file(rows, format, labels=labels), mixture, validation, forgetting)
    return resolve(wanted, files, known, LLAMA, teacher=teacher)


LABELLED = ("classification", "multi_label", "token_classification")


def spec(rows: int = 1000, **body: Any) -> FineTuneSpec:
    return resolved(rows, **body).spec


def test_four_dialects_say_the_same() -> None:
    values = {"n_epochs": 2, "batch_size": 16, "learning_rate_multiplier": 0.5}
    alike = [
        spec(
            method={"type": "supervised", "supervised": {"hyperparameters": values}},
            adapter={"rank": 8, "alpha": 16},
        ),
        spec(hyperparameters={**values, "lora": True, "lora_r": 8, "lora_alpha": 16}),
        spec(training=values, adapter={"type": "lora", "r": 8, "lora_alpha": 16}),
        spec(training=values, hyperparameters=values, adapter={"kind": "LoRA", "lora_r": 8, "alpha": 16}),
        spec(
            training={"n_epochs": 2, "batch_size": 16, "learning_rate": LoRA.learning_rate / 2},
            adapter={"rank": 8, "alpha": 16},
        ),
    ]
    assert all(each == alike[0] for each in alike)
    assert alike[0].method == LoRA(rank=8, alpha=16)


def test_qlora_is_lora_on_a_4_bit_base() -> None:
    assert spec(adapter={"kind": "qlora", "r": 4}) == spec(adapter={"rank": 4}, base={"quantize": "nf4"})
    assert spec(base={"quantize": "none"}).base.quantize is None


def test_every_way_to_say_auto_is_one() -> None:
    silent = spec()
    for auto in ("auto", -1, None):
        three = {"n_epochs": auto, "batch_size": auto, "learning_rate_multiplier": auto}
        assert spec(hyperparameters=three) == silent
        assert spec(training=three) == silent
    assert spec(training={"learning_rate": "auto", "max_seq_len": "auto", "microbatch": "auto"}) == silent


def test_what_is_not_given_is_the_spec_s_own_default() -> None:
    chosen = {"n_epochs", "batch_size", "learning_rate", "max_seq_len"}
    for name, field in Training.model_fields.items():
        if name not in chosen:
            assert getattr(spec().training, name) == field.default, name
    assert resolved().reasons.keys() == chosen
    assert resolved(training={"n_epochs": 1}).reasons.keys() == chosen - {"n_epochs"}


def test_the_learning_rate_is_the_method_s_own_times_the_multiplier() -> None:
    assert spec().training.learning_rate == LoRA.learning_rate
    assert (
        spec(hyperparameters={"learning_rate_multiplier": 3}).training.learning_rate == 3 * LoRA.learning_rate
    )
    given_rate = spec(hyperparameters={"learning_rate": 1e-3})
    assert hyperparameters_of(given_rate)["learning_rate_multiplier"] == pytest.approx(
        1e-3 / LoRA.learning_rate
    )


def test_rows_are_never_longer_than_the_context() -> None:
    assert spec().training.max_seq_len == 2048
    assert spec(known=Known(KNOWN.base, 512)).training.max_seq_len == 512
    assert spec(known=Known(KNOWN.base, None)).training.max_seq_len == 2048
    with pytest.raises(InvalidRequest, match="context"):
        spec(training={"max_seq_len": 4097})


@pytest.mark.parametrize(
    ("adapter", "taken"),
    [
        ({"kind": "prompt_tuning", "virtual_tokens": 100}, 100),
        ({"kind": "p_tuning", "template": "{prompt:30}{text}{prompt:12}"}, 42),
        ({"kind": "lora"}, 0),
    ],
)
def test_virtual_tokens_take_their_part_of_the_context(adapter: dict[str, Any], taken: int) -> None:
    known = Known(KNOWN.base, 512)
    shape = SHAPE.model_copy(update={"vocab": 0})
    body = {"model": "org/base", "training_file": "file-1", "adapter": adapter}
    made = resolve(read(body), Files(data_file(10)), known, shape)
    assert made.spec.training.max_seq_len == 512 - taken
    room = {**body, "training": {"max_seq_len": 512 - taken}}
    assert resolve(read(room), Files(data_file(10)), known, shape).spec.training.max_seq_len == 512 - taken
    longer = {**body, "training": {"max_seq_len": 513 - taken}}
    with pytest.raises(InvalidRequest, match=f"{512 - taken} is the most"):
        resolve(read(longer), Files(data_file(10)), known, shape)
    if taken:
        with pytest.raises(InvalidRequest, match="no room for a row: take at most 24"):
            resolve(read(body), Files(data_file(10)), Known(KNOWN.base, 48), shape)


def test_a_method_that_extends_the_context_takes_longer_rows() -> None:
    parts = ("q_proj", "k_proj", "v_proj", "o_proj")
    linears = tuple((f"model.layers.0.self_attn.{part}", 8, 8) for part in parts)
    shape = SHAPE.model_copy(update={"model_type": "llama", "linears": linears})
    body = {"model": "org/base", "training_file": "file-1", "training": {"max_seq_len": 9000}}
    longer = read({**body, "adapter": {"kind": "longlora"}})
    assert resolve(longer, Files(data_file(10)), KNOWN, shape).spec.training.max_seq_len == 9000
    with pytest.raises(InvalidRequest, match="context of the base"):
        resolve(read({**body, "adapter": {"kind": "lora"}}), Files(data_file(10)), KNOWN, shape)


@given(st.integers(1, 10**9))
def test_auto_sees_enough_and_not_too_many_examples(rows: int) -> None:
    epochs, batch = auto_epochs(rows), auto_batch_size(rows)
    assert 1 <= epochs <= 25
    assert rows * epochs <= max(25_000, rows)
    assert rows * epochs > 75 or epochs == 25
    assert 1 <= batch <= min(rows, 32)
    assert batch >= min(rows, 4)
    assert spec(rows).training.batch_size == batch


@given(st.text(), st.sampled_from(["lora", "x" * 30]))
def test_a_default_name_can_always_be_a_folder(base: str, kind: str) -> None:
    import re

    assert re.match(NAME_PATTERN, default_name(base, kind))


def test_names() -> None:
    assert spec(suffix="a.b-c_d").name == "a.b-c_d"
    assert spec(name="x").name == spec(name="x", suffix="x").name == "x"
    assert spec().name == "base-lora"


@pytest.mark.parametrize(
    "body",
    [
        {"training": {"n_epochs": 2}, "hyperparameters": {"n_epochs": 3}},
        {"adapter": {"r": 4, "rank": 8}},
        {"adapter": {"kind": "lora", "type": "dora"}},
        {"training": {"learning_rate": 1e-4, "learning_rate_multiplier": 1}},
        {"training": {"learning_rate": 1e-4}, "hyperparameters": {"learning_rate_multiplier": 1}},
        {"name": "a", "suffix": "b"},
    ],
    ids=str,
)
def test_a_contradiction_is_refused_and_not_decided(body: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        spec(**body)
    assert refused.value.code == "conflicting_parameters"


def test_a_limit_broken_by_arithmetic_names_what_the_user_wrote() -> None:
    with pytest.raises(InvalidRequest) as refused:
        resolve(
            read({"model": "m", "training_file": "f", "training": {"microbatch": 0}}),
            Files(data_file(9)),
            KNOWN,
            SHAPE,
        )
    assert refused.value.param == "training.microbatch"
    with pytest.raises(InvalidRequest) as refused:
        spec(adapter={"target_modules": ["gone"]})
    assert refused.value.param == "adapter.targets"


# ----------------------------------------------------------------------------------------------- objectives


def request_for(kind: str, **values: Any) -> dict[str, Any]:
    """`method` of a request for this objective, with what it cannot do without."""
    fields = objectives.objectives()[kind].model_fields
    part: dict[str, Any] = {"hyperparameters": values}
    if "grader" in fields:
        part["grader"] = GRADER
    if "teacher" in fields:
        part["teacher"] = "org/large"
    return {"type": kind, kind: part}


@pytest.mark.parametrize("kind", objectives.objectives())
def test_every_objective_can_be_asked_for_on_every_format_it_learns_from(kind: str) -> None:
    variant = objectives.objectives()[kind]
    for format in variant.formats:
        made = spec(method=request_for(kind), format=format)
        assert made.objective.kind == kind
        assert made.training.learning_rate == pytest.approx(LoRA.learning_rate * variant.rate_scale)
        assert made.data.training.format == format
    others = set(map(kind_of, FORMATS)) - set(variant.formats)
    for format in others:
        with pytest.raises(InvalidRequest) as refused:
            spec(method=request_for(kind), format=format)
        assert (refused.value.code, refused.value.param) == ("format_not_applicable", "training_file")
        assert all(name in refused.value.message for name in variant.formats)


@pytest.mark.parametrize("kind", objectives.objectives())
def test_what_a_job_tells_of_its_method_is_what_makes_it_again(kind: str) -> None:
    for format in objectives.objectives()[kind].formats:
        made = resolved(method=request_for(kind), format=format).spec
        told = objectives.told(made.model_dump(mode="json"), hyperparameters_of(made))
        numbers = told[told["type"]]["hyperparameters"]
        assert (
            numbers.pop("learning_rate") == made.training.learning_rate
        )  # beside its multiplier it is too much
        assert spec(method=told, format=format) == made


FREELY = {
    "dpo": ("dpo", {}),
    "DPO": ("dpo", {}),
    "ipo": ("dpo", {"loss": "ipo"}),
    "reward model": ("reward", {}),
    "Continued-Pretraining": ("pretraining", {}),
    "multi-label": ("multi_label", {}),
    "Token Classification": ("token_classification", {}),
    "GRPO": ("grpo", {}),
    "reinforcement": ("grpo", {}),
    "SFT": ("sft", {}),
}


@pytest.mark.parametrize("name", FREELY)
def test_a_name_may_be_spelled_freely_and_so_may_the_object_beside_it(name: str) -> None:
    kind, preset = FREELY[name]
    part = next(iter(list(request_for(kind).values())[1:]))
    format = objectives.objectives()[kind].formats[0]
    made = spec(method={"type": name, name.upper(): part}, format=format)
    assert made.objective.kind == kind
    assert preset.items() <= made.objective.model_dump().items()


def test_a_file_means_an_objective_where_the_request_names_none() -> None:
    for kind, variant in objectives.objectives().items():
        for format in variant.default_for:
            if any(info.is_required() for info in variant.model_fields.values()):
                with pytest.raises(InvalidRequest, match=r"set method\.type to") as refused:
                    spec(format=format)
                assert refused.value.param == "method.type"
            else:
                assert spec(format=format).objective.kind == kind
            supervised: dict[str, Any] = {
                "type": "supervised",
                "supervised": {"hyperparameters": {"n_epochs": 1}},
            }
            if variant.rows in ("pairs", "unpaired", "prompts"):
                with pytest.raises(InvalidRequest) as refused:
                    spec(method=supervised, format=format)
                assert refused.value.code == "method_required"
            else:
                assert spec(method=supervised, format=format).objective.kind == kind
    with pytest.raises(InvalidRequest, match=r"set method\.type to dpo"):
        spec(method={"type": "supervised"}, format="preference")
    assert spec(format="preference").objective.kind == "dpo"


def test_the_hyperparameters_of_an_objective_are_its_fields_and_everybody_s() -> None:
    values = {"beta": 0.3, "label_smoothing": 0.1, "n_epochs": 2, "lora_r": 4, "learning_rate_multiplier": 2}
    made = resolved(method={"type": "dpo", "dpo": {"hyperparameters": values}}, format="preference")
    assert made.spec.objective.model_dump() == {
        "kind": "dpo", "loss": "sigmoid", "beta": 0.3, "label_smoothing": 0.1,
    }  # fmt: skip
    assert made.spec.method == LoRA(rank=4)
    assert made.spec.training.n_epochs == 2
    rate = LoRA.learning_rate * type(made.spec.objective).rate_scale * 2
    assert made.spec.training.learning_rate == pytest.approx(rate)
    assert hyperparameters_of(made.spec)["learning_rate_multiplier"] == pytest.approx(2)
    automatic = resolved(
        method={"type": "dpo", "dpo": {"hyperparameters": {"beta": "auto"}}}, format="preference"
    )
    assert automatic.spec.objective.model_dump()["beta"] == 0.1
    assert automatic.reasons["beta"] == "dpo's own 0.1"
    assert "0.05 for dpo" in automatic.reasons["learning_rate"]


def test_openai_s_numbers_of_reinforcement_have_their_places() -> None:
    numbers = {
        "compute_multiplier": 0.5, "eval_interval": 7, "eval_samples": 5, "reasoning_effort": "default",
        "batch_size": "auto", "n_epochs": "auto", "learning_rate_multiplier": "auto",
    }  # fmt: skip
    part = {"grader": GRADER, "hyperparameters": numbers, "response_format": {"type": "text"}}
    made = spec(
        method={"type": "reinforcement", "reinforcement": part},
        format="prompts",
        validation=data_file(9, "prompts"),
    )
    objective = made.objective.model_dump(mode="json")
    assert objective["group_size"] == 4
    assert made.training.eval_steps == 7
    assert made.evaluation is not None
    assert made.evaluation.rows == 5
    assert made.evaluation.grader.model_dump() == objective["grader"]
    assert made.evaluation.max_new_tokens == objective["max_new_tokens"]
    assert FineTuneSpec.model_validate_json(made.model_dump_json()) == made
    without = {
        "grader": GRADER,
        "hyperparameters": dict.fromkeys(numbers, "auto") | {"reasoning_effort": None},
    }
    plain = spec(method={"type": "reinforcement", "reinforcement": without}, format="prompts")
    assert plain.evaluation is None
    assert plain.objective.model_dump()["group_size"] == 8


def test_a_teacher_stands_beside_the_numbers() -> None:
    large = Base(id="org/large", uri="file:///large")
    made = spec(
        method={
            "type": "distillation",
            "distillation": {"teacher": "org/large", "hyperparameters": {"temperature": 3}},
        },
        teacher=large,
    )
    assert made.teacher == large
    assert made.objective.model_dump()["teacher"] == "org/large"
    assert made.objective.model_dump()["temperature"] == 3


def test_the_schema_has_every_objective_with_its_own_fields() -> None:
    schema = CreateJob.model_json_schema()
    assert schema["properties"]["method"]["anyOf"][0] == {"$ref": "#/$defs/MethodRequest"}
    known = schema["$defs"]["MethodRequest"]["properties"]
    for kind, variant in objectives.objectives().items():
        for name in (kind, *variant.aliases):
            part = schema["$defs"][known[name]["anyOf"][0]["$ref"].rsplit("/", 1)[1]]["properties"]
            if name == "supervised":
                continue
            numbers = schema["$defs"][part["hyperparameters"]["anyOf"][0]["$ref"].rsplit("/", 1)[1]][
                "properties"
            ]
            own = set(variant.model_fields) - {"kind", *objectives.BESIDE}
            assert own | {"n_epochs", "batch_size", "learning_rate_multiplier", "lora_r"} <= numbers.keys()


NEW = '''
"""An objective that only this test has."""
from typing import ClassVar, Literal
from peft_service.objectives import Objective
class Patience(Objective):
    kind: Literal["patience"] = "patience"
    calm: float = 0.5
    formats: ClassVar[tuple[str, ...]] = ("chat",)
    aliases: ClassVar[dict] = {"serenity": {"calm": 1.0}}
    def task(self, architecture):
        return "causal_lm"
'''


def test_a_file_in_the_folder_of_objectives_is_all_that_a_new_one_takes(tmp_path: Path) -> None:
    package, copy = Path(peft_service.__file__).parent, tmp_path / "peft_service"
    copy.mkdir()
    for path in package.iterdir():
        if path.name == "objectives":
            shutil.copytree(path, copy / path.name)
        else:
            (copy / path.name).symlink_to(path)
    (copy / "objectives" / "patience.py").write_text(NEW)
    ask = (
        "import json; from jobs.request import CreateJob, read; from jobs import objectives\n"
        "wanted = read({'model': 'm', 'training_file': 'f', 'method': {'type': 'Serenity'}})\n"
        "schema = CreateJob.model_json_schema()['$defs']\n"
        "print(json.dumps([wanted.objective.named.kind, dict(wanted.objective.values),"
        " 'calm' in schema['PatienceHyperparameters']['properties'],"
        " 'serenity' in schema['MethodRequest']['properties']]))"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    done = subprocess.run(
        [sys.executable, "-c", ask],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["patience", {"calm": 1.0}, True, True]


RL = {"type": "reinforcement"}


@pytest.mark.parametrize(
    ("method", "param", "words"),
    [
        ({"type": "simpoo"}, "method.type", "did you mean 'simpo'"),
        ({"type": "xyz"}, "method.type", "known are"),
        ({"type": 3}, "method.type", "name of an objective"),
        ({"type": "dpo", "kto": {}}, "method.kto", "method.type is 'dpo'"),
        ({"dpo": {}}, "method.dpo", "set method.type to 'dpo'"),
        ({"type": "ipo", "dpo": {}}, "method.dpo", "method.type is 'ipo'"),
        ({"type": "dpo", "dop": {}}, "method.dop", "did you mean 'dpo'"),
        ({"type": "dpo", "dpo": []}, "method.dpo", "an object"),
        ({"type": "dpo", "dpo": {"hyperparameter": {}}}, "method.dpo.hyperparameter", "did you mean"),
        (
            {"type": "dpo", "dpo": {"hyperparameters": {"betta": 1}}},
            "method.dpo.hyperparameters.betta",
            "did you mean 'beta'",
        ),
        (
            {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0}}},
            "method.dpo.hyperparameters.beta",
            "greater than 0",
        ),
        (
            {"type": "ipo", "ipo": {"hyperparameters": {"loss": "hinge"}}},
            "method.ipo.hyperparameters.loss",
            "means loss 'ipo'",
        ),
        ({"type": "kto", "kto": {"grader": GRADER}}, "method.kto.grader", "unknown key"),
        ({"type": "distillation"}, "method.distillation.teacher", "is required"),
        (RL, "method.reinforcement.grader", "is required"),
        ({**RL, "reinforcement": {"grader": {"type": "x"}}}, "method.reinforcement.grader", "string_check"),
        (
            {**RL, "reinforcement": {"grader": {**GRADER, "operation": "is"}}},
            "method.reinforcement.grader.operation",
            "eq",
        ),
        ({**RL, "reinforcement": {}, "grpo": {}}, "method.grpo", "are one thing"),
        (
            {**RL, "reinforcement": {"grader": GRADER, "response_format": {"type": "json_object"}}},
            "method.reinforcement.response_format",
            "only",
        ),
        (
            {**RL, "reinforcement": {"grader": GRADER, "hyperparameters": {"reasoning_effort": "high"}}},
            "method.reinforcement.hyperparameters.reasoning_effort",
            "only 'default'",
        ),
        (
            {
                **RL,
                "reinforcement": {
                    "grader": GRADER, "hyperparameters": {"compute_multiplier": 2, "group_size": 4}
                },
            },
            "method.reinforcement.hyperparameters.compute_multiplier",
            "scales group_size",
        ),
        (
            {**RL, "reinforcement": {"grader": GRADER, "hyperparameters": {"eval_samples": 2}}},
            "method.reinforcement.hyperparameters.eval_samples",
            "validation_file",
        ),
        ("dpo", "method", "an object"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_method_is_refused_by_its_key(method: Any, param: str, words: str) -> None:
    kind = method.get("type") if isinstance(method, dict) else None
    format = {"dpo": "preference", "ipo": "preference", "reinforcement": "prompts"}.get(str(kind), "chat")
    with pytest.raises(InvalidRequest) as refused:
        spec(method=method, format=format)
    assert refused.value.param == param, refused.value.message
    assert words in refused.value.message


# ----------------------------------------------------------------------------------------------------- data


def test_how_data_is_read_is_part_of_the_spec() -> None:
    other = DataFile(id="file-2", key="p/files/file-2", sha256="1" * 64, rows=500, format="instruction")
    held_out = data_file(10)
    data = {
        "train_on": "last_assistant",
        "eos": "all",
        "turns": "apart",
        "too_long": "left",
        "tools": [{"name": "add", "parameters": {"type": "dict", "properties": {"a": {"type": "int"}}}}],
        "template": {"name": "chatml"},
        "sources": [{"file": "file-2"}],
        "forgetting_file": "file-3",
    }
    made = spec(data=data, mixture=(other,), validation=held_out, forgetting=held_out)
    assert (made.data.train_on, made.data.eos, made.data.turns) == ("last_assistant", "all", "apart")
    assert made.data.too_long == "left"
    assert made.data.sources == (data_file(1000), other)
    assert made.data.rows == 1500
    assert made.training.batch_size == auto_batch_size(1500)
    assert made.data.template is not None
    assert made.data.template.name == "chatml"
    assert made.data.tools[0]["function"]["parameters"]["properties"]["a"] == {"type": "integer"}
    assert made.data.forgetting == held_out
    assert FineTuneSpec.model_validate_json(made.model_dump_json()) == made


def test_only_documents_are_split_and_they_are_by_default() -> None:
    assert spec(format="text").data.too_long == "split"
    assert spec(format="chat").data.too_long == "error"
    with pytest.raises(InvalidRequest) as refused:
        spec(data={"too_long": "split"})
    assert refused.value.param == "data.too_long"
    # A probe of what is forgotten is not learned from: it does not change what happens to documents.
    chats = data_file(9, "chat")
    made = spec(format="text", data={"forgetting_file": "x"}, forgetting=chats)
    assert made.data.too_long == "split"
    assert made.data.too_long_in(made.data.training) == "split"
    assert made.data.too_long_in(chats) == "error"


def test_the_data_sets_of_a_request_are_listed_with_their_places() -> None:
    wanted = read(
        {
            "model": "m",
            "training_file": "file-1",
            "validation_file": "hf://datasets/org/name",
            "data": {
                "columns": {"prompt": "q", "completion": "a"},
                "weight": 1,
                "sources": [{"file": "s3://b/x", "weight": 3, "limit": 5, "documents": "file"}],
                "forgetting_file": "file-9",
            },
        }
    )
    first, second = wanted.sources
    assert (first.file, first.param, first.weight) == ("file-1", "training_file", 1)
    assert (second.file, second.param, second.weight, second.limit) == (
        "s3://b/x",
        "data.sources[0].file",
        3,
        5,
    )
    assert (second.columns, second.documents) == (None, "file")
    assert wanted.validation is not None
    assert wanted.validation.columns == first.columns
    assert wanted.validation.columns_param == "data.columns"
    assert wanted.forgetting is not None
    assert wanted.forgetting.columns is None


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (
            {"data": {"sources": [{"file": "x", "wieght": 2}]}},
            "data.sources[0].wieght",
            "did you mean 'weight'",
        ),
        ({"data": {"sources": [{}]}}, "data.sources[0].file", "required"),
        ({"data": {"colums": {}}}, "data.colums", "did you mean 'columns'"),
        ({"data": {"weight": 2}}, "data.weight", "there are none"),
        ({"data": {"weight": 2, "sources": [{"file": "x"}]}}, "data.sources[0].weight", "is missing"),
        ({"data": {"sources": [{"file": "x", "weight": 1}]}}, "data.weight", "is missing"),
        ({"data": {"columns": {"prompt": "a["}}}, "data.columns.prompt", "no path"),
        ({"data": {"columns": {"prompt": {"txt": "a"}}}}, "data.columns.prompt", "one of the keys"),
        ({"data": {"columns": {"prompt": {"text": "{a"}}}}, "data.columns.prompt.text", "not closed"),
        ({"data": {"columns": {"prompt": 3}}}, "data.columns.prompt", "a path into a row"),
        ({"data": {"columns": {}}}, "data.columns", "at least 1"),
        ({"data": {"sources": [{"file": "x", "columns": {"a": ""}}]}}, "data.sources[0].columns.a", "empty"),
        ({"data": {"validation_columns": {"prompt": "a"}}}, "data.validation_columns", "no validation_file"),
        ({"data": {"template": {}}}, "data.template", "name of a template"),
        ({"data": {"template": {"name": "a", "jinja": "b"}}}, "data.template", "not both"),
        ({"data": {"template": {"name": "chatmll"}}}, "data.template.name", "did you mean 'chatml'"),
        ({"data": {"template": {"jinja": "{% for"}}}, "data.template.jinja", "line 1"),
        ({"data": {"template": {"jinja": "hello"}}}, "data.template.jinja", "messages"),
        ({"data": {"tools": [{"x": 1}]}}, "data.tools[0].x", "x"),
        ({"training": {"best_checkpoint": True}}, "training.best_checkpoint", "validation_file"),
        ({"training": {"early_stopping_patience": 2}}, "training.early_stopping_patience", "validation_file"),
        ({"training": {"select_by": "accuracy"}}, "training.select_by", "validation_file"),
        ({"evaluation": {"grader": GRADER}}, "evaluation", "validation_file"),
        ({"evaluation": {"grader": GRADER, "row": 3}}, "evaluation.row", "did you mean 'rows'"),
        ({"evaluation": {"grader": {**GRADER, "type": "x"}}}, "evaluation.grader", "string_check"),
    ],
    ids=str,
)
def test_wrong_data_is_refused_by_its_key(body: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        spec(**body)
    assert refused.value.param == param, refused.value.message
    assert words in refused.value.message


def test_files_that_do_not_go_together_are_refused_by_the_key_that_names_them() -> None:
    pairs, texts = data_file(9, "preference"), data_file(9, "text")
    with pytest.raises(InvalidRequest) as refused:
        spec(data={"sources": [{"file": "x"}]}, mixture=(pairs,))
    assert refused.value.param == "data.sources[0].file"
    with pytest.raises(InvalidRequest) as refused:
        spec(validation=pairs)
    assert refused.value.param == "validation_file"
    with pytest.raises(InvalidRequest) as refused:
        spec(data={"forgetting_file": "x"}, forgetting=pairs)
    assert refused.value.param == "data.forgetting_file"
    assert spec(data={"forgetting_file": "x"}, forgetting=texts).data.forgetting == texts


def test_what_chooses_by_scores_needs_a_grader() -> None:
    held_out = data_file(9)
    with pytest.raises(InvalidRequest) as refused:
        spec(training={"select_by": "score"}, validation=held_out)
    assert (refused.value.param, "grader" in refused.value.message) == ("training.select_by", True)
    made = spec(
        training={"select_by": "score", "best_checkpoint": True},
        evaluation={"grader": GRADER, "rows": 4},
        validation=held_out,
    )
    assert made.evaluation is not None
    assert (made.evaluation.rows, made.training.select_by) == (4, "score")
    with pytest.raises(InvalidRequest) as refused:
        spec(evaluation={"rows": 3}, validation=held_out)
    assert refused.value.param == "evaluation.grader"
    with pytest.raises(InvalidRequest, match="writes none"):
        spec(
            format="classification",
            evaluation={"grader": GRADER},
            validation=data_file(9, "classification", labels=("no", "yes")),
        )


def test_where_answers_are_graded_the_best_is_that_of_the_best_score() -> None:
    held_out = data_file(9, "prompts")
    method = request_for("grpo")
    made = spec(method=method, format="prompts", validation=held_out, training={"best_checkpoint": True})
    assert made.training.select_by == "score"
    for wrong in ("loss", "accuracy"):
        with pytest.raises(InvalidRequest) as refused:
            spec(method=method, format="prompts", validation=held_out, training={"select_by": wrong})
        assert refused.value.param == "training.select_by"


def test_packing_is_granted_or_refused_where_it_was_asked_for() -> None:
    assert spec(hyperparameters={"packing": True}).training.packing is True
    assert spec(hyperparameters={"packing": False}).training.packing is False
    with pytest.raises(InvalidRequest) as refused:
        spec(hyperparameters={"packing": True}, format="classification")
    assert (refused.value.code, refused.value.param) == ("packing_not_applicable", "hyperparameters.packing")


def test_reinforcement_needs_room_for_answers_and_a_base_to_compare_with() -> None:
    def asked(adapter: str = "lora", **numbers: Any) -> Resolved:
        method = {"type": "grpo", "grpo": {"grader": GRADER, "hyperparameters": numbers}}
        return resolved(
            format="prompts", method=method, adapter={"kind": adapter}, known=Known(KNOWN.base, 512)
        )

    assert asked(max_new_tokens=100).spec.training.max_seq_len == 412
    with pytest.raises(InvalidRequest, match="base itself") as caught:
        asked("lt_sft", beta=0.1, max_new_tokens=100)
    assert caught.value.param == "method.grpo.hyperparameters.beta"
    assert asked("lt_sft", max_new_tokens=100).spec.objective.kind == "grpo"
    with pytest.raises(InvalidRequest, match="answers of up to 510") as caught:
        asked(max_new_tokens=510)
    assert caught.value.param == "method.grpo.hyperparameters.max_new_tokens"
