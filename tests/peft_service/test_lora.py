"""LoRA trains exactly what its formula says, starts as the base, and says what a wrong target should have
been."""

import pytest
import torch

from peft_service import base_model
from peft_service.errors import InvalidRequest
from peft_service.methods import Case, Material
from peft_service.methods.lora import LoRA
from tests.tiny import save_tiny_base

TOKENS = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"), hidden=64)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize(
    "method", [LoRA(), LoRA(rank=3, targets=("q_proj", "down_proj")), LoRA(rank=4, alpha=7, rslora=True)]
)
def test_it_trains_exactly_what_it_promised_and_starts_as_the_base_model(base, method, quantize):
    model = base_model.load(base, precision="fp32", quantize=quantize)
    before = model(TOKENS).logits
    promised = method.trainable(base_model.shape_of_directory(base), Case())
    adapted = method.attach(model, Case(seed=1), Material()).model
    trainable = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trainable.values()) == promised > 0
    assert all(p.dtype == torch.float32 and "lora_" in name for name, p in trainable.items())
    torch.testing.assert_close(adapted(TOKENS).logits, before, rtol=0, atol=0)


def test_the_update_is_the_formula_of_the_paper(base):
    method = LoRA(rank=4, alpha=8, targets=("q_proj",))
    adapted = method.attach(base_model.load(base, precision="fp32"), Case(), Material()).model
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(b)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), x @ layer.base_layer.weight.T + 8 / 4 * (x @ a.T @ b.T))


def test_the_same_seed_gives_the_same_adapter_and_leaves_the_global_generator_alone(base):
    def values(seed):
        model = base_model.load(base, precision="fp32")
        adapted = LoRA(rank=4).attach(model, Case(seed=seed), Material()).model
        return torch.cat([p.flatten() for n, p in adapted.named_parameters() if "lora_A" in n])

    torch.manual_seed(5)
    first, drawn = values(1), torch.rand(1)
    torch.manual_seed(6)
    assert torch.equal(first, values(1))
    assert not torch.equal(first, values(2))
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))


def test_targets_that_match_nothing_are_refused_with_what_there_is(base):
    shape = base_model.shape_of_directory(base)
    LoRA(targets=("q_proj", "self_attn.k_proj")).check(shape, Case())
    with pytest.raises(InvalidRequest, match=r"'query'.*down_proj, gate_proj, k_proj") as caught:
        LoRA(targets=("q_proj", "query")).check(shape, Case())
    assert caught.value.param == "adapter.targets"
    with pytest.raises(InvalidRequest, match="lm_head"):
        LoRA(targets=("lm_head",)).check(shape, Case())
