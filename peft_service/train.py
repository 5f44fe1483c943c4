"""The loop: one optimizer step, evaluation, and `fit`, which is both of them until the end.

Shape suffixes: B rows, T tokens per row, V vocabulary. Nothing here knows where gradients live (an Engine
does), where metrics and checkpoints go (the caller does), or what is trained (a method has attached it).
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from peft_service import batches
from peft_service.attached import Attached
from peft_service.batches import Batch
from peft_service.errors import Diverged, InvalidTrainingFile
from peft_service.objectives import Objective
from peft_service.schedule import learning_rate
from peft_service.spec import Training

if TYPE_CHECKING:
    from peft_service.tokenised import Tokenised

STOP_POLL_SECONDS = 1.0
EVALUATED_ROWS = 256
"""Rows whose tensors exist at one time in an evaluation. Not a multiple of the ranks: an objective that looks
at all rows of a step would see others on another number of them."""


class Engine(Protocol):
    """Where gradients live. One conformance suite runs on every implementation."""

    model: nn.Module
    rank: int
    world: int
    device: torch.device

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`: SUMS over microbatches and over ranks."""

    def step(self, learning_rate: float) -> float:
        """Clip to max_grad_norm, update, clear; the global gradient norm before clipping.

        A norm that is not finite comes back as it is, and no weight has moved.
        """

    def all_sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over ranks, on every rank."""

    def gradient(self, name: str) -> Tensor:
        """Collective. Between `backward` and `step`: the full-size float32 gradient of the parameter `name`,
        summed over microbatches and ranks, before clipping; zeros where nothing has arrived."""

    def gathered(self) -> AbstractContextManager[None]:
        """Collective. Inside, every trainable parameter of the model is there, full size."""

    def state(self) -> dict[str, Tensor]:
        """Collective. Full-size float32 CPU tensors: "param.<name>", "exp_avg.<name>", "exp_avg_sq.<name>",
        and the number of updates so far as "step": independent of the number of ranks and of sharding."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Collective. Go on from what `state` of any engine returned."""

    def trainable(self) -> dict[str, Tensor]:
        """Collective. What the forward pass uses now: full-size CPU tensors by parameter name."""


@dataclass(frozen=True)
class Step:
    """What one optimizer step did, over all ranks."""

    loss: float
    accuracy: float
    grad_norm: float
    tokens: int
    target_tokens: int


@dataclass(frozen=True)
class Evaluation:
    loss: float
    accuracy: float
    target_tokens: int


@dataclass(frozen=True)
class Best:
    """The best evaluation so far."""

    step: int
    value: float


@dataclass(frozen=True)
class Progress:
    """Where a fit is: enough to go on from, together with the engine's state."""

    step: int = 0
    trained_tokens: int = 0
    metrics: Mapping[str, float] | None = None
    best: Best | None = None
    stale: int = 0
    """Evaluations since the best one."""


@dataclass(frozen=True)
class Fitted:
    finished: bool
    """False: it was asked to stop, and has checkpointed."""
    progress: Progress


class LocalEngine:
    """One process, torch's AdamW, on whatever device the model is."""

    rank = 0
    world = 1

    def __init__(self, attached: Attached, training: Training) -> None:
        self.model = attached.model
        self.device = next(self.model.parameters()).device
        self.max_grad_norm = training.max_grad_norm
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = adamw(attached, training)

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, learning_rate: float) -> float:
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm))
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate * group["ratio"]
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def all_sum(self, x: Tensor) -> Tensor:
        return x

    def gradient(self, name: str) -> Tensor:
        parameter = self.parameters[name]
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.float()

    def gathered(self) -> AbstractContextManager[None]:
        return nullcontext()

    def state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {"step": torch.zeros((), dtype=torch.int64)}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state.get(parameter, {})
            state[f"param.{name}"] = full_copy(parameter)
            for key in ("exp_avg", "exp_avg_sq"):
                state[f"{key}.{name}"] = full_copy(moments.get(key, torch.zeros_like(parameter)))
            if moments:
                state["step"] = torch.tensor(int(moments["step"]))
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            with torch.no_grad():
                parameter.copy_(state[f"param.{name}"])
            self.optimizer.state.pop(parameter, None)
            if int(state["step"]) > 0:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(state["step"])),
                    "exp_avg": state[f"exp_avg.{name}"].to(parameter, copy=True),
                    "exp_avg_sq": state[f"exp_avg_sq.{name}"].to(parameter, copy=True),
                }

    def trainable(self) -> dict[str, Tensor]:
        return {name: p.detach().cpu().clone().contiguous() for name, p in self.parameters.items()}


class StillEngine:
    """For what has nothing to train: one process holds the model, and no step can be taken."""

    rank = 0
    world = 1

    def __init__(self, attached: Attached, training: Training) -> None:
        self.model = attached.model
        self.device = next(self.model.parameters()).device

    def backward(self, loss: Tensor) -> None:
        raise TypeError("nothing trains here")

    def step(self, learning_rate: float) -> float:
        raise TypeError("nothing trains here")

    def all_sum(self, x: Tensor) -> Tensor:
        return x

    def gradient(self, name: str) -> Tensor:
        raise KeyError(name)

    def gathered(self) -> AbstractContextManager[None]:
        return nullcontext()

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """There is none."""

    def trainable(self) -> dict[str, Tensor]:
        return {}


def adamw(attached: Attached, training: Training) -> torch.optim.AdamW:
    """The optimizer of every engine: a group for each ratio of learning rates; the rate itself is set at
    each step."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in attached.model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(attached.ratio(name), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "ratio": ratio, "lr": training.learning_rate * ratio}
            for ratio, parameters in sorted(groups.items())
        ],
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        weight_decay=training.weight_decay,
    )


def full_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def train_step(
    engine: Engine,
    objective: Objective,
    microbatches: Sequence[Batch],
    learning_rate: float,
    attached: Attached | None = None,
    step: int = 0,
) -> Step:
    """One optimizer step. Every target token weighs the same, wherever it was computed.

    `attached` is the method at work; without it, nothing but the update happens.

    Dividing by the step's own token count (not per microbatch, not per rank) is what makes the result
    independent of the number of workers.

    Raises:
        InvalidTrainingFile: no token in the step is to be learned.
        Diverged: loss or gradient norm is not finite. Raised before the weights change, on every rank.
    """
    method = attached or Attached(engine.model)
    counts = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for batch in microbatches:
        # A batch without rows only fills a rank's share: its tokens are nobody's.
        counts += torch.stack([objective.targets(batch), batch.mask_BT.sum() * bool(batch.rows)])
    targets, tokens = (int(count) for count in engine.all_sum(counts))
    if targets == 0:
        raise InvalidTrainingFile("no token of this step is to be learned")

    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
    losses = []
    method.before_step(step)
    for batch in microbatches:
        batch.extra = method.inputs(batch)
    _share(engine, objective, microbatches)
    for batch in microbatches:
        nll, right = objective.loss_sum(engine.model, batch)
        loss_of_batch = nll / targets
        if (penalty := method.penalty()) is not None:
            # Once a step, although every microbatch of every rank adds its part.
            loss_of_batch = loss_of_batch + penalty / (len(microbatches) * engine.world)
        engine.backward(loss_of_batch)
        losses.append(nll.detach())
        sums += torch.stack([nll.detach().double(), right.double()])
    nll_sum, right_sum = (float(x) for x in engine.all_sum(sums))
    loss = nll_sum / targets
    if not math.isfinite(loss):
        # Every rank knows of the failure, so a second collective is safe here: it finds the microbatches
        # at fault.
        marks = torch.zeros(len(microbatches), engine.world, device=engine.device)
        marks[:, engine.rank] = (~torch.isfinite(torch.stack(losses))).float()
        bad = engine.all_sum(marks).nonzero().tolist()
        raise Diverged(f"the loss is {loss}", details={"microbatches": bad})
    method.before_update(engine, step)
    norm = engine.step(learning_rate * method.rate(step))
    if not math.isfinite(norm):
        raise Diverged(f"the loss is {loss:.4g} but the gradient norm is {norm}")
    method.after_update(engine, step)
    return Step(loss, right_sum / targets, norm, tokens, targets)


def _share(engine: Engine, objective: Objective, microbatches: Sequence[Batch]) -> None:
    """Give every batch what its loss needs to know of all the others. Collective."""
    shared = objective.shared(engine.model, microbatches)
    if shared is not None:
        shared = engine.all_sum(shared)
        for batch in microbatches:
            batch.shared = shared


def evaluate(
    engine: Engine,
    objective: Objective,
    data: "Tokenised",
    *,
    microbatch: int,
    pad_id: int,
    attached: Attached | None = None,
    collate: Mapping[str, Any] | None = None,
    prepare: Callable[[Sequence[Batch]], None] | None = None,
) -> Evaluation:
    """Mean loss per target and share of right ones over all rows of `data`. Collective.

    `collate` has the further arguments of `batches.microbatches`.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=engine.device)
    was_training = engine.model.training
    engine.model.eval()
    with torch.no_grad():
        for start in range(0, data.rows, EVALUATED_ROWS):
            rows = list(range(start, min(start + EVALUATED_ROWS, data.rows)))
            parts = batches.microbatches(
                data, rows, engine.rank, engine.world, microbatch, pad_id, engine.device, **(collate or {})
            )
            if prepare is not None:
                prepare(parts)
            for batch in parts:
                batch.extra = attached.inputs(batch) if attached else {}
            _share(engine, objective, parts)
            for batch in parts:
                nll, right = objective.loss_sum(engine.model, batch)
                count = objective.targets(batch)
                sums += torch.stack([nll.double(), right.double(), count.double()])
    engine.model.train(was_training)
    nll_sum, right_sum, targets = (float(x) for x in engine.all_sum(sums))
    targets = max(targets, 1.0)
    return Evaluation(nll_sum / targets, right_sum / targets, int(targets))


def fit(
    engine: Engine,
    objective: Objective,
    training: Training,
    seed: int,
    data: "Tokenised",
    validation: "Tokenised | None",
    *,
    microbatch: int,
    pad_id: int,
    start: Progress,
    log: Callable[[dict[str, Any]], None],
    save: Callable[[Progress], None],
    stop_requested: Callable[[], bool],
    attached: Attached | None = None,
    collate: Mapping[str, Any] | None = None,
    draw: "batches.Draw | None" = None,
    prepare: Callable[[Sequence[Batch]], None] | None = None,
    rollout: Callable[[Sequence[int], int], tuple[list[Batch], dict[str, float]]] | None = None,
    further: Callable[[], dict[str, float]] | None = None,
) -> Fitted:
    """Train from `start` to the last step, or until someone asks to stop, or it no longer gets better.
    Collective.

    `log` gets metrics lines and `stop_requested` is asked, on rank 0 only; `save` is called on every rank,
    after every `checkpoint_steps` steps, after an evaluation that is the best so far where that matters,
    after the last one, and before returning because of a stop. `prepare` is given every microbatch before it
    is used. `rollout` makes the microbatches of a step of an objective that generates: (rows, step from 0) ->
    (microbatches of this rank, metrics). `further` measures more at every evaluation.

    Raises:
        Diverged: names the step and the source lines of the rows; the last checkpoint is good.
    """
    method = attached or Attached(engine.model)
    steps = batches.steps_of(data.rows, training)
    per_epoch = max(1, math.ceil(data.rows / training.batch_size))
    progress, saved = start, start.step
    metrics: dict[str, float] = dict(start.metrics or {})
    asked = 0.0
    engine.model.train()
    while progress.step < steps and not _given_up(progress, training):
        began = time.monotonic()
        number = progress.step + 1
        rows = batches.rows_of_step(progress.step, data.rows, training, seed, draw=draw)
        rate = learning_rate(*method.phase(progress.step, steps), training)
        # A seed per step and rank instead of a running generator: dropout after a resume is what it would
        # have been, with nothing to save.
        torch.manual_seed((seed * 1_000_003 + progress.step) * 65_537 + engine.rank)
        told: dict[str, float] = {}
        if rollout is not None:
            parts, told = rollout(rows, progress.step)
        else:
            parts = batches.microbatches(
                data, rows, engine.rank, engine.world, microbatch, pad_id, engine.device, **(collate or {})
            )
        if prepare is not None:
            prepare(parts)
        try:
            done = train_step(engine, objective, parts, rate, attached, progress.step)
        except (Diverged, InvalidTrainingFile) as error:
            capacity = (collate or {}).get("capacity")
            suspects = None if rollout is not None else (engine.world, microbatch, capacity)
            raise _explained(error, number, rows, data, suspects) from error
        seconds = time.monotonic() - began
        metrics["train_loss"] = done.loss
        metrics["train_mean_token_accuracy"] = done.accuracy
        metrics.update(told)
        progress = replace(
            progress,
            step=number,
            trained_tokens=progress.trained_tokens + done.tokens,
            metrics=dict(metrics),
        )
        if engine.rank == 0:
            log(
                {
                    "type": "step",
                    "step": number,
                    "total_steps": steps,
                    "train_loss": done.loss,
                    "train_mean_token_accuracy": done.accuracy,
                    "grad_norm": done.grad_norm,
                    "learning_rate": rate,
                    "tokens": done.tokens,
                    "target_tokens": done.target_tokens,
                    "seconds": seconds,
                    "tokens_per_second": done.tokens / max(seconds, 1e-9),
                    **told,
                }
            )
        last = number == steps
        improved = False
        every = training.eval_steps or per_epoch
        evaluation: dict[str, float] = {}
        if validation is not None and (last or number % every == 0):
            found = evaluate(
                engine,
                objective,
                validation,
                microbatch=microbatch,
                pad_id=pad_id,
                attached=attached,
                collate=collate,
                prepare=prepare,
            )
            evaluation = {
                "valid_loss": found.loss,
                "valid_mean_token_accuracy": found.accuracy,
                "full_valid_loss": found.loss,
            }
        if further is not None and (last or number % every == 0):
            evaluation |= further()
        if evaluation:
            metrics.update(evaluation)
            progress, improved = _judged(replace(progress, metrics=dict(metrics)), training)
            if engine.rank == 0:
                log({"type": "eval", "step": number, **evaluation})
        last = last or _given_up(progress, training)
        stop = False
        if engine.rank == 0 and time.monotonic() - asked >= STOP_POLL_SECONDS:
            asked = time.monotonic()
            stop = stop_requested()
        stop = bool(engine.all_sum(torch.tensor([float(stop)], device=engine.device)).item())
        due = last or stop or number % training.checkpoint_steps == 0
        if (due or (improved and training.best_checkpoint)) and saved != number:
            save(progress)
            saved = number
        if stop and not last:
            return Fitted(False, progress)
    return Fitted(True, progress)


def _given_up(progress: Progress, training: Training) -> bool:
    patience = training.early_stopping_patience
    return patience is not None and progress.stale >= patience


_SELECTED = {"loss": "valid_loss", "accuracy": "valid_mean_token_accuracy", "score": "valid_score"}


def _judged(progress: Progress, training: Training) -> tuple[Progress, bool]:
    """The progress after an evaluation, and whether that was the best so far."""
    told = progress.metrics or {}
    # Of an objective that generates there is no loss on held-out rows: their score is what there is.
    select = training.select_by if _SELECTED[training.select_by] in told else "score"
    value = float(told[_SELECTED[select]])
    sign = 1 if select == "loss" else -1
    best = progress.best
    better = best is None or sign * value < sign * best.value - training.early_stopping_threshold
    if better:
        return replace(progress, best=Best(progress.step, value), stale=0), True
    return replace(progress, stale=progress.stale + 1), False


def _explained(
    error: Diverged | InvalidTrainingFile,
    step: int,
    rows: Sequence[int],
    data: "Tokenised",
    laid_out: tuple[int, int, int | None] | None,
) -> Diverged | InvalidTrainingFile:
    """The same error, saying which lines of the training data were in the step.

    `laid_out`: ranks, lines of a microbatch and tokens of a packed line, by which the rows of a microbatch
    can be told.
    """
    suspects = list(rows)
    at_fault = error.details.get("microbatches")
    if at_fault and laid_out is not None:
        world, microbatch, capacity = laid_out
        lengths = data.lengths(rows).sum(axis=1).tolist()
        room = None if capacity is None else capacity * data.sequences
        parts = {
            rank: batches.layout(lengths, rank, world, microbatch, room)
            for rank in {rank for _, rank in at_fault}
        }
        suspects = [rows[row] for part, rank in at_fault for line in parts[rank][part] for row in line]
    lines = sorted({int(data.lines[row]) for row in suspects})
    shown = ", ".join(map(str, lines[:20])) + (f" and {len(lines) - 20} more" if len(lines) > 20 else "")
    if data.row_files is not None:
        shown = "; ".join(data.place(row) for row in sorted(suspects)[:20])
    advice = (
        "The weights were not updated. Look at those lines, or try a lower learning rate."
        if isinstance(error, Diverged)
        else "Are the prompts longer than max_seq_len?"
    )
    return type(error)(
        f"step {step}: {error.message}, in rows from line{'s' if len(lines) > 1 else ''} {shown} of the "
        f"training file. {advice}",
        code=error.code,
        details={"step": step, "lines": lines[:100]},
    )
