"""Arrow: peft's own router is the oracle, and the mean of general LoRAs is taken away as it does."""

import pytest
import torch
from peft import ArrowConfig as TheirConfig
from peft import LoraConfig, create_arrow_model, get_peft_model

from peft_service import artifact
from peft_service.errors import InvalidRequest
from peft_service.methods import Case
from peft_service.methods.arrow import Arrow
from peft_service.tuners.arrow import ArrowConfig, attach_arrow, prototype
from tests.methods.checks import directory_of, shape_of

TARGETS = ["q_proj", "v_proj", "down_proj"]
INPUTS = {"input_ids": torch.arange(60).reshape(3, 20) + 5}


def base_of(root):
    return artifact.load_base(directory_of("llama", root), "causal_lm", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def loras(root, tmp_path_factory):
    """Four LoRAs, each with one direction far above the others: peft finds it by fifteen multiplications."""
    made = []
    for number in range(4):
        torch.manual_seed(number)
        model = get_peft_model(base_of(root), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter) * 0.2
            if "lora_A" in name:
                parameter.data[0] *= 6
        made.append(tmp_path_factory.mktemp("lora") / str(number))
        model.save_pretrained(made[-1], save_embedding_layers=False)
    return made


@pytest.mark.parametrize(
    ("top_k", "temperature", "general"), [(1, 1.0, 0), (2, 0.5, 0), (4, 3.0, 0), (2, 1.0, 1)]
)
def test_it_answers_as_pefts_router(root, loras, tmp_path, top_k, temperature, general):
    tasks, known = loras[: 4 - general], loras[4 - general :]
    config = TheirConfig(top_k=top_k, router_temperature=temperature, rng_seed=1, use_gks=bool(general))
    theirs = create_arrow_model(
        base_of(root), list(map(str, tasks)), config, general_adapter_paths=list(map(str, known)) or None
    ).eval()
    method = Arrow(sources=("a", "b", "c", "d"), top_k=top_k, temperature=temperature, general=general)
    ours = attach_arrow(base_of(root), Case(), method, loras)
    assert not any(parameter.requires_grad for parameter in ours.model.parameters())
    ours.save({}, tmp_path, ("tiny", None))
    loaded = artifact.load(base_of(root), tmp_path)
    with torch.no_grad():
        wanted, found = theirs(**INPUTS).logits, loaded(**INPUTS).logits
        base = base_of(root)(**INPUTS).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-4)
    assert (wanted - base).abs().max() > 0.1


def test_a_prototype_is_the_direction_that_is_stretched_most():
    torch.manual_seed(0)
    a, b = torch.randn(3, 10), torch.randn(7, 3)
    found = prototype(a, b)
    _, _, right = torch.linalg.svd(b @ a)
    assert abs(float(found @ right[0])) == pytest.approx(1.0, abs=1e-5)
    assert float(found.norm()) == pytest.approx(1.0, abs=1e-5)


def test_one_expert_gets_every_token_and_is_that_lora(root, loras):
    method = Arrow(sources=("a", "b"), top_k=2)
    made = attach_arrow(base_of(root), Case(), method, [loras[2], loras[2]])
    alone = artifact.load(base_of(root), loras[2])
    with torch.no_grad():
        torch.testing.assert_close(made.model(**INPUTS).logits, alone(**INPUTS).logits, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_routed_is_refused(root, loras, tmp_path):
    other = get_peft_model(base_of(root), LoraConfig(r=4, target_modules=["o_proj"]))
    other.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(InvalidRequest, match="same targets"):
        attach_arrow(base_of(root), Case(), Arrow(sources=("a", "b")), [loras[0], tmp_path])
    with pytest.raises(InvalidRequest, match="set general to 0"):
        Arrow(sources=("a", "b"), general=1).check(shape_of("llama", root), Case())
    with pytest.raises(ValueError, match="temperature"):
        ArrowConfig(temperature=0)
