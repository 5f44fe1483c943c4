"""Delta-LoRA: LoRA, and the base moves with it: W ← W + lambda * s * (B A of now - B A of the last step).

Zi et al. 2023, arXiv:2309.02411. The sum telescopes: from step K on, W_t = W_0 + lambda * s * (B A - B_K
A_K), so the base itself need not change, and the result is a plain LoRA of rank 2 r. Gradients reach A and
B through s B A x alone.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service.methods import Case, Material, Method, adapted
from peft_service.methods.lora import LowRank

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape


class DeltaLoRA(LowRank, Method):
    kind: Literal["delta_lora"] = "delta_lora"
    dropout: Literal[0] = 0
    """The paper trains without: B A would not be what the layer has computed."""
    share: float = Field(2.0, ge=0, le=100)
    """lambda: how far the base moves for one step of s B A; 0 is LoRA."""
    begin: float = Field(0.1, ge=0, lt=1)
    """K as a part of all steps: until then it is LoRA."""

    learning_rate: ClassVar[float] = 1e-4
    title: ClassVar[str] = "Delta-LoRA"
    family: ClassVar[str] = "low rank"
    paper: ClassVar[str] = "https://arxiv.org/abs/2309.02411"
    summary: ClassVar[str] = "LoRA whose every step also moves the base's own weight."
    formula: ClassVar[str] = (
        "y = W x + s B A x + lambda s (B A - B_K A_K) x; rank * (d_in + d_out) values, twice that stored"
    )
    use_when: ClassVar[str] = "A low rank is to move the weights further than LoRA does."
    limits: ClassVar[str] = "The artifact has twice the rank."
    aliases: ClassVar[dict[str, dict[str, Any]]] = {}
    small: ClassVar[dict[str, Any]] = {"rank": 4, "alpha": 8}

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.tuners.delta_lora import Moving

        return Moving(self.lora(model, case), self.scaling, self.share, self.first_step(case))

    def first_step(self, case: Case) -> int:
        """K: the number of updates before the base moves."""
        return int(self.begin * case.steps)

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        return self.pairs(shape)

    def stored(self, shape: "ModelShape", case: Case) -> int:
        return self.pairs(shape) * (2 if self.share else 1)

    def check(self, shape: "ModelShape", case: Case) -> None:
        adapted(shape, self.targets)
