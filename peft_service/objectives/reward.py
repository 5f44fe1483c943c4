"""Reward model: one number for a text, larger for the better of two answers (Bradley and Terry).

Ouyang et al. 2022, arXiv:2203.02155, equation 1; centring: Eisenstein et al. 2023, arXiv:2312.09244.

    -log σ(r⁺ - r⁻) + center_coefficient · (r⁺ + r⁻)²
"""

from typing import Any, ClassVar, Literal

from pydantic import Field

from peft_service.objectives import Objective, Rows
from peft_service.objectives.sft import IGNORE
from peft_service.tasks import Architecture, Task


class Reward(Objective):
    kind: Literal["reward"] = "reward"
    center_coefficient: float = Field(default=0.0, ge=0, le=100)
    """Pulls the mean of the rewards to zero, which differences alone leave open; 0.01 is usual."""

    rows: ClassVar[Rows] = "pairs"
    formats: ClassVar[tuple[str, ...]] = ("preference",)
    aliases: ClassVar[dict[str, dict[str, Any]]] = {"reward_model": {}}
    summary: ClassVar[str] = "Learn a number for each answer, larger for the better of two."
    paper: ClassVar[str] = "Ouyang et al. 2022, arXiv:2203.02155, equation 1"
    formula: ClassVar[str] = "-log σ(r⁺ - r⁻) + center_coefficient (r⁺ + r⁻)²"
    measure: ClassVar[str] = "how often the better answer has the larger reward, on held-out pairs"

    def task(self, architecture: Architecture) -> Task:
        return "sequence_classification"

    def labels(self, found: tuple[str, ...]) -> tuple[str, ...]:
        return ("reward",)

    def targets(self, batch: Any) -> Any:
        return (batch.labels_BT[0::2, 0] != IGNORE).sum()

    def loss_sum(self, model: Any, batch: Any) -> tuple[Any, Any]:
        from peft_service import logps

        rewards_B = logps.precise(model(**batch.inputs).logits[:, 0])
        better_P, worse_P = rewards_B[0::2], rewards_B[1::2]
        real_P = batch.labels_BT[0::2, 0] != IGNORE
        loss_P = logps.smoothed(better_P - worse_P, 0.0)
        if self.center_coefficient:
            loss_P = loss_P + self.center_coefficient * (better_P + worse_P) ** 2
        return loss_P.masked_fill(~real_P, 0.0).sum(), ((better_P > worse_P) & real_P).sum()
