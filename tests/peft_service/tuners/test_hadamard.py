"""Tests of the Hadamard adapter: the paper's count, formula, the base's norms."""

import pytest
import torch
from peft import get_peft_model
from transformers import BertConfig, BertModel

from peft_service.tuners.hadamard import HadamardConfig
from tests.peft_service.tuners import bases


def test_it_is_0033_percent_of_bert_base():
    with torch.device("meta"):
        base = BertModel(BertConfig())
    total = sum(p.numel() for p in base.parameters())
    d, layers = 768, 12
    model = get_peft_model(base, HadamardConfig(), low_cpu_mem_usage=True)
    assert bases.trainable(model) == 4 * d * layers == 36864
    assert round(100 * 4 * d * layers / total, 4) == 0.0337


@pytest.mark.parametrize(("kind", "norm"), [("bert", 2), ("bart", 2), ("gpt2", 2), ("llama", 1), ("t5", 1)])
def test_count(kind, norm):
    layers = bases.LAYERS * (2 if kind in ("bart", "t5") else 1)
    model = get_peft_model(bases.base(kind), HadamardConfig())
    assert bases.trainable(model) == layers * (2 + norm) * bases.WIDTH
    alone = get_peft_model(bases.base(kind), HadamardConfig(train_norms=False))
    assert bases.trainable(alone) == layers * 2 * bases.WIDTH


def test_it_scales_and_shifts_the_output_projection_and_replaces_the_norms_weights():
    model = get_peft_model(bases.base("bert"), HadamardConfig()).eval()
    output = model.base_model.model.bert.encoder.layer[1].attention.output
    base_norm = {name: p.clone() for name, p in output.LayerNorm.base_layer.named_parameters()}
    bases.stir(model, scale=0.5)
    x, residual = torch.randn(2, 4, bases.WIDTH), torch.randn(2, 4, bases.WIDTH)
    affine, norm = output.dense.hadamard_parts["default"], output.LayerNorm.hadamard_parts["default"]
    wanted = torch.nn.functional.layer_norm(
        affine.gamma * output.dense.base_layer(x) + affine.beta + residual,
        (bases.WIDTH,),
        norm.weight,
        norm.bias,
        output.LayerNorm.base_layer.eps,
    )
    torch.testing.assert_close(output(x, residual), wanted)
    for name, parameter in output.LayerNorm.base_layer.named_parameters():
        assert torch.equal(parameter, base_norm[name])
        assert not torch.allclose(parameter, dict(norm.named_parameters())[name])


def test_two_active_adapters_are_refused():
    model = get_peft_model(bases.base("bert"), HadamardConfig(), adapter_name="a").eval()
    model.add_adapter("b", HadamardConfig())
    model.base_model.set_adapter(["a", "b"])
    with pytest.raises(ValueError, match="cannot be combined"):
        model(**bases.inputs("bert"))
