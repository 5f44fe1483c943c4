"""SimPO: DPO without a base to compare with: the reward is the mean log-probability of an answer's tokens.

Meng et al. 2024, arXiv:2405.14734, equation 6, with r(y) = β / |y| · log π(y) and γ = β · gamma_ratio:

    -log σ(r(y⁺) - r(y⁻) - γ)
"""

from typing import Any, ClassVar, Literal

from pydantic import Field

from peft_service.objectives import Objective, Rows
from peft_service.tasks import Architecture, Task


class SimPO(Objective):
    kind: Literal["simpo"] = "simpo"
    beta: float = Field(default=2.0, gt=0, le=100)
    """What the mean log-probability of a token is multiplied with."""
    gamma_ratio: float = Field(default=0.5, ge=0, le=100)
    """γ / β: by how much a token's mean log-probability is to be larger in the better answer."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """The share of the pairs that are taken to be the wrong way round."""

    rows: ClassVar[Rows] = "pairs"
    formats: ClassVar[tuple[str, ...]] = ("preference",)
    summary: ClassVar[str] = (
        "Learn which of two answers is better, by the mean log-probability of their tokens."
    )
    paper: ClassVar[str] = "Meng et al. 2024, arXiv:2405.14734"
    formula: ClassVar[str] = "-log σ(β/|y⁺| log π(y⁺) - β/|y⁻| log π(y⁻) - β·gamma_ratio)"
    measure: ClassVar[str] = (
        "how often the better answer's tokens have the larger mean log-probability, on held-out pairs"
    )
    rate_scale: ClassVar[float] = 0.05
    """As DPO's: the paper searches 3e-7 to 1e-6 for what SFT learns at 2e-5."""
    packs: ClassVar[bool] = True

    def task(self, architecture: Architecture) -> Task:
        return "seq2seq_lm" if architecture == "encoder_decoder" else "causal_lm"

    def targets(self, batch: Any) -> Any:
        from peft_service import logps

        return logps.pairs_in(batch)

    def loss_sum(self, model: Any, batch: Any) -> tuple[Any, Any]:
        from peft_service import logps

        pairs = logps.Pairs.of(*logps.sequence_logps(model, batch, per_row=2))
        better_P, worse_P = pairs.averages()
        logits_P = self.beta * (better_P - worse_P - self.gamma_ratio)
        return pairs.sums(logps.smoothed(logits_P, self.label_smoothing), better_P - worse_P)
