"""Four dialects of one request, and what "auto" becomes."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.request import (
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
from peft_service.methods.lora import LoRA
from peft_service.spec import NAME_PATTERN, Base, DataFile, FineTuneSpec, Training

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


def data_file(rows: int) -> DataFile:
    return DataFile(id="file-1", key="p/files/file-1", sha256="0" * 64, rows=rows, format="chat")


def resolved(rows: int = 1000, known: Known = KNOWN, **body: Any) -> Resolved:
    wanted = read({"model": "org/base", "training_file": "file-1", **body})
    return resolve(wanted, Files(data_file(rows)), known, SHAPE)


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
