"""Answers are drawn from the model's own distribution, and depend on nothing that they should not."""

import math

import numpy as np
import pytest
import torch

from peft_service import base_model, rollout
from peft_service.graders import Allowed, Judge, Sample
from peft_service.graders.string_check import StringCheck
from peft_service.methods import Case, Material
from peft_service.methods.lora import LoRA
from peft_service.methods.prompt_tuning import PromptTuning
from peft_service.objectives.grpo import GRPO
from peft_service.objectives.sft import IGNORE
from peft_service.rollout import Prompt, Sampling
from peft_service.spec import Training
from peft_service.tokenised import Tokenised
from peft_service.train import LocalEngine
from tests.tiny import save_tiny_base, tiny_tokenizer

PAD = 2
GRADER = StringCheck(name="s", input="{{sample.output_text}}", reference="{{item.wanted}}", operation="like")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def engine_of(base, method=None):
    model = base_model.load(base, precision="fp32")
    attached = (method or LoRA(rank=4)).attach(model, Case(), Material())
    return LocalEngine(attached, Training(learning_rate=1e-3)), attached


@pytest.fixture(scope="module")
def engine(base):
    made, _ = engine_of(base)
    with torch.no_grad():
        for name, parameter in made.parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    return made


def prompts_of_length(*lengths, answers=2):
    generator = np.random.default_rng(0)
    made = []
    for row, length in enumerate(lengths):
        ids = tuple(generator.integers(7, 300, length).tolist())
        made += [Prompt(ids, row, number) for number in range(answers)]
    return made


def sampled(engine, tokenizer, prompts, microbatch=8, **options):
    sampling = Sampling(**{"max_new_tokens": 12, "seed": 3, "step": 5, **options})
    return rollout.sample(engine, None, tokenizer, prompts, sampling, microbatch=microbatch, pad_id=PAD)


def data_of(prompts, answer=0):
    """Rows of these token ids; the last `answer` of each are an answer."""
    ids = np.concatenate([np.array(p, np.int32) for p in prompts])
    masks = [np.array([0] * (len(p) - answer) + [1] * answer, np.uint8) for p in prompts]
    offsets = np.cumsum([0, *map(len, prompts)]).astype(np.int64)
    return Tokenised(ids, np.concatenate(masks), offsets, np.arange(len(prompts)) + 1)


@pytest.mark.parametrize("method", [LoRA(rank=4), PromptTuning(virtual_tokens=3)], ids=lambda m: m.kind)
def test_an_answer_depends_on_nothing_else_in_its_batch(base, tokenizer, method):
    engine, _ = engine_of(base, method)
    prompts = prompts_of_length(3, 11, 5, 20, 1)
    alone = sampled(engine, tokenizer, prompts, microbatch=1)
    assert len({answer.token_ids for answer in alone}) > 5
    for microbatch in (3, 8):
        assert sampled(engine, tokenizer, prompts, microbatch=microbatch) == alone
    assert sampled(engine, tokenizer, prompts[::-1], microbatch=3) == alone[::-1]
    assert sampled(engine, tokenizer, prompts[3:6], microbatch=2) == alone[3:6]


def test_seed_step_row_and_number_each_give_other_answers(engine, tokenizer):
    (prompt,) = prompts_of_length(6, answers=1)
    told = {
        sampled(engine, tokenizer, [other], **options)[0].token_ids
        for other, options in (
            (prompt, {}),
            (prompt, {"seed": 4}),
            (prompt, {"step": 6}),
            (Prompt(prompt.token_ids, 1), {}),
            (Prompt(prompt.token_ids, 0, 1), {}),
        )
    }
    assert len(told) == 5


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.6, "temperature": 2.0}], ids=str
)
def test_tokens_have_the_softmaxs_frequencies(engine, tokenizer, options):
    (prompt,) = prompts_of_length(4, answers=1)
    with torch.no_grad():
        logits = engine.model(input_ids=torch.tensor([prompt.token_ids])).logits[0, -1].double()
    logits = logits / options.get("temperature", 1.0)
    ordered = logits.sort(descending=True)
    kept = torch.ones(len(logits), dtype=torch.bool)
    if "top_k" in options:
        kept[ordered.indices[options["top_k"] :]] = False
    if "top_p" in options:
        before = ordered.values.softmax(0).cumsum(0) - ordered.values.softmax(0)
        kept[ordered.indices[before >= options["top_p"]]] = False
    wanted = logits.masked_fill(~kept, -math.inf).softmax(0).numpy()

    draws = 4000
    prompts = [Prompt(prompt.token_ids, 0, number) for number in range(draws)]
    found = sampled(engine, tokenizer, prompts, microbatch=1000, max_new_tokens=1, **options)
    counts = np.bincount([answer.token_ids[0] for answer in found], minlength=len(wanted))
    assert not counts[wanted == 0].any()
    # Pearson's statistic, tokens with fewer than 5 expected draws taken together.
    many = wanted * draws >= 5
    seen = np.append(counts[many], counts[~many].sum())
    expected = np.append(wanted[many], wanted[~many].sum()) * draws
    seen, expected = seen[expected > 0], expected[expected > 0]
    freedom = max(1, len(seen) - 1)
    statistic = float(((seen - expected) ** 2 / expected).sum())
    # Wilson and Hilferty: the cube root of chi²/k is nearly normal. 4 standard deviations.
    normal = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert normal < 4


def test_the_noise_is_gumbels():
    noise = rollout.gumbel(torch.arange(50), 2000).flatten()
    assert float(noise.mean()) == pytest.approx(0.5772156649, abs=0.02)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.04)
    assert torch.unique(noise).numel() == 100_000
    # SplitMix64 as published: the first outputs for the seed 1234567.
    state = torch.tensor([1234567])
    uniform = torch.exp(-torch.exp(-rollout.gumbel(state, 3)))[0]
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    torch.testing.assert_close(
        uniform, torch.tensor([x / 2**64 for x in outputs], dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_without_temperature_it_is_what_generate_does(engine, tokenizer):
    prompts = prompts_of_length(5, 9, answers=1)
    found = sampled(engine, tokenizer, prompts, temperature=0.0)
    for prompt, answer in zip(prompts, found, strict=True):
        with torch.no_grad():
            oracle = engine.model.generate(
                input_ids=torch.tensor([prompt.token_ids]), do_sample=False, max_new_tokens=12,
                eos_token_id=1, pad_token_id=PAD,
            )[0, len(prompt.token_ids) :]  # fmt: skip
        assert list(answer.token_ids) == oracle.tolist()


def test_an_answer_ends_with_its_end_token(engine, tokenizer):
    answers = sampled(engine, tokenizer, prompts_of_length(*[4] * 40), max_new_tokens=60, microbatch=80)
    ended = [answer for answer in answers if answer.finished]
    assert 0 < len(ended) < len(answers)
    for answer in answers:
        assert (answer.token_ids[-1] == 1) == answer.finished
        assert 1 not in answer.token_ids[:-1]
        assert answer.finished or len(answer.token_ids) == 60
        assert "<|end|>" not in answer.text


def test_the_model_is_left_as_it_was(engine, tokenizer):
    config, prompts = engine.model.generation_config, prompts_of_length(5, 9, 3, 12, answers=4)
    config.repetition_penalty = 5.0
    engine.model.train()
    try:
        penalised = sampled(engine, tokenizer, prompts)
        assert any(len(answer.token_ids) == 12 for answer in penalised)
        assert engine.model.training
        assert engine.model.generation_config is config
        config.repetition_penalty = 1.0
        assert sampled(engine, tokenizer, prompts) == penalised
    finally:
        config.repetition_penalty = None


class Ranks:
    """One of several ranks in this process; sums wait until all have been told."""

    def __init__(self, engine, rank, world, sums):
        self.model, self.device = engine.model, engine.device
        self.rank, self.world, self.sums = rank, world, sums

    def all_sum(self, x):
        self.sums.append(x)
        return self.sums[0] if len(self.sums) == 1 else sum(self.sums)


def test_a_rollout_is_the_same_on_any_number_of_ranks_and_microbatches(engine, tokenizer):
    data = data_of([p.token_ids for p in prompts_of_length(3, 8, 5, 6, 4, answers=1)])
    wanted = [{"wanted": letter} for letter in "etaoi"]
    objective = GRPO(grader=GRADER, group_size=4, max_new_tokens=6)

    def told(world, microbatch):
        found, sums, metrics = {}, [], {}
        with Judge(GRADER, Allowed()) as judge:
            for rank in range(world):
                batches, metrics = rollout.rollout(
                    Ranks(engine, rank, world, sums), None, tokenizer, objective, judge, data,
                    lambda row: wanted[row], [4, 0, 2, 1, 3], 7, seed=1, microbatch=microbatch, pad_id=PAD,
                )  # fmt: skip
                assert len(batches) == math.ceil(math.ceil(5 / world) * 4 / microbatch)
                for batch in batches:
                    assert len(batch.advantages_S) == len(batch.tokens_BT)
                    for line, row in enumerate(batch.rows):
                        length = int(batch.mask_BT[line].sum())
                        ids = batch.tokens_BT[line, :length].tolist()
                        labels = batch.labels_BT[line].tolist()
                        prompt = data.row(row)[0].tolist()
                        assert ids[: len(prompt)] == prompt
                        assert labels[: len(prompt)] == [IGNORE] * len(prompt)
                        assert labels[len(prompt) : length] == ids[len(prompt) :]
                        assert set(labels[length:]) <= {IGNORE}
                        found.setdefault(row, []).append((tuple(ids), float(batch.advantages_S[line])))
        return found, metrics

    one, metrics = told(1, 20)
    assert {row: len(answers) for row, answers in one.items()} == dict.fromkeys(range(5), 4)
    assert 0 < metrics["reward"] < 1
    assert metrics["groups_without_spread"] < 1
    assert any(advantage for answers in one.values() for _, advantage in answers)
    for world, microbatch in ((1, 3), (2, 4), (3, 5)):
        assert told(world, microbatch) == (one, pytest.approx(metrics))


def test_advantages_are_the_papers():
    rewards = np.array([[1.0, 0, 0, 0], [1, 1, 1, 1], [0.1, 0.1, 0.1, 0.1], [0.5, 0, 1, 0.5]])
    group = rollout.advantages_of(rewards, "group", 0)
    for line, found in zip(rewards, group, strict=True):
        oracle = (torch.tensor(line) - line.mean()) / (torch.tensor(line).std() + 1e-4)
        np.testing.assert_allclose(found, oracle.numpy(), atol=1e-12)
    assert not group[1:3].any()
    assert rollout.advantages_of(rewards, "none", 0)[0].tolist() == [0.75, -0.25, -0.25, -0.25]
    std = float(torch.tensor(rewards).flatten().std())
    np.testing.assert_allclose(rollout.advantages_of(rewards, "batch", std)[3, 2], 0.5 / (std + 1e-4))


def test_held_out_prompts_are_answered_and_graded(engine, tokenizer):
    prompts = prompts_of_length(3, 8, 5, answers=1)
    rows = [[*p.token_ids, 40, 41] for p in prompts]
    told = sampled(engine, tokenizer, prompts, temperature=0.0)
    with Judge(GRADER, Allowed()) as judge:
        items = [{"wanted": told[0].text[:2]}, {"wanted": "no such text"}, {"wanted": told[2].text}]
        found = rollout.evaluate_generation(
            engine, None, tokenizer, judge, data_of(rows, answer=2), lambda row: items[row],
            max_new_tokens=12, microbatch=2, pad_id=PAD,
        )  # fmt: skip
        scores = [outcome.score for outcome in judge(items, [Sample(answer.text) for answer in told])]
    assert scores == [1, 0, 1]
    assert found["reward"] == pytest.approx(2 / 3)
    assert found["completion_tokens"] == pytest.approx(np.mean([len(a.token_ids) for a in told]))
