"""X-LoRA: a trained router scales published LoRAs, for every token and layer.  Buehler and Buehler 2024,
arXiv:2402.07148.

    y = W x + Σ_e c_e(h) s_e B_e A_e x      c(h) = softmax(R(h))

h is the last hidden state of the base alone, so every forward pass is two. R is a linear layer, or with
`depth` above 1 an MLP; the LoRAs are frozen.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service.errors import InvalidRequest
from peft_service.methods import Capabilities, Case, Material, Method, adapted
from peft_service.methods.lorahub import PLAIN_LORAS

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape


class XLoRA(Method):
    kind: Literal["xlora"] = "xlora"
    sources: tuple[str, ...] = Field(min_length=2, max_length=64)
    """Published LoRAs of this base, as `name@version`."""
    depth: int = Field(1, ge=1, le=8)
    """Layers of the router."""
    size: int = Field(256, ge=1, le=16384)
    """Width inside it, with depth above 1."""
    layerwise: bool = True
    """Weights of their own for every adapted layer, as in the paper; false: the same in all."""
    temperature: float = Field(1.0, gt=0, le=100)
    targets: tuple[str, ...] | None = Field(None, min_length=1)
    """The layers that the sources adapt, by the last parts of their names; None: every linear layer of the
    blocks."""

    learning_rate: ClassVar[float] = 1e-3
    title: ClassVar[str] = "X-LoRA"
    family: ClassVar[str] = "multi-task"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.07148"
    summary: ClassVar[str] = "A small router mixes frozen published LoRAs, for every token and layer anew."
    formula: ClassVar[str] = (
        "y = W x + Σ_e c_e(h) s_e B_e A_e x; with depth 1 (d + 1) * sources * adapted layers values"
    )
    use_when: ClassVar[str] = "LoRAs of several domains are there, and answers need more than one of them."
    limits: ClassVar[str] = (
        "Every forward pass is two, and there is no cache of keys and values: writing a text of n tokens "
        "costs n whole passes. The LoRAs are in the artifact; peft_service.artifact.load finds them there, "
        "plain peft is to be told their folders (adapters=)."
    )
    aliases: ClassVar[dict[str, dict[str, Any]]] = {}
    sources_of: ClassVar[tuple[str, ...]] = PLAIN_LORAS
    small: ClassVar[dict[str, Any]] = {"sources": ("one@1", "two@1")}
    can: ClassVar[Capabilities] = Capabilities(
        architectures=("decoder",),
        tasks=("causal_lm",),
        nf4=False,
        zero_stages=(0, 1, 2),
        gradient_checkpointing=False,
        starts_as_base=False,
        mergeable=False,
        hot_switch=False,
        servers=("peft",),
        why={
            "architectures": "peft's X-LoRA reads the names of a decoder's layers only; use arrow",
            "tasks": "peft's X-LoRA saves no head beside the router; use lora, or arrow for encoder-decoders",
            "nf4": "peft's X-LoRA passes over 4-bit layers in silence; hold the base in full, or use arrow",
            "zero_stages": "two forward passes in one are not proven with cut parameters; use stage 2",
            "gradient_checkpointing": "replayed layers lose the LoRAs' weights; take a smaller microbatch",
            "starts_as_base": "the LoRAs are at work from the start",
            "mergeable": "the weights depend on the token; combine the LoRAs to merge their sum",
            "hot_switch": "the router takes the base's forward pass over; load it on a base of its own",
            "servers": "no server routes tokens: use combine, whose result is one plain LoRA",
        },
    )

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.tuners.xlora import attach_router

        return attach_router(model, case, self, material.sources)

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        layers = len(adapted(shape, self.targets)) if self.layerwise else 1
        outputs = len(self.sources) * layers
        if self.depth == 1:
            return (shape.hidden + 1) * outputs
        inside = (shape.hidden + 1) * self.size + (self.depth - 2) * (self.size + 1) * self.size
        return inside + (self.size + 1) * outputs

    def stored(self, shape: "ModelShape", case: Case) -> None:
        return None

    def check(self, shape: "ModelShape", case: Case) -> None:
        for name, _, _ in adapted(shape, self.targets):
            if not name.startswith("model."):
                raise InvalidRequest(
                    f"peft's X-LoRA knows layers called model.…, and this {shape.model_type} has {name}: use "
                    "arrow.",
                    code="method_not_applicable",
                    param="adapter.kind",
                )
