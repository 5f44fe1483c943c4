"""UniPELT: AdapterHub's numbers, gates between 0 and 1, and that padding is nobody's affair."""

import re

import pytest
import torch
from peft import get_peft_model

from peft_service.methods.unipelt import UniPELT
from peft_service.tuners.unipelt import Gate, UniPELTConfig
from tests import golden
from tests.methods.checks import Live, Trial


def ours(name: str, kind: str) -> str:
    """The module and parameter of ours for one of AdapterHub's, but the prefix."""
    gate = {"weight": "gate.linear.weight", "bias": "gate.linear.bias"}
    rest = name.rpartition(".")[2]
    if "prefix_gates" in name:
        block = name.partition(".self.prefix_tuning" if kind == "bert" else ".prefix_tuning")[0]
        return f"{block} {gate[rest]}"
    if ".loras." in name:
        part = {"lora_A": "down.weight", "lora_B": "up.weight"}.get(rest) or gate[rest]
        return f"{name.partition('.loras.')[0]} {part}"
    part = (
        gate[rest]
        if ".gate." in name
        else re.search(r"adapter_(down|up)(\.0)?\.(\w+)$", name).expand(r"adapter.\1.\3")
    )
    place = "output.LayerNorm" if kind == "bert" else "mlp.down_proj"
    return f"{re.match(r'.*?[.][0-9]+', name).group(0)}.{place} {part}"


def loaded(kind: str):
    """(recorded, our model with its weights, AdapterHub's name -> our parameter, the prefix's)."""
    recorded = golden.load(f"unipelt-{kind}")
    config = UniPELTConfig(rank=4, virtual_tokens=3, bottleneck_size=4, gates_see_padding=True)
    model = get_peft_model(recorded.base(), config).eval()
    mine = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            module, part = name.removeprefix("base_model.model.").split(".unipelt_parts.default.")
            mine[f"{module.replace('.base_layer', '')} {part}"] = parameter
    matched = {}
    for name, value in recorded.adapter.items():
        if name.startswith("pool."):
            continue
        matched[name] = mine.pop(ours(name, kind))
        matched[name].data.copy_(value)
    prefix = recorded.adapter["pool.prefix_tunings.a.self_prefix.control_trans"]
    layers = recorded.base_config["num_hidden_layers"]
    parts = sorted(mine)  # by layer, keys before values
    assert len(parts) == 2 * layers
    for part, value in zip(parts, prefix.view(3, 2 * layers, -1).unbind(1), strict=True):
        mine[part].data.copy_(value)
    return recorded, model, matched, [mine[part] for part in parts]


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_output_and_gradients_are_adapterhubs(kind):
    recorded, model, matched, prefix = loaded(kind)
    output = golden.output_of(model, recorded.inputs)
    torch.testing.assert_close(output, recorded.output, rtol=1e-5, atol=2e-5)
    (output**2).sum().backward()
    for name, parameter in matched.items():
        torch.testing.assert_close(parameter.grad, recorded.gradients[name], rtol=1e-3, atol=1e-3, msg=name)
    gradient = torch.stack([p.grad for p in prefix], 1).flatten()
    wanted = recorded.gradients["pool.prefix_tunings.a.self_prefix.control_trans"]
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-3)


def test_gates_that_do_not_see_padding_differ_where_there_is_some():
    recorded, model, _, _ = loaded("bert")
    model.peft_config["default"].gates_see_padding = False
    output = golden.output_of(model, recorded.inputs)
    assert torch.allclose(output[0], recorded.output[0], atol=2e-5)  # no pads
    assert not torch.allclose(output[2, :4], recorded.output[2, :4], atol=1e-3)


def test_gates_are_between_0_and_1_one_a_row_and_place(root):
    live = Live(Trial(UniPELT(**UniPELT.small), "llama", "sequence_classification"), root, rate=0.01)
    seen = []
    gates = [module for module in live.engine.model.modules() if isinstance(module, Gate)]
    assert len(gates) == 2 * (1 + 1 + 2)  # two layers with prefix, adapter, q and v
    for gate in gates:
        gate.register_forward_hook(lambda module, args, made: seen.append(made))
    for step in range(2):
        live.step(step)
    for made in seen:
        assert made.shape[1:] == (1, 1)
        assert bool(((made > 0) & (made < 1)).all())


@pytest.mark.parametrize(
    ("base", "task"),
    [
        ("bert", "sequence_classification"),
        ("llama", "token_classification"),
        ("llama", "sequence_classification"),
    ],
)
def test_a_row_is_answered_the_same_whatever_it_is_padded_to(root, base, task):
    live = Live(Trial(UniPELT(**UniPELT.small), base, task), root, rate=0.01)
    for step in range(3):
        live.step(step)
    model = live.engine.model.eval()
    alone, together = live.batch([0]), live.batch([0, 2])
    width = alone.tokens_BT.shape[1]
    assert together.tokens_BT.shape[1] > width
    with torch.no_grad():
        one, two = (model(**b.inputs).logits[b.rows.index(0)] for b in (alone, together))
    torch.testing.assert_close(
        one, two[: len(one)] if task == "token_classification" else two, rtol=1e-5, atol=1e-5
    )


def test_open_gates_are_the_sum_of_the_parts(root):
    """w = 0 and b large: g is 1, and LoRA on a value layer adds B A x."""
    live = Live(Trial(UniPELT(**UniPELT.small), "bert", "sequence_classification"), root, rate=0.05)
    for step in range(3):
        live.step(step)
    layer = next(m for n, m in live.engine.model.named_modules() if n.endswith("self.value"))
    part = layer.part("default")
    with torch.no_grad():
        part.gate.linear.weight.zero_()
        part.gate.linear.bias.fill_(50.0)
        x = torch.randn(2, 5, 32)
        layer.tokens.mask = None
        wanted = layer.base_layer(x) + x @ part.down.weight.T @ part.up.weight.T
        torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
