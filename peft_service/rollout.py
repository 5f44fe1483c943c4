"""The model answers prompts, while it trains or is evaluated: sampled, graded, and made into batches.

An answer is a function of (weights, prompt, seed, step, row, number of the answer): not of what else is in
the batch, of padding, of ranks or of microbatches. Sampling takes the largest of log-probability + Gumbel
noise, which draws from the softmax exactly (Gumbel 1954; "Gumbel-max"); the noise of a token at a position is
a hash of all that, so there is no generator whose state would have to be kept. What is left is rounding: the
logits of a row differ in their last digits between batches, and where the two best are as near as that (about
one token in a million in float32, more in bfloat16) another may win.

Shape suffixes: B lines, T tokens of a line, V vocabulary.
"""

import hashlib
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from peft_service.attached import Attached
from peft_service.batches import Batch
from peft_service.graders import Judge, Outcome, Sample
from peft_service.objectives.sft import IGNORE

if TYPE_CHECKING:
    from peft_service.objectives.grpo import GRPO
    from peft_service.tokenised import Tokenised
    from peft_service.train import Engine

Items = Callable[[int], Mapping[str, Any]]
"""Row of the data -> what the graders get of it."""


@dataclass(frozen=True)
class Prompt:
    """What is to be answered once."""

    token_ids: tuple[int, ...]
    row: int
    number: int = 0
    """Of the answer, among those to the same row."""
    task: int = 0
    """Of multi-task data."""


@dataclass(frozen=True)
class Sampled:
    token_ids: tuple[int, ...]
    """With the token that ended it."""
    text: str
    """Without special tokens."""
    finished: bool
    """False: it was cut off."""


@dataclass(frozen=True)
class Sampling:
    """How answers are written."""

    max_new_tokens: int
    temperature: float = 1.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0
    step: int = 0


def sample(
    engine: "Engine",
    attached: Attached | None,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    microbatch: int,
    pad_id: int,
) -> list[Sampled]:
    """An answer to each of this rank's prompts, `microbatch` at a time.

    Collective where parameters are sharded (ZeRO-3): every rank then gives the same number of prompts.
    """
    model = getattr(engine.model, "module", engine.model)
    ends = ends_of(tokenizer, model)
    sharded = engine.world > 1 and any(hasattr(p, "ds_id") for p in model.parameters())
    made: list[Sampled] = []
    with _generating(engine.model, model):
        for lines in _lines(prompts, microbatch, alike=_sees_padding(model)):
            # A decoder writes on behind its prompt; an encoder counts from the left, as in training.
            left = not getattr(model.config, "is_encoder_decoder", False)
            ids_BT, mask_BT = _beside(lines, pad_id, engine.device, left)
            batch = Batch(
                ids_BT,
                torch.full_like(ids_BT, IGNORE),
                mask_BT,
                task_B=torch.tensor([line.task for line in lines], device=engine.device),
            )
            told = attached.inputs(batch) if attached else {}
            written_BT = _generate(
                model,
                ids_BT,
                mask_BT,
                _Pick(lines, sampling),
                sampling.max_new_tokens,
                ends,
                pad_id,
                sharded,
                {name: value for name, value in told.items() if name == "task_ids"},
            )
            for line in written_BT.tolist():
                made.append(_cut(line, ends, tokenizer))
    return made


def rollout(
    engine: "Engine",
    attached: Attached | None,
    tokenizer: Any,
    objective: "GRPO",
    judge: Judge,
    data: "Tokenised",
    items: Items,
    rows: Sequence[int],
    step: int,
    *,
    seed: int,
    microbatch: int,
    pad_id: int,
    start_id: int | None = None,
) -> tuple[list[Batch], dict[str, float]]:
    """This rank's microbatches of a step, answers with their advantages, and what the graders said of all.
    Collective; every rank gets the same number of microbatches and the same metrics.

    Args:
        rows: of the whole step; a rank answers `rows[rank::world]`, and a group stays on its rank.
        start_id: what the decoder of an encoder-decoder starts with; None: it is a decoder alone.
    """
    group, mine = objective.group_size, list(rows[engine.rank :: engine.world])
    most = -(-len(rows) // engine.world)
    prompts = [prompt for row in mine for prompt in prompts_of(data, row, group)]
    # A rank with fewer rows answers another's again, for nobody: under ZeRO-3 all must take part.
    filling = [prompt for _ in range(most - len(mine)) for prompt in prompts_of(data, rows[0], group)]
    sampling = Sampling(
        objective.max_new_tokens, objective.temperature, objective.top_p, objective.top_k, seed, step
    )
    sampled = sample(
        engine, attached, tokenizer, prompts + filling, sampling, microbatch=microbatch, pad_id=pad_id
    )[: len(prompts)]
    outcomes = judge([items(p.row) for p in prompts], [Sample(answer.text) for answer in sampled])
    rewards = np.array([outcome.score for outcome in outcomes], dtype=np.float64).reshape(-1, group)
    metrics = _metrics(engine, judge, sampled, outcomes, group)
    advantages = advantages_of(rewards, objective.scale_rewards, metrics["reward_std"]).reshape(-1)
    batches = [
        _batch(
            prompts[start : start + microbatch],
            sampled[start : start + microbatch],
            advantages[start : start + microbatch],
            pad_id,
            start_id,
            engine.device,
            data.row_tasks is not None,
        )
        for start in range(0, most * group, microbatch)
    ]
    return batches, metrics


def evaluate_generation(
    engine: "Engine",
    attached: Attached | None,
    tokenizer: Any,
    judge: Judge,
    data: "Tokenised",
    items: Items,
    *,
    max_new_tokens: int,
    microbatch: int,
    pad_id: int,
    temperature: float = 0.0,
    answers: int = 1,
    seed: int = 0,
    most_rows: int | None = None,
) -> dict[str, float]:
    """What the graders say of answers to the prompts of `data` (its first `most_rows`): the metrics of a
    rollout. Collective. The same answers every time for the same weights."""
    rows = range(data.rows if most_rows is None else min(most_rows, data.rows))
    mine = list(rows[engine.rank :: engine.world])
    prompts = [prompt for row in mine for prompt in prompts_of(data, row, answers)]
    filling = -(-len(rows) // engine.world) - len(mine)
    prompts += [prompt for _ in range(filling) for prompt in prompts_of(data, 0, answers)]
    sampled = sample(
        engine,
        attached,
        tokenizer,
        prompts,
        Sampling(max_new_tokens, temperature, seed=seed, step=-1),
        microbatch=microbatch,
        pad_id=pad_id,
    )[: len(mine) * answers]
    outcomes = judge(
        [items(prompt.row) for prompt in prompts[: len(sampled)]], [Sample(s.text) for s in sampled]
    )
    return _metrics(engine, judge, sampled, outcomes, answers)


def prompts_of(data: "Tokenised", row: int, answers: int) -> list[Prompt]:
    """The prompt of a row, once for each answer: what stands before the first token to be learned."""
    ids, targets = data.row(row)
    learned = np.flatnonzero(targets)
    token_ids = tuple(ids[: learned[0] if len(learned) else len(ids)].tolist())
    task = 0 if data.row_tasks is None else int(data.row_tasks[row])
    return [Prompt(token_ids, row, number, task) for number in range(answers)]


def advantages_of(rewards_GN: np.ndarray[Any, Any], scale: str, step_std: float) -> np.ndarray[Any, Any]:
    """(groups, answers) float64: how much better than its group each answer is; 0 where all are alike.

    Args:
        scale: as `GRPO.scale_rewards`.
        step_std: of all rewards of the step, over all ranks.
    """
    centred = rewards_GN - rewards_GN.mean(1, keepdims=True)
    if scale == "group":
        centred = centred / (rewards_GN.std(1, ddof=1, keepdims=True) + 1e-4)
    elif scale == "batch":
        centred = centred / (step_std + 1e-4)
    alike = rewards_GN.max(1, keepdims=True, initial=-np.inf) == rewards_GN.min(
        1, keepdims=True, initial=np.inf
    )
    return np.where(alike, 0.0, centred)


def ends_of(tokenizer: Any, model: Any) -> tuple[int, ...]:
    """The tokens after which an answer is over: the tokenizer's, and those that the model names."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return tuple(sorted({int(token) for token in found if token is not None}))


# ---------------------------------------------------------------------------------------------- generation


def gumbel(keys_B: Tensor, vocabulary: int) -> Tensor:
    """(B, V) float64: noise with the distribution of Gumbel, a function of (key, token).

    The hash is SplitMix64 (Steele, Lea, Flood 2014, figure 15) with the token as its counter: integer
    arithmetic, so it is the same on every device.
    """

    def shifted(x: Tensor, by: int) -> Tensor:
        return (x >> by) & ((1 << (64 - by)) - 1)  # torch's own shift copies the sign

    tokens_V = torch.arange(1, vocabulary + 1, dtype=torch.int64, device=keys_B.device)
    x = keys_B[:, None] + tokens_V * _signed(0x9E3779B97F4A7C15)
    x = (x ^ shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ shifted(x, 27)) * _signed(0x94D049BB133111EB)
    x = x ^ shifted(x, 31)
    uniform = (shifted(x, 11).double() + 0.5) * 2.0**-53
    return -(-uniform.log()).log()


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def key_of(sampling: Sampling, prompt: Prompt, position: int) -> int:
    """64 bits, signed: what the noise of one position of one answer is made from."""
    said = f"{sampling.seed} {sampling.step} {prompt.row} {prompt.number} {position}"
    found: int = struct.unpack("<q", hashlib.sha256(said.encode()).digest()[:8])[0]
    return found


class _Pick:
    """A processor of logits that leaves one token: the one that is drawn."""

    def __init__(self, lines: Sequence[Prompt], sampling: Sampling) -> None:
        from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

        self.lines = lines
        self.sampling = sampling
        self.position = 0
        self.warpers: list[Any] = []
        if sampling.top_k is not None:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, input_ids: Tensor, scores_BV: Tensor) -> Tensor:
        scores_BV = scores_BV.double()
        if self.sampling.temperature > 0:
            scores_BV = scores_BV / self.sampling.temperature
            for warper in self.warpers:
                scores_BV = warper(input_ids, scores_BV)
            keys_B = torch.tensor(
                [key_of(self.sampling, line, self.position) for line in self.lines], device=scores_BV.device
            )
            scores_BV = scores_BV + gumbel(keys_B, scores_BV.shape[1])
        self.position += 1
        return scores_BV


@contextmanager
def _generating(engine_model: nn.Module, model: nn.Module) -> Iterator[None]:
    """Dropout is off, and nothing that the base's author likes in texts (a repetition penalty) changes what
    is drawn: answers must come from the distribution that is trained."""
    from transformers import GenerationConfig

    was_training = engine_model.training
    configs = {
        module: module.generation_config
        for module in model.modules()
        if isinstance(vars(module).get("generation_config"), GenerationConfig)
    }
    engine_model.eval()
    for module in configs:
        module.generation_config = GenerationConfig()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, config in configs.items():
            module.generation_config = config
        engine_model.train(was_training)


def _generate(
    model: Any,
    ids_BT: Tensor,
    mask_BT: Tensor,
    pick: _Pick,
    most: int,
    ends: Sequence[int],
    pad_id: int,
    sharded: bool,
    told: Mapping[str, Any],
) -> Tensor:
    """(B, at most `most`): what the model writes."""
    from transformers import LogitsProcessorList

    config = model.config
    start = {"decoder_start_token_id": config.decoder_start_token_id} if config.is_encoder_decoder else {}
    written: Tensor = model.generate(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        logits_processor=LogitsProcessorList([pick]),
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=most,
        eos_token_id=list(ends) or None,
        pad_token_id=pad_id,
        synced_gpus=sharded,
        **start,
        **told,
    )
    return written[:, 1:] if config.is_encoder_decoder else written[:, ids_BT.shape[1] :]


def _sees_padding(model: Any) -> bool:
    """Whether padding changes what a row says: virtual tokens stand in front of it, at some distance."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def _lines(prompts: Sequence[Prompt], most: int, alike: bool) -> Iterator[Sequence[Prompt]]:
    """The prompts, at most `most` at a time; `alike`: only answers to one prompt together."""
    start = 0
    while start < len(prompts):
        end = start + 1
        while end < min(start + most, len(prompts)) and not (
            alike and (prompts[end].row != prompts[start].row or prompts[end].number == 0)
        ):
            end += 1
        yield prompts[start:end]
        start = end


def _beside(lines: Sequence[Prompt], pad_id: int, device: Any, left: bool) -> tuple[Tensor, Tensor]:
    """(ids, mask) of the prompts, padded on the left or on the right."""
    width = max(len(line.token_ids) for line in lines)
    ids = torch.full((len(lines), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(lines), width), dtype=torch.int64)
    for place, line in enumerate(lines):
        start = width - len(line.token_ids) if left else 0
        ids[place, start : start + len(line.token_ids)] = torch.tensor(line.token_ids)
        mask[place, start : start + len(line.token_ids)] = 1
    return ids.to(device), mask.to(device)


def _cut(written: list[int], ends: Sequence[int], tokenizer: Any) -> Sampled:
    """The answer, up to the token that ends it."""
    place = next((place for place, token in enumerate(written) if token in ends), None)
    ids = tuple(written if place is None else written[: place + 1])
    text = tokenizer.decode(ids if place is None else ids[:-1], skip_special_tokens=True)
    return Sampled(ids, text, place is not None)


# ------------------------------------------------------------------------------------- batches and metrics


def _batch(
    prompts: Sequence[Prompt],
    sampled: Sequence[Sampled],
    advantages: Sequence[float] | np.ndarray[Any, Any],
    pad_id: int,
    start_id: int | None,
    device: Any,
    with_tasks: bool,
) -> Batch:
    """Prompts with their answers, padded on the right; without any, a line that teaches nothing."""
    questions = [list(prompt.token_ids) for prompt in prompts] or [[pad_id]]
    answers = [list(answer.token_ids) for answer in sampled] or [[pad_id]]
    decoder_BT = None
    if start_id is None:
        tokens_BT, mask_BT = _padded([q + a for q, a in zip(questions, answers, strict=True)], pad_id)
        labels_BT, _ = _padded(
            [[IGNORE] * len(q) + a for q, a in zip(questions, answers, strict=True)], IGNORE
        )
    else:
        tokens_BT, mask_BT = _padded(questions, pad_id)
        labels_BT, _ = _padded(answers, IGNORE)
        decoder_BT, _ = _padded([[start_id, *answer[:-1]] for answer in answers], pad_id)
    if not prompts:
        labels_BT[:] = IGNORE
    made = Batch(
        tokens_BT,
        labels_BT,
        mask_BT,
        decoder_BT=decoder_BT,
        sequence_BT=torch.arange(len(questions))[:, None].where(mask_BT == 1, -1),
        advantages_S=torch.tensor([*advantages] or [0.0], dtype=torch.float32),
        task_B=torch.tensor([p.task for p in prompts] or [0]) if with_tasks else None,
        rows=tuple(prompt.row for prompt in prompts),
    )
    for name, value in vars(made).items():
        if isinstance(value, Tensor):
            setattr(made, name, value.to(device))
    return made


def _padded(lines: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    width = max(2, *map(len, lines))
    values = torch.full((len(lines), width), fill, dtype=torch.int64)
    mask = torch.zeros((len(lines), width), dtype=torch.int64)
    for place, line in enumerate(lines):
        values[place, : len(line)] = torch.tensor(line, dtype=torch.int64)
        mask[place, : len(line)] = 1
    return values, mask


def _metrics(
    engine: "Engine",
    judge: Judge,
    sampled: Sequence[Sampled],
    outcomes: Sequence[Outcome],
    group: int,
) -> dict[str, float]:
    """Over all ranks: mean and standard deviation of the score, share of groups without any spread, length,
    share of answers that ended by themselves, share that could not be graded; by grader where there are
    several. Collective."""
    names = sorted(getattr(judge.grader, "graders", {}))
    scores = np.array([outcome.score for outcome in outcomes], dtype=np.float64)
    groups = scores.reshape(-1, group)
    sums = [
        float(len(scores)),
        scores.sum(),
        (scores**2).sum(),
        float(len(groups)),
        float(sum(line.max() == line.min() for line in groups)),
        float(sum(len(answer.token_ids) for answer in sampled)),
        float(sum(answer.finished for answer in sampled)),
        float(sum(bool(outcome.fault) for outcome in outcomes)),
        *(float(sum(outcome.parts.get(name, 0.0) for outcome in outcomes)) for name in names),
    ]
    count, total, squares, groups_found, still, length, finished, faults, *parts = engine.all_sum(
        torch.tensor(sums, dtype=torch.float64, device=engine.device)
    ).tolist()
    mean = total / max(count, 1)
    return {
        "reward": mean,
        "reward_std": max(0.0, (squares - count * mean**2) / max(count - 1, 1)) ** 0.5,
        "groups_without_spread": still / max(groups_found, 1),
        "completion_tokens": length / max(count, 1),
        "finished": finished / max(count, 1),
        "grader_faults": faults / max(count, 1),
        **{f"reward/{name}": part / max(count, 1) for name, part in zip(names, parts, strict=True)},
    }
