"""DyLoRA: a LoRA that is good at every rank up to its own.  Valipour et al. 2022, arXiv:2210.07558.

Each step draws a rank b, uniformly and the same for all layers, and computes y = W x + (alpha / b) B[:, :b]
A[:b] x. At the end any b can be cut out: `serve_rank` says which is.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service.errors import InvalidRequest
from peft_service.methods import Case, Material, Method, adapted
from peft_service.methods.lora import LowRank

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape


class DyLoRA(LowRank, Method):
    kind: Literal["dylora"] = "dylora"
    rslora: Literal[False] = False
    """Its scaling is alpha / b."""
    frozen: bool = False
    """Only the b-th row of A and column of B learn at a step, instead of the first b (the paper's fast
    variant)."""
    serve_rank: int | None = Field(None, ge=1)
    """Rank of the artifact, and of every evaluation; None: the whole rank."""

    learning_rate: ClassVar[float] = 4e-4
    title: ClassVar[str] = "DyLoRA"
    family: ClassVar[str] = "low rank"
    paper: ClassVar[str] = "https://arxiv.org/abs/2210.07558"
    summary: ClassVar[str] = "One training gives a LoRA of every rank up to the largest."
    formula: ClassVar[str] = (
        "b ~ U{1..rank} a step; y = W x + (alpha / b) B[:, :b] A[:b] x; rank * (d_in + d_out) values"
    )
    use_when: ClassVar[str] = "The right rank is not known, or servers want different ones."
    limits: ClassVar[str] = "Adam's momentum also moves rows that a step left out."
    aliases: ClassVar[dict[str, dict[str, Any]]] = {}
    small: ClassVar[dict[str, Any]] = {"rank": 4, "alpha": 8}

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.tuners.dylora import AnyRank

        return AnyRank(
            self.lora(model, case), float(self.alpha), case.seed, self.frozen, self.serve_rank or self.rank
        )

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        return self.pairs(shape)

    def stored(self, shape: "ModelShape", case: Case) -> int:
        return self.pairs(shape) // self.rank * (self.serve_rank or self.rank)

    def check(self, shape: "ModelShape", case: Case) -> None:
        adapted(shape, self.targets)
        if self.serve_rank and self.serve_rank > self.rank:
            raise InvalidRequest(
                f"serve_rank {self.serve_rank} is above rank {self.rank}, the largest that is trained: raise "
                "rank, or lower serve_rank.",
                param="adapter.serve_rank",
            )
