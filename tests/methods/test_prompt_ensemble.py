"""Prompt ensembling: one batch is N separate runs, the loss is their mean, and the vote is a vote."""

import pytest
import torch
from peft import PeftModel
from torch.nn import functional

from peft_service import artifact
from peft_service.methods.prompt_ensemble import PromptEnsemble
from peft_service.methods.prompt_tuning import PromptTuning
from peft_service.tuners.prompt_ensemble import majority, with_rest
from tests.methods import checks
from tests.methods.checks import Live, Trial

TASKS = [("llama", "causal_lm"), ("t5", "seq2seq_lm"), ("bert", "sequence_classification")]


@pytest.mark.parametrize(("base", "task"), TASKS)
def test_each_member_loads_alone_and_says_what_it_said_in_the_batch(root, tmp_path, base, task):
    live = Live(Trial(PromptEnsemble(prompts=3, virtual_tokens=4), base, task), root, rate=0.01)
    for step in range(2):
        live.step(step)
    live.engine.model.eval()
    directory = live.save(tmp_path / "made")
    with torch.no_grad():
        together = live.engine.model.members(**live.probe.inputs)
        for number in range(3):
            fresh = artifact.load_base(checks.directory_of(base, root), task, live.case.labels)
            member = PeftModel.from_pretrained(fresh, directory / f"part-{number}").eval()
            member.config.pad_token_id = 2
            alone = member(**live.probe.inputs).logits.log_softmax(-1)
            if task == "causal_lm":
                alone = alone[:, 4:]
            said = {"logits": together[number]}
            assert checks.difference({"logits": alone}, said, live.probe) < 2e-5


@pytest.mark.parametrize(("base", "task"), TASKS)
def test_the_loss_and_its_gradient_are_the_mean_of_the_members(root, base, task):
    live = Live(Trial(PromptEnsemble(prompts=3, virtual_tokens=4), base, task), root)
    model = live.engine.model.train()
    loss, _ = live.objective.loss_sum(model, live.probe)
    (gradient,) = torch.autograd.grad(loss, [model.prompts])
    said_N = model.members(**live.probe.inputs)
    labels = live.probe.labels_BT
    if task == "causal_lm":
        said_N, labels = said_N[:, :, :-1], labels[:, 1:]
    elif task == "sequence_classification":
        said_N = said_N[:, :, None]
    each = [functional.nll_loss(s.flatten(0, 1), labels.flatten(), reduction="sum") for s in said_N]
    mean = sum(each) / 3
    torch.testing.assert_close(loss, mean, rtol=1e-5, atol=1e-5)
    (expected,) = torch.autograd.grad(mean, [model.prompts])
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


def test_one_prompt_is_prompt_tuning(root):
    one = Live(Trial(PromptEnsemble(prompts=1, virtual_tokens=4), "llama", "causal_lm"), root, rate=0.01)
    plain = Live(Trial(PromptTuning(virtual_tokens=4), "llama", "causal_lm"), root, rate=0.01)
    for step in range(4):
        assert one.step(step) == pytest.approx(plain.step(step), rel=1e-5)
    (prompt,) = plain.engine.parameters.values()
    torch.testing.assert_close(one.engine.model.prompts[0], prompt, atol=1e-4, rtol=1e-3)


def test_the_rest_makes_probabilities_sum_to_one_and_is_safe_where_nothing_is_missing():
    said = torch.randn(4, 6, 9, dtype=torch.float64).log_softmax(-1)
    assert torch.allclose(with_rest(said.mean(0)).exp().sum(-1), torch.ones(6, dtype=torch.float64))
    same = torch.randn(6, 9).log_softmax(-1).requires_grad_()
    functional.cross_entropy(with_rest(same), torch.arange(6)).backward()
    assert bool(torch.isfinite(same.grad).all())


def test_the_majority_wins_and_ties_go_to_the_more_probable():
    probabilities = torch.tensor([[0.6, 0.4, 0.0], [0.6, 0.4, 0.0], [0.01, 0.01, 0.98]]).clamp_min(1e-9)
    said = majority(probabilities.log()[:, None])[0]
    assert int(said.argmax()) == 0  # two of three, although the mean of probabilities says the third
    assert float(said.exp().sum()) == pytest.approx(1)
    tie = torch.tensor([[0.6, 0.4], [0.1, 0.9]]).log()[:, None]
    assert int(majority(tie)[0].argmax()) == 1


def test_both_votes_come_back_with_the_artifact(root, tmp_path):
    for vote in ("mean_log_prob", "majority"):
        method = PromptEnsemble(prompts=3, virtual_tokens=4, vote=vote)
        live = Live(Trial(method, "bert", "sequence_classification"), root, rate=0.05)
        live.step(0)
        model, said = checks.load(live, live.save(tmp_path / vote))
        assert model.vote == vote
        assert checks.difference(said, live.answers(), live.probe) < 2e-5
