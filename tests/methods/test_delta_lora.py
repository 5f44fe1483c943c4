"""Delta-LoRA: the closed form is what changing W step by step gives, in float64; with share 0 it is LoRA."""

import pytest
import torch

from peft_service.methods import Case, Material
from peft_service.methods.delta_lora import DeltaLoRA
from peft_service.methods.lora import LoRA
from peft_service.spec import Training
from peft_service.train import LocalEngine
from peft_service.tuners.low_rank import base_weight, down, lora_layers, up
from tests.methods import bases, checks
from tests.methods.checks import Live, Trial

STEPS = 15


def _model():
    model = bases.model("llama").double().eval()
    return model.requires_grad_(False)


def _loss(model, step):
    tokens = torch.randint(3, 300, (3, 8), generator=torch.Generator().manual_seed(step))
    return model(input_ids=tokens).logits.double().square().mean()


@pytest.mark.parametrize("begin", [0.0, 0.2])
@pytest.mark.parametrize("share", [0.5, 2.0])
def test_the_closed_form_is_the_step_by_step_change_of_the_base(begin, share):
    """After every step W += share * s * (B A of now - B A before), literally, in float64."""
    method = DeltaLoRA(rank=3, alpha=6, share=share, begin=begin, targets=("q_proj", "down_proj"))
    attached = method.attach(_model(), Case(steps=STEPS), Material())
    attached.model.double()
    engine = LocalEngine(attached, Training(learning_rate=0.01, max_grad_norm=1e9))

    explicit = LoRA(rank=3, alpha=6, targets=("q_proj", "down_proj"))
    other = explicit.attach(_model(), Case(steps=STEPS), Material()).model.double()
    layers = lora_layers(other)
    for name, layer in layers.items():
        down(layer).weight.data.copy_(down(attached.model.get_submodule(name)).weight)
    optimizer = torch.optim.AdamW(
        [p for p in other.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0
    )
    untouched = {name: base_weight(layer).clone() for name, layer in layers.items()}

    for step in range(STEPS):
        attached.before_step(step)
        engine.backward(_loss(attached.model, step))
        attached.before_update(engine, step)
        engine.step(0.01)
        attached.after_update(engine, step)

        _loss(other, step).backward()
        before = {name: (up(layer).weight @ down(layer).weight).detach() for name, layer in layers.items()}
        optimizer.step()
        optimizer.zero_grad()
        if step >= int(begin * STEPS):
            for name, layer in layers.items():
                moved = (up(layer).weight @ down(layer).weight).detach() - before[name]
                layer.base_layer.weight.data += share * 2 * moved
        with torch.no_grad():
            gap = (_loss(attached.model, 99) - _loss(other, 99)).abs()
        assert gap < 1e-12, step
    for name, layer in layers.items():
        live = attached.model.get_submodule(name)
        assert (down(live).weight - down(layer).weight).abs().max() < 1e-12
        assert (up(live).weight - up(layer).weight).abs().max() < 1e-12
        assert torch.equal(base_weight(live), untouched[name])
        assert (base_weight(layer) - untouched[name]).abs().max() > 1e-3, "nothing was tested"


def test_share_0_is_lora_bit_for_bit(root):
    one, other = (
        Live(Trial(method, "llama", "causal_lm"), root, rate=0.01)
        for method in (DeltaLoRA(rank=4, share=0), LoRA(rank=4))
    )
    assert [one.step(n) for n in range(6)] == [other.step(n) for n in range(6)]
    for name, value in one.engine.trainable().items():
        assert torch.equal(value, other.engine.trainable()[name])


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_stop_before_at_and_after_the_base_begins_to_move(root, stop):
    trial = Trial(DeltaLoRA(rank=4, alpha=8, begin=0.34), "llama", "causal_lm")
    assert trial.method.first_step(checks.case_of(trial)) == 2
    whole, first, second = (Live(trial, root, rate=0.01) for _ in range(3))
    for step in range(6):
        whole.step(step)
    for step in range(stop):
        first.step(step)
    second.attached.load_state(first.attached.state())
    second.engine.load_state(first.engine.state())
    assert checks.difference(second.answers(), first.answers(), first.probe) == 0
    for step in range(stop, 6):
        second.step(step)
    for name, value in whole.engine.trainable().items():
        assert torch.equal(value, second.engine.trainable()[name]), name
    assert checks.difference(second.answers(), whole.answers(), whole.probe) == 0
