"""Objectives: TRL's losses and gradients, formulas in float64, and sums that no cut of a step changes.

Everything is computed in float64, so that a difference is one of meaning (LLaMA's norms and softmax are in
float32 all the same, hence the tolerances). TRL's own numbers are recorded (tests/golden, objectives-*); the
formulas here are the papers', with loops over rows that stand alone, so that they share neither code nor
padding, packing or pairing with what they check.
"""

import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from peft_service import batches, logps
from peft_service.batches import Batch
from peft_service.objectives import OBJECTIVES
from peft_service.objectives.classification import Classification
from peft_service.objectives.cpo import CPO
from peft_service.objectives.distillation import Distillation
from peft_service.objectives.dpo import DPO
from peft_service.objectives.kto import KTO
from peft_service.objectives.multi_label import MultiLabel
from peft_service.objectives.orpo import ORPO
from peft_service.objectives.pretraining import Pretraining
from peft_service.objectives.regression import Regression
from peft_service.objectives.reward import Reward
from peft_service.objectives.sft import IGNORE, SFT
from peft_service.objectives.simpo import SimPO
from peft_service.tokenised import Tokenised
from peft_service.variants import kind_of
from tests import golden
from tests.methods import bases

PAD = 2
LOSS, GRADIENT = 2e-7, 1e-6
"""Relative differences allowed; of gradients, relative to the largest."""
RECORDED = {name: golden.losses(name) for name in ("pairs", "unpaired", "reward", "distillation")}
ANY = next(iter(RECORDED["pairs"].values()))
FROM_TRL = {
    "dpo": DPO(),
    "dpo-stiff": DPO(beta=0.5),
    "dpo-hinge": DPO(loss="hinge"),
    "dpo-ipo": DPO(loss="ipo"),
    "dpo-robust": DPO(loss="robust", label_smoothing=0.1),
    "dpo-smoothed": DPO(label_smoothing=0.1),
    "cpo": CPO(),
    "cpo-smoothed": CPO(cpo_alpha=0.5, label_smoothing=0.1),
    "cpo-hinge": CPO(loss="hinge", cpo_alpha=0.0),
    "cpo-ipo": CPO(loss="ipo"),
    "simpo": SimPO(),
    "orpo": ORPO(),
    "orpo-heavy": ORPO(beta=2.0),
    "kto": KTO(),
    "kto-weighted": KTO(beta=0.3, desirable_weight=1.5, undesirable_weight=0.7),
    "kto-clamped": KTO(),
    "reward": Reward(),
    "reward-centred": Reward(center_coefficient=0.1),
    "forward": Distillation(alpha=1.0),
    "reverse": Distillation(alpha=1.0, divergence="reverse"),
    "jensen_shannon": Distillation(alpha=1.0, divergence="jensen_shannon"),
    "cold": Distillation(alpha=1.0, temperature=0.7),
}
"""Our objective for each recorded case."""
CASES = [(name, case) for name, cases in RECORDED.items() for case in cases]


@cache
def model_of(outputs: int = 0):
    """The recorded base with the recorded LoRA, in float64; with `outputs`, one that classifies."""
    config = LlamaConfig(**ANY.base_config, attn_implementation="eager")
    if outputs:
        config.num_labels = outputs
    model = (LlamaForSequenceClassification if outputs else LlamaForCausalLM)(config)
    golden.fill(model, golden.base_weights({name: list(p.shape) for name, p in model.named_parameters()}))
    lora = LoraConfig(**ANY.lora, task_type="SEQ_CLS" if outputs else "CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    with torch.no_grad():
        for t, (name, parameter) in enumerate(trainable(adapted).items()):
            if "lora_" in name:
                parameter.copy_(ANY.scale * golden.chirp(list(parameter.shape), t + 100))
    return adapted.double().eval()


def trainable(model) -> dict[str, torch.nn.Parameter]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: named[name] for name in sorted(named)}


def plain() -> torch.nn.Module:
    """The recorded base alone, in float64."""
    model = LlamaForCausalLM(LlamaConfig(**ANY.base_config, attn_implementation="eager"))
    golden.fill(model, golden.base_weights({name: list(p.shape) for name, p in model.named_parameters()}))
    return model.double().eval()


@cache
def teacher() -> torch.nn.Module:
    """The base, which is also what preferences are compared with."""
    return plain()


class Line:
    """A sequence: its tokens, and which of them are to be learned."""

    def __init__(self, prompt, answer, **more):
        self.ids = [*prompt, *answer]
        self.start = len(prompt)
        self.more = more

    @property
    def labels(self):
        return [IGNORE] * self.start + self.ids[self.start :]


def text_line(objective, row, answer="chosen"):
    """Of a document every token is to be learned."""
    whole = objective.kind == "pretraining"
    return Line([], row["prompt"] + row[answer]) if whole else Line(row["prompt"], row[answer])


def pair_lines(rows):
    return [Line(row["prompt"], row[name]) for row in rows for name in ("chosen", "rejected")]


def unpaired_lines(rows):
    return [Line(row["prompt"], row[name]) for row in rows for name in ("completion", "other")]


def padded(lines, *, values=None, reference=None) -> Batch:
    """A line of the batch for each sequence."""
    width = max(len(line.ids) for line in lines)
    tokens = torch.full((len(lines), width), PAD)
    labels = torch.full((len(lines), width), IGNORE)
    mask = torch.zeros((len(lines), width), dtype=torch.long)
    for place, line in enumerate(lines):
        tokens[place, : len(line.ids)] = torch.tensor(line.ids)
        labels[place, : len(line.ids)] = torch.tensor(line.labels)
        mask[place, : len(line.ids)] = 1
    labels[:, 0] = IGNORE
    numbers = torch.arange(len(lines))[:, None].where(mask == 1, -1)
    return Batch(tokens, labels, mask, sequence_BT=numbers, values_BK=values, reference_S=reference)


def packed(lines, *, per_line=3, values=None, reference=None) -> Batch:
    """Several sequences in each line of the batch, behind one another, and padding at the end."""
    groups = [lines[start : start + per_line] for start in range(0, len(lines), per_line)]
    width = max(sum(len(line.ids) for line in group) for group in groups) + 2
    shape = (len(groups), width)
    tokens, labels = torch.full(shape, PAD), torch.full(shape, IGNORE)
    mask, numbers = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    positions, number = torch.zeros(shape, dtype=torch.long), 0
    for place, group in enumerate(groups):
        at = 0
        for line in group:
            here = slice(at, at + len(line.ids))
            tokens[place, here] = torch.tensor(line.ids)
            labels[place, here] = torch.tensor([IGNORE, *line.labels[1:]])
            mask[place, here], numbers[place, here] = 1, number
            positions[place, here] = torch.arange(len(line.ids))
            at, number = at + len(line.ids), number + 1
        positions[place, at:] = torch.arange(width - at)
    return Batch(
        tokens,
        labels,
        mask,
        sequence_BT=numbers,
        positions_BT=positions,
        values_BK=values,
        reference_S=reference,
    )


def reference_of(lines) -> torch.Tensor:
    """Each sequence alone, in the base."""
    with torch.no_grad():
        return torch.stack([alone(teacher(), line).sum() for line in lines])


def alone(model, line, *, whole=False) -> torch.Tensor:
    """Log-probability of each target of a sequence that stands alone; of every token, if `whole`."""
    ids = torch.tensor([line.ids])
    said = model(input_ids=ids).logits[0].log_softmax(-1)
    first = 1 if whole else max(line.start, 1)
    return torch.stack([said[at - 1, line.ids[at]] for at in range(first, len(line.ids))])


def gradients(loss, model) -> dict[str, torch.Tensor]:
    named = trainable(model)
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if grad is None else grad
        for (name, p), grad in zip(named.items(), found, strict=True)
    }


def step(objective, model, parts) -> tuple[float, float, dict[str, torch.Tensor]]:
    """(loss, share that is right, gradients) of a step, as the loop of `train.py` makes them."""
    targets = sum(float(objective.targets(batch)) for batch in parts)
    shared = objective.shared(model, parts)
    total, right, sums = 0.0, 0.0, None
    for batch in parts:
        batch = replace(batch, shared=shared)
        loss, good = objective.loss_sum(model, batch)
        grads = gradients(loss / targets, model)
        sums = grads if sums is None else {name: sums[name] + grads[name] for name in grads}
        total, right = total + float(loss.detach()) / targets, right + float(good)
    return total, right / targets, sums


def same(seen: dict, expected: dict, tolerance: float) -> None:
    assert seen.keys() == expected.keys()
    largest = max(float(x.abs().max()) for x in expected.values())
    for name in expected:
        apart = float((seen[name] - expected[name]).abs().max())
        assert apart <= tolerance * largest, f"{name}: {apart / largest:.1e} of the largest gradient"


def batch_for(objective, rows, layout=padded) -> Batch:
    """A microbatch of these recorded rows, as the objective wants them."""
    if objective.rows == "unpaired":
        lines = unpaired_lines(rows)
        good = torch.tensor([[float(row["label"])] for row in rows])
        return layout(lines, values=good, reference=reference_of(lines))
    if objective.rows == "pairs":
        lines = pair_lines(rows)
        batch = layout(lines, reference=reference_of(lines) if objective.needs_reference else None)
        return (
            replace(batch, labels_BT=torch.zeros(len(lines), 1).long())
            if objective.kind == "reward"
            else batch
        )
    answer = "chosen" if "chosen" in rows[0] else "completion"
    lines = [text_line(objective, row, answer) for row in rows]
    batch = layout(lines)
    if objective.kind == "distillation":
        batch.teacher = teacher()
    if objective.rows in ("values", "class_sets", "classes"):
        numbers = [sum(row["prompt"]) for row in rows]
        batch.labels_BT = torch.tensor([[n % 3] for n in numbers])
        if objective.rows != "classes":
            width = 1 if objective.rows == "values" else 3
            batch.values_BK = torch.tensor([[float((n >> k) % 2) for k in range(width)] for n in numbers])
    return batch


def outputs_of(objective) -> int:
    return {"reward": 1, "regression": 1, "multi_label": 3, "classification": 3}.get(objective.kind, 0)


# TRL's. Its logits are in float32 where it has a fused head, and the files are; the log of 1 - exp(x) is too.


@pytest.mark.parametrize(("name", "case"), CASES)
def test_loss_and_gradients_are_those_of_trl(name, case):
    recorded, objective = RECORDED[name][case], FROM_TRL[case]
    model = model_of(outputs_of(objective))
    loss, _, grads = step(objective, model, [batch_for(objective, recorded.rows)])
    factor = 1.0
    if name == "distillation":
        factor = recorded.options["temperature"] ** 2  # TRL leaves it out
    assert loss == pytest.approx(recorded.loss * factor, rel=2e-6)
    short = {n.removeprefix("base_model.model.").replace(".default", ""): g for n, g in grads.items()}
    same(short, {n: g.double() * factor for n, g in recorded.gradients.items()}, 5e-6)


def test_every_recorded_case_is_compared():
    assert {case for _, case in CASES} == set(FROM_TRL)
    for recorded in (case for cases in RECORDED.values() for case in cases.values()):
        assert any("lora_A" in name for name in recorded.gradients)
        # A KL of 0 everywhere could not tell a clamp from a constant.
    assert RECORDED["unpaired"]["kto"].kl > 0.1
    assert RECORDED["unpaired"]["kto-clamped"].kl == 0


# The papers' formulas, row by row.


def log_sigmoid(x):
    return -torch.log1p(torch.exp(-x))


def expected_dpo(objective, model, rows):
    losses = []
    for row in rows:
        better, worse = pair_lines([row])
        h, means = 0.0, 0.0
        for sign, line in ((1, better), (-1, worse)):
            ratio = alone(model, line) - alone(teacher(), line).detach()
            h, means = h + sign * ratio.sum(), means + sign * ratio.mean()
        noise, beta = objective.label_smoothing, objective.beta
        if objective.loss == "ipo":
            losses.append((means - 1 / (2 * beta)) ** 2)
        elif objective.loss == "hinge":
            losses.append(torch.clamp(1 - beta * h, min=0))
        elif objective.loss == "robust":
            kept, flipped = -log_sigmoid(beta * h), -log_sigmoid(-beta * h)
            losses.append(((1 - noise) * kept - noise * flipped) / (1 - 2 * noise))
        else:
            losses.append(-(1 - noise) * log_sigmoid(beta * h) - noise * log_sigmoid(-beta * h))
    return sum(losses) / len(rows)


def expected_simpo(objective, model, rows):
    total = 0.0
    for row in rows:
        better, worse = (alone(model, line).mean() for line in pair_lines([row]))
        x = objective.beta * better - objective.beta * worse - objective.beta * objective.gamma_ratio
        noise = objective.label_smoothing
        total = total - (1 - noise) * log_sigmoid(x) - noise * log_sigmoid(-x)
    return total / len(rows)


def expected_cpo(objective, model, rows):
    preference, likelihood, tokens = 0.0, 0.0, 0
    for row in rows:
        better, worse = (alone(model, line) for line in pair_lines([row]))
        likelihood, tokens = likelihood - better.sum(), tokens + len(better)
        noise, beta, h = objective.label_smoothing, objective.beta, better.sum() - worse.sum()
        if objective.loss == "ipo":
            preference = preference + (better.mean() - worse.mean() - 0.5 / beta) ** 2
        elif objective.loss == "hinge":
            preference = preference + torch.clamp(1 - beta * h, min=0)
        else:
            preference = preference - (1 - noise) * log_sigmoid(beta * h) - noise * log_sigmoid(-beta * h)
    return preference / len(rows) + objective.cpo_alpha * likelihood / tokens


def expected_orpo(objective, model, rows):
    ratio, likelihood, tokens = 0.0, 0.0, 0
    for row in rows:
        better, worse = pair_lines([row])
        whole = alone(model, better, whole=True)
        likelihood, tokens = likelihood - whole.sum(), tokens + len(whole)
        p, q = (torch.exp(alone(model, line).mean()) for line in (better, worse))
        ratio = ratio - torch.log(torch.sigmoid(torch.log((p / (1 - p)) / (q / (1 - q)))))
    return likelihood / tokens + objective.beta * ratio / len(rows)


def expected_kto(objective, model, rows):
    with torch.no_grad():
        others = [Line(row["prompt"], row["other"]) for row in rows]
        z = sum(alone(model, line).sum() - alone(teacher(), line).sum() for line in others) / len(rows)
        z = max(float(z), 0.0)
    total = 0.0
    for row in rows:
        line = Line(row["prompt"], row["completion"])
        r = alone(model, line).sum() - alone(teacher(), line).sum().detach()
        if row["label"]:
            total = total + objective.desirable_weight * (1 - torch.sigmoid(objective.beta * (r - z)))
        else:
            total = total + objective.undesirable_weight * (1 - torch.sigmoid(objective.beta * (z - r)))
    return total / len(rows)


def scores(model, line) -> torch.Tensor:
    return model(input_ids=torch.tensor([line.ids])).logits[0]


def expected_reward(objective, model, rows):
    total = 0.0
    for row in rows:
        better, worse = (scores(model, line)[0] for line in pair_lines([row]))
        total = total - log_sigmoid(better - worse) + objective.center_coefficient * (better + worse) ** 2
    return total / len(rows)


def expected_text(objective, model, rows):
    total = []
    for row in rows:
        total.append(-alone(model, text_line(objective, row)))
    return torch.cat(total).mean()


def expected_distillation(objective, model, rows):
    total, count, T = 0.0, 0, objective.temperature
    for row in rows:
        line = Line(row["prompt"], row["chosen"])
        ids = torch.tensor([line.ids])
        z, u = model(input_ids=ids).logits[0], teacher()(input_ids=ids).logits[0].detach()
        for at in range(line.start, len(line.ids)):
            q, p = torch.softmax(z[at - 1] / T, -1), torch.softmax(u[at - 1] / T, -1)
            m = (p + q) / 2
            apart = {
                "forward": (p * torch.log(p / q)).sum(),
                "reverse": (q * torch.log(q / p)).sum(),
                "jensen_shannon": ((p * torch.log(p / m)).sum() + (q * torch.log(q / m)).sum()) / 2,
            }[objective.divergence]
            hard = -torch.log(torch.softmax(z[at - 1], -1)[line.ids[at]])
            total, count = total + objective.alpha * T * T * apart + (1 - objective.alpha) * hard, count + 1
    return total / count


def expected_regression(objective, model, rows):
    """transformers' own loss of a head with one output."""
    model.config.problem_type = "regression"
    batch = batch_for(objective, rows)
    return model(**batch.inputs, labels=batch.values_BK[:, 0].double()).loss


def expected_multi_label(objective, model, rows):
    """transformers' own."""
    model.config.problem_type = "multi_label_classification"
    batch = batch_for(objective, rows)
    return model(**batch.inputs, labels=batch.values_BK.double()).loss


def expected_classification(objective, model, rows):
    model.config.problem_type = "single_label_classification"
    batch = batch_for(objective, rows)
    return model(**batch.inputs, labels=batch.labels_BT[:, 0]).loss


EXPECTED = {
    "dpo": expected_dpo, "simpo": expected_simpo, "cpo": expected_cpo, "orpo": expected_orpo,
    "kto": expected_kto, "reward": expected_reward, "sft": expected_text, "pretraining": expected_text,
    "distillation": expected_distillation, "regression": expected_regression,
    "multi_label": expected_multi_label, "classification": expected_classification,
}  # fmt: skip
OF_KIND = {
    **FROM_TRL,
    "sft": SFT(),
    "pretraining": Pretraining(),
    "simpo-smoothed": SimPO(beta=1.0, gamma_ratio=0.0, label_smoothing=0.2),
    "mixed": Distillation(alpha=0.3, divergence="reverse", temperature=3.0),
    "regression": Regression(),
    "multi_label": MultiLabel(),
    "classification": Classification(),
}


def rows_for(objective):
    return RECORDED["unpaired"]["kto"].rows if objective.rows == "unpaired" else ANY.rows


@pytest.mark.parametrize("case", OF_KIND)
def test_loss_and_gradients_are_those_of_the_formula(case):
    objective = OF_KIND[case]
    model, rows = model_of(outputs_of(objective)), rows_for(objective)
    expected = EXPECTED[objective.kind](objective, model, rows)
    loss, _, grads = step(objective, model, [batch_for(objective, rows)])
    assert loss == pytest.approx(float(expected.detach()), rel=LOSS)
    same(grads, gradients(expected, model), GRADIENT)


# However a step is cut.


@pytest.mark.parametrize("case", OF_KIND)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_a_step_is_the_same_however_it_is_cut(case, data):
    """Into microbatches of any size, in any order, with padding rows where a rank has nothing."""
    objective = OF_KIND[case]
    model, rows = model_of(outputs_of(objective)), rows_for(objective)
    whole = step(objective, model, [batch_for(objective, rows)])
    order = data.draw(st.permutations(range(len(rows))))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(rows) - 1))))
    parts = [
        batch_for(objective, [rows[row] for row in order[start:end]])
        for start, end in pairwise([0, *cuts, len(rows)])
    ]
    place = data.draw(st.integers(0, len(parts)))
    parts.insert(place, nothing(objective))
    cut = step(objective, model, parts)
    assert cut[:2] == pytest.approx(whole[:2], rel=LOSS)
    same(cut[2], whole[2], GRADIENT)


def nothing(objective) -> Batch:
    """The microbatch of a rank that has no row: padding that attends to itself."""
    per_row = 2 if objective.rows in ("pairs", "unpaired") else 1
    labels = torch.full((per_row, 1 if outputs_of(objective) else 2), IGNORE)
    width = 3 if objective.rows == "class_sets" else 1
    return Batch(
        torch.full((per_row, 2), PAD),
        labels,
        torch.ones(per_row, 2).long(),
        sequence_BT=torch.arange(per_row)[:, None].expand(-1, 2),
        values_BK=torch.zeros(1, width),
        reference_S=torch.zeros(per_row) if objective.needs_reference else None,
        teacher=teacher() if objective.kind == "distillation" else None,
    )


class Counted(torch.nn.Module):
    """A model that counts its forward passes."""

    def __init__(self, model):
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, **inputs):
        self.calls += 1
        return self.model(**inputs)


@pytest.mark.parametrize("case", OF_KIND)
@pytest.mark.parametrize("single", [False, True], ids=["as_wide", "one_line"])
def test_a_padding_row_adds_nothing_and_calls_the_model_as_often(case, single):
    objective = OF_KIND[case]
    model = Counted(model_of(outputs_of(objective)))
    batch = nothing(objective)
    if single:
        batch = replace(
            batch, tokens_BT=batch.tokens_BT[:1], labels_BT=batch.labels_BT[:1], mask_BT=batch.mask_BT[:1],
            sequence_BT=batch.sequence_BT[:1],
        )  # fmt: skip
    assert int(objective.targets(batch)) == 0
    shared = objective.shared(model, [batch])
    if shared is not None:
        assert shared.dtype == torch.float64
        assert torch.equal(shared, torch.zeros_like(shared))
        # What the other ranks have.
        batch.shared = torch.tensor([3.0, 7.0], dtype=torch.float64)
    loss, right = objective.loss_sum(model, batch)
    assert float(loss) == 0
    assert int(right) == 0
    grads = torch.autograd.grad(loss, list(trainable(model).values()), allow_unused=True)
    assert all(g is None or torch.equal(g, torch.zeros_like(g)) for g in grads)
    assert any(g is not None for g in grads), "the backward pass would not reach the model: a rank would hang"

    padding, model.calls = model.calls, 0
    rows = batch_for(objective, rows_for(objective)[:2])
    rows.shared = objective.shared(model, [rows])
    objective.loss_sum(model, rows)
    assert model.calls == padding


@pytest.mark.parametrize("case", [case for case in OF_KIND if OF_KIND[case].packs])
@pytest.mark.parametrize("per_line", [2, 3, 100])
def test_packed_rows_are_rows(case, per_line):
    objective = OF_KIND[case]
    model, rows = model_of(), rows_for(objective)
    whole = step(objective, model, [batch_for(objective, rows)])
    layout = lambda lines, **more: packed(lines, per_line=per_line, **more)  # noqa: E731
    laid = step(objective, model, [batch_for(objective, rows, layout)])
    assert laid[:2] == pytest.approx(whole[:2], rel=LOSS)
    same(laid[2], whole[2], GRADIENT)


@pytest.mark.parametrize("case", [case for case in OF_KIND if OF_KIND[case].packs])
def test_a_packed_batch_without_rows_adds_nothing(case):
    objective = OF_KIND[case]
    batch = nothing(objective)
    batch = replace(
        batch, tokens_BT=batch.tokens_BT[:1], labels_BT=batch.labels_BT[:1], mask_BT=batch.mask_BT[:1],
        sequence_BT=batch.sequence_BT[:1], positions_BT=torch.arange(2)[None],
    )  # fmt: skip
    assert int(objective.targets(batch)) == 0
    batch.shared = objective.shared(model_of(), [batch])
    loss, right = objective.loss_sum(model_of(), batch)
    assert (float(loss), int(right)) == (0, 0)


def data_of(objective) -> Tokenised:
    """The recorded rows, as they come from a file."""
    rows = rows_for(objective)
    lines = {"pairs": pair_lines, "unpaired": unpaired_lines}.get(
        objective.rows, lambda rows: [text_line(objective, row) for row in rows]
    )(rows)
    numbers = None
    if objective.rows == "unpaired":
        numbers = [[row["label"]] for row in rows]
    elif objective.rows == "values":
        numbers = [[0.5], [-1.0], [2.0], [0.0]]
    elif objective.rows == "class_sets":
        numbers = [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]]
    return Tokenised(
        input_ids=np.concatenate([line.ids for line in lines]).astype(np.int32),
        target_mask=np.concatenate([np.array([0, *line.labels[1:]]) > 0 for line in lines]).astype(np.uint8),
        offsets=np.cumsum([0, *(len(line.ids) for line in lines)]),
        lines=np.arange(1, len(rows) + 1),
        row_values=np.array([[0], [2], [1], [1]], dtype=np.int32) if objective.rows == "classes" else None,
        row_numbers=None if numbers is None else np.array(numbers, dtype=np.float32),
        sequences=len(lines) // len(rows),
        reference=reference_of(lines).float().numpy() if objective.needs_reference else None,
    )


@pytest.mark.parametrize("case", [case for case in OF_KIND if case != "mixed"])
def test_the_batches_of_a_run_give_the_same_step_on_any_number_of_ranks(case):
    """The collated batches themselves: more ranks than rows, so that some of them have padding only."""
    objective = OF_KIND[case]
    model, data = model_of(outputs_of(objective)), data_of(objective)
    task = objective.task("decoder")

    def seen(world, microbatch, **options):
        made = [
            batch
            for rank in range(world)
            for batch in batches.microbatches(
                data, range(data.rows), rank, world, microbatch, PAD, "cpu", task=task, **options
            )
        ]
        for batch in made:
            batch.teacher = teacher() if objective.kind == "distillation" else None
        return step(objective, model, made)

    whole = seen(1, 100)
    if objective.kind in EXPECTED and objective.rows in ("text", "pairs", "unpaired"):
        expected = EXPECTED[objective.kind](objective, model, rows_for(objective))
        assert whole[0] == pytest.approx(float(expected.detach()), rel=1e-6)  # the reference is in float32
    laid = [(1, 1, {}), (3, 1, {}), (7, 2, {})]
    if objective.packs:
        laid += [(1, 1, {"capacity": 30}), (3, 2, {"capacity": 16})]
    for world, microbatch, options in laid:
        cut = seen(world, microbatch, **options)
        assert cut[:2] == pytest.approx(whole[:2], rel=LOSS), (world, microbatch, options)
        same(cut[2], whole[2], GRADIENT)


# What is right.


def test_right_is_what_the_measure_says():
    model, rows = model_of(), ANY.rows
    lines = pair_lines(rows)
    ratios = [float(alone(model, line).sum() - alone(teacher(), line).sum()) for line in lines]
    wins = sum(ratios[n] > ratios[n + 1] for n in range(0, len(lines), 2)) / len(rows)
    assert 0 < wins < 1, "rows that are all right or all wrong would not tell"
    assert step(DPO(), model, [batch_for(DPO(), rows)])[1] == wins
    means = [float(alone(model, line).mean()) for line in lines]
    wins = sum(means[n] > means[n + 1] for n in range(0, len(lines), 2)) / len(rows)
    assert step(SimPO(), model, [batch_for(SimPO(), rows)])[1] == wins
    assert step(ORPO(), model, [batch_for(ORPO(), rows)])[1] == wins
    rows = RECORDED["unpaired"]["kto"].rows
    ratios = [float(alone(model, x).sum() - alone(teacher(), x).sum()) for x in unpaired_lines(rows)[::2]]
    agreed = sum((ratio > 0) == row["label"] for ratio, row in zip(ratios, rows, strict=True)) / len(rows)
    assert step(KTO(), model, [batch_for(KTO(), rows)])[1] == agreed
    model = model_of(1)
    rewards = [float(scores(model, line)) for line in lines]
    wins = sum(rewards[n] > rewards[n + 1] for n in range(0, len(lines), 2)) / len(ANY.rows)
    assert step(Reward(), model, [batch_for(Reward(), ANY.rows)])[1] == wins
    assert step(Regression(), model, [batch_for(Regression(), ANY.rows)])[1] == 0


def test_classes_of_other_tasks_are_not_asked():
    """In multi-task data a (row, class) of another task is no target and has no gradient."""
    objective, model = MultiLabel(), model_of(3)
    batch = batch_for(objective, ANY.rows)
    batch.allowed_BC = torch.tensor([[True, True, False], [False, False, True]] * 2)
    assert int(objective.targets(batch)) == 6
    loss, _ = objective.loss_sum(model, batch)
    logits = model(**batch.inputs).logits
    kept = F.binary_cross_entropy_with_logits(logits, batch.values_BK.double(), reduction="none")
    assert float(loss) == pytest.approx(float(kept[batch.allowed_BC].sum()), rel=1e-12)


# Where numbers are at their limits.


class Says(torch.nn.Module):
    """A model that says what it is told to."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, input_ids, **_):
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.logits)


@pytest.mark.parametrize("objective", [ORPO(), DPO(), CPO(), SimPO(), DPO(loss="ipo")], ids=lambda o: o.kind)
def test_certain_and_impossible_answers_have_finite_gradients(objective):
    """log(1 - p) of a token that is certain is infinite, and its gradient no number."""
    batch = padded(pair_lines(ANY.rows[:1]), reference=torch.zeros(2))
    logits = torch.zeros(*batch.tokens_BT.shape, 100)
    for line, sign in ((0, 1), (1, -1)):
        for at in range(1, batch.tokens_BT.shape[1]):
            logits[line, at - 1, batch.tokens_BT[line, at]] = 200.0 * sign
    for turned in (logits, logits.flip(0), logits.abs()):
        model = Says(turned.clone())
        loss, _ = objective.loss_sum(model, batch)
        (grad,) = torch.autograd.grad(loss, model.logits)
        assert torch.isfinite(loss)
        assert torch.isfinite(grad).all()


def test_half_precision_logits_are_summed_in_float32():
    """bfloat16 has eight bits: a log-softmax in it is wrong in the second digit."""
    logits = torch.randn(3, 9, 500, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.randint(0, 500, (3, 9), generator=torch.Generator().manual_seed(1))
    seen = logps.token_logps(logits, targets)
    expected = logits.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    assert seen.dtype == torch.float32
    assert float((seen - expected).abs().max()) < 2e-6


def test_nothing_is_predicted_from_padding_on_the_left():
    """Not even where everything that is read is a target, as in ORPO."""
    batch = padded(pair_lines(ANY.rows))
    lengths = batch.mask_BT.sum(1)
    assert torch.equal((logps.whole_targets_of(batch) != IGNORE).sum(1), lengths - 1)
    left = replace(batch, tokens_BT=batch.tokens_BT.flip(1), mask_BT=batch.mask_BT.flip(1))
    assert torch.equal((logps.whole_targets_of(left) != IGNORE).sum(1), lengths - 1)


def test_virtual_tokens_in_front_are_cut():
    """A prompt's tokens push the logits back: those of the row are the last."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = get_peft_model(plain(), config).double().eval()
    lines = pair_lines(ANY.rows)
    seen, counts = logps.sequence_logps(model, padded(lines), 2)
    for number, line in enumerate(lines):
        logits = model(input_ids=torch.tensor([line.ids]), attention_mask=torch.ones(1, len(line.ids))).logits
        assert logits.shape[1] == len(line.ids) + 5
        said = logits[0, 5:].log_softmax(-1)
        expected = sum(said[at - 1, line.ids[at]] for at in range(line.start, len(line.ids)))
        assert float(seen[number]) == pytest.approx(float(expected.detach()), rel=LOSS)
        assert int(counts[number]) == len(line.ids) - line.start


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("objective", [DPO(), ORPO(), CPO(), KTO(), SFT()], ids=lambda o: o.kind)
def test_encoder_decoders(kind, objective):
    """The encoder reads the prompt; the decoder's labels are not shifted."""
    model = bases.model(kind).double().eval()
    rows = RECORDED["unpaired"]["kto"].rows if objective.rows == "unpaired" else ANY.rows
    start = model.config.decoder_start_token_id

    def batch_of(rows):
        names = {"pairs": ("chosen", "rejected"), "unpaired": ("completion", "other"), "text": ("chosen",)}
        lines = [Line(row["prompt"], row[name]) for row in rows for name in names[objective.rows]]
        sources = padded([Line(line.ids[: line.start], []) for line in lines])
        answers = padded([Line([], line.ids[line.start :]) for line in lines])
        labels = answers.tokens_BT.where(answers.mask_BT == 1, IGNORE)
        decoder = torch.full_like(labels, start)
        decoder[:, 1:] = answers.tokens_BT[:, :-1]
        good = None
        if objective.rows == "unpaired":
            good = torch.tensor([[float(row["label"])] for row in rows])
        return replace(
            sources, labels_BT=labels, decoder_BT=decoder, sequence_BT=answers.sequence_BT, values_BK=good,
            reference_S=torch.linspace(-9, -5, 8)[: len(lines)].double(),
        )  # fmt: skip

    batch = batch_of(rows)
    seen, counts = logps.sequence_logps(model, batch)
    said = model(**batch.inputs).logits.log_softmax(-1)
    for number in range(len(seen)):
        labels = [int(token) for token in batch.labels_BT[number] if token != IGNORE]
        expected = sum(float(said[number, at, token]) for at, token in enumerate(labels))
        assert float(seen[number].detach()) == pytest.approx(expected, rel=LOSS)
        assert int(counts[number]) == len(labels)
    if objective.rows == "text":
        assert float(objective.loss_sum(model, batch)[0]) == pytest.approx(-float(seen.sum()), rel=LOSS)
        return
    reference = batch.reference_S
    parts = [replace(batch_of([row]), reference_S=reference[2 * n : 2 * n + 2]) for n, row in enumerate(rows)]
    whole, cut = step(objective, model, [batch]), step(objective, model, parts)
    assert cut[:2] == pytest.approx(whole[:2], rel=LOSS)


def test_teacher_with_a_larger_vocabulary():
    """Only the ids that both have are compared."""

    class Wide(torch.nn.Module):
        def forward(self, **inputs):
            said = teacher()(**inputs)
            said.logits = F.pad(said.logits, (0, 28), value=50.0)
            return said

    objective, model = Distillation(), model_of()
    batch = batch_for(objective, ANY.rows)
    plain = float(objective.loss_sum(model, batch)[0])
    batch.teacher = Wide()
    assert float(objective.loss_sum(model, batch)[0]) == pytest.approx(plain, rel=1e-12)
    batch.teacher = None
    with pytest.raises(TypeError, match=r"batch\.teacher"):
        objective.loss_sum(model, batch)


# What an objective says of itself.


def test_each_format_means_one_objective():
    default = [format for variant in OBJECTIVES for format in variant.default_for]
    assert len(default) == len(set(default))
    for variant in OBJECTIVES:
        assert set(variant.default_for) <= set(variant.formats)
        assert all((variant.summary, variant.paper, variant.formula, variant.measure)), variant
        assert 0 < variant.rate_scale <= 1
        for field in variant.model_fields.values():
            assert field.description or field.default == kind_of(variant), (variant, field)
    names = [kind_of(variant) for variant in OBJECTIVES] + [n for v in OBJECTIVES for n in v.aliases]
    assert len(names) == len(set(names))


def test_aliases_set_fields():
    for variant in OBJECTIVES:
        for fields in variant.aliases.values():
            assert set(fields) <= set(variant.model_fields)
    assert DPO.model_validate(DPO.aliases["ipo"]) == DPO(loss="ipo")


@pytest.mark.parametrize(
    ("variant", "fields"),
    [
        (DPO, {"loss": "ipo", "label_smoothing": 0.1}), (DPO, {"loss": "hinge", "label_smoothing": 0.1}),
        (CPO, {"loss": "hinge", "label_smoothing": 0.1}), (DPO, {"label_smoothing": 0.5}), (DPO, {"beta": 0}),
        (KTO, {"beta": -1}), (Distillation, {"alpha": 1.1}), (Distillation, {"temperature": 0}),
        (ORPO, {"lambda": 1}), (DPO, {"beta": float("nan")}), (DPO, {"beta": float("inf")}),
    ],
)  # fmt: skip
def test_fields_that_mean_nothing_are_refused(variant, fields):
    with pytest.raises(ValidationError):
        variant.model_validate(fields)


def test_objectives_are_imported_without_torch():
    code = "import sys, peft_service.objectives; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
