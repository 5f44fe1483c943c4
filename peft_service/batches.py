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
from peft_service.packing import balanced
from peft_service.spec import Training
from peft_service.tasks import Task
from peft_service.tokenised import Tokenised

if TYPE_CHECKING:
    from torch import Tensor

# Shape suffixes in this file: B rows, T tokens per row.


@dataclass
class Batch:
    """A microbatch, right-padded to its longest line. Of pairs, two lines are a row."""

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
    rows: tuple[int, ...] = ()
    """Rows of the data set, in the order of their sequences."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further inputs of the forward pass, which the method has set."""

    @property
    def inputs(self) -> "dict[str, Tensor]":
        """All that the forward pass gets."""
        given = {"input_ids": self.tokens_BT, **self.extra}
        if self.positions_BT is None:
            given["attention_mask"] = self.mask_BT
        else:
            # With a cache, or a mask, transformers does not look for restarting positions.
            given |= {"position_ids": self.positions_BT, "use_cache": False}
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


@dataclass(frozen=True, eq=False)
class Draw:
    """Rows drawn by group (a task, or a source of a mixture) instead of each once an epoch."""

    groups: NDArray[np.int32]
    """(rows,) the group of each row."""
    shares: tuple[float, ...]
    """How much of an epoch is of each group, in any unit."""


def by_task(row_tasks: NDArray[np.int32], temperature: float) -> Draw:
    """A task of n rows has a share of n^(1/T) (Raffel et al. 2020, arXiv:1910.10683, section 3.5.2)."""
    sizes = np.bincount(row_tasks).astype(np.float64)
    shares = np.where(sizes > 0, sizes, 1.0) ** (1.0 / temperature) * (sizes > 0)
    return Draw(row_tasks, tuple(shares.tolist()))


@lru_cache(maxsize=4)
def _drawn(draw: Draw, epoch: int, seed: int) -> NDArray[np.int64]:
    """As many rows as there are, each from a group drawn by its share, then in turn from that group's own
    permutation."""
    shares = np.array(draw.shares)
    key = hashlib.sha256(f"tasks {seed} {epoch}".encode()).digest()
    raw = np.random.Philox(key=np.frombuffer(key[:16], dtype="<u8")).random_raw(len(draw.groups))
    uniform = (raw >> np.uint64(11)) / np.float64(1 << 53)
    chosen = np.searchsorted(np.cumsum(shares / shares.sum()), uniform, side="right")
    drawn = np.empty(len(draw.groups), dtype=np.int64)
    for group in np.unique(chosen):
        mine = np.flatnonzero(draw.groups == group)
        places = np.flatnonzero(chosen == group)
        turns = -(-len(places) // len(mine))
        queue = [mine[order(len(mine), epoch * 1000 + turn, seed + int(group))] for turn in range(turns)]
        drawn[places] = np.concatenate(queue)[: len(places)]
    drawn.setflags(write=False)
    return drawn


def rows_of_step(
    step: int, rows: int, training: Training, seed: int, *, draw: Draw | None = None
) -> list[int]:
    """The rows, in order, of step `step`; steps count from 0, so this makes update number `step + 1`.

    Raises:
        IndexError: the run has no such step.
    """
    if not 0 <= step < steps_of(rows, training):
        raise IndexError(f"step {step} of a run of {steps_of(rows, training)} steps (from 0)")
    epoch, within = divmod(step, steps_of_epoch(rows, training))
    start = within * training.batch_size
    epochs_rows = order(rows, epoch, seed) if draw is None else _drawn(draw, epoch, seed)
    taken: list[int] = epochs_rows[start : start + training.batch_size].tolist()
    return taken


def layout(
    lengths: Sequence[int], rank: int, world: int, microbatch: int, capacity: int | None = None
) -> list[list[list[int]]]:
    """Which of a step's rows `rank` of `world` computes: its microbatches, each of lines, each of rows.

    Rows are numbers from 0 in the order of `lengths`, their sizes in tokens. With a `capacity`, rows are
    packed into lines of at most so many tokens; without, a row is a line, and lines are sorted by length, so
    that those of one microbatch need little padding. Every rank gets the same number of microbatches, since
    under ZeRO-3 each forward pass is a collective: a rank with fewer lines gets empty microbatches.
    """
    if capacity is None:
        order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
        lines = [[row] for row in order]
    else:
        lines = balanced(lengths, capacity, world)
    most = -(-len(lines) // world)
    mine = lines[rank::world]
    return [mine[start : start + microbatch] for start in range(0, most, microbatch)]


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
    capacity: int | None = None,
) -> list[Batch]:
    """What `rank` of `world` computes of `rows`, laid out by `layout`.

    `start_id` is what an encoder-decoder's decoder starts with. `pad_left` suits a decoder that classifies by
    its last token. `classes` is the number of classes of a multi-task file. `capacity` packs rows into lines
    of so many tokens for each sequence of a row; a batch is then as wide as its widest line.
    """
    lengths = tokenised.lengths(rows).sum(axis=1).tolist()
    room = None if capacity is None else capacity * tokenised.sequences
    return [
        _batch(
            tokenised,
            [[rows[row] for row in line] for line in lines],
            pad_id,
            device,
            task,
            start_id,
            classes,
            pad_left,
            packed=capacity is not None,
        )
        for lines in layout(lengths, rank, world, microbatch, room)
    ]


def _batch(
    tokenised: Tokenised,
    lines: Sequence[Sequence[int]],
    pad_id: int,
    device: Any,
    task: Task,
    start_id: int,
    classes: int,
    pad_left: bool,
    packed: bool,
) -> Batch:
    import torch

    rows = [row for line in lines for row in line]
    count = tokenised.sequences
    numbers = [row * count + part for row in rows for part in range(count)]
    pairs = [tokenised.row(number) for number in numbers]
    least = max(1, len(rows)) * count
    decoder_BT = allowed_BC = positions_BT = None
    if packed:
        lengths = [[tokenised.lengths([row])[0].tolist() for row in line] for line in lines]
        tokens_BT, labels_BT, mask_BT, sequence_BT, positions_BT = _packed(lengths, pairs, pad_id, count)
    elif task == "seq2seq_lm":
        sources = [ids[targets == 0] for ids, targets in pairs]
        answers = [ids[targets == 1] for ids, targets in pairs]
        tokens_BT, mask_BT = _padded(sources, least, pad_id)
        labels_BT, answer_BT = _padded(answers, least, IGNORE)
        decoder_BT = np.full_like(labels_BT, start_id)
        decoder_BT[:, 1:] = np.where(labels_BT[:, :-1] == IGNORE, pad_id, labels_BT[:, :-1])
        sequence_BT = np.where(answer_BT == 1, np.arange(least)[:, None], -1)
    else:
        read = pairs
        if not pairs and task == "sequence_classification":
            # T5 and BART look for the end token of every text: a padding microbatch reads the first row's.
            read = [tokenised.row(part) for part in range(count)]
        tokens_BT, mask_BT = _padded([ids for ids, _ in read], least, pad_id, pad_left)
        sequence_BT = np.where(mask_BT == 1, np.arange(least)[:, None], -1)
        if task == "causal_lm":
            marked = [np.where(targets == 1, ids, IGNORE) for ids, targets in pairs]
            labels_BT, _ = _padded(marked, least, IGNORE, pad_left)
        elif task == "token_classification":
            labels_BT, _ = _padded([tokenised.token_labels(row) for row in rows], least, IGNORE)
        else:
            labels_BT = np.full((least, 2 if task == "question_answering" else 1), IGNORE, dtype=np.int64)
            for place, row in enumerate(rows):
                # Of rows without a class (pairs, numbers), 0 says that there is a row and not only padding.
                labels_BT[place * count : (place + 1) * count] = (
                    0 if tokenised.row_values is None else tokenised.row_labels(row)
                )
    if not pairs:
        # A row that attends to nothing is a softmax over nothing: NaN, and 0 * NaN in the gradients.
        mask_BT[:] = 1
        if not packed:
            sequence_BT = np.broadcast_to(np.arange(least)[:, None], sequence_BT.shape).copy()
    task_B = None
    if tokenised.row_tasks is not None:
        # For each line: of pairs, both are of the row's task.
        task_B = np.repeat(np.array([tokenised.row_tasks[row] for row in rows] or [0], dtype=np.int64), count)
        if task == "sequence_classification" and tokenised.class_tasks is not None:
            allowed_BC = tokenised.class_tasks[None, :classes] == task_B[:, None]
    values_BK = reference_S = None
    if tokenised.row_numbers is not None:
        values_BK = np.zeros((max(1, len(rows)), tokenised.row_numbers.shape[1]), dtype=np.float32)
        values_BK[: len(rows)] = tokenised.row_numbers[rows]
    if tokenised.reference is not None:
        reference_S = np.zeros(least, dtype=np.float32)
        reference_S[: len(numbers)] = tokenised.reference[numbers]

    def placed(array: "NDArray[Any] | None") -> Any:
        return None if array is None else torch.from_numpy(array).to(device)

    return Batch(
        tokens_BT=placed(tokens_BT),
        labels_BT=placed(labels_BT),
        mask_BT=placed(mask_BT),
        decoder_BT=placed(decoder_BT),
        task_B=placed(task_B),
        allowed_BC=placed(allowed_BC),
        sequence_BT=placed(sequence_BT),
        positions_BT=placed(positions_BT),
        values_BK=placed(values_BK),
        reference_S=placed(reference_S),
        rows=tuple(rows),
    )


def _packed(
    lines: Sequence[Sequence[Sequence[int]]],
    pairs: Sequence[tuple[NDArray[np.int32], NDArray[np.uint8]]],
    pad_id: int,
    count: int,
) -> tuple[NDArray[np.int64], ...]:
    """(tokens, labels, mask, sequence, positions), each (B, T): sequences behind one another in their lines.

    `lines` has the lengths of the sequences of each row of each line; `pairs` all sequences in that order.
    Positions restart on padding too: to attention it is one more sequence.
    """
    sizes = [[int(length) for row in line for length in row] for line in lines]
    # No line at all: a padding microbatch, whose sequences have two tokens each and no target.
    width = max((sum(line) for line in sizes), default=2 * count)
    shape = (max(1, len(lines)), max(width, 2))
    tokens_BT = np.full(shape, pad_id, dtype=np.int64)
    labels_BT = np.full(shape, IGNORE, dtype=np.int64)
    mask_BT = np.zeros(shape, dtype=np.int64)
    sequence_BT = np.full(shape, -1, dtype=np.int64)
    positions_BT = np.tile(np.arange(shape[1]), (shape[0], 1))
    number = 0
    for line, lengths in enumerate(sizes):
        at = 0
        for length in lengths:
            ids, targets = pairs[number]
            here = slice(at, at + length)
            tokens_BT[line, here] = ids
            labels_BT[line, here] = np.where(targets == 1, ids, IGNORE)
            mask_BT[line, here] = 1
            sequence_BT[line, here] = number
            positions_BT[line, here] = np.arange(length)
            number, at = number + 1, at + length
        positions_BT[line, at:] = np.arange(shape[1] - at)
    if not lines:
        sequence_BT[0] = np.repeat(np.arange(count), 2)
        positions_BT[0] = np.tile([0, 1], count)
    return tokens_BT, labels_BT, mask_BT, sequence_BT, positions_BT


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
