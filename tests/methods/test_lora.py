"""LoRA is loralib's and AdapterHub's, and its other first values are peft's, without peft's change of the
base."""

import pytest
import torch

from peft_service import base_model
from peft_service.errors import InvalidRequest
from peft_service.methods import Case, Material
from peft_service.methods.lora import LoRA
from peft_service.tuners.low_rank import base_weight, down, lora_layers, up
from tests import golden
from tests.methods import checks
from tests.methods.checks import Live, Trial

STARTS = ("gaussian", "pissa", "olora", "eva", "orthogonal")
# (file, targets): AdapterHub's `output_lora`, `intermediate_lora` and `attn_matrices` of that file.
RECORDED = [
    ("lora-llama", ("q_proj", "v_proj"), "causal_lm"),
    ("lora-bert", ("query", "value"), "sequence_classification"),
    ("lora-t5", ("q", "v"), "seq2seq_lm"),
    ("lora-wide-llama", ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"), "causal_lm"),
]


def _live(root, steps=6, base="llama", task="causal_lm", rate=0.01, **fields):
    return Live(Trial(LoRA(**{"rank": 4, "alpha": 8} | fields), base, task), root, steps=steps, rate=rate)


@pytest.mark.parametrize(("name", "targets", "task"), RECORDED)
def test_output_and_gradients_are_adapterhubs(name, targets, task):
    recorded = golden.load(name)
    method = LoRA(rank=recorded.config["r"], alpha=recorded.config["alpha"], targets=targets)
    model = recorded.base()
    model.requires_grad_(False)
    model = method.attach(model, Case(task=task), Material()).model
    layers = lora_layers(model)
    assert {f"{n.removeprefix('base_model.model.')}.loras.a.lora_{p}" for n in layers for p in "AB"} == set(
        recorded.adapter
    )
    for layer_name, layer in layers.items():
        key = f"{layer_name.removeprefix('base_model.model.')}.loras.a.lora_"
        down(layer).weight.data.copy_(recorded.adapter[f"{key}A"])
        up(layer).weight.data.copy_(recorded.adapter[f"{key}B"])
    output = golden.output_of(model.get_base_model().eval(), recorded.inputs)
    torch.testing.assert_close(output, recorded.output, rtol=2e-5, atol=2e-5)
    (output**2).sum().backward()
    for layer_name, layer in layers.items():
        key = f"{layer_name.removeprefix('base_model.model.')}.loras.a.lora_"
        for part, module in (("A", down(layer)), ("B", up(layer))):
            wanted = recorded.gradients[f"{key}{part}"]
            assert (module.weight.grad - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize(("base", "task"), [("llama", "causal_lm"), ("bert", "sequence_classification")])
def test_every_start_holds_what_a_method_must(init, base, task, root, tmp_path):
    checks.check_all(Trial(LoRA(rank=4, alpha=8, init=init), base, task), root, tmp_path / "artifact")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_training_from_a_subtracted_pair_is_training_on_pefts_changed_base(init, root):
    """peft's own initialisation changes the base's weights; the same losses come out of an untouched base."""
    ours, theirs = _live(root, init=init), _live(root)
    config_model = base_model.load(theirs.directory, precision="fp32")
    theirs.attached = _peft(config_model, init)
    theirs.engine = type(theirs.engine)(theirs.attached, theirs.training)
    for name, layer in lora_layers(ours.attached.model).items():
        other = theirs.attached.model.get_submodule(name)
        torch.testing.assert_close(down(layer).weight, down(other).weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(up(layer).weight, up(other).weight, rtol=1e-4, atol=1e-5)
    losses = [[live.step(step) for step in range(6)] for live in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert checks.difference(ours.answers(), theirs.answers(), ours.probe) < 1e-4


def _peft(model, init):
    from peft_service.attached import Attached
    from peft_service.tuners.low_rank import attach_lora

    return Attached(
        attach_lora(model, Case(), rank=4, alpha=8, targets=None, dropout=0.0, init_lora_weights=init)
    )


def test_pissa_takes_the_leading_part_of_the_weight(root):
    for layer in lora_layers(_live(root, init="pissa").attached.model).values():
        product = 2 * up(layer).weight @ down(layer).weight
        left, size, right = torch.linalg.svd(base_weight(layer))
        best = left[:, :4] @ torch.diag(size[:4]) @ right[:4]
        torch.testing.assert_close(product, best, rtol=1e-4, atol=1e-5)


def test_eva_sees_nearly_as_much_of_the_inputs_as_any_directions_of_that_number_could(root):
    live = _live(root, init="eva")
    model = base_model.load(live.directory, precision="fp32")
    layers = lora_layers(live.attached.model)
    seen = {name: [] for name in layers}
    for name in layers:
        plain = model.get_submodule(name.removeprefix("base_model.model."))
        plain.register_forward_pre_hook(lambda module, args, name=name: seen[name].append(args[0][0]))
    with torch.no_grad():
        for row in range(32):
            model(**live.batch([row]).inputs)
    for name, layer in layers.items():
        x = torch.cat(seen[name])
        x = x - x.mean(0)
        best = torch.linalg.svd(x)[2][:4]
        share = (x @ down(layer).weight.T).square().sum() / (x @ best.T).square().sum()
        assert 0.9 < share < 1.01, f"{name}: {share}"
        torch.testing.assert_close(down(layer).weight @ down(layer).weight.T, torch.eye(4), rtol=0, atol=1e-4)
        assert not up(layer).weight.any()


def test_eva_refuses_too_little_text(root):
    live = _live(root)
    few = Material(sample=lambda count: [live.batch([0])])
    with pytest.raises(InvalidRequest, match="smaller rank"):
        LoRA(rank=16, init="eva").attach(base_model.load(live.directory, precision="fp32"), Case(), few)


def test_orthogonal_starts_at_zero_with_neither_factor_zero(root):
    for layer in lora_layers(_live(root, init="orthogonal").attached.model).values():
        a, b = down(layer).weight, up(layer).weight
        assert a.abs().max() > 0.05
        assert b.abs().max() > 0.05
        assert (b @ a).abs().max() < 1e-6


@pytest.mark.parametrize("alpha", [16, 64])
def test_loftq_starts_nearer_to_the_base_than_its_four_bits_do(root, alpha):
    directory = checks.directory_of("llama", root)
    tokens = torch.arange(24).reshape(2, 12) + 5

    def logits(init=None, quantize="nf4"):
        model = base_model.load(directory, precision="fp32", quantize=quantize)
        if init:
            case = Case(quantize=quantize)
            model = LoRA(rank=16, alpha=alpha, init=init).attach(model, case, Material()).model.eval()
        with torch.no_grad():
            return model(tokens).logits

    original, quantised = logits(quantize=None), logits()
    assert (logits("loftq") - original).norm() < 0.5 * (quantised - original).norm()
    # A subtracted pair starts as the base it trains on, which is the quantised one.
    torch.testing.assert_close(logits("pissa"), quantised, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits("olora"), quantised, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"init": "loftq"}, "adapter.init", "base.quantize"),
        ({"init": "orthogonal", "rank": 5}, "adapter.rank", "set rank to 6"),
        ({"init": "pissa", "rank": 64}, "adapter.rank", "k_proj has 16"),
        ({"init": "olora", "rank": 17}, "adapter.rank", "set rank to 16"),
    ],
)
def test_what_cannot_work_is_refused_with_what_does(fields, param, words, root):
    with pytest.raises(InvalidRequest, match=words) as caught:
        LoRA(**fields).check(checks.shape_of("llama", root), Case())
    assert caught.value.param == param
