"""LoRA+: LoRA whose B learns `ratio` times faster than A.  Hayou et al. 2024, arXiv:2402.12354.

The schedule scales both rates, so that their ratio holds at every step.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service.methods import Case, Material, Method, adapted
from peft_service.methods.lora import LowRank

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape


class LoRAPlus(LowRank, Method):
    kind: Literal["lora_plus"] = "lora_plus"
    ratio: float = Field(16.0, ge=1, le=1024)
    """Learning rate of B over that of A; 1 is LoRA."""

    learning_rate: ClassVar[float] = 5e-5
    title: ClassVar[str] = "LoRA+"
    family: ClassVar[str] = "low rank"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.12354"
    summary: ClassVar[str] = "LoRA with a higher learning rate for B than for A."
    formula: ClassVar[str] = (
        "lr(B) = ratio * lr(A); y = W x + (alpha / rank) B A x; rank * (d_in + d_out) values"
    )
    use_when: ClassVar[str] = "LoRA learns too slowly, as in wide models and on tasks far from the base's."
    aliases: ClassVar[dict[str, dict[str, Any]]] = {}
    small: ClassVar[dict[str, Any]] = {"rank": 4, "alpha": 8}

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.tuners.lora_plus import FasterUp

        return FasterUp(self.lora(model, case), self.ratio)

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        return self.pairs(shape)

    def check(self, shape: "ModelShape", case: Case) -> None:
        adapted(shape, self.targets)
