"""Tests of the bottleneck adapter: AdapterHub's numbers, the count, the refusals."""

import pytest
import torch
from peft import get_peft_model

from peft_service.tuners.bottleneck import BottleneckConfig
from tests import golden
from tests.peft_service.tuners import adapterhub, bases

PLACEMENTS = ("houlsby", "pfeiffer", "parallel")


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_output_and_gradients_are_adapterhubs(placement, kind):
    recorded = golden.load(f"{placement}-{kind}")
    activation = recorded.config["non_linearity"]
    model = get_peft_model(
        recorded.base(),
        BottleneckConfig(placement=placement, bottleneck_size=4, activation=activation),
    ).eval()
    theirs = {
        (*adapterhub.place(name, kind), adapterhub.bottleneck_part(name)): name for name in recorded.adapter
    }
    parameters = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = name.split(".default.")[1]
            parameters[theirs[(*adapterhub.ours(name), part)]] = parameter
    assert parameters.keys() == recorded.adapter.keys()
    for name, parameter in parameters.items():
        parameter.data.copy_(recorded.adapter[name])
    output = golden.output_of(model, recorded.inputs)
    assert (recorded.output - recorded.base_output).abs().max() > 1e-2
    torch.testing.assert_close(output, recorded.output, rtol=1e-5, atol=2e-5)
    (output**2).sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, recorded.gradients[name], rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("kind", bases.KINDS)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("size", [1, 6])
def test_count_is_the_formulas(placement, kind, size):
    model = get_peft_model(bases.base(kind), BottleneckConfig(placement=placement, bottleneck_size=size))
    layers = bases.LAYERS * (2 if kind in ("t5", "bart") else 1)
    positions = layers * (2 if placement == "houlsby" else 1)
    d, m = bases.WIDTH, size
    assert bases.trainable(model) == positions * (2 * d * m + d + m)


def test_scale_multiplies_what_is_added():
    given = bases.inputs("llama")
    untouched = bases.logits(bases.base("llama"), given)
    outputs = {}
    for scale in (None, 4.0, 0.0):
        torch.manual_seed(0)
        model = get_peft_model(
            bases.base("llama"), BottleneckConfig(placement="parallel", bottleneck_size=4, scale=scale)
        ).eval()
        bases.stir(model)
        outputs[scale] = bases.logits(model, given)
    assert torch.equal(outputs[None], outputs[4.0])
    assert torch.equal(outputs[0.0], untouched)
    assert not torch.equal(outputs[4.0], untouched)


def test_it_works_on_nf4_linear_layers():
    bnb = pytest.importorskip("bitsandbytes")
    model = bases.base("llama")
    for layer in model.model.layers:
        for module, name in ((layer.self_attn, "o_proj"), (layer.mlp, "down_proj")):
            linear = getattr(module, name)
            packed = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, False, torch.float32, quant_type="nf4"
            )
            packed.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            setattr(module, name, packed.to("cpu"))
            # bitsandbytes repacks weights for AVX512-BF16 at the first evaluation, with other results
            getattr(module, name).support_avx512bf16_for_cpu = False
    given = bases.inputs("llama")
    before = bases.logits(model, given)
    model = get_peft_model(model, BottleneckConfig(bottleneck_size=4)).eval()
    assert torch.equal(bases.logits(model, given), before)
    bases.stir(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model(**given).logits.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"placement": "mad"}, "placement is one of"),
        ({"activation": "sine"}, "activation is one of"),
        ({"bottleneck_size": 0}, "at least 1"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        BottleneckConfig(**options)


def test_a_target_without_a_place_is_refused():
    with pytest.raises(ValueError, match="has no place"):
        get_peft_model(bases.base("llama"), BottleneckConfig(placement="parallel", target_modules=["q_proj"]))


def test_cached_generation_is_uncached_generation():
    for placement in PLACEMENTS:
        model = get_peft_model(
            bases.base("llama"), BottleneckConfig(placement=placement, bottleneck_size=4)
        ).eval()
        bases.stir(model)
        given = bases.inputs("llama")
        made = [
            model.generate(**given, max_new_tokens=8, do_sample=False, use_cache=cache, eos_token_id=None)
            for cache in (True, False)
        ]
        assert torch.equal(*made)
