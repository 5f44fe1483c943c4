"""Xattn tuning: exactly the cross-attention, counted by the paper's formula."""

import pytest
import torch

from peft_service import delta, methods
from peft_service.errors import InvalidRequest
from peft_service.methods.xattn import Xattn
from tests.methods.checks import Live, Trial, case_of, difference, load, shape_of

D, LAYERS = 32, 2


@pytest.mark.parametrize(
    ("base", "norms", "expected"),
    [
        ("t5", False, LAYERS * 4 * D * D),
        ("t5", True, LAYERS * (4 * D * D + D)),
        ("bart", False, LAYERS * (4 * D * D + 4 * D)),
        ("bart", True, LAYERS * (4 * D * D + 4 * D + 2 * D)),
    ],
)
def test_the_papers_count(root, base, norms, expected):
    live = Live(Trial(Xattn(norms=norms), base, "seq2seq_lm"), root)
    assert sum(p.numel() for p in live.engine.parameters.values()) == expected
    assert live.trial.method.trainable(shape_of(base, root), live.case) == expected
    assert all("decoder" in name for name in live.engine.parameters)


def test_the_encoder_says_the_same_before_and_after(root):
    live = Live(Trial(Xattn(norms=True), "bart", "seq2seq_lm"), root, rate=0.01)

    def encoded():
        with torch.no_grad():
            given = live.probe
            return live.engine.model.eval().get_encoder()(given.tokens_BT, given.mask_BT).last_hidden_state

    before = encoded()
    for step in range(3):
        live.step(step)
    assert torch.equal(before, encoded())


@pytest.mark.parametrize("base", ["t5", "bart"])
def test_the_embeddings_of_a_new_language_train_too_and_are_in_the_artifact(root, base, tmp_path):
    live = Live(Trial(Xattn(embeddings=True), base, "seq2seq_lm"), root, rate=0.01)
    plain = Live(Trial(Xattn(), base, "seq2seq_lm"), root)
    (words,) = live.engine.parameters.keys() - plain.engine.parameters.keys()
    assert live.engine.parameters[words] is live.engine.model.get_input_embeddings().weight
    assert live.trial.method.trainable(shape_of(base, root), live.case) == (
        Xattn().trainable(shape_of(base, root), live.case) + 300 * D
    )
    before = live.engine.parameters[words].detach().clone()
    live.step(0)
    now = live.engine.parameters[words].detach()
    assert not torch.equal(now, before)
    made = delta.load(live.save(tmp_path / "made"))
    assert torch.equal(made.dense[words], now)
    model, said = load(live, tmp_path / "made")
    assert torch.equal(model.get_input_embeddings().weight, now)
    assert difference(said, live.answers(), live.probe) < 2e-5


@pytest.mark.parametrize(("base", "task"), [("llama", "causal_lm"), ("bert", "token_classification")])
def test_bases_without_cross_attention_are_refused(root, base, task):
    trial = Trial(Xattn(), base, task)
    with pytest.raises(InvalidRequest, match="only encoder-decoders"):
        methods.admit(trial.method, shape_of(base, root), case_of(trial))
