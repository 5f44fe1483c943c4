"""DyLoRA: every rank can be cut out, ranks are drawn evenly and by the step alone, and small ranks are
good."""

import math
from collections import Counter

import pytest
import torch

from peft_service.errors import InvalidRequest
from peft_service.methods import Case
from peft_service.methods.dylora import DyLoRA
from peft_service.methods.lora import LoRA
from peft_service.tuners.dylora import sampled_rank
from peft_service.tuners.low_rank import down, lora_layers, up
from tests.methods import checks
from tests.methods.checks import Live, Trial


def _live(root, method, steps=6, rate=0.01):
    return Live(Trial(method, "llama", "causal_lm"), root, steps=steps, rate=rate)


def _serve(live, b):
    live.attached.served = b
    for layer in live.attached.layers.values():
        down(layer).served = b


def test_the_file_of_every_rank_is_a_plain_lora_that_says_what_the_live_model_says(root, tmp_path):
    live = _live(root, DyLoRA(rank=4, alpha=8))
    for step in range(4):
        live.step(step)
    seen = []
    for b in range(1, 5):
        _serve(live, b)
        model, again = checks.load(live, live.save(tmp_path / str(b)))
        config = model.peft_config["default"]
        assert (config.peft_type, config.r, config.lora_alpha) == ("LORA", b, 8)
        assert checks.difference(again, live.answers(), live.probe) < 2e-6
        seen.append(again)
    assert checks.difference(seen[0], seen[3], live.probe) > 1e-3


def test_a_training_step_computes_a_plain_lora_of_rank_b(root):
    live = _live(root, DyLoRA(rank=4, alpha=8))
    layer = next(iter(lora_layers(live.attached.model).values()))
    with torch.no_grad():
        up(layer).weight.normal_()
    x = torch.randn(5, 32)
    a, b_matrix, w = down(layer).weight, up(layer).weight, layer.base_layer.weight
    layer.train()
    for step in range(8):
        live.attached.before_step(step)
        b = sampled_rank(0, step, 4)
        wanted = x @ w.T + 8 / b * (x @ a[:b].T @ b_matrix[:, :b].T)
        torch.testing.assert_close(layer(x), wanted)
    layer.eval()
    torch.testing.assert_close(layer(x), x @ w.T + 2 * (x @ a.T @ b_matrix.T))


def test_ranks_are_drawn_evenly_by_seed_and_step(root):
    drawn = Counter(sampled_rank(7, step, 8) for step in range(8000))
    assert set(drawn) == set(range(1, 9))
    assert all(abs(count - 1000) < 6 * math.sqrt(875) for count in drawn.values())
    assert [sampled_rank(7, step, 8) for step in range(50)] != [
        sampled_rank(8, step, 8) for step in range(50)
    ]


@pytest.mark.parametrize("frozen", [False, True])
def test_only_the_rows_of_the_step_get_a_gradient(root, frozen):
    live = _live(root, DyLoRA(rank=4, alpha=8, frozen=frozen))
    for layer in lora_layers(live.attached.model).values():
        with torch.no_grad():
            up(layer).weight.normal_(std=0.1)
    for step in range(6):
        live.attached.before_step(step)
        live.engine.model.train()
        live.objective.loss_sum(live.engine.model, live.batch(range(4)))[0].backward()
        b = sampled_rank(0, step, 4)
        wanted = {b - 1} if frozen else set(range(b))
        for layer in lora_layers(live.attached.model).values():
            rows = down(layer).weight.grad.abs().amax(1).nonzero().flatten().tolist()
            columns = up(layer).weight.grad.abs().amax(0).nonzero().flatten().tolist()
            assert set(rows) == set(columns) == wanted
        live.engine.optimizer.zero_grad()


def test_small_ranks_are_better_than_a_lora_cut_down(root):
    """The reason to use it: at rank 1 it is far better than a LoRA of full rank of which rank 1 is left."""
    steps = 60
    dynamic = _live(root, DyLoRA(rank=4, alpha=8), steps)
    plain = _live(root, LoRA(rank=4, alpha=8), steps)
    for step in range(steps):
        dynamic.step(step)
        plain.step(step)
    _serve(dynamic, 1)
    for layer in lora_layers(plain.attached.model).values():
        with torch.no_grad():
            down(layer).weight[1:] = 0
            down(layer).weight[:1] *= 4  # alpha / 1 instead of alpha / 4
    assert dynamic.loss() < 0.8 * plain.loss()


def test_a_rank_to_serve_above_the_trained_one_is_refused(root):
    with pytest.raises(InvalidRequest, match="raise rank") as caught:
        DyLoRA(rank=4, serve_rank=5).check(checks.shape_of("llama", root), Case())
    assert caught.value.param == "adapter.serve_rank"


def test_a_smaller_rank_to_serve_is_what_the_gate_sees(root, tmp_path):
    checks.check_all(Trial(DyLoRA(rank=4, alpha=8, serve_rank=2), "t5", "seq2seq_lm"), root, tmp_path / "a")
