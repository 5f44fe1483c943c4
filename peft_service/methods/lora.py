"""LoRA: y = W x + s * B A x, with W frozen and s = alpha / rank.  Hu et al. 2021, arXiv:2106.09685.

Shapes: A is (rank, d_in), B is (d_out, rank). B starts at zero, so step 0 is the base model. On a base held
in NF4 this is QLoRA (Dettmers et al. 2023, arXiv:2305.14314). With `rslora`, s = alpha / sqrt(rank)
(Kalajdzievski 2023, arXiv:2312.03732). `init` has other first values (`peft_service.tuners.initial`).
"""

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service.errors import InvalidRequest
from peft_service.methods import Case, Material, Method, adapted
from peft_service.variants import Frozen

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape

Init = Literal["default", "gaussian", "pissa", "olora", "eva", "loftq", "orthogonal"]


class LowRank(Frozen):
    """The fields of every method that trains an A and a B beside linear layers."""

    rank: int = Field(16, ge=1, le=512)
    """r, the rows of A and columns of B: what is added to a weight has this rank at most."""
    alpha: int = Field(32, ge=1, le=4096)
    """What is added is scaled by s = alpha / rank, so that a rate goes on fitting when the rank changes."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of A; 0 keeps every forward pass deterministic."""
    targets: tuple[str, ...] | None = Field(None, min_length=1)
    """Last parts of the module names that are adapted; None: every linear layer of the transformer's
    blocks."""
    rslora: bool = False
    """s = alpha / sqrt(rank), which keeps large ranks from learning too little."""

    @property
    def scaling(self) -> float:
        """s."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def pairs(self, shape: "ModelShape") -> int:
        """Values in all A and B."""
        return sum(self.rank * (d_in + d_out) for _, d_out, d_in in adapted(shape, self.targets))

    def lora(self, model: Any, case: Case, **more: Any) -> Any:
        """peft's LoRA on the model; `more` are further fields of its LoraConfig."""
        from peft_service.tuners.low_rank import attach_lora

        return attach_lora(
            model,
            case,
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            targets=self.targets,
            use_rslora=self.rslora,
            **more,
        )


class LoRA(LowRank, Method):
    kind: Literal["lora"] = "lora"
    init: Init = "default"
    """First values. default: A uniform, B zero. gaussian: A normal. pissa: the base's leading singular
    vectors. olora: its QR. eva: directions of the data. loftq: what NF4 has lost. orthogonal: B A = 0 with
    neither zero. The artifact is a plain LoRA on the original base whatever it is; pissa and olora double its
    rank."""

    learning_rate: ClassVar[float] = 2e-4
    title: ClassVar[str] = "LoRA"
    family: ClassVar[str] = "low rank"
    paper: ClassVar[str] = "https://arxiv.org/abs/2106.09685"
    summary: ClassVar[str] = (
        "Low-rank matrices beside the frozen linear layers; on an NF4 base this is QLoRA."
    )
    formula: ClassVar[str] = "y = W x + (alpha / rank) B A x; rank * (d_in + d_out) values a layer"
    use_when: ClassVar[str] = "The default: quality near full fine-tuning, served by every adapter server."
    limits: ClassVar[str] = (
        "loftq starts nearer to the unquantised base than the NF4 base is, so not as either. eva keeps the "
        "same "
        "rank in every layer. pissa on NF4 decomposes the quantised weights and does not quantise anew."
    )
    corrections: ClassVar[tuple[str, ...]] = (
        "“QLoRA fine-tunes 65B on a GPU of 24 GB.” In NF4 with double quantisation a weight takes "
        "{nf4[bytes_per_weight]:.3f} bytes, so 65 billion of them are {nf4[gib_of_65e9]:.1f} GiB before the "
        "first activation. The paper's own figure is 48 GB for 65B, and 24 GB for 33B.",
        "“To switch tasks, subtract B A from the weights and add B' A'.” In bf16 the weights do not come "
        "back: after one round trip between two updates of 1 % of the weight's norm, what is left of it is "
        "off by {switching[bf16_update_0.01_after_1_of_update]:.1%} of itself (float32: "
        "{switching[fp32_update_0.01_after_1_of_update]:.0e}); with updates of 10 %, by "
        "{switching[bf16_update_0.1_after_100_of_update]:.1%} after 100. Keep adapters beside the base: "
        "switching them is then bit-identical.",
    )
    aliases: ClassVar[dict[str, dict[str, Any]]] = {
        "qlora": {"base.quantize": "nf4"},
        "rslora": {"rslora": True},
        "pissa": {"init": "pissa"},
        "olora": {"init": "olora"},
        "eva": {"init": "eva"},
        "loftq": {"init": "loftq", "base.quantize": "nf4"},
        "orthogonal_lora": {"init": "orthogonal"},
    }
    small: ClassVar[dict[str, Any]] = {"rank": 4, "alpha": 8}

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.attached import Attached
        from peft_service.tuners.initial import started

        adapted_model = self.lora(
            model, case, init_lora_weights="gaussian" if self.init == "gaussian" else True
        )
        if self.init in ("default", "gaussian"):
            return Attached(adapted_model)
        return started(adapted_model, self.init, self.scaling, case, material)

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        return self.pairs(shape)

    def stored(self, shape: "ModelShape", case: Case) -> int:
        return self.pairs(shape) * (2 if self.init in ("pissa", "olora") else 1)

    def check(self, shape: "ModelShape", case: Case) -> None:
        layers = adapted(shape, self.targets)
        if self.init in ("pissa", "olora", "loftq", "eva"):
            name, limit = min(((name, min(o, i)) for name, o, i in layers), key=lambda layer: layer[1])
            if self.rank > limit:
                raise InvalidRequest(
                    f"init {self.init} takes at most as many directions as a layer has, and {name} has "
                    f"{limit}, "
                    f"fewer than rank {self.rank}: set rank to {limit}, or init to default.",
                    param="adapter.rank",
                )
        if self.init == "loftq" and case.quantize != "nf4":
            raise InvalidRequest(
                "init loftq makes up for what 4 bits lose, and this base is held in full: set base.quantize "
                "to "
                "nf4, or init to pissa.",
                param="adapter.init",
            )
        if self.init == "orthogonal" and self.rank % 2:
            raise InvalidRequest(
                f"init orthogonal halves the rank between A and B, and {self.rank} is odd: set rank to "
                f"{self.rank + 1}.",
                param="adapter.rank",
            )
