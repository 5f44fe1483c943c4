"""Tests of SSF: count, formula, the paper's start, merging."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_service.tuners import sites
from peft_service.tuners.ssf import SSFConfig
from peft_service.tuners.wrapper import NotMergeable, fold_affine
from tests.peft_service.tuners import bases


@pytest.mark.parametrize("kind", bases.KINDS)
def test_count_is_the_width_of_every_linear_layer_and_norm_in_the_layers(kind):
    raw = bases.base(kind)
    widths = {"all": 0, "where_bias": 0, "none": 0}
    for name, module in raw.named_modules():
        if isinstance(module, nn.Linear | Conv1D) or sites.is_norm(module):
            if sites.index_of(name) is None:
                continue
            weight = module.weight
            width = weight.shape[1] if isinstance(module, Conv1D) else weight.shape[0]
            widths["all"] += 2 * width
            widths["none"] += width
            widths["where_bias"] += (2 if getattr(module, "bias", None) is not None else 1) * width
    for shift, wanted in widths.items():
        model = get_peft_model(bases.base(kind), SSFConfig(shift=shift, target_modules=None))
        head = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "ssf_" not in n)
        assert bases.trainable(model) - head == wanted


def test_gamma_and_beta_do_what_the_formula_says():
    model = get_peft_model(bases.base("bert"), SSFConfig(target_modules=["query"])).eval()
    wrapped = model.base_model.model.bert.encoder.layer[0].attention.self.query
    bases.stir(model, scale=1.0)
    part = wrapped.ssf_parts["default"]
    x = torch.randn(2, 5, bases.WIDTH)
    torch.testing.assert_close(wrapped(x), part.gamma * wrapped.base_layer(x) + part.beta)


def test_the_papers_start_has_deviation_002():
    torch.manual_seed(0)
    model = get_peft_model(bases.base("gpt2"), SSFConfig(init="paper"))
    gamma = torch.cat([p for n, p in model.named_parameters() if n.endswith("gamma")])
    beta = torch.cat([p for n, p in model.named_parameters() if n.endswith("beta")])
    assert abs(gamma.mean() - 1) < 0.003
    assert abs(beta.mean()) < 0.003
    assert abs(gamma.std() - 0.02) < 0.002
    assert abs(beta.std() - 0.02) < 0.002


def test_a_norm_that_does_not_multiply_by_its_weight_is_not_merged_and_stays_as_it_was():
    class OnePlusRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8))

        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)

    norm = OnePlusRMSNorm()
    before = norm.weight.detach().clone()
    with torch.no_grad(), pytest.raises(NotMergeable):
        fold_affine(norm, torch.full((8,), 2.0), None)
    assert torch.equal(norm.weight, before)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="shift is one of"):
        SSFConfig(shift="some")
    with pytest.raises(ValueError, match="init is"):
        SSFConfig(init="ones")
    with pytest.raises(ValueError, match="neither a linear layer nor a norm"):
        get_peft_model(bases.base("llama"), SSFConfig(target_modules=["self_attn"]))
