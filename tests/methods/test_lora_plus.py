"""LoRA+: two rates whose ratio survives every schedule; with ratio 1 it is LoRA, bit for bit."""

import pytest
import torch

from peft_service.methods.lora import LoRA
from peft_service.methods.lora_plus import LoRAPlus
from tests.methods.checks import Live, Trial


def _live(root, method):
    return Live(Trial(method, "llama", "causal_lm"), root, rate=0.01)


def test_every_b_is_in_the_fast_group_and_stays_that_much_faster(root):
    live = _live(root, LoRAPlus(rank=4, ratio=16))
    names = {id(p): name for name, p in live.engine.parameters.items()}
    slow, fast = live.engine.optimizer.param_groups
    assert {"lora_A" in names[id(p)] for p in slow["params"]} == {True}
    assert {"lora_B" in names[id(p)] for p in fast["params"]} == {True}
    assert len(slow["params"]) == len(fast["params"]) == len(names) // 2
    for rate in (1e-2, 3e-3, 0.0):
        live.engine.step(rate)
        assert fast["lr"] == 16 * slow["lr"] == pytest.approx(16 * rate)


def test_adam_s_first_step_moves_b_by_the_ratio(root):
    live = _live(root, LoRAPlus(rank=4, ratio=8))
    live.step(0)
    moved = max(float(p.detach().abs().max()) for n, p in live.engine.parameters.items() if "lora_B" in n)
    assert moved == pytest.approx(8 * 0.01, rel=1e-3)  # B starts at zero, and Adam's first step is the rate


def test_ratio_1_is_lora_bit_for_bit(root):
    one, other = _live(root, LoRAPlus(rank=4, ratio=1)), _live(root, LoRA(rank=4))
    assert [one.step(n) for n in range(4)] == [other.step(n) for n in range(4)]
    for name, value in one.engine.trainable().items():
        assert torch.equal(value, other.engine.trainable()[name])
