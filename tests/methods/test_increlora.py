"""IncreLoRA: the gradient of the whole change is exact, the best layers grow, and the total is the budget."""

from itertools import pairwise

import pytest
import torch

from peft_service.errors import InvalidRequest
from peft_service.methods import Case
from peft_service.methods.increlora import IncreLoRA
from peft_service.tuners.increlora import grown
from peft_service.tuners.low_rank import down, lora_layers, up
from tests.methods import checks
from tests.methods.checks import Live, Trial

METHOD = IncreLoRA(rank=3, max_rank=6, alpha=6, begin=0.1, end=0.8, interval=3, score_rows=1000)
STEPS = 20


def _live(root, method=METHOD, steps=STEPS):
    return Live(Trial(method, "llama", "causal_lm"), root, steps=steps, rate=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rows", [1000, 7])
def test_the_gradient_of_the_change_is_that_of_the_weight(root, rows, checkpointing):
    """Of y = (W + ΔW) x both have the same: W is made to train, and autograd asked."""
    live = _live(root, METHOD.model_copy(update={"score_rows": rows}))
    if checkpointing:
        live.attached.model.gradient_checkpointing_enable({"use_reentrant": False})
        live.attached.model.enable_input_require_grads()
    layers = live.attached.layers
    for layer in layers.values():
        layer.base_layer.weight.requires_grad_(True)
    live.engine.model.train()
    for part in (range(4), range(4, 8)):
        live.objective.loss_sum(live.engine.model, live.batch(part))[0].backward()
    for layer, sink in zip(layers.values(), live.attached.sinks, strict=True):
        wanted = layer.base_layer.weight.grad[sink.rows]
        assert len(sink.rows) == min(rows, layer.out_features)
        torch.testing.assert_close(sink.take(torch.device("cpu")), wanted, rtol=1e-4, atol=1e-5)


def test_ranks_are_what_the_papers_formulas_say(root):
    """Scores from the weights' own gradients in float64, averaged and compared anew at every step."""
    live = _live(root)
    attached = live.attached
    mean = spread = torch.zeros(14, dtype=torch.float64)
    ranks = [1] * 14
    history = []
    for layer in attached.layers.values():
        layer.base_layer.weight.requires_grad_(True)
    for step in range(STEPS):
        before = {
            name: 2.0
            * (up(layer).weight * down(layer).strength()).detach().double()
            @ down(layer).weight.detach().double()
            for name, layer in attached.layers.items()
        }
        live.step(step)
        now = []
        for name, layer in attached.layers.items():
            gradient = layer.base_layer.weight.grad.double()
            layer.base_layer.weight.grad = None
            now.append((before[name] * gradient).abs().sum() / gradient.numel() ** 0.5)
        score = torch.stack(now)
        if sum(ranks) < 42:
            mean = 0.85 * mean + 0.15 * score
            spread = 0.85 * spread + 0.15 * (score - mean).abs()
        if step + 1 in (5, 8, 11, 14, 16):
            wanted = 14 + round(28 * ((5, 8, 11, 14, 16).index(step + 1) + 1) / 5)
            order = (mean * spread).argsort(descending=True).tolist()
            while sum(ranks) < wanted:
                for index in order:
                    if ranks[index] < 6 and sum(ranks) < wanted:
                        ranks[index] += 1
        assert attached.ranks == ranks, step
        history.append(list(ranks))
    assert sum(ranks) == 3 * 14
    assert len(set(ranks)) > 1
    assert all(a <= b for one, two in pairwise(history) for a, b in zip(one, two, strict=True))


def test_a_layer_with_a_planted_gradient_grows_first(root):
    """A layer whose gradient is a hundred times larger has the largest rank in the end."""
    for planted in (2, 9):
        attached = _live(root).attached
        scores = [1.0] * 14
        scores[planted] = 100.0
        ranks = grown([1] * 14, scores, 15, 6)
        assert ranks[planted] == 2
        assert sum(ranks) == 15
        assert len(attached.layers) == 14


def test_growth_is_exact_and_stays_below_the_limit():
    assert grown([1, 1, 1], [3.0, 2.0, 1.0], 5, 4) == [2, 2, 1]
    assert grown([1, 1, 1], [3.0, 2.0, 1.0], 8, 3) == [3, 3, 2]
    assert grown([3, 1, 1], [3.0, 2.0, 1.0], 7, 3) == [3, 2, 2]
    assert grown([2, 2], [0.0, 0.0], 4, 3) == [2, 2]


def test_places_not_in_use_contribute_nothing_and_do_not_move(root):
    live = _live(root)
    layers = live.attached.layers
    first = {
        name: (down(y).weight.detach().clone(), up(y).weight.detach().clone()) for name, y in layers.items()
    }
    used = [0] * 14
    for step in range(STEPS):
        in_use = [rank + (1 if live.attached.growing() else 0) for rank in live.attached.ranks]
        used = [max(pair) for pair in zip(used, in_use, strict=True)]
        for (name, layer), count in zip(layers.items(), used, strict=True):
            a, b = first[name]
            assert torch.equal(down(layer).weight[count:], a[count:])
            assert torch.equal(up(layer).weight[:, count:], b[:, count:])
        for layer, count in zip(layers.values(), in_use, strict=True):
            assert not down(layer).strength()[count:].any()
        resting = [
            float(down(y).strength()[r].detach())
            for y, r in zip(layers.values(), live.attached.ranks, strict=True)
            if r < 6
        ]
        if live.attached.growing():
            assert resting == pytest.approx([1e-5] * len(resting))
        else:
            assert not any(resting)
        live.step(step)
    moved = [not torch.equal(down(y).weight[:1], first[name][0][:1]) for name, y in layers.items()]
    assert all(moved)


def test_the_file_is_a_plain_lora_with_a_rank_for_each_layer(root, tmp_path):
    live = _live(root)
    for step in range(STEPS):
        live.step(step)
    model, again = checks.load(live, live.save(tmp_path / "artifact"))
    assert model.peft_config["default"].peft_type == "LORA"
    assert [len(down(layer).weight) for layer in lora_layers(model).values()] == live.attached.ranks
    assert checks.difference(again, live.answers(), live.probe) < 5e-6
    assert checks.difference(again, live.before, live.probe) > 1e-2


@pytest.mark.parametrize("stop", [3, 6, 16, 18])
def test_a_stop_anywhere_changes_nothing(root, stop):
    whole, first, second = (_live(root) for _ in range(3))
    for step in range(STEPS):
        whole.step(step)
    for step in range(stop):
        first.step(step)
    second.attached.load_state(first.attached.state())
    second.engine.load_state(first.engine.state())
    for step in range(stop, STEPS):
        second.step(step)
    assert second.attached.ranks == whole.attached.ranks
    for name, value in whole.engine.trainable().items():
        assert torch.equal(value, second.engine.trainable()[name]), name


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_short_run_ends_with_its_budget_too(root, steps):
    live = _live(root, steps=steps)
    for step in range(steps):
        live.step(step)
    assert sum(live.attached.ranks) == 3 * 14


def test_ranks_that_could_not_differ_are_refused(root):
    with pytest.raises(InvalidRequest, match="max_rank") as caught:
        IncreLoRA(rank=8, max_rank=8).check(checks.shape_of("llama", root), Case())
    assert caught.value.param == "adapter.max_rank"
    with pytest.raises(InvalidRequest, match="set rank to 15"):
        IncreLoRA(rank=512).check(checks.shape_of("llama", root), Case())  # no max_rank is above that
    with pytest.raises(InvalidRequest, match=r"defaults are 0\.1 and 0\.6"):
        IncreLoRA(begin=0.7).check(checks.shape_of("llama", root), Case())
