"""KTO: answers that are good or bad, one by one, with people's asymmetry of gains and losses.

Ethayarajh et al. 2024, arXiv:2402.01306, equation 7 and section 4.1. With r = log π(y)/π_ref(y) and
z = max(0, mean over the step of log π(y')/π_ref(y')), where y' are other rows' answers to the rows' prompts:

    good: desirable_weight · (1 - σ(β (r - z)))      bad: undesirable_weight · (1 - σ(β (z - r)))

z estimates the KL divergence from the base, has no gradient, and is of the whole step: `shared` sums it up
over microbatches and ranks. TRL takes the mean of a microbatch, so that its z depends on how large that is.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from peft_service.objectives import Objective, Rows
from peft_service.tasks import Architecture, Task


class KTO(Objective):
    kind: Literal["kto"] = "kto"
    beta: float = Field(default=0.1, gt=0, le=100)
    """How much a change of the log-probability ratio counts: the larger, the nearer to the base the model
    stays."""
    desirable_weight: float = Field(default=1.0, gt=0, le=100)
    """Weight of good answers: times their number 1 to 4/3 of the same of bad ones, says the paper."""
    undesirable_weight: float = Field(default=1.0, gt=0, le=100)
    """Weight of bad answers."""

    rows: ClassVar[Rows] = "unpaired"
    formats: ClassVar[tuple[str, ...]] = ("unpaired",)
    default_for: ClassVar[tuple[str, ...]] = formats
    summary: ClassVar[str] = "Learn from answers that were found good or bad, without pairs."
    paper: ClassVar[str] = "Ethayarajh et al. 2024, arXiv:2402.01306"
    formula: ClassVar[str] = "w (1 - σ(±β [log π(y)/π_ref(y) - z])), z = max(0, mean of log π(y')/π_ref(y'))"
    measure: ClassVar[str] = (
        "how often the reward log π/π_ref is above zero for good answers and below for bad, on held-out rows"
    )
    rate_scale: ClassVar[float] = 0.05
    """As DPO's, for the same reason: TRL's defaults are 1e-6 for KTO and 2e-5 for SFT."""
    needs_reference: ClassVar[bool] = True
    packs: ClassVar[bool] = True

    def task(self, architecture: Architecture) -> Task:
        return "seq2seq_lm" if architecture == "encoder_decoder" else "causal_lm"

    def targets(self, batch: Any) -> Any:
        from peft_service import logps

        return (logps.counts_of(batch, 2)[0::2] > 0).sum()

    def shared(self, model: Any, batches: Sequence[Any]) -> Any:
        """(sum of log π(y')/π_ref(y'), rows) of the step: one forward pass for each microbatch."""
        import torch

        from peft_service import logps

        total = torch.zeros(2, dtype=torch.float64, device=batches[0].tokens_BT.device)
        with torch.no_grad():
            for batch in batches:
                ratio_R, count_R = logps.ratios(model, batch, 1)
                real_R = count_R > 0
                total += torch.stack([ratio_R.double().masked_fill(~real_R, 0.0).sum(), real_R.sum()])
        return total

    def loss_sum(self, model: Any, batch: Any) -> tuple[Any, Any]:
        from peft_service import logps

        shared = self.shared(model, [batch]) if batch.shared is None else batch.shared
        kl = (shared[0] / shared[1].clamp(min=1)).clamp(min=0)
        ratio_R, count_R = logps.ratios(model, batch, 0)
        good_R, real_R = batch.values_BK[:, 0].to(ratio_R.dtype), count_R > 0
        sign_R = 2 * good_R - 1
        weight_R = self.desirable_weight * good_R + self.undesirable_weight * (1 - good_R)
        loss_R = weight_R * (1 - (self.beta * sign_R * (ratio_R - kl.to(ratio_R.dtype))).sigmoid())
        right_R = (sign_R * ratio_R > 0) & real_R
        return loss_R.masked_fill(~real_R, 0.0).sum(), right_R.sum()
