"""Tiny-attention adapter: a second, very narrow self-attention behind each attention block.  Zhao et al.
2022.

arXiv:2211.01979; `peft_service.tuners.tiny_attention` has the formula. With several `experts` every row of a
step goes through one, drawn anew at each step, and the artifact has the mean of their weights.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service import sites
from peft_service.errors import InvalidRequest
from peft_service.methods import Capabilities, Case, Material, Method
from peft_service.methods.adapter import NO_SERVER

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape


class TinyAttention(Method):
    kind: Literal["tiny_attention"] = "tiny_attention"
    size: int = Field(1, ge=1, le=1024)
    """a, the width of the attention."""
    heads: int = Field(1, ge=1, le=64)
    """They divide `size`."""
    experts: int = Field(1, ge=1, le=16)
    dropout: float = Field(0.0, ge=0, lt=1)
    """On the attention's weights."""

    learning_rate: ClassVar[float] = 1e-3
    title: ClassVar[str] = "Tiny-attention adapter"
    family: ClassVar[str] = "adapter"
    paper: ClassVar[str] = "https://arxiv.org/abs/2211.01979"
    summary: ClassVar[str] = "A second self-attention of width one behind each attention block."
    formula: ClassVar[str] = (
        "h + Up(MHA(Down(LN(h)))); 3d + 4ad + 4a² + 7a values a block and expert, 7d + 11 at a = 1"
    )
    use_when: ClassVar[str] = (
        "Some hundredths of a per cent of the weights, and what helps lies elsewhere in the text."
    )
    limits: ClassVar[str] = (
        "Up starts at zero and not at 1/100 of noise as the authors' does, so that step 0 is the base. "
        "Scores are "
        "held as a matrix over all pairs of tokens. Masks of flash and flex attention are not read: sdpa or "
        "eager."
    )
    aliases: ClassVar[dict[str, dict[str, Any]]] = {"tiny_attention_adapter": {}}
    small: ClassVar[dict[str, Any]] = {"size": 16, "heads": 2, "experts": 2}
    can: ClassVar[Capabilities] = Capabilities(
        packing=False,
        carrier="registered",
        mergeable=False,
        servers=("peft",),
        why={
            "mergeable": "it is an attention of its own, which no weight of the base can express. Use lora",
            "servers": NO_SERVER,
        },
    )

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.tuners.tiny_attention import Experts, TinyAttentionConfig
        from peft_service.tuners.wrapper import attach

        fields = {name: getattr(self, name) for name in ("size", "heads", "experts", "dropout")}
        return Experts(attach(model, case, TinyAttentionConfig, **fields), case.seed)

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        return self.experts * self.stored(shape, case)

    def stored(self, shape: "ModelShape", case: Case) -> int:
        a, d = self.size, shape.hidden
        return len(self._blocks(shape)) * (3 * d + 4 * a * d + 4 * a * a + 7 * a)

    def check(self, shape: "ModelShape", case: Case) -> None:
        if self.size % self.heads:
            raise InvalidRequest(
                f"tiny_attention: {self.heads} heads do not divide size {self.size}: set size to "
                f"{-(-self.size // self.heads) * self.heads}.",
                param="adapter.size",
            )
        if not self._blocks(shape):
            raise sites.unknown(self.kind, shape, "the attention blocks")

    @staticmethod
    def _blocks(shape: "ModelShape") -> list[str]:
        return sites.of_shape(shape).found(sites.ATTENTION_BLOCK)
