"""DoRA: lengths start at the base's, scale the output, and train."""

import torch

from peft_service.methods.dora import DoRA
from peft_service.tuners.low_rank import base_weight, down, lora_layers, up
from tests.methods.checks import Live, Trial


def _layers(root):
    live = Live(Trial(DoRA(rank=4, alpha=8), "llama", "causal_lm"), root, rate=0.01)
    return live, lora_layers(live.attached.model)


def _magnitude(layer):
    return layer.lora_magnitude_vector["default"].weight


def test_lengths_start_as_those_of_the_rows_and_scale_the_output(root):
    _, layers = _layers(root)
    x = torch.randn(5, 64)
    for layer in layers.values():
        torch.testing.assert_close(_magnitude(layer), base_weight(layer).norm(dim=1))
        before = layer(x[:, : layer.in_features])
        with torch.no_grad():
            _magnitude(layer).mul_(1.5)
        torch.testing.assert_close(layer(x[:, : layer.in_features]), 1.5 * before, rtol=1e-4, atol=1e-5)


def test_the_layer_is_the_formula(root):
    _, layers = _layers(root)
    layer = next(iter(layers.values()))
    with torch.no_grad():
        up(layer).weight.normal_()
        _magnitude(layer).uniform_(0.5, 2)
    changed = (base_weight(layer) + 2 * up(layer).weight @ down(layer).weight).double()
    weight = _magnitude(layer)[:, None] * changed / changed.norm(dim=1, keepdim=True)
    x = torch.randn(5, 32)
    torch.testing.assert_close(layer(x).double(), x.double() @ weight.T, rtol=1e-4, atol=1e-4)


def test_lengths_and_directions_both_train(root):
    live, layers = _layers(root)
    before = {name: _magnitude(layer).detach().clone() for name, layer in layers.items()}
    for step in range(3):
        live.step(step)
    assert all(not torch.equal(before[name], _magnitude(layer)) for name, layer in layers.items())
    assert all(up(layer).weight.any() for layer in layers.values())
