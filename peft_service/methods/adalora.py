"""AdaLoRA: LoRA as a decomposition W x + s B diag(e) A x, whose ranks go where they matter.

Zhang et al. 2023, arXiv:2303.10512. Every layer starts with `initial_rank` triples. Each step the
sensitivity |w * dL/dw| of every value is averaged (beta1), and so is how much it varies (beta2); their
product is its score, and a triple's is e's plus the means over its row of A and its column of B. From
`begin` on, every `interval` steps, all but the best triples of the whole model are set to zero, fewer and
fewer of them being left (cubic), until `rank` a layer remain on average, for good; the last part of the
training goes on with those. `orthogonal` * mean(‖A Aᵀ - I‖, ‖Bᵀ B - I‖) is added to the loss.

The artifact is a plain LoRA with a rank for each layer (e goes into A): the same sums as peft's ADALORA
type would do, and unlike that type it can be merged in 4 bits, switched in a batch and combined with
others.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service.errors import InvalidRequest
from peft_service.methods import Capabilities, Case, Material, Method, adapted
from peft_service.methods.lora import LowRank

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape


LARGEST = 512


class Budgeted(LowRank):
    """The fields of methods that move ranks between layers while they train, by averaged scores."""

    rslora: Literal[False] = False
    begin: float = Field(0.1, ge=0, lt=1)
    """Part of the steps before ranks begin to change."""
    end: float = Field(0.7, gt=0, le=1)
    """Part of the steps after which ranks are final."""
    interval: int = Field(10, ge=1)
    """Steps between two decisions."""
    beta1: float = Field(0.85, gt=0, lt=1)
    """Of the running mean of scores."""
    beta2: float = Field(0.85, gt=0, lt=1)
    """Of the running mean of how much they vary."""
    orthogonal: float = Field(0.5, ge=0, le=100)
    """Weight of mean(‖A Aᵀ - I‖, ‖Bᵀ B - I‖) in the loss of a step."""

    def first_decision(self, case: Case) -> int:
        """The number of updates before which ranks stay as they are."""
        return int(self.begin * case.steps)

    def last_decision(self, case: Case) -> int:
        """The number of updates after which ranks are final."""
        return max(1, min(case.steps, int(self.end * case.steps)))

    def places(self, shape: "ModelShape", most: int) -> int:
        """Values of `most` triples on every layer."""
        return sum(most * (d_in + d_out + 1) for _, d_out, d_in in adapted(shape, self.targets))

    def check_phases(self) -> None:
        """
        Raises:
            InvalidRequest: ranks would have no time to change.
        """
        if self.begin >= self.end:
            usual = type(self).model_fields
            raise InvalidRequest(
                f"begin {self.begin:g} is not before end {self.end:g}: ranks would have no time to change. "
                f"The defaults are {usual['begin'].default} and {usual['end'].default}.",
                param="adapter.begin",
            )


class AdaLoRA(Budgeted, Method):
    kind: Literal["adalora"] = "adalora"
    rank: int = Field(8, ge=1, le=LARGEST)
    """The mean rank of a layer at the end."""
    initial_rank: int = Field(12, ge=2, le=LARGEST)
    """Of every layer at the start; more than `rank`."""
    alpha: int = Field(32, ge=1, le=4096)
    """s = alpha / initial_rank, at any rank."""

    learning_rate: ClassVar[float] = 1e-3
    title: ClassVar[str] = "AdaLoRA"
    family: ClassVar[str] = "low rank"
    paper: ClassVar[str] = "https://arxiv.org/abs/2303.10512"
    summary: ClassVar[str] = "LoRA that prunes its ranks while it trains, where they matter least."
    formula: ClassVar[str] = (
        "y = W x + (alpha / initial_rank) B diag(e) A x; initial_rank * (d_in + d_out + 1) values train, the "
        "best "
        "rank * layers triples are stored"
    )
    use_when: ClassVar[str] = "The adapter must be small and layers differ in what they need."
    limits: ClassVar[str] = "Ranks differ from layer to layer, which vLLM does not serve: merge it."
    aliases: ClassVar[dict[str, dict[str, Any]]] = {}
    small: ClassVar[dict[str, Any]] = {"rank": 2, "initial_rank": 4, "alpha": 8, "interval": 2}
    can: ClassVar[Capabilities] = Capabilities(
        servers=("peft",),
        why={"servers": "vLLM and LoRAX want one rank in all layers: merge it, or train lora"},
    )

    @property
    def scaling(self) -> float:
        return self.alpha / self.initial_rank

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.tuners.adalora import Pruned
        from peft_service.tuners.low_rank import attach_lora

        made = attach_lora(
            model, case, rank=self.initial_rank, alpha=self.alpha, dropout=self.dropout, targets=self.targets
        )
        return Pruned(made, self, case)

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        return self.places(shape, self.initial_rank)

    def stored(self, shape: "ModelShape", case: Case) -> int | None:
        return None

    def check(self, shape: "ModelShape", case: Case) -> None:
        adapted(shape, self.targets)
        if self.rank >= self.initial_rank:
            above = min(LARGEST, max(self.rank + 1, self.rank * 3 // 2))
            able = f"initial_rank to {above}" if above > self.rank else f"rank to {self.initial_rank - 1}"
            raise InvalidRequest(
                f"adalora prunes from initial_rank {self.initial_rank} to rank {self.rank}, which is not "
                f"less: set {able}, or take lora.",
                param="adapter.initial_rank",
            )
        self.check_phases()
