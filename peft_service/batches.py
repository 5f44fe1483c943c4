"""Which rows a step takes, and which of them a rank computes: the same for any number of ranks.

Steps never span epochs: every epoch is a permutation of all rows, cut into steps of `batch_size`; its last
step has what is left. So every row is seen once an epoch, and a step is a function of (seed, step) alone:
resuming, or going on with more or fewer workers, needs no saved state of a sampler.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from peft_service.objectives.sft import IGNORE
from peft_service.spec import Training
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
    """int64: the token itself where it is a target, IGNORE elsewhere. Not shifted: the objective shifts."""
    mask_BT: "Tensor"
    """int64: 1 where there is a token, 0 on padding."""


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


def rows_of_step(step: int, rows: int, training: Training, seed: int) -> list[int]:
    """The rows, in order, of step `step`; steps count from 0, so this makes update number `step + 1`.

    Raises:
        IndexError: the run has no such step.
    """
    if not 0 <= step < steps_of(rows, training):
        raise IndexError(f"step {step} of a run of {steps_of(rows, training)} steps (from 0)")
    epoch, within = divmod(step, steps_of_epoch(rows, training))
    start = within * training.batch_size
    taken: list[int] = order(rows, epoch, seed)[start : start + training.batch_size].tolist()
    return taken


def microbatches(
    tokenised: Tokenised,
    rows: Sequence[int],
    rank: int,
    world: int,
    microbatch: int,
    pad_id: int,
    device: Any,
) -> list[Batch]:
    """What `rank` of `world` computes of `rows`: its rows are `rows[rank::world]`, `microbatch` at a time.

    Every rank gets the same number of microbatches, since under ZeRO-3 each forward pass is a collective: a
    rank with fewer rows gets a padding row without targets in the place of a missing microbatch.
    """
    most = -(-len(rows) // world)
    mine = list(rows[rank::world])
    return [
        _batch(tokenised, mine[start : start + microbatch], pad_id, device)
        for start in range(0, most, microbatch)
    ]


def _batch(tokenised: Tokenised, rows: Sequence[int], pad_id: int, device: Any) -> Batch:
    import torch

    pairs = [tokenised.row(row) for row in rows]
    width = max((len(ids) for ids, _ in pairs), default=2)
    shape = (max(1, len(pairs)), width)
    tokens_BT = np.full(shape, pad_id, dtype=np.int64)
    labels_BT = np.full(shape, IGNORE, dtype=np.int64)
    mask_BT = np.zeros(shape, dtype=np.int64)
    for place, (ids, targets) in enumerate(pairs):
        tokens_BT[place, : len(ids)] = ids
        labels_BT[place, : len(ids)][targets == 1] = ids[targets == 1]
        mask_BT[place, : len(ids)] = 1
    if not pairs:
        # A row that attends to nothing is a softmax over nothing: NaN, and 0 * NaN in the gradients.
        mask_BT[:] = 1
    return Batch(
        tokens_BT=torch.from_numpy(tokens_BT).to(device),
        labels_BT=torch.from_numpy(labels_BT).to(device),
        mask_BT=torch.from_numpy(mask_BT).to(device),
    )
