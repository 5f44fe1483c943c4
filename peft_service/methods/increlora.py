"""IncreLoRA: LoRA as W x + s B diag(e) A x, whose ranks grow where they matter.  Zhang et al. 2023,
arXiv:2308.12043.

Every layer starts with one triple, and one in reserve: its e is fixed at 1e-5, so that its A and B learn
ahead. A layer's score is Σ |ΔW ⊙ dL/dΔW| / sqrt(d_out d_in), averaged (beta1), times how much it varies
(beta2). From `begin` on, every `interval` steps, the reserves of the layers that score highest are put to
work, until the mean rank is `rank`; then the reserves go. `orthogonal` * mean(‖A Aᵀ - I‖, ‖Bᵀ B - I‖) is
added to the loss.

dL/dΔW is as large as the base's weight, so it is taken on `score_rows` of its rows, evenly spaced (on all
where a layer has no more). No optimizer of ZeRO takes new parameters while it runs: `max_rank` triples a
layer are there from the beginning, and those not yet in use contribute exactly nothing and do not move.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service.errors import InvalidRequest
from peft_service.methods import Capabilities, Case, Material, Method, adapted
from peft_service.methods.adalora import LARGEST, Budgeted

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape


class IncreLoRA(Budgeted, Method):
    kind: Literal["increlora"] = "increlora"
    rank: int = Field(8, ge=2, le=LARGEST)
    """The mean rank of a layer at the end; s = alpha / rank all along."""
    max_rank: int = Field(16, ge=3, le=LARGEST)
    """The most that a layer can have; more than `rank`."""
    end: float = Field(0.6, gt=0, le=1)
    """Part of the steps after which ranks are final."""
    orthogonal: float = Field(0.1, ge=0, le=100)
    """Weight of mean(‖A Aᵀ - I‖, ‖Bᵀ B - I‖) in the loss of a step."""
    score_rows: int = Field(16, ge=1)
    """Rows of a layer's weight whose gradient is taken for its score."""

    learning_rate: ClassVar[float] = 1e-3
    title: ClassVar[str] = "IncreLoRA"
    family: ClassVar[str] = "low rank"
    paper: ClassVar[str] = "https://arxiv.org/abs/2308.12043"
    summary: ClassVar[str] = "LoRA that grows its ranks while it trains, where they matter most."
    formula: ClassVar[str] = (
        "y = W x + (alpha / rank) B diag(e) A x; max_rank * (d_in + d_out + 1) values have a place, rank * "
        "layers "
        "triples are used and stored"
    )
    use_when: ClassVar[str] = "The adapter must be small, layers differ in what they need, and data are few."
    limits: ClassVar[str] = (
        "Optimizer state for max_rank from the beginning. New triples have no warm-up of their own. Ranks "
        "differ "
        "from layer to layer, which vLLM does not serve: merge it."
    )
    aliases: ClassVar[dict[str, dict[str, Any]]] = {}
    small: ClassVar[dict[str, Any]] = {"rank": 2, "max_rank": 4, "alpha": 8, "interval": 2}
    can: ClassVar[Capabilities] = Capabilities(
        servers=("peft",),
        why={"servers": "vLLM and LoRAX want one rank in all layers: merge it, or train lora"},
    )

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.tuners.increlora import Grown
        from peft_service.tuners.low_rank import attach_lora

        made = attach_lora(
            model, case, rank=self.max_rank, alpha=self.alpha, dropout=self.dropout, targets=self.targets
        )
        return Grown(made, self, case)

    def decisions(self, case: Case) -> list[int]:
        """After how many updates layers grow."""
        first, last = self.first_decision(case), self.last_decision(case)
        return [*range(first + self.interval, last, self.interval), last]

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        return self.places(shape, self.max_rank)

    def stored(self, shape: "ModelShape", case: Case) -> int | None:
        return None

    def check(self, shape: "ModelShape", case: Case) -> None:
        adapted(shape, self.targets)
        if self.rank >= self.max_rank:
            above = min(LARGEST, 2 * self.rank)
            able = f"max_rank to {above}" if above > self.rank else f"rank to {self.max_rank - 1}"
            raise InvalidRequest(
                f"increlora grows layers to rank {self.rank} on average and {self.max_rank} at most, so all "
                f"would end the same: set {able}, or take lora.",
                param="adapter.max_rank",
            )
        self.check_phases()
