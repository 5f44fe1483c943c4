"""Log-probabilities of what is to be learned: token by token, and summed over each sequence of a batch.

Shape suffixes: B lines, T tokens of a line, V vocabulary, S sequences, P pairs, R rows. U is the number of
places in a line where something is predicted: T - 1 for a decoder, whose labels are shifted here, T for the
decoder of an encoder-decoder, whose inputs are. Computed in float32 at least: bfloat16 has three digits, and
a sum over a thousand tokens none.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_service.objectives.sft import IGNORE

if TYPE_CHECKING:
    from peft_service.batches import Batch


def precise(x: Tensor) -> Tensor:
    """In float32, or in float64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def targets_of(batch: "Batch") -> Tensor:
    """(B, U) int64: the token to be predicted at each place, IGNORE where none is."""
    return batch.labels_BT if batch.decoder_BT is not None else batch.labels_BT[:, 1:]


def logits_of(model: Any, batch: "Batch") -> Tensor:
    """(B, U, V), in the model's own dtype: what it says at each place."""
    logits: Tensor = model(**batch.inputs).logits
    if batch.decoder_BT is not None:
        return logits
    # Virtual tokens, where a method has them, stand in front of the row.
    return logits[:, -batch.tokens_BT.shape[1] :][:, :-1]


def token_logps(logits_BUV: Tensor, targets_BU: Tensor) -> Tensor:
    """(B, U): log-probability of each target, 0 where there is none.

    No log-softmax is kept: logsumexp's backward pass makes it from the logits. So beside the model's own
    logits there is one tensor of their size, and only if they are in half precision.
    """
    found = targets_BU != IGNORE
    chosen = logits_BUV.gather(-1, targets_BU.where(found, 0).unsqueeze(-1)).squeeze(-1)
    logps = precise(chosen) - precise(logits_BUV).logsumexp(-1)
    return logps.masked_fill(~found, 0.0)


def sequences_of(batch: "Batch") -> Tensor:
    """(B, U) int64: the number of the sequence that each place belongs to, -1 for those of none.

    A place whose token belongs to another sequence than the token before it is of none: nothing that is read
    there tells what follows.
    """
    if batch.positions_BT is None:
        lines = torch.arange(batch.labels_BT.shape[0], device=batch.labels_BT.device).unsqueeze(1)
        if batch.decoder_BT is not None:
            return lines.where(batch.labels_BT != IGNORE, -1)
        return lines.where((batch.mask_BT[:, 1:] == 1) & (batch.mask_BT[:, :-1] == 1), -1)
    assert batch.sequence_BT is not None
    following = batch.sequence_BT[:, 1:]
    return following.where(following == batch.sequence_BT[:, :-1], -1)


def sums_of(batch: "Batch", x_BU: Tensor, per_row: int = 1) -> Tensor:
    """(S,): the sum of `x_BU` over the places of each sequence; S is a multiple of `per_row`.

    Not by `index_add`: on a GPU that adds in whatever order its threads come, and a run would not give the
    same bytes twice.
    """
    if batch.positions_BT is None:
        sums = x_BU.sum(1)
    else:
        assert batch.sequence_BT is not None
        count = int(batch.sequence_BT.max()) + 1 if batch.reference_S is None else len(batch.reference_S)
        numbers = torch.arange(count, device=x_BU.device)[:, None, None]
        sums = x_BU.where(batch.sequence_BT[:, -x_BU.shape[1] :] == numbers, 0).sum((1, 2))
    return F.pad(sums, (0, -len(sums) % per_row))


def counts_of(batch: "Batch", per_row: int = 1) -> Tensor:
    """(S,) int64: how many targets each sequence has; none says that it is only there to fill a batch."""
    return sums_of(batch, (targets_of(batch) != IGNORE).long(), per_row)


def sequence_logps(model: Any, batch: "Batch", per_row: int = 1) -> tuple[Tensor, Tensor]:
    """((S,) log-probability of each sequence's targets, (S,) how many they are).

    `per_row`: how many sequences a row has: 2 of pairs and of unpaired rows, of which S is a multiple.
    """
    logps_BU = token_logps(logits_of(model, batch), targets_of(batch))
    return sums_of(batch, logps_BU, per_row), counts_of(batch, per_row)


def next_token_loss(model: Any, batch: "Batch") -> tuple[Tensor, Tensor]:
    """(sum of the cross-entropy over the targets, how many of them are what the model finds likeliest)."""
    logits_BUV, targets_BU = precise(logits_of(model, batch)), targets_of(batch)
    nll = F.cross_entropy(
        logits_BUV.flatten(0, 1), targets_BU.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return nll, ((logits_BUV.argmax(-1) == targets_BU) & (targets_BU != IGNORE)).sum()


class Pairs(NamedTuple):
    """Of each pair the better answer and the worse."""

    better_P: Tensor
    """Log-probability of the better answer's targets, their sum."""
    worse_P: Tensor
    better_count_P: Tensor
    """int64: how many targets it has."""
    worse_count_P: Tensor
    real_P: Tensor
    """bool: it is not only there to fill a batch."""

    @classmethod
    def of(cls, logp_S: Tensor, count_S: Tensor) -> "Pairs":
        real = (count_S[0::2] > 0) & (count_S[1::2] > 0)
        return cls(logp_S[0::2], logp_S[1::2], count_S[0::2], count_S[1::2], real)

    def averages(self) -> tuple[Tensor, Tensor]:
        """(P,) each: the log-probabilities of a token in the mean; 0 in a pair that is not real."""
        better = self.better_P / self.better_count_P.clamp(min=1)
        return better, self.worse_P / self.worse_count_P.clamp(min=1)

    def sums(self, loss_P: Tensor, margin_P: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of the loss over real pairs, how many of them have a margin above zero)."""
        return loss_P.masked_fill(~self.real_P, 0.0).sum(), ((margin_P > 0) & self.real_P).sum()


def pairs_in(batch: "Batch") -> Tensor:
    """How many real pairs there are, as a 0-dim tensor."""
    count_S = counts_of(batch, 2)
    return Pairs.of(count_S, count_S).real_P.sum()


def smoothed(logits: Tensor, smoothing: float) -> Tensor:
    """-log sigma(x), if a share `smoothing` of the pairs is the wrong way round."""
    loss = -F.logsigmoid(logits)
    return loss if smoothing == 0 else (1 - smoothing) * loss - smoothing * F.logsigmoid(-logits)


def ratios(model: Any, batch: "Batch", first: int) -> tuple[Tensor, Tensor]:
    """((R,) log π/π_ref of the sequences `first`, `first + 2`, …, (R,) how many targets they have).

    Of unpaired rows, 0 gives the rows' own answers and 1 what only measures the divergence.
    """
    assert batch.reference_S is not None
    part = _every_second(batch, first)
    if part is None:
        logp_S, count_S = sequence_logps(model, batch, 2)
        return (logp_S - batch.reference_S)[first::2], count_S[first::2]
    logp_R, count_R = sequence_logps(model, part)
    return logp_R - batch.reference_S[first::2], count_R


def _every_second(batch: "Batch", first: int) -> "Batch | None":
    """The lines `first`, `first + 2`, …; None of a batch that is packed or has a single line: half of that
    would be nothing, and a rank that makes no forward pass stops all others."""
    lines = len(batch.tokens_BT)
    if batch.positions_BT is not None or lines % 2:
        return None

    def half(x: Any) -> Any:
        return x[first::2] if isinstance(x, Tensor) and x.ndim > 0 and len(x) == lines else x

    return replace(
        batch,
        tokens_BT=half(batch.tokens_BT),
        labels_BT=half(batch.labels_BT),
        mask_BT=half(batch.mask_BT),
        decoder_BT=half(batch.decoder_BT),
        task_B=half(batch.task_B),
        sequence_BT=None,
        reference_S=None,
        extra={name: half(x) for name, x in batch.extra.items()},
    )


def whole_targets_of(batch: "Batch") -> Tensor:
    """(B, U) int64: like `targets_of`, but every token of a sequence is a target, its prompt's too; of an
    encoder-decoder, whose decoder reads no prompt, its targets."""
    if batch.decoder_BT is not None:
        return batch.labels_BT
    return batch.tokens_BT[:, 1:].where(sequences_of(batch) >= 0, IGNORE)


def pairs_and_tokens(batches: "Sequence[Batch]", prompts: bool = False) -> Tensor:
    """float64 (pairs, targets of their better answers, or with `prompts` all tokens) of all batches."""
    total = torch.zeros(2, dtype=torch.float64, device=batches[0].tokens_BT.device)
    for batch in batches:
        count_S = counts_of(batch, 2)
        real = Pairs.of(count_S, count_S).real_P
        counted = sums_of(batch, (whole_targets_of(batch) != IGNORE).long(), 2) if prompts else count_S
        total += torch.stack([real.sum(), counted[0::2].where(real, 0).sum()])
    return total


def per_pair(nll: Tensor, shared: Tensor) -> Tensor:
    """A sum over tokens as one over pairs: what, divided by the step's pairs, is a mean over its tokens.

    `shared` is what `pairs_and_tokens` says of the whole step.
    """
    return nll * (shared[0] / shared[1].clamp(min=1)).to(nll.dtype)
