"""Standard adapters: AdapterHub's numbers through the method, targets, and bases without a place."""

import pytest
import torch

from peft_service import methods
from peft_service.errors import InvalidRequest
from peft_service.methods import Case, Material
from peft_service.methods.adapter import Adapter
from tests import golden
from tests.methods.checks import Live, Trial, case_of, shape_of
from tests.peft_service.tuners import adapterhub


@pytest.mark.parametrize("variant", ["houlsby", "pfeiffer", "parallel"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_it_is_adapterhubs(variant, kind):
    recorded = golden.load(f"{variant}-{kind}")
    model = recorded.base()
    model.new_head = []
    method = Adapter(variant=variant, size=4, activation=recorded.config["non_linearity"])
    task = "causal_lm" if kind == "llama" else "seq2seq_lm"
    model = method.attach(model, Case(task=task), Material()).model.eval()
    hub = {(*adapterhub.place(n, kind), adapterhub.bottleneck_part(n)): n for n in recorded.adapter}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                key = (*adapterhub.ours(name), name.split(".default.")[1])
                parameter.copy_(recorded.adapter[hub.pop(key)])
        assert not hub
        output = golden.output_of(model, recorded.inputs)
    torch.testing.assert_close(output, recorded.output, rtol=1e-5, atol=2e-5)


def test_targets_get_an_adapter_each(root):
    method = Adapter(size=4, targets=("v_proj", "down_proj"))
    live = Live(Trial(method, "llama", "causal_lm"), root)
    count = sum(2 * d * 4 + d + 4 for d in (16, 32)) * 2
    assert sum(p.numel() for p in live.engine.parameters.values()) == count
    assert method.trainable(shape_of("llama", root), live.case) == count


@pytest.mark.parametrize(
    ("fields", "base", "said"),
    [
        ({"variant": "parallel", "targets": ("v_proj",)}, "llama", "Leave targets out"),
        ({"targets": ("nonsense",)}, "llama", "no linear layer"),
        ({"variant": "parallel"}, "opt", "cannot tell"),
    ],
)
def test_what_has_no_place_is_refused_at_submission(root, fields, base, said):
    trial = Trial(Adapter(**fields), base, "causal_lm")
    with pytest.raises(InvalidRequest, match=said):
        methods.admit(trial.method, shape_of(base, root), case_of(trial))
