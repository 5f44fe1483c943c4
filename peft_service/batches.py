"""Which rows a step takes, and which of them a rank computes: the same for any number of ranks.

Steps never span epochs: every epoch is a permutation of all rows, cut into steps of `batch_size`; its last
step has what is left. So every row is seen once an epoch, and a step is a function of (seed, step) alone:
resuming, or going on with more or fewer workers, needs no saved state of a sampler.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from peft_service.objectives.sft import IGNORE
from peft_service.spec import Training
from peft_service.tasks import Task
from peft_service.tokenise import Tokenised

if TYPE_CHECKING:
    from torch import Tensor

# Shape suffixes in this file: B rows, T tokens per row.


@dataclass
class Batch:
    """A microbatch, right-padded to its longest row."""

    tokens_BT: "Tensor"
    """int64"""
    labels_BT: "Tensor"
    """int64: what is to be learned, IGNORE elsewhere. For text the token itself, not shifted: the objective
    shifts. Tags by token; (B, 1) the class of a row; (B, 2) the first and last token of an answer."""
    mask_BT: "Tensor"
    """int64: 1 where there is a token, 0 on padding."""
    decoder_BT: "Tensor | None" = None
    """int64: what an encoder-decoder's decoder reads; `tokens_BT` are then the encoder's."""
    task_B: "Tensor | None" = None
    """int64: number of the row's task, in multi-task data."""
    allowed_BC: "Tensor | None" = None
    """bool: the classes of the row's task, in multi-task classification."""
    sequence_BT: "Tensor | None" = None
    """int64: the number of the sequence that a token belongs to, from 0 to S - 1; -1 on padding. Without
    packing a sequence is a line of the batch. Of pairs, 2 i is the better answer and 2 i + 1 the worse; of
    unpaired rows, 2 i is the row and 2 i + 1 its prompt with another row's answer."""
    positions_BT: "Tensor | None" = None
    """int64: positions that restart with every sequence, in packed batches: they replace the mask, since
    attention then stays inside a sequence."""
    values_BK: "Tensor | None" = None
    """float32: the number that a row teaches; of K classes, 1 where the row belongs to it; whether an
    unpaired answer is good (1 or 0)."""
    reference_S: "Tensor | None" = None
    """float32: log-probability of a sequence's targets under the base."""
    advantages_S: "Tensor | None" = None
    """float32: how much better than its group a sampled answer is."""
    teacher: Any = None
    """A frozen model whose distribution is learned."""
    shared: "Tensor | None" = None
    """float64: what `Objective.shared` has summed up over the whole step."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further inputs of the forward pass, which the method has set."""

    @property
    def inputs(self) -> "dict[str, Tensor]":
        """All that the forward pass gets."""
        given = {"input_ids": self.tokens_BT, **self.extra}
        if self.positions_BT is None:
            given["attention_mask"] = self.mask_BT
        else:
            given["position_ids"] = self.positions_BT
        return given if self.decoder_BT is None else {**given, "decoder_input_ids": self.decoder_BT}


@lru_cache(maxsize=4)
def order(rows: int, epoch: int, seed: int) -> NDArray[np.int64]:
    """The permutation of `rows` in this epoch (from 0).

    The rows sorted by Philox's raw output: numpy keeps that stable for ever (NEP 19), which neither its own
    `permutation` nor torch's promises; and a run may be resumed under another version.
    """
    key = hashlib.sha256(f"order {seed} {epoch}".encode()).digest()
    generator = np.random.Philox(key=np.frombuffer(key[:16], dtype="<u8"))
    permutation = np.argsort(generator.random_raw(rows), kind="stable").astype(np.int64)
    permutation.setflags(write=False)  # one cached array for all callers
    return permutation


def steps_of(rows: int, training: Training) -> int:
    """Optimizer steps of the whole run: the last step of an epoch is smaller, never left out."""
    steps = training.n_epochs * steps_of_epoch(rows, training)
    return steps if training.max_steps is None else min(steps, training.max_steps)


def steps_of_epoch(rows: int, training: Training) -> int:
    return -(-rows // training.batch_size)


@lru_cache(maxsize=4)
def _drawn(row_tasks: bytes, temperature: float, epoch: int, seed: int) -> NDArray[np.int64]:
    """As many rows as there are, each from a task drawn with its share n^(1/T) (Raffel et al. 2020,
    arXiv:1910.10683, section 3.5.2), then in turn from that task's own permutation."""
    tasks = np.frombuffer(row_tasks, dtype=np.int32)
    sizes = np.bincount(tasks).astype(np.float64)
    shares = np.where(sizes > 0, sizes, 1.0) ** (1.0 / temperature) * (sizes > 0)
    key = hashlib.sha256(f"tasks {seed} {epoch}".encode()).digest()
    raw = np.random.Philox(key=np.frombuffer(key[:16], dtype="<u8")).random_raw(len(tasks))
    uniform = (raw >> np.uint64(11)) / np.float64(1 << 53)
    chosen = np.searchsorted(np.cumsum(shares / shares.sum()), uniform, side="right")
    drawn = np.empty(len(tasks), dtype=np.int64)
    for task in np.unique(chosen):
        mine = np.flatnonzero(tasks == task)
        places = np.flatnonzero(chosen == task)
        turns = -(-len(places) // len(mine))
        queue = [mine[order(len(mine), epoch * 1000 + turn, seed + int(task))] for turn in range(turns)]
        drawn[places] = np.concatenate(queue)[: len(places)]
    drawn.setflags(write=False)
    return drawn


def rows_of_step(
    step: int,
    rows: int,
    training: Training,
    seed: int,
    *,
    row_tasks: NDArray[np.int32] | None = None,
    temperature: float | None = None,
) -> list[int]:
    """The rows, in order, of step `step`; steps count from 0, so this makes update number `step + 1`.

    With a `temperature` and tasks, an epoch draws its rows by task instead of taking each once.

    Raises:
        IndexError: the run has no such step.
    """
    if not 0 <= step < steps_of(rows, training):
        raise IndexError(f"step {step} of a run of {steps_of(rows, training)} steps (from 0)")
    epoch, within = divmod(step, steps_of_epoch(rows, training))
    start = within * training.batch_size
    if temperature is not None and row_tasks is not None:
        epochs_rows = _drawn(row_tasks.astype(np.int32).tobytes(), temperature, epoch, seed)
    else:
        epochs_rows = order(rows, epoch, seed)
    taken: list[int] = epochs_rows[start : start + training.batch_size].tolist()
    return taken


def microbatches(
    tokenised: Tokenised,
    rows: Sequence[int],
    rank: int,
    world: int,
    microbatch: int,
    pad_id: int,
    device: Any,
    *,
    task: Task = "causal_lm",
    start_id: int = 0,
    classes: int = 0,
    pad_left: bool = False,
) -> list[Batch]:
    """What `rank` of `world` computes of `rows`: its rows are `rows[rank::world]`, `microbatch` at a time.

    Every rank gets the same number of microbatches, since under ZeRO-3 each forward pass is a collective: a
    rank with fewer rows gets a padding row without targets in the place of a missing microbatch.

    `start_id` is what an encoder-decoder's decoder starts with. `pad_left` suits a decoder that classifies by
    its last token. `classes` is the number of classes of a multi-task file.
    """
    most = -(-len(rows) // world)
    mine = list(rows[rank::world])
    return [
        _batch(tokenised, mine[start : start + microbatch], pad_id, device, task, start_id, classes, pad_left)
        for start in range(0, most, microbatch)
    ]


def _batch(
    tokenised: Tokenised,
    rows: Sequence[int],
    pad_id: int,
    device: Any,
    task: Task,
    start_id: int,
    classes: int,
    pad_left: bool,
) -> Batch:
    import torch

    pairs = [tokenised.row(row) for row in rows]
    count = max(1, len(pairs))
    decoder_BT = allowed_BC = None
    if task == "seq2seq_lm":
        sources = [ids[targets == 0] for ids, targets in pairs]
        answers = [ids[targets == 1] for ids, targets in pairs]
        tokens_BT, mask_BT = _padded(sources, count, pad_id)
        labels_BT, _ = _padded(answers, count, IGNORE)
        decoder_BT = np.full_like(labels_BT, start_id)
        decoder_BT[:, 1:] = np.where(labels_BT[:, :-1] == IGNORE, pad_id, labels_BT[:, :-1])
    else:
        tokens_BT, mask_BT = _padded([ids for ids, _ in pairs], count, pad_id, pad_left)
        if task == "causal_lm":
            marked = [np.where(targets == 1, ids, IGNORE) for ids, targets in pairs]
            labels_BT, _ = _padded(marked, count, IGNORE)
        elif task == "token_classification":
            labels_BT, _ = _padded([tokenised.token_labels(row) for row in rows], count, IGNORE)
        else:
            width = 2 if task == "question_answering" else 1
            labels_BT = np.full((count, width), IGNORE, dtype=np.int64)
            for place, row in enumerate(rows):
                labels_BT[place] = tokenised.row_labels(row)
    if not pairs:
        # A row that attends to nothing is a softmax over nothing: NaN, and 0 * NaN in the gradients.
        mask_BT[:] = 1
    task_B = None
    if tokenised.row_tasks is not None:
        task_B = np.array([tokenised.row_tasks[row] for row in rows] or [0], dtype=np.int64)
        if task == "sequence_classification" and tokenised.class_tasks is not None:
            allowed_BC = tokenised.class_tasks[None, :classes] == task_B[:, None]

    def placed(array: "NDArray[Any] | None") -> Any:
        return None if array is None else torch.from_numpy(array).to(device)

    return Batch(
        tokens_BT=placed(tokens_BT),
        labels_BT=placed(labels_BT),
        mask_BT=placed(mask_BT),
        decoder_BT=placed(decoder_BT),
        task_B=placed(task_B),
        allowed_BC=placed(allowed_BC),
    )


def _padded(
    rows: Sequence[NDArray[Any]], count: int, fill: int, left: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(values, mask), both (count, T), T that of the longest row."""
    width = max((len(row) for row in rows), default=2)
    values = np.full((count, width), fill, dtype=np.int64)
    mask = np.zeros((count, width), dtype=np.int64)
    for place, row in enumerate(rows):
        part = slice(width - len(row), width) if left else slice(0, len(row))
        values[place, part] = row
        mask[place, part] = 1
    return values, mask
