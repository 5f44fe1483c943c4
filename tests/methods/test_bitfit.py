"""BitFit: the same trajectory as biases that are added, and nothing but biases moves."""

import pytest
import torch

from peft_service import methods
from peft_service.errors import InvalidRequest
from peft_service.methods.bitfit import BitFit
from tests.methods.checks import Live, Trial, case_of, directory_of, shape_of


def test_in_place_is_the_same_as_an_added_bias(root):
    """An independent implementation: b + z with z at zero, by torch's own parametrisation, in an own loop."""
    from torch.nn.utils import parametrize

    from peft_service import base_model

    class Plus(torch.nn.Module):
        def __init__(self, like):
            super().__init__()
            self.z = torch.nn.Parameter(torch.zeros_like(like))

        def forward(self, bias):
            return bias + self.z

    trial = Trial(BitFit(), "opt", "causal_lm")
    live = Live(trial, root, rate=0.01)
    model = base_model.load(directory_of("opt", root), precision="fp32")
    added = {}
    for name, module in list(model.named_modules()):
        if isinstance(getattr(module, "bias", None), torch.nn.Parameter):
            added[f"{name}.bias"] = Plus(module.bias)
            parametrize.register_parametrization(module, "bias", added[f"{name}.bias"])
    optimizer = torch.optim.SGD([plus.z for plus in added.values()], lr=0.1)
    batch = live.batch(range(4))
    for _ in range(3):
        nll, _ = live.objective.loss_sum(model, batch)
        (nll / 10).backward()
        optimizer.step()
        optimizer.zero_grad()
    mine = torch.optim.SGD(live.engine.parameters.values(), lr=0.1)
    start = {name: p.detach().clone() for name, p in live.engine.parameters.items()}
    for _ in range(3):
        nll, _ = live.objective.loss_sum(live.engine.model, batch)
        (nll / 10).backward()
        mine.step()
        mine.zero_grad()
    assert start.keys() == added.keys()
    for name, parameter in live.engine.parameters.items():
        torch.testing.assert_close(parameter - start[name], added[name].z, atol=2e-6, rtol=1e-4)


def test_the_papers_smaller_variant_trains_what_it_names(root):
    method = BitFit(targets=("query", "intermediate.dense"))
    live = Live(Trial(method, "bert", "sequence_classification"), root)
    trained = {name for name in live.engine.parameters if not name.startswith("classifier")}
    assert len(trained) == 4
    assert all(name.endswith(("query.bias", "intermediate.dense.bias")) for name in trained)
    assert method.trainable(shape_of("bert", root), live.case) == 2 * (32 + 64)


@pytest.mark.parametrize("base", ["llama", "t5"])
def test_a_base_without_biases_is_refused_and_told_what_works(root, base):
    trial = Trial(BitFit(), base, "causal_lm" if base == "llama" else "seq2seq_lm")
    with pytest.raises(InvalidRequest, match=r"BEFT.*LN_TUNING.*ia3"):
        methods.admit(trial.method, shape_of(base, root), case_of(trial))


def test_an_unknown_target_is_refused_with_what_there_is(root):
    with pytest.raises(InvalidRequest, match="fc1"):
        BitFit(targets=("query",)).check(shape_of("opt", root), case_of(Trial(BitFit(), "opt", "causal_lm")))


def test_weight_decay_is_refused(root):
    trial = Trial(BitFit(), "opt", "causal_lm")
    case = case_of(trial).model_copy(update={"weight_decay": 0.1})
    with pytest.raises(InvalidRequest, match="Set it to 0"):
        methods.admit(trial.method, shape_of("opt", root), case)
