"""LoRA-drop: layers whose LoRA says much keep their own, all others share one.  Zhou et al. 2024,
arXiv:2402.07721.

(1) A LoRA on every layer trains for a few steps on a sample. (2) A layer's importance is the sum of ‖s B A
x‖² over the sample, as a share of all layers of its kind. (3) Among the layers of one kind (same last name,
same shape) the most important `keep` have their own A and B, the others one A and one B together; then
training begins anew. The paper keeps layers until their shares reach a threshold; here their number is
given, because what a job trains must be known when it is submitted.
"""

import math
from collections import Counter
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service.methods import Case, Material, Method, adapted
from peft_service.methods.lora import LowRank

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape


class LoRADrop(LowRank, Method):
    kind: Literal["lora_drop"] = "lora_drop"
    keep: float = Field(0.5, gt=0, lt=1)
    """Part of the layers of a kind that keep a LoRA of their own, rounded up."""
    sample_rows: int = Field(64, ge=1, le=4096)
    """Rows that decide which."""
    sample_rate: float = Field(1e-3, gt=0, lt=1)
    """Learning rate of that."""

    learning_rate: ClassVar[float] = 2e-4
    title: ClassVar[str] = "LoRA-drop"
    family: ClassVar[str] = "low rank"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.07721"
    summary: ClassVar[str] = "LoRA of its own only for the layers whose LoRA says most; the others share one."
    formula: ClassVar[str] = (
        "importance = Σ ‖s B A x‖² on a sample; (kept + 1 shared) * rank * (d_in + d_out) values a kind of "
        "layer"
    )
    use_when: ClassVar[str] = "Optimizer state is to be about half of LoRA's."
    limits: ClassVar[str] = "The file is as large as LoRA's: every layer is written out, as servers expect."
    aliases: ClassVar[dict[str, dict[str, Any]]] = {}
    small: ClassVar[dict[str, Any]] = {"rank": 4, "alpha": 8, "sample_rows": 4}

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.tuners.lora_drop import attach_dropped

        return attach_dropped(self.lora(model, case), self, material)

    def kept(self, layers: int) -> int:
        """How many of so many layers of a kind keep their own."""
        return min(layers, math.ceil(self.keep * layers - 1e-9))

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        kinds = Counter((n.split(".")[-1], o, i) for n, o, i in adapted(shape, self.targets))
        return sum(
            min(count, self.kept(count) + 1) * self.rank * (d_out + d_in)
            for (_, d_out, d_in), count in kinds.items()
        )

    def stored(self, shape: "ModelShape", case: Case) -> int:
        return self.pairs(shape)

    def check(self, shape: "ModelShape", case: Case) -> None:
        adapted(shape, self.targets)
