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


def test_lengths_beside_a_bfloat16_base_are_float32_and_move_at_the_methods_own_rate(root):
    """Rounded to bfloat16, a length moves by 1/256 of itself or not at all."""
    from peft_service import base_model
    from peft_service.methods import Case, Material
    from tests.methods import checks

    model = base_model.load(checks.directory_of("llama", root), precision="bf16")
    attached = DoRA(rank=4, alpha=8).attach(model, Case(), Material())
    layers = lora_layers(attached.model)
    before = {name: _magnitude(layer).detach().clone() for name, layer in layers.items()}
    optimizer = torch.optim.AdamW(
        [p for p in attached.model.parameters() if p.requires_grad], lr=DoRA().rate()
    )
    ids = torch.arange(24).reshape(2, 12) + 5
    attached.model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    for name, layer in layers.items():
        assert _magnitude(layer).dtype == torch.float32
        assert layer.get_base_layer().weight.dtype == torch.bfloat16
        assert not torch.equal(before[name], _magnitude(layer))
        assert torch.equal(before[name].bfloat16(), _magnitude(layer).bfloat16()), "nothing was tested"
