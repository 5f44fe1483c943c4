"""Hadamard: two stages by hashes, the paper's count, and merging where there is a bias."""

import pytest
import torch

from peft_service.methods import Case
from peft_service.methods.hadamard import Hadamard
from peft_service.tuners.wrapper import NotMergeable
from tests.methods.checks import Live, Trial, difference, real, shape_of


def moved(live, before):
    """(whether some of the adapter moved, whether some of the head did)."""
    now = live.engine.trainable()
    names = {name for name in now if not torch.equal(now[name], before[name])}
    return any("hadamard_" in name for name in names), any("hadamard_" not in name for name in names)


@pytest.mark.parametrize("head_in_second", [True, False])
def test_first_the_head_alone_then_the_adapter(root, head_in_second):
    method = Hadamard(first_stage=0.5, head_in_second=head_in_second)
    live = Live(Trial(method, "bert", "sequence_classification"), root, rate=0.01)
    for step in range(6):
        before = live.engine.trainable()
        live.step(step)
        assert moved(live, before) == ((False, True) if step < 3 else (True, head_in_second)), step


def test_without_a_head_there_is_one_stage(root):
    live = Live(Trial(Hadamard(first_stage=0.5), "llama", "causal_lm"), root)
    before = live.engine.trainable()
    live.step(0)
    assert moved(live, before) == (True, False)


def test_the_papers_share_of_bert_base(root):
    """4dL of 110 million."""
    d, layers = 768, 12
    shape = shape_of("bert", root)
    names = [name for name, _, _ in shape.linears if ".0." in name]
    linears = tuple((n.replace(".0.", f".{i}."), d, d) for i in range(layers) for n in names)
    norms = tuple((f"encoder.layer.{i}.attention.output.LayerNorm", d) for i in range(layers))
    biases = tuple((f"{name}.bias", d) for name, _ in norms)
    base = shape.model_copy(
        update={"hidden": d, "layers": layers, "linears": linears, "norms": norms, "biases": biases}
    )
    assert Hadamard().trainable(base, Case()) == 4 * d * layers
    assert round(100 * 4 * d * layers / 109.48e6, 3) == 0.034


def test_it_merges_where_self_attention_ends_in_a_bias(root):
    live = Live(Trial(Hadamard(first_stage=0), "bert", "sequence_classification"), root, rate=0.01)
    for step in range(3):
        live.step(step)
    said = live.answers()
    merged = live.attached.model.merge_and_unload().eval()
    with torch.no_grad():
        after = {"logits": merged(**live.probe.inputs).logits}
    assert difference(after, said, live.probe) <= 1e-5
    assert float((real(after, live.probe) - real(live.before, live.probe)).abs().max()) > 1e-3


def test_it_does_not_merge_without_one(root):
    live = Live(Trial(Hadamard(), "llama", "causal_lm"), root)
    with pytest.raises(NotMergeable, match="no bias"):
        live.attached.model.merge_and_unload()
