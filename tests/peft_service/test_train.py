"""The step and the loop, in one process: any split into microbatches, the schedule, stops, what must not
train."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from peft_service import base_model, batches, train
from peft_service.errors import Diverged, InvalidTrainingFile
from peft_service.methods import Case, Material
from peft_service.methods.lora import LoRA
from peft_service.objectives.sft import IGNORE, SFT
from peft_service.schedule import learning_rate
from peft_service.spec import Training
from peft_service.tokenised import Tokenised
from peft_service.train import LocalEngine, Progress, evaluate, fit, train_step
from tests.tiny import save_tiny_base

TRAINING = Training(learning_rate=1e-2, n_epochs=2, batch_size=6, max_seq_len=64, max_grad_norm=0.3)


def rows_of(count, seed=0):
    """Random rows of uneven length, each with an uneven share of targets."""
    generator = np.random.default_rng(seed)
    ids, masks = [], []
    for row in range(count):
        length = int(generator.integers(3, 15))
        ids.append(generator.integers(3, 300, length).astype(np.int32))
        mask = np.zeros(length, np.uint8)
        mask[1 + row % 3 if row % 4 else length - 1 :] = 1
        masks.append(mask)
    offsets = np.cumsum([0, *map(len, ids)]).astype(np.int64)
    return Tokenised(np.concatenate(ids), np.concatenate(masks), offsets, np.arange(count) * 2 + 1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def engine(base):
    return made(base)


def made(base, **lora):
    model = base_model.load(base, precision="fp32")
    return LocalEngine(LoRA(rank=4, **lora).attach(model, Case(), Material()), TRAINING)


def _batches(data, rows, microbatch):
    return batches.microbatches(data, rows, 0, 1, microbatch, 2, "cpu")


def test_a_step_is_torchs_mean_over_the_target_tokens_of_the_whole_batch(base, engine):
    data = rows_of(6)
    (batch,) = _batches(data, range(6), 6)
    oracle = made(base)
    logits = oracle.model(input_ids=batch.tokens_BT, attention_mask=batch.mask_BT).logits
    loss = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels_BT[:, 1:].flatten(), ignore_index=IGNORE
    )
    loss.backward()
    parameters = [p for p in oracle.model.parameters() if p.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(parameters, TRAINING.max_grad_norm)
    torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0).step()

    done = train_step(engine, SFT(), _batches(data, range(6), 2), 0.01)
    assert done.loss == pytest.approx(float(loss), rel=1e-6)
    assert done.grad_norm == pytest.approx(float(norm), rel=1e-5)
    assert (done.target_tokens, done.tokens) == (data.target_tokens, len(data.input_ids))
    for mine, theirs in zip(engine.parameters.values(), parameters, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("microbatch", [1, 4, 5])
def test_the_split_into_microbatches_changes_nothing(base, microbatch):
    data = rows_of(6)
    curves = []
    for size in (6, microbatch):
        engine = made(base)
        curves.append(
            [train_step(engine, SFT(), _batches(data, range(6), size), 1e-2).loss for _ in range(4)]
        )
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert curves[0][-1] < curves[0][0]


def test_only_what_the_method_says_moves(engine):
    frozen = {n: p.detach().clone() for n, p in engine.model.named_parameters() if not p.requires_grad}
    before = engine.trainable()
    for _ in range(3):
        train_step(engine, SFT(), _batches(rows_of(6), range(6), 3), 1e-2)
    for name, parameter in engine.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    after = engine.trainable()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_accuracy_and_evaluation_count_what_is_there(engine):
    data = rows_of(7)
    (batch,) = _batches(data, range(7), 7)
    with torch.no_grad():
        logits = engine.model(input_ids=batch.tokens_BT, attention_mask=batch.mask_BT).logits[:, :-1]
    targets = batch.labels_BT[:, 1:]
    right = ((logits.argmax(-1) == targets) & (targets != IGNORE)).sum() / (targets != IGNORE).sum()
    for microbatch in (1, 3, 100):
        found = evaluate(engine, SFT(), data, microbatch=microbatch, pad_id=2)
        assert found.accuracy == pytest.approx(float(right))
        assert found.target_tokens == data.target_tokens
        assert found.loss == pytest.approx(
            float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)), rel=1e-5
        )
    engine.model.train()
    evaluate(engine, SFT(), data, microbatch=2, pad_id=2)
    assert engine.model.training


def _fit(engine, data, validation=None, training=TRAINING, stop=lambda: False, start=None):
    lines, saved = [], []
    fitted = fit(
        engine, SFT(), training, 5, data, validation, microbatch=2, pad_id=2, start=start or Progress(),
        log=lines.append, save=lambda progress: saved.append(progress.step), stop_requested=stop,
    )  # fmt: skip
    return fitted, lines, saved


def test_every_row_is_seen_once_an_epoch_and_checkpoints_come_on_time(engine):
    data = rows_of(13)
    training = TRAINING.model_copy(update={"checkpoint_steps": 2, "eval_steps": 4})
    fitted, lines, saved = _fit(engine, data, rows_of(3, seed=1), training)
    steps = [line for line in lines if line["type"] == "step"]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert fitted.progress.trained_tokens == 2 * len(data.input_ids) == sum(line["tokens"] for line in steps)
    assert saved == [2, 4, 6]
    assert [line["step"] for line in lines if line["type"] == "eval"] == [4, 6]
    assert fitted.finished


def test_a_stop_is_seen_at_a_step_boundary_and_checkpointed(engine, monkeypatch):
    monkeypatch.setattr(train, "STOP_POLL_SECONDS", 0.0)
    asked = []
    fitted, _, saved = _fit(engine, rows_of(13), stop=lambda: asked.append(1) or len(asked) == 2)
    assert (fitted.finished, fitted.progress.step, saved) == (False, 2, [2])


def test_a_stop_is_not_polled_before_its_time(engine, monkeypatch):
    monkeypatch.setattr(train, "STOP_POLL_SECONDS", 1e12)
    asked = []
    assert _fit(engine, rows_of(13), stop=lambda: bool(asked.append(1)))[0].finished
    assert asked == []


def test_the_rows_at_fault_are_named(engine):
    data = rows_of(12)
    rows = batches.rows_of_step(0, 12, TRAINING, 5)
    bad = int(data.input_ids[data.offsets[rows[3]]])
    engine.model.register_forward_hook(
        lambda module, args, kwargs, output: _poison(output, kwargs["input_ids"], rows[3], data),
        with_kwargs=True,
    )
    before = engine.trainable()
    with pytest.raises(Diverged) as caught:
        _fit(engine, data)
    # Those of its microbatch of two rows.
    parts = batches.layout(data.lengths(rows).sum(axis=1).tolist(), 0, 1, 2)
    (part,) = [[rows[row] for line in lines for row in line] for lines in parts if [3] in lines]
    assert len(part) == 2
    assert caught.value.details == {"step": 1, "lines": sorted(int(data.lines[row]) for row in part)}
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.trainable().items())
    assert bad > 0


def _poison(output, tokens_BT, row, data):
    ids = torch.from_numpy(data.row(row)[0].astype(np.int64))
    if any(torch.equal(tokens[: len(ids)], ids) for tokens in tokens_BT):
        output.logits = output.logits * math.inf
    return output


def test_a_gradient_that_is_not_finite_does_not_move_the_weights(engine):
    before = engine.trainable()
    next(iter(engine.parameters.values())).register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(Diverged, match="gradient norm is nan"):
        train_step(engine, SFT(), _batches(rows_of(6), range(6), 2), 1e-2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.trainable().items())


def test_a_step_without_targets_is_an_error_that_names_lines(engine):
    data = rows_of(6)
    data.target_mask[:] = 0
    with pytest.raises(InvalidTrainingFile, match=r"step 1: no token .* lines 1, 3, 5, 7, 9, 11"):
        _fit(engine, data)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_the_schedule_is_positive_warms_up_and_falls(schedule, ratio):
    training = Training(learning_rate=0.5, schedule=schedule, warmup_ratio=ratio)
    rates = [learning_rate(step, 20, training) for step in range(20)]
    warmup = int(ratio * 20)
    assert all(0 < rate <= 0.5 for rate in rates)
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if warmup < 20:
        assert rates[warmup] == 0.5


@pytest.mark.parametrize(
    ("schedule", "oracle"),
    [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)],
)
def test_after_warm_up_the_schedule_is_transformers_own(schedule, oracle):
    training = Training(learning_rate=0.5, schedule=schedule, warmup_ratio=0.25)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = oracle(optimizer, 5, 20)
    for step in range(20):
        if step >= 5:
            assert learning_rate(step, 20, training) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_the_state_of_a_local_engine_goes_on_bit_for_bit(base):
    one = made(base)
    data = rows_of(12)
    for step in range(2):
        train_step(one, SFT(), _batches(data, range(step, step + 4), 2), 1e-2)
    other = made(base)
    other.load_state(one.state())
    for engine in (one, other):
        train_step(engine, SFT(), _batches(data, range(6), 2), 1e-2)
    left, right = one.state(), other.state()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert int(left["step"]) == 3
