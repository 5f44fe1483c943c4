"""AdapterFusion: members stay, attention sums to one, the penalty is right, wrong members are refused."""

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from peft_service.errors import InvalidRequest
from peft_service.methods.adapter_fusion import AdapterFusion
from peft_service.tuners.adapter_fusion import Mixer
from tests.methods.checks import Live, Trial, sources

SMALL = AdapterFusion.small


def test_members_in_the_artifact_are_the_sources_bit_by_bit(root, tmp_path):
    trial = Trial(AdapterFusion(**SMALL), "bert", "sequence_classification")
    live = Live(trial, root, rate=0.01)
    for step in range(3):
        live.step(step)
    saved = load_file(live.save(tmp_path / "a") / "adapter_model.safetensors")
    found = 0
    for number, source in enumerate(sources(trial, root)):
        for name, tensor in load_file(source / "adapter_model.safetensors").items():
            if ".bottleneck_parts." in name:
                name = name.replace("bottleneck_parts", f"adapter_fusion_members.member_{number}")
                assert torch.equal(saved[name], tensor)
                found += 1
    assert found == 2 * 4 * 4


def test_attention_sums_to_one(root):
    """Members that all say u give V u, whatever Q and K are."""
    torch.manual_seed(0)
    mixer = Mixer(8)
    x, u = torch.randn(2, 5, 8), torch.randn(2, 5, 1, 8)
    torch.testing.assert_close(mixer(x, u.expand(2, 5, 3, 8)), u[..., 0, :] @ mixer.value.weight.T)


def test_the_penalty_and_its_gradient(root):
    live = Live(Trial(AdapterFusion(**SMALL | {"regularisation": 0.5}), "llama", "causal_lm"), root)
    matrices = [p for n, p in live.engine.parameters.items() if n.endswith("value.weight")]
    with torch.no_grad():
        for matrix in matrices:
            matrix.add_(0.1 * torch.randn_like(matrix))
    live.engine.model.train()
    live.engine.model(**live.probe.inputs)
    penalty = live.attached.penalty()
    wanted = 0.5 * sum(((m - torch.eye(32)) ** 2).sum() for m in matrices)
    torch.testing.assert_close(penalty, wanted)
    penalty.backward()
    for matrix in matrices:
        torch.testing.assert_close(matrix.grad, matrix.detach() - torch.eye(32))
    live.engine.model.eval()
    live.engine.model(**live.probe.inputs)
    assert live.attached.penalty() is None


def test_members_of_another_shape_are_refused(root):
    with pytest.raises(InvalidRequest, match="bottleneck_size is 8") as error:
        Live(Trial(AdapterFusion(sources=("one", "two"), size=4), "llama", "causal_lm"), root)
    assert error.value.param == "adapter.sources"
    with pytest.raises(ValidationError, match="each adapter once"):
        AdapterFusion(sources=("one", "one"))
