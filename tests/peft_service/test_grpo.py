"""GRPO: TRL's losses and gradients, the papers' formulas in float64, and a reward that goes up."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM

from peft_service import base_model, rollout, shipped
from peft_service.batches import Batch
from peft_service.errors import InvalidRequest
from peft_service.graders import Allowed, Judge
from peft_service.graders.string_check import StringCheck
from peft_service.methods import Case, Material
from peft_service.methods.lora import LoRA
from peft_service.objectives.grpo import GRPO
from peft_service.objectives.sft import IGNORE
from peft_service.spec import Training
from peft_service.tokenised import Tokenised
from peft_service.train import LocalEngine, train_step
from tests import golden

GRADER = StringCheck(name="s", input="{{sample.output_text}}", reference="th", operation="like")
RECORDED = golden.losses("groups")
ANY = next(iter(RECORDED.values()))
OURS = {
    "grpo": GRPO(grader=GRADER, loss_type="grpo"),
    "dapo": GRPO(grader=GRADER),
    "bnpo": GRPO(grader=GRADER, loss_type="bnpo"),
    "dr_grpo": GRPO(grader=GRADER, loss_type="dr_grpo", max_new_tokens=16),
    "grpo-kl": GRPO(grader=GRADER, loss_type="grpo", beta=0.2),
    "grpo-kl-paper": GRPO(grader=GRADER, loss_type="grpo", beta=0.2, kl_gradient="paper"),
    "dapo-warm-kl": GRPO(grader=GRADER, beta=0.04, temperature=0.7),
}


@pytest.fixture(scope="module")
def model():
    """The recorded base with the recorded LoRA, in float64."""
    made = LlamaForCausalLM(LlamaConfig(**ANY.base_config, attn_implementation="eager"))
    golden.fill(made, golden.base_weights({name: list(p.shape) for name, p in made.named_parameters()}))
    adapted = get_peft_model(made, LoraConfig(**ANY.lora, task_type="CAUSAL_LM")).double().eval()
    named = {name: p for name, p in sorted(adapted.named_parameters()) if p.requires_grad}
    with torch.no_grad():
        for place, parameter in enumerate(named.values()):
            parameter.copy_(ANY.scale * golden.chirp(list(parameter.shape), place + 100))
    return adapted


def batch_of(rows):
    width = max(len(row["prompt"] + row["completion"]) for row in rows)
    tokens, labels, mask = torch.full((3, len(rows), width), 2)
    labels[:], mask[:] = IGNORE, 0
    for line, row in enumerate(rows):
        start, end = len(row["prompt"]), len(row["prompt"] + row["completion"])
        tokens[line, :end] = torch.tensor(row["prompt"] + row["completion"])
        labels[line, start:end] = tokens[line, start:end]
        mask[line, :end] = 1
    advantages = torch.tensor([row["advantage"] for row in rows], dtype=torch.float64)
    return Batch(tokens, labels, mask, advantages_S=advantages)


def step_of(objective, model, batches):
    """(loss, gradients) of a step that is cut into `batches`."""
    model.zero_grad()
    targets = sum(int(objective.targets(batch)) for batch in batches)
    total = 0.0
    for batch in batches:
        loss, right = objective.loss_sum(model, batch)
        assert 0 <= float(right) <= int(objective.targets(batch))
        (loss / targets).backward()
        total += float(loss)
    gradients = {
        name.removeprefix("base_model.model.").replace(".default", ""): p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return total / targets, gradients


def close(seen, wanted, relative=5e-6):
    assert seen.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        apart = float((seen[name] - gradient).abs().max())
        assert apart <= relative * scale, (name, apart / scale)


@pytest.mark.parametrize("case", OURS)
def test_loss_and_gradients_are_trls(model, case):
    loss, gradients = step_of(OURS[case], model, [batch_of(ANY.rows)])
    assert loss == pytest.approx(RECORDED[case].loss, rel=2e-6, abs=1e-7)
    close(gradients, RECORDED[case].gradients)


@pytest.mark.parametrize("case", OURS)
def test_loss_and_gradients_are_the_papers_in_any_cut(model, case):
    """Answer by answer, without padding; the ratio's gradient is that of log π."""
    objective = OURS[case]
    model.zero_grad()
    surrogate = value = torch.zeros((), dtype=torch.float64)
    tokens = sum(len(row["completion"]) for row in ANY.rows)
    for row in ANY.rows:
        ids = torch.tensor([row["prompt"] + row["completion"]])

        def logps(ids=ids, row=row):
            logits = model(input_ids=ids).logits[0, len(row["prompt"]) - 1 : -1].double()
            chosen = ids[0, len(row["prompt"]) :, None]
            return (logits / objective.temperature).log_softmax(-1).gather(1, chosen)[:, 0]

        with torch.no_grad(), model.disable_adapter():
            base = logps()
        mine = logps()
        kl = (base - mine).exp() - (base - mine) - 1
        weight = {
            "grpo": 1 / (len(row["completion"]) * len(ANY.rows)),
            "dr_grpo": 1 / (len(ANY.rows) * objective.max_new_tokens),
        }.get(objective.loss_type, 1 / tokens)
        # With E over the policy's own tokens, ∇ E[k] = E[∇ k + k ∇ log π].
        unbiased = kl + kl.detach() * mine if objective.kl_gradient == "unbiased" else kl
        surrogate = surrogate + weight * (-row["advantage"] * mine + objective.beta * unbiased).sum()
        value = value + weight * (-row["advantage"] + objective.beta * kl).sum()
    surrogate.backward()
    wanted = {
        name.removeprefix("base_model.model.").replace(".default", ""): p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    for size in (8, 3, 1):
        parts = [batch_of(ANY.rows[start : start + size]) for start in range(0, len(ANY.rows), size)]
        loss, gradients = step_of(objective, model, parts)
        assert loss == pytest.approx(float(value), rel=1e-6, abs=1e-9)
        close(gradients, wanted, 2e-6)


def test_the_unbiased_gradient_is_that_of_the_reverse_kl():
    """One token, every answer weighted by its probability: Σ π (its gradient) = ∇ Σ π log(π / π_ref)."""
    logits = torch.tensor([[[0.3, -1.0, 2.0, 0.1, 0.7], [0.0] * 5]], dtype=torch.float64, requires_grad=True)
    base = torch.tensor([[[1.0, 0.5, -1.0, 0.0, 0.2], [0.0] * 5]], dtype=torch.float64)

    class Two:
        """A model whose adapter can be taken away."""

        told = logits

        def __call__(self, **inputs):
            return type("Output", (), {"logits": self.told})

        def disable_adapter(self):
            from contextlib import contextmanager

            @contextmanager
            def without():
                self.told = base
                yield
                self.told = logits

            return without()

    objective = GRPO(grader=GRADER, beta=1.0)
    probabilities = logits.detach()[0, 0].softmax(0)
    found = torch.zeros(5, dtype=torch.float64)
    for token, probability in enumerate(probabilities):
        pair = torch.tensor([[0, token]])
        batch = Batch(
            pair, torch.tensor([[IGNORE, token]]), torch.ones_like(pair), advantages_S=torch.zeros(1)
        )
        loss, _ = objective.loss_sum(Two(), batch)
        found += probability * torch.autograd.grad(loss, logits)[0][0, 0]
    mine = logits[0, 0].log_softmax(0)
    reverse = (mine.exp() * (mine - base[0, 0].log_softmax(0))).sum()
    torch.testing.assert_close(found, torch.autograd.grad(reverse, logits)[0][0, 0])


def test_the_distance_from_a_base_that_itself_trains_is_refused():
    model = LlamaForCausalLM(LlamaConfig(**ANY.base_config))
    with pytest.raises(InvalidRequest) as refused:
        OURS["grpo-kl"].loss_sum(model, batch_of(ANY.rows))
    assert (refused.value.code, refused.value.param) == ("no_reference", "method.grpo.beta")


def test_what_can_be_asked_for():
    told = {"kind": "grpo", "grader": GRADER.model_dump(), "group_size": 4}
    made = GRPO.model_validate(told)
    assert GRPO.model_validate_json(made.model_dump_json()) == made
    for wrong in ({"group_size": 1}, {"temperature": 0.0}, {"grader": {"type": "bleurt"}}, {"epsilon": 0.2}):
        with pytest.raises(ValidationError):
            GRPO.model_validate(told | wrong)


def test_a_reward_goes_up():
    """The base that comes with the package learns within a minute to write what a grader wants."""
    directory = shipped.path()
    tokenizer = base_model.load_tokenizer(directory)
    attached = LoRA(rank=8).attach(base_model.load(directory, precision="fp32"), Case(), Material())
    engine = LocalEngine(attached, Training(learning_rate=2e-3, max_grad_norm=1.0))
    questions = ["What is a river?", "Tell me about the king.", "How many apples?", "Say something."]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in questions
    ]
    ids = np.concatenate([np.array(p, np.int32) for p in prompts])
    offsets = np.cumsum([0, *map(len, prompts)]).astype(np.int64)
    data = Tokenised(ids, np.zeros(len(ids), np.uint8), offsets, np.arange(4) + 1)
    grader = StringCheck(name="w", input="{{sample.output_text}}", reference="you", operation="ilike")
    objective = GRPO(grader=grader, group_size=8, max_new_tokens=8)
    pad = tokenizer.pad_token_id
    rewards = []
    with Judge(grader, Allowed()) as judge:

        def measured():
            return rollout.evaluate_generation(
                engine, attached, tokenizer, judge, data, lambda row: {}, max_new_tokens=8,
                temperature=1.0, answers=32, microbatch=128, pad_id=pad, seed=9,
            )["reward"]  # fmt: skip

        before = measured()
        for step in range(40):
            parts, metrics = rollout.rollout(
                engine, attached, tokenizer, objective, judge, data, lambda row: {}, range(4), step,
                seed=0, microbatch=32, pad_id=pad,
            )  # fmt: skip
            rewards.append(metrics["reward"])
            train_step(engine, objective, parts, 2e-3, attached, step)
        after = measured()
    assert before < 0.3
    assert after > before + 0.5
    assert np.mean(rewards[-10:]) > np.mean(rewards[:10]) + 0.3
