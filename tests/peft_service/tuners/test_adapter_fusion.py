"""Tests of AdapterFusion: AdapterHub's numbers, what trains, what the attention is."""

import re

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from peft_service.tuners.adapter_fusion import AdapterFusionConfig, Mixer
from peft_service.tuners.bottleneck import BottleneckConfig
from tests import golden
from tests.peft_service.tuners import adapterhub, bases


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_output_and_gradients_are_adapterhubs(kind):
    recorded = golden.load(f"fusion-{kind}")
    members = sorted(
        {m.group(1) for name in recorded.adapter if (m := re.search(r"\.adapters\.(\w+)\.", name))}
    )
    config = AdapterFusionConfig(members=members, placement="pfeiffer", bottleneck_size=4)
    model = get_peft_model(recorded.base(), config).eval()
    parameters = {}
    for name, parameter in model.named_parameters():
        if "adapter_fusion_" not in name:
            continue
        part = name.split(".default.")[1]
        parameters[(*adapterhub.ours(name), part)] = parameter
    matched = {}
    for name, value in recorded.adapter.items():
        if "adapter_fusion_layer" in name:
            part = re.search(r"(query|key|value)\.\w+$", name).group(0)
        else:
            member = re.search(r"\.adapters\.(\w+)\.", name).group(1)
            part = f"member_{members.index(member)}.{adapterhub.bottleneck_part(name)}"
        matched[name] = parameters.pop((*adapterhub.place(name, kind), part))
        matched[name].data.copy_(value)
    assert not parameters
    output = golden.output_of(model, recorded.inputs)
    assert (recorded.output - recorded.base_output).abs().max() > 1e-2
    torch.testing.assert_close(output, recorded.output, rtol=1e-5, atol=2e-5)
    (output**2).sum().backward()
    trained = {name for name in matched if matched[name].requires_grad}
    assert trained == {name for name in matched if "adapter_fusion_layer" in name}
    for name in trained:
        torch.testing.assert_close(
            matched[name].grad, recorded.gradients[name], rtol=1e-3, atol=1e-3, msg=name
        )


def test_count_is_the_formulas_and_members_do_not_train():
    d = bases.WIDTH
    for placement, places in (("pfeiffer", bases.LAYERS), ("houlsby", 2 * bases.LAYERS)):
        config = AdapterFusionConfig(members=["a", "b"], placement=placement, bottleneck_size=4)
        model = get_peft_model(bases.base("bert"), config)
        fused = sum(
            p.numel() for n, p in model.named_parameters() if p.requires_grad and "adapter_fusion_" in n
        )
        assert fused == places * (3 * d * d + 2 * d)
        for _ in range(2):  # switching must not unfreeze them
            assert not any(p.requires_grad for n, p in model.named_parameters() if "_members" in n)
            model.set_adapter("default")


def _saved_member(tmp_path, name, seed, **options):
    model = get_peft_model(
        bases.base("bert"), BottleneckConfig(placement="pfeiffer", bottleneck_size=4, **options)
    )
    bases.stir(model, seed=seed)
    model.save_pretrained(tmp_path / name, save_embedding_layers=False)
    return bases.logits(model.eval(), bases.inputs("bert"))


def test_one_member_and_an_identity_is_that_member(tmp_path):
    alone = _saved_member(tmp_path, "only", 3)
    config = AdapterFusionConfig(members=["only"], bottleneck_size=4)
    model = get_peft_model(bases.base("bert"), config).eval()
    model.base_model.load_members({"only": tmp_path / "only"})
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Mixer):
                module.value.weight.copy_(torch.eye(bases.WIDTH))
    torch.testing.assert_close(bases.logits(model, bases.inputs("bert")), alone, rtol=1e-6, atol=1e-6)


def test_equal_members_get_equal_weights_and_the_same_result(tmp_path):
    alone = _saved_member(tmp_path, "a", 3)
    config = AdapterFusionConfig(members=["a", "b", "c"], bottleneck_size=4)
    model = get_peft_model(bases.base("bert"), config).eval()
    model.base_model.load_members(dict.fromkeys("abc", tmp_path / "a"))
    torch.testing.assert_close(bases.logits(model, bases.inputs("bert")), alone, rtol=1e-4, atol=1e-4)


def test_members_are_in_the_artifact_also_when_only_trained_values_are_passed(tmp_path):
    _saved_member(tmp_path, "a", 3)
    _saved_member(tmp_path, "b", 4)
    model = get_peft_model(bases.base("bert"), AdapterFusionConfig(members=["a", "b"], bottleneck_size=4))
    model.base_model.load_members({"a": tmp_path / "a", "b": tmp_path / "b"})
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(tmp_path / "fusion", state_dict=trained, save_embedding_layers=False)
    saved = load_file(tmp_path / "fusion" / "adapter_model.safetensors")
    member = load_file(tmp_path / "b" / "adapter_model.safetensors")
    for key, value in member.items():
        if "bottleneck" in key:
            assert torch.equal(
                saved[key.replace("bottleneck_parts", "adapter_fusion_members.member_1")], value
            )


@pytest.mark.parametrize(
    ("options", "said"),
    [({"activation": "tanh"}, "activation is 'tanh'"), ({"scale": 2.0}, "scale is 2.0")],
)
def test_a_member_of_another_shape_is_refused(tmp_path, options, said):
    _saved_member(tmp_path, "a", 3, **options)
    model = get_peft_model(bases.base("bert"), AdapterFusionConfig(members=["a"], bottleneck_size=4))
    with pytest.raises(ValueError, match=said):
        model.base_model.load_members({"a": tmp_path / "a"})
    with pytest.raises(ValueError, match="members are"):
        model.base_model.load_members({"b": tmp_path / "a"})


@pytest.mark.parametrize("members", [[], ["a", "a"]])
def test_bad_members_are_refused(members):
    with pytest.raises(ValueError, match="each once"):
        AdapterFusionConfig(members=members)
