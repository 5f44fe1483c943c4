"""AdaLoRA: the published allocator on a recorded tape of gradients, exact budgets, and peft's own sums."""

import contextlib

import pytest
import torch

from peft_service.errors import InvalidRequest
from peft_service.methods import Case
from peft_service.methods.adalora import AdaLoRA
from peft_service.tuners.low_rank import down, lora_layers, names_of, up
from peft_service.tuners.svd import gate_of
from tests.methods import checks
from tests.methods.checks import Live, Trial

METHOD = AdaLoRA(rank=2, initial_rank=4, alpha=8, begin=0.1, end=0.8, interval=3)
STEPS = 20


def _live(root, method=METHOD, steps=STEPS):
    return Live(Trial(method, "llama", "causal_lm"), root, steps=steps, rate=0.02)


class Tape:
    """An engine that has the gradients of a tape instead of its own."""

    device = torch.device("cpu")

    def __init__(self):
        self.now = {}

    def gradient(self, name):
        return self.now[name]

    def gathered(self):
        return contextlib.nullcontext()


def _parts(attached):
    return {name: (names_of(name)[0], gate_of(name), names_of(name)[1]) for name in attached.layers}


def test_who_is_left_is_what_the_papers_formulas_say(root):
    """Equations 8 to 12 and the cubic budget, written down again in float64, on 20 recorded steps."""
    attached = _live(root).attached
    tape, draw = Tape(), torch.Generator().manual_seed(0)
    parameters = dict(attached.model.named_parameters())
    parts = _parts(attached)
    mean, spread = {}, {}
    weights = {key: parameters[key].detach().double().clone() for names in parts.values() for key in names}
    decided = 0
    for step in range(STEPS):
        tape.now = {
            key: torch.randn(value.shape, generator=draw) * torch.rand((), generator=draw)
            for key, value in weights.items()
        }
        attached.before_update(tape, step)
        if step < 16:
            for key, weight in weights.items():
                sensitivity = (weight * tape.now[key].double()).abs()
                mean[key] = 0.85 * mean.get(key, 0) + 0.15 * sensitivity
                spread[key] = 0.85 * spread.get(key, 0) + 0.15 * (sensitivity - mean[key]).abs()
        # what an optimizer would do
        with torch.no_grad():
            for key in weights:
                moved = torch.randn(weights[key].shape, generator=draw) * 0.1
                parameters[key] += moved
                weights[key] += moved.double()
        attached.after_update(tape, step)

        updates = step + 1
        if updates == 16 or (2 < updates < 16 and updates % 3 == 0):
            coefficient = 1 - (updates - 2) / (16 - 2)
            budget = int((56 - 28) * coefficient**3 + 28) if updates < 16 else 28
            scores = []
            for name, (a, e, b) in parts.items():
                score = {key: mean[key] * spread[key] for key in (a, e, b)}
                for i in range(4):
                    total = score[e][i] + score[a][i].mean() + score[b][:, i].mean()
                    scores.append((float(total), name, i))
            left = sorted(scores, reverse=True)[:budget]
            for name, (_, e, _) in parts.items():
                for i in range(4):
                    if not any(entry[1:] == (name, i) for entry in left):
                        weights[e][i] = 0.0
            decided += 1
        if updates > 16:
            for name, (_, e, _) in parts.items():
                for i in range(4):
                    if not any(entry[1:] == (name, i) for entry in left):
                        weights[e][i] = 0.0
        for name, (_, e, _) in parts.items():
            strength = down(attached.layers[name]).strength().double()
            torch.testing.assert_close(strength, weights[e], rtol=1e-5, atol=1e-6)
            assert torch.equal(strength == 0, weights[e] == 0), (step, name)
    assert decided == 6


def test_the_budget_is_kept_exactly_also_among_equals(root):
    attached = _live(root).attached
    tape = Tape()
    parameters = dict(attached.model.named_parameters())
    with torch.no_grad():
        for layer in attached.layers.values():
            for value in (down(layer).weight, down(layer).gate, up(layer).weight):
                value.fill_(0.5)
    for step in range(STEPS):
        tape.now = {key: torch.ones_like(value) for key, value in parameters.items() if value.requires_grad}
        attached.before_update(tape, step)
        if step < 2:  # of an A, an e and a B all the same: every triple of every layer ties
            assert len(set(attached.scores().tolist())) == 1
        with torch.no_grad():
            for layer in attached.layers.values():
                down(layer).gate += 0.1
        attached.after_update(tape, step)
        if (budget := attached.budget(step + 1)) is not None:
            alive = sum(int((down(layer).strength() != 0).sum()) for layer in attached.layers.values())
            assert alive == budget
    assert alive == 2 * 14 == sum(int(down(layer).learning.sum()) for layer in attached.layers.values())


def test_training_ends_with_exactly_the_budget_and_a_file_of_those_triples(root, tmp_path):
    live = _live(root)
    for step in range(STEPS):
        live.step(step)
    strengths = {name: down(layer).strength() for name, layer in live.attached.layers.items()}
    assert sum(int((value != 0).sum()) for value in strengths.values()) == 2 * 14
    model, again = checks.load(live, live.save(tmp_path / "artifact"))
    assert checks.difference(again, live.answers(), live.probe) < 5e-6
    loaded = lora_layers(model)
    for name, value in strengths.items():
        rank = int((value != 0).sum())
        assert (down(loaded[name]).weight.shape[0] if name in loaded else 0) == rank
    assert len({len(value.nonzero()) for value in strengths.values()}) > 1, "ranks did not move"
    assert checks.difference(again, live.before, live.probe) > 1e-2


def test_the_sums_are_those_of_pefts_adalora(root):
    """The same A, E and B in peft's own AdaLoRA layers."""
    from peft import AdaLoraConfig, get_peft_model

    from peft_service import base_model

    live = _live(root)
    for step in range(4):
        live.step(step)
    config = AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=8, total_step=10, target_modules=["q_proj", "k_proj", "v_proj",
        "o_proj", "up_proj", "down_proj", "gate_proj"],
    )  # fmt: skip
    theirs = get_peft_model(base_model.load(live.directory, precision="fp32"), config)
    for name, layer in live.attached.layers.items():
        other = theirs.get_submodule(name)
        with torch.no_grad():
            other.lora_A["default"].copy_(down(layer).weight)
            other.lora_E["default"].copy_(down(layer).strength()[:, None])
            other.lora_B["default"].copy_(up(layer).weight)
    theirs.eval()
    with torch.no_grad():
        logits = theirs(**live.probe.inputs).logits
    assert (
        checks.difference({"logits": logits}, live.answers(), live.probe) < 1e-4
    )  # peft's 1e-5 in α/(r + 1e-5)
    assert checks.difference({"logits": logits}, live.before, live.probe) > 1e-2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_penalty_is_added_once_a_step_however_it_is_split(root, checkpointing):
    """Gradients of a step with and without it differ by the gradient of 0.5 mean ‖A Aᵀ - I‖."""

    def gradients(weight, parts):
        live = _live(root, METHOD.model_copy(update={"orthogonal": weight}))
        if checkpointing:
            live.attached.model.gradient_checkpointing_enable({"use_reentrant": False})
            live.attached.model.enable_input_require_grads()
        live.engine.model.train()
        size, found = 8 // parts, {}

        def step(rate):
            found.update({n: p.grad.clone() for n, p in live.engine.parameters.items()})
            live.engine.optimizer.zero_grad()
            return 1.0

        live.engine.step = step
        from peft_service.train import train_step

        batches = [live.batch(range(part * size, (part + 1) * size)) for part in range(parts)]
        done = train_step(live.engine, live.objective, batches, 0.01, live.attached, 0)
        return live, found, done.loss

    live, plain, loss = gradients(0.0, 1)
    for parts in (1, 2, 4):
        _, penalised, reported = gradients(0.5, parts)
        assert reported == pytest.approx(loss, rel=1e-6), "the penalty is in the loss that is reported"
        for name, layer in live.attached.layers.items():
            for key, value, by_row in (
                (names_of(name)[0], down(layer).weight, True),
                (names_of(name)[1], up(layer).weight, False),
            ):
                weight = value.detach().double().requires_grad_()
                rows = weight if by_row else weight.T
                distance = torch.linalg.matrix_norm(rows @ rows.T - torch.eye(4, dtype=torch.float64))
                (0.5 * distance / 28).backward()
                torch.testing.assert_close(
                    (penalised[key] - plain[key]).double(), weight.grad, rtol=1e-3, atol=1e-6
                )
                assert weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize("stop", [2, 7, 16, 18])
def test_a_stop_anywhere_changes_nothing(root, stop):
    """Before the first decision, between two, right after the last, and in the final phase."""
    whole, first, second = (_live(root) for _ in range(3))
    for step in range(STEPS):
        whole.step(step)
    for step in range(stop):
        first.step(step)
    second.attached.load_state(first.attached.state())
    second.engine.load_state(first.engine.state())
    assert checks.difference(second.answers(), first.answers(), first.probe) == 0
    for step in range(stop, STEPS):
        second.step(step)
    for name, value in whole.engine.trainable().items():
        assert torch.equal(value, second.engine.trainable()[name]), name
    state = whole.attached.state()
    assert all(torch.equal(state[key], value) for key, value in second.attached.state().items())


@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_a_short_run_ends_with_its_budget_too(root, steps):
    attached = _live(root, steps=steps).attached
    assert [attached.budget(n) for n in range(1, steps + 1)].count(28) >= 1
    assert attached.end <= steps


def test_a_rank_that_is_not_less_than_the_first_is_refused(root):
    shape = checks.shape_of("llama", root)
    with pytest.raises(InvalidRequest, match="initial_rank") as caught:
        AdaLoRA(rank=8, initial_rank=8).check(shape, Case())
    assert caught.value.param == "adapter.initial_rank"
    with pytest.raises(InvalidRequest, match="before end"):
        AdaLoRA(begin=0.8, end=0.5).check(shape, Case())
    with pytest.raises(InvalidRequest, match="set rank to 11"):
        AdaLoRA(rank=512).check(shape, Case())  # no initial_rank is above that
