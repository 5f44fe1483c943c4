"""(IA)³ against AdapterHub, and what a scale does."""

import pytest
import torch
from peft import IA3Config, get_peft_model

from peft_service import methods
from peft_service.errors import InvalidRequest
from peft_service.methods.ia3 import IA3
from tests import golden
from tests.methods import checks
from tests.methods.checks import Live, Trial


@pytest.mark.parametrize("name", ["ia3-bert", "ia3-llama", "ia3-t5"])
def test_outputs_are_scaled_as_adapterhub_does(name):
    """AdapterHub scales outputs everywhere, so all layers are named as such (see tests/golden/README.md)."""
    recorded = golden.load(name)
    layers = {key.partition(".loras.")[0]: tensor for key, tensor in recorded.adapter.items()}
    model = get_peft_model(
        recorded.base(), IA3Config(target_modules=list(layers), feedforward_modules=[])
    ).eval()
    with torch.no_grad():
        for layer, scale in layers.items():
            model.base_model.model.get_submodule(layer).ia3_l["default"].copy_(scale.reshape(-1, 1))
        said = golden.output_of(model.base_model.model, recorded.inputs)
    real = (
        recorded.inputs["attention_mask"].bool()
        if said.shape[1] == recorded.inputs["attention_mask"].shape[1]
        else ...
    )
    torch.testing.assert_close(said[real], recorded.output[real], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("base", "task", "expected"),
    [
        ("llama", "causal_lm", 2 * (16 + 16 + 64)),
        ("opt", "causal_lm", 2 * (32 + 32 + 64)),
        ("bert", "token_classification", 2 * (32 + 32 + 64)),
        ("t5", "seq2seq_lm", 2 * (32 + 32 + 64) + 2 * (4 * 32 + 64)),
    ],
)
def test_the_papers_count(root, base, task, expected):
    assert IA3().trainable(checks.shape_of(base, root), checks.case_of(Trial(IA3(), base, task))) == expected


def test_a_scale_of_the_keys_is_a_scale_of_the_attentions_logits(root):
    """l = c on every key: the same as a base whose key layer is c times as large."""
    live = Live(Trial(IA3(targets=("k_proj",), feedforward=()), "opt", "causal_lm"), root)
    model = live.engine.model
    with torch.no_grad():
        for parameter in live.engine.parameters.values():
            parameter.fill_(1.7)
    said = live.answers()
    for parameter in live.engine.parameters.values():
        parameter.data.fill_(1.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".k_proj.base_layer." in name:
                parameter.mul_(1.7)
    assert checks.difference(said, live.answers(), live.probe) < 2e-5


def test_weight_decay_is_refused(root):
    """It pulls the scales to 0, where the keys are gone, and not to 1, where the base is."""
    trial = Trial(IA3(), "llama", "causal_lm")
    case = checks.case_of(trial).model_copy(update={"weight_decay": 0.01})
    with pytest.raises(InvalidRequest, match="rest at 1") as refused:
        methods.admit(trial.method, checks.shape_of("llama", root), case)
    assert refused.value.param == "training.weight_decay"
