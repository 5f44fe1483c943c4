"""LoRA: y = W x + s * B A x, with W frozen and s = alpha / rank.  Hu et al. 2021, arXiv:2106.09685.

Shapes: A is (rank, d_in), B is (d_out, rank). B starts at zero, so step 0 is the base model. On a base
held in NF4 this is QLoRA (Dettmers et al. 2023, arXiv:2305.14314). With `rslora`, s = alpha / sqrt(rank)
(Kalajdzievski 2023, arXiv:2312.03732).
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service.methods import Case, Material, Method, adapted

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape


class LoRA(Method):
    kind: Literal["lora"] = "lora"
    rank: int = Field(16, ge=1, le=512)
    alpha: int = Field(32, ge=1, le=4096)
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of A; 0 keeps every forward pass deterministic."""
    targets: tuple[str, ...] | None = Field(None, min_length=1)
    """Last parts of the module names that are adapted; None: every linear layer of the transformer's blocks."""
    rslora: bool = False

    learning_rate: ClassVar[float] = 2e-4
    title: ClassVar[str] = "LoRA"
    family: ClassVar[str] = "low rank"
    paper: ClassVar[str] = "https://arxiv.org/abs/2106.09685"
    summary: ClassVar[str] = (
        "Low-rank matrices beside the frozen linear layers; on an NF4 base this is QLoRA."
    )
    formula: ClassVar[str] = "y = W x + (alpha / rank) B A x; rank * (d_in + d_out) values a layer"
    use_when: ClassVar[str] = "The default: quality near full fine-tuning, served by every adapter server."
    aliases: ClassVar[dict[str, dict[str, Any]]] = {"qlora": {"base.quantize": "nf4"}}
    small: ClassVar[dict[str, Any]] = {"rank": 4, "alpha": 8}

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.attached import Attached
        from peft_service.tuners.low_rank import attach_lora

        return Attached(
            attach_lora(
                model,
                case,
                rank=self.rank,
                alpha=self.alpha,
                dropout=self.dropout,
                targets=self.targets,
                use_rslora=self.rslora,
            )
        )

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        return sum(self.rank * (d_in + d_out) for _, d_out, d_in in adapted(shape, self.targets))

    def check(self, shape: "ModelShape", case: Case) -> None:
        adapted(shape, self.targets)
