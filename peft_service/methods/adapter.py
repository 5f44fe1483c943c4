"""Adapters: a small two-layer network after, or beside, parts of the frozen transformer.  Houlsby et al.
2019.

    E(x) = s (U σ(D x + b_D) + b_U)      D (m, d), U (d, m); U and b_U start at zero, so step 0 is the base

`variant` says where (`peft_service.tuners.bottleneck` has the formulas): houlsby after attention and FFN
(arXiv:1902.00751), pfeiffer after the FFN and before its residual (arXiv:2005.00247), parallel beside the FFN
with s = 4 (arXiv:2110.04366).
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service import sites
from peft_service.errors import InvalidRequest
from peft_service.methods import Capabilities, Case, Material, Method, adapted
from peft_service.variants import Frozen

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape

Variant = Literal["houlsby", "pfeiffer", "parallel"]
Activation = Literal["relu", "gelu", "swish", "tanh"]
NO_MERGE = "it has a nonlinearity, which no weight of the base can express. Use lora, which merges"
NO_SERVER = "vLLM, LoRAX and Ray Serve load LoRA files only. Use lora there"


class Bottlenecks(Frozen):
    """The fields that give an adapter its shape."""

    size: int = Field(64, ge=1, le=65536)
    """m, the width of the bottleneck."""
    activation: Activation = "relu"
    scale: float | None = Field(None, gt=0, le=1000)
    """s; None: 4 in parallel, else 1."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """On what the adapter adds."""


class Adapter(Bottlenecks, Method):
    kind: Literal["adapter"] = "adapter"
    variant: Variant = "houlsby"
    targets: tuple[str, ...] | None = Field(None, min_length=1)
    """With houlsby, last parts of the names of the linear layers that get an adapter; None: the last ones of
    self-attention and of the FFN."""

    learning_rate: ClassVar[float] = 1e-3
    title: ClassVar[str] = "Standard adapter"
    family: ClassVar[str] = "adapter"
    paper: ClassVar[str] = "https://arxiv.org/abs/1902.00751"
    summary: ClassVar[str] = "Small two-layer networks inside every layer of the frozen transformer."
    formula: ClassVar[str] = (
        "y + s U relu(D y): 2dm + d + m values a place; houlsby has two places a layer, pfeiffer and "
        "parallel one"
    )
    use_when: ClassVar[str] = (
        "Many tasks on one base, to be fused later (adapter_fusion), or LoRA's accuracy is short."
    )
    limits: ClassVar[str] = (
        "Two more products a layer at inference. An encoder-decoder's cross-attention gets none."
    )
    aliases: ClassVar[dict[str, dict[str, Any]]] = {
        "standard_adapter": {},
        "bottleneck": {},
        "bottleneck_adapter": {},
        "houlsby": {"variant": "houlsby"},
        "houlsby_adapter": {"variant": "houlsby"},
        "pfeiffer": {"variant": "pfeiffer"},
        "pfeiffer_adapter": {"variant": "pfeiffer"},
        "parallel_adapter": {"variant": "parallel"},
    }
    small: ClassVar[dict[str, Any]] = {"size": 8}
    can: ClassVar[Capabilities] = Capabilities(
        carrier="registered",
        mergeable=False,
        servers=("peft",),
        why={"mergeable": NO_MERGE, "servers": NO_SERVER},
    )

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.attached import Attached
        from peft_service.targets import linear_layers
        from peft_service.tuners.bottleneck import BottleneckConfig
        from peft_service.tuners.wrapper import attach

        return Attached(
            attach(
                model,
                case,
                BottleneckConfig,
                placement=self.variant,
                bottleneck_size=self.size,
                activation=self.activation,
                scale=self.scale,
                dropout=self.dropout,
                target_modules=linear_layers(model, self.targets) if self.targets else None,
            )
        )

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        m = self.size
        return sum(2 * d * m + d + m for d in self.widths(shape))

    def widths(self, shape: "ModelShape") -> list[int]:
        """d at every place.

        Raises:
            InvalidRequest: the base has none.
        """
        if self.targets:
            return [d_out for _, d_out, _ in adapted(shape, self.targets)]
        return widths(self.kind, self.variant, shape)

    def check(self, shape: "ModelShape", case: Case) -> None:
        if self.targets and self.variant != "houlsby":
            raise InvalidRequest(
                f"targets: {self.variant} has its place beside the FFN's residual; only variant houlsby goes "
                "after any linear layer. Leave targets out, or set variant to houlsby.",
                param="adapter.targets",
            )
        self.widths(shape)


def widths(kind: str, variant: Variant, shape: "ModelShape") -> list[int]:
    """d at every place of a variant: hidden states, so always the same.

    Raises:
        InvalidRequest: the base has no such places.
    """
    places = sites.of_shape(shape)
    attention, ffn = places.found(sites.ATTENTION_OUTPUT), places.found(sites.FFN_OUTPUT)
    try:
        if not ffn or len(attention) != len(ffn):
            raise ValueError
        if variant != "houlsby" and not (variant == "pfeiffer" and places.norm_after_ffn):
            _ = places.ffn_entrance
    except ValueError:
        what = "where attention and feed-forward network end" if variant == "houlsby" else (
            f"the residual that variant {variant} needs"
        )  # fmt: skip
        raise sites.unknown(kind, shape, what) from None
    return [shape.hidden] * (len(ffn) * (2 if variant == "houlsby" else 1))
