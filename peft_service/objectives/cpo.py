"""CPO: a preference loss without a base to compare with, and likelihood of the better answer.

Xu et al. 2024, arXiv:2401.08417, equations 4 and 5. With h = log π(y⁺) - log π(y⁻), sums over tokens:

    L = preference(h) + cpo_alpha · NLL(y⁺)
    preference = -(1 - ε) log σ(β h) - ε log σ(-β h), or max(0, 1 - β h), or (h' - 1 / (2 β))²

h' has means over an answer's tokens where h has sums. The first term is a mean over the pairs of the step,
the second over the tokens of its better answers: what TRL computes of one batch with the whole step.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from peft_service.objectives import Objective, Rows
from peft_service.tasks import Architecture, Task


class CPO(Objective):
    kind: Literal["cpo"] = "cpo"
    beta: float = Field(default=0.1, gt=0, le=100)
    """How much a difference of the log-probabilities counts."""
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """The function of the difference between the log-probabilities; `ipo` takes their means over tokens."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """ε: the share of the pairs that are taken to be the wrong way round; for `sigmoid`."""
    cpo_alpha: float = Field(default=1.0, ge=0, le=100)
    """Weight of the likelihood of the better answers."""

    rows: ClassVar[Rows] = "pairs"
    formats: ClassVar[tuple[str, ...]] = ("preference",)
    summary: ClassVar[str] = "Learn to write the better of two answers, and to tell it from the worse."
    paper: ClassVar[str] = "Xu et al. 2024, arXiv:2401.08417"
    formula: ClassVar[str] = "-log σ(β [log π(y⁺) - log π(y⁻)]) + cpo_alpha · NLL(y⁺)"
    measure: ClassVar[str] = "how often the better answer has the larger log-probability, on held-out pairs"
    rate_scale: ClassVar[float] = 0.5
    """1e-4 where LoRA's own rate is 2e-4, the paper's rate for its LoRA: the likelihood holds the model."""
    packs: ClassVar[bool] = True

    @model_validator(mode="after")
    def _smoothed(self) -> "CPO":
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing is of the loss sigmoid; {self.loss} has none: set it to 0")
        return self

    def task(self, architecture: Architecture) -> Task:
        return "seq2seq_lm" if architecture == "encoder_decoder" else "causal_lm"

    def targets(self, batch: Any) -> Any:
        from peft_service import logps

        return logps.pairs_in(batch)

    def shared(self, model: Any, batches: Sequence[Any]) -> Any:
        """(pairs, tokens of their better answers) of the step."""
        from peft_service import logps

        return logps.pairs_and_tokens(batches)

    def loss_sum(self, model: Any, batch: Any) -> tuple[Any, Any]:
        from peft_service import logps

        pairs = logps.Pairs.of(*logps.sequence_logps(model, batch, per_row=2))
        better_P, worse_P = pairs.averages() if self.loss == "ipo" else (pairs.better_P, pairs.worse_P)
        margin_P = better_P - worse_P
        if self.loss == "ipo":
            loss_P = (margin_P - 1 / (2 * self.beta)) ** 2
        elif self.loss == "hinge":
            loss_P = (1 - self.beta * margin_P).relu()
        else:
            loss_P = logps.smoothed(self.beta * margin_P, self.label_smoothing)
        loss, right = pairs.sums(loss_P, margin_P)
        shared = self.shared(model, [batch]) if batch.shared is None else batch.shared
        nll = -pairs.better_P.masked_fill(~pairs.real_P, 0.0).sum()
        return loss + self.cpo_alpha * logps.per_pair(nll, shared), right
