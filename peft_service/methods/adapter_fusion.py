"""AdapterFusion: attention over trained adapters, which stay as they are.  Pfeiffer et al. 2020,
arXiv:2005.00247.

At every place of the members, with x what an adapter would read and u_i what member i would add:

    Σ_i softmax_i(⟨Q x, K u_i⟩) V u_i        Q, K ~ N(0, 0.02) with biases, V = I + 1e-6

V is held near the identity by a penalty λ Σ (V - I)², as in the authors' library. The members are copied into
the artifact.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from peft_service.errors import InvalidRequest
from peft_service.methods import Capabilities, Case, Material, Method
from peft_service.methods.adapter import NO_SERVER, Bottlenecks, Variant, widths

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape


class AdapterFusion(Bottlenecks, Method):
    kind: Literal["adapter_fusion"] = "adapter_fusion"
    sources: tuple[str, ...] = Field(min_length=2, max_length=64)
    """The adapters to fuse, published ones of kind adapter on the same base."""
    variant: Variant = "houlsby"
    """Of the members: it, `size`, `activation` and `scale` are those that all of them have."""
    regularisation: float = Field(0.01, ge=0, le=10)
    """λ."""

    learning_rate: ClassVar[float] = 1e-3
    title: ClassVar[str] = "AdapterFusion"
    family: ClassVar[str] = "multi-task"
    paper: ClassVar[str] = "https://arxiv.org/abs/2005.00247"
    summary: ClassVar[str] = (
        "Learns how much of each of several trained adapters to use, position by position."
    )
    formula: ClassVar[str] = (
        "Σ softmax(⟨Q x, K u_i⟩) V u_i; 3d² + 2d values a place train, the members' are kept too"
    )
    use_when: ClassVar[str] = (
        "Adapters of related tasks exist, and a task with few rows is to profit from them."
    )
    limits: ClassVar[str] = (
        "Every member is computed at every place; d² values a place are many for a large base."
    )
    aliases: ClassVar[dict[str, dict[str, Any]]] = {"fusion": {}}
    sources_of: ClassVar[tuple[str, ...]] = ("adapter",)
    small: ClassVar[dict[str, Any]] = {"sources": ("one", "two"), "size": 8, "regularisation": 1e-6}
    can: ClassVar[Capabilities] = Capabilities(
        carrier="registered",
        starts_as_base=False,
        mergeable=False,
        servers=("peft",),
        why={
            "starts_as_base": "before its first step it mixes the members, which change the base",
            "mergeable": "its members have nonlinearities, which no weight of the base can express. Use lora",
            "servers": NO_SERVER,
        },
    )

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len(set(self.sources)) != len(self.sources):
            raise ValueError("sources: each adapter once")
        return self

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.tuners.adapter_fusion import AdapterFusionConfig, Fusion
        from peft_service.tuners.wrapper import attach

        made = attach(
            model,
            case,
            AdapterFusionConfig,
            members=list(self.sources),
            placement=self.variant,
            bottleneck_size=self.size,
            activation=self.activation,
            scale=self.scale,
            dropout=self.dropout,
        )
        try:
            made.base_model.load_members(dict(zip(self.sources, material.sources, strict=True)))
        except ValueError as error:
            raise InvalidRequest(
                f"adapter_fusion: {error} Set variant, size, activation and scale to what the members have; "
                "members of different shapes cannot be fused.",
                param="adapter.sources",
            ) from error
        return Fusion(made, self.regularisation)

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        return sum(3 * d * d + 2 * d for d in widths(self.kind, self.variant, shape))

    def stored(self, shape: "ModelShape", case: Case) -> int:
        m = self.size
        members = sum(2 * d * m + d + m for d in widths(self.kind, self.variant, shape))
        return self.trainable(shape, case) + len(self.sources) * members

    def check(self, shape: "ModelShape", case: Case) -> None:
        widths(self.kind, self.variant, shape)
