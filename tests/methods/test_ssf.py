"""SSF: what is counted and merged, and the paper's first values."""

import pytest
import torch

from peft_service.methods.ssf import SSF
from peft_service.tuners.wrapper import NotMergeable
from tests.methods.checks import Live, Trial, difference, shape_of


@pytest.mark.parametrize(("shift", "betas"), [("none", 0), ("where_bias", 0), ("all", 1)])
def test_count_without_biases_is_the_sum_of_widths(root, shift, betas):
    widths = 32 + 16 + 16 + 32 + 64 + 64 + 32 + 32 + 32  # q k v o gate up down and two norms
    live = Live(Trial(SSF(shift=shift), "llama", "causal_lm"), root)
    assert sum(p.numel() for p in live.engine.parameters.values()) == 2 * widths * (1 + betas)
    assert live.trial.method.trainable(shape_of("llama", root), live.case) == 2 * widths * (1 + betas)


def test_shifts_without_biases_do_not_merge(root):
    live = Live(Trial(SSF(shift="all"), "llama", "causal_lm"), root, rate=0.01)
    live.step(0)
    with pytest.raises(NotMergeable, match="no bias"):
        live.attached.model.merge_and_unload()


def test_the_papers_first_values(root):
    live = Live(Trial(SSF(init="paper"), "bert", "sequence_classification"), root)
    values = {n: p.detach() for n, p in live.engine.parameters.items() if "ssf_parts" in n}
    for mark, mean in (("gamma", 1.0), ("beta", 0.0)):
        drawn = torch.cat([v for n, v in values.items() if n.endswith(mark)])
        assert abs(float(drawn.mean()) - mean) < 0.005
        assert abs(float(drawn.std()) - 0.02) < 0.003
    assert difference(live.answers(), live.before, live.probe) > 1e-4
