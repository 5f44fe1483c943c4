"""LoRA-FA: LoRA whose random A never moves; only B trains.  Zhang et al. 2023, arXiv:2308.03303.

With `project` (the paper's second version) B's gradient becomes (1/s²) g_B (A Aᵀ)⁻¹, the step for which s
dB A is nearest to the gradient of the whole weight.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peft_service.errors import InvalidRequest
from peft_service.methods import Case, Material, Method, adapted
from peft_service.methods.lora import LowRank

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape


class LoRAFA(LowRank, Method):
    kind: Literal["lora_fa"] = "lora_fa"
    project: bool = True
    """False: the first version of the paper, with B's plain gradient."""

    learning_rate: ClassVar[float] = 5e-4
    title: ClassVar[str] = "LoRA-FA"
    family: ClassVar[str] = "low rank"
    paper: ClassVar[str] = "https://arxiv.org/abs/2308.03303"
    summary: ClassVar[str] = (
        "LoRA with A frozen: half of the values train, and the layers' inputs need not be kept."
    )
    formula: ClassVar[str] = (
        "y = W x + (alpha / rank) B A x, A fixed; g_B becomes (1/s²) g_B (A Aᵀ)⁻¹; rank * d_out values"
    )
    use_when: ClassVar[str] = "Activations do not fit, and gradient checkpointing costs too much time."
    limits: ClassVar[str] = (
        "Below LoRA at the same rank; the saving of memory is gone with gradient checkpointing."
    )
    aliases: ClassVar[dict[str, dict[str, Any]]] = {}
    small: ClassVar[dict[str, Any]] = {"rank": 4, "alpha": 8}

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.tuners.lora_fa import FixedDown

        return FixedDown(self.lora(model, case), self.scaling, self.project)

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        return sum(self.rank * d_out for _, d_out, _ in adapted(shape, self.targets))

    def stored(self, shape: "ModelShape", case: Case) -> int:
        return self.pairs(shape)

    def check(self, shape: "ModelShape", case: Case) -> None:
        name, limit = min(
            ((name, d_in) for name, _, d_in in adapted(shape, self.targets)), key=lambda layer: layer[1]
        )
        if self.project and self.rank > limit:
            raise InvalidRequest(
                f"lora_fa inverts A Aᵀ, which is singular where rank {self.rank} is above the {limit} inputs "
                "of "
                f"{name}: set rank to {limit}, or project to false.",
                param="adapter.rank",
            )
