"""DPO: the better answer of a pair gains on the worse, measured against the base.  Rafailov et al. 2023,
arXiv:2305.18290; IPO: Azar et al. 2023, arXiv:2310.12036.

With h = log π(y⁺) - log π_ref(y⁺) - (log π(y⁻) - log π_ref(y⁻)), each a sum over the answer's tokens:

    sigmoid   -(1 - ε) log σ(β h) - ε log σ(-β h)                 DPO; ε > 0: conservative DPO (Mitchell 2023)
    robust    [-(1 - ε) log σ(β h) + ε log σ(-β h)] / (1 - 2 ε)   Chowdhury et al. 2024, arXiv:2403.00409
    hinge     max(0, 1 - β h)                                     Zhao et al. 2023, arXiv:2305.10425
    ipo       (h' - 1 / (2 β))²

h' has means over an answer's tokens where h has sums, as in IPO's experiments and in TRL: squared, sums would
above all tell how long the answers are. TRL differs in one place: its `sigmoid` takes no ε at all.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from peft_service.objectives import Objective, Rows
from peft_service.tasks import Architecture, Task


class DPO(Objective):
    kind: Literal["dpo"] = "dpo"
    beta: float = Field(default=0.1, gt=0, le=100)
    """How much a change of the log-probability ratio counts: the larger, the nearer to the base the model
    stays. Of IPO, the regularisation τ."""
    loss: Literal["sigmoid", "robust", "hinge", "ipo"] = "sigmoid"
    """The function of the difference h between the two rewards."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """ε: the share of the pairs that are taken to be the wrong way round; for `sigmoid` and `robust`."""

    rows: ClassVar[Rows] = "pairs"
    formats: ClassVar[tuple[str, ...]] = ("preference",)
    default_for: ClassVar[tuple[str, ...]] = formats
    aliases: ClassVar[dict[str, dict[str, Any]]] = {"ipo": {"loss": "ipo"}}
    summary: ClassVar[str] = "Learn which of two answers is better, without leaving the base far behind."
    paper: ClassVar[str] = "Rafailov et al. 2023, arXiv:2305.18290 (IPO: Azar et al. 2023, arXiv:2310.12036)"
    formula: ClassVar[str] = "-log σ(β [log π(y⁺)/π_ref(y⁺) - log π(y⁻)/π_ref(y⁻)])"
    measure: ClassVar[str] = (
        "how often the better answer has the larger reward log π/π_ref, on held-out pairs"
    )
    rate_scale: ClassVar[float] = 0.05
    """1e-5 where LoRA's own rate is 2e-4, as TRL's defaults are 1e-6 for DPO and 2e-5 for SFT: the gradient
    pushes a whole answer's probability, and a rate of SFT's ruins the model within a few dozen steps."""
    needs_reference: ClassVar[bool] = True
    packs: ClassVar[bool] = True

    @model_validator(mode="after")
    def _smoothed(self) -> "DPO":
        if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
            raise ValueError(
                f"label_smoothing is of the losses sigmoid and robust; {self.loss} has none: set it to 0"
            )
        return self

    def task(self, architecture: Architecture) -> Task:
        return "seq2seq_lm" if architecture == "encoder_decoder" else "causal_lm"

    def targets(self, batch: Any) -> Any:
        from peft_service import logps

        return logps.pairs_in(batch)

    def loss_sum(self, model: Any, batch: Any) -> tuple[Any, Any]:
        import torch.nn.functional as F

        from peft_service import logps

        logp_S, count_S = logps.sequence_logps(model, batch, per_row=2)
        pairs = logps.Pairs.of(logp_S - batch.reference_S, count_S)
        margin_P = pairs.better_P - pairs.worse_P
        logits_P, noise = self.beta * margin_P, self.label_smoothing
        if self.loss == "ipo":
            better_P, worse_P = pairs.averages()
            loss_P = (better_P - worse_P - 1 / (2 * self.beta)) ** 2
        elif self.loss == "hinge":
            loss_P = (1 - logits_P).relu()
        elif self.loss == "robust":
            flipped_P = noise * F.logsigmoid(-logits_P)
            loss_P = (flipped_P - (1 - noise) * F.logsigmoid(logits_P)) / (1 - 2 * noise)
        else:
            loss_P = logps.smoothed(logits_P, noise)
        return pairs.sums(loss_P, margin_P)
