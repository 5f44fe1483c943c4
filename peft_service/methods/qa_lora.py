"""QA-LoRA: the base in groups of 4-bit codes, and a LoRA that merges into their zero points alone.

Xu et al. 2023, arXiv:2309.14717. Of a row, `group` neighbouring inputs share a scale α and a zero point β,
W̃ = α (q - β). A sees the sum of each group's inputs, so that B A is constant within a group and the merge
is β' = β - s (B A) / α: the codes q keep every bit, and the result is as small and as fast as the
quantised base.
Shapes: A (rank, d_in / group), B (d_out, rank), α and β (d_out, d_in / group), q (d_out, d_in).
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service.errors import InvalidRequest
from peft_service.methods import Capabilities, Case, Material, Method, adapted

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape


class QALoRA(Method):
    kind: Literal["qa_lora"] = "qa_lora"
    rank: int = Field(16, ge=1, le=512)
    """r, the rows of A and columns of B."""
    alpha: int = Field(32, ge=1, le=4096)
    """s = alpha / rank, for every input of a group."""
    group: int = Field(32, ge=1, le=4096)
    """Neighbouring inputs with one scale and zero point; must divide the inputs of every layer."""
    bits: int = Field(4, ge=2, le=8)
    """Of a code. 2, 4 and 8 fill whole bytes; 3 takes the room of 4, and 5 to 7 that of 8."""
    merged: bool = True
    """The artifact has the merged zero points; false: the base's own, with A and B beside them."""

    learning_rate: ClassVar[float] = 2e-4
    title: ClassVar[str] = "QA-LoRA"
    family: ClassVar[str] = "low rank"
    paper: ClassVar[str] = "https://arxiv.org/abs/2309.14717"
    summary: ClassVar[str] = (
        "LoRA on a 4-bit base of our own groups of weights; it merges into their zero points without a loss."
    )
    formula: ClassVar[str] = (
        "y = α (q - β) x + (alpha / rank) B A pool(x), pool(x) = sums over groups; merged β' = β - "
        "(alpha / rank) B A / α; rank * (d_in / group + d_out) values a layer"
    )
    use_when: ClassVar[str] = (
        "What is deployed is to be 4-bit itself, without the loss of quantising a merged model."
    )
    limits: ClassVar[str] = (
        "It starts from the quantised base. The linear layers of the blocks are quantised by rounding, "
        "without data; embeddings, norms and heads stay as they are. Weights are unpacked in every forward "
        "pass: less memory, not less time. Float zero points are a format of our own that no server reads."
    )
    aliases: ClassVar[dict[str, dict[str, Any]]] = {"quantization_aware_lora": {}}
    small: ClassVar[dict[str, Any]] = {"rank": 4, "alpha": 8, "group": 8}
    can: ClassVar[Capabilities] = Capabilities(
        nf4=False,
        starts_as_base=False,
        hot_switch=False,
        carrier="delta",
        servers=(),
        why={
            "nf4": "it quantises the base itself, in groups with zero points that NF4's codebook does not "
            "have. Leave base.quantize out: it trains on 4 bits all the same; QLoRA is LoRA on NF4",
            "starts_as_base": "it starts as the base quantised to codes of 4 bits; from that the first "
            "forward pass does not differ",
            "hot_switch": "it replaces the base's linear layers with quantised ones; QLoRA's adapters can "
            "be switched on one NF4 base",
        },
    )

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.tuners.qa_lora import Quantised

        return Quantised(
            model, self.rank, self.alpha / self.rank, self.group, self.bits, self.merged, case.seed
        )

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        return sum(self.rank * (d_in // self.group + d_out) for _, d_out, d_in in shape.linears)

    def stored(self, shape: "ModelShape", case: Case) -> int:
        """Bytes of codes, and scales and zero points; A and B where they are kept."""
        in_a_byte = 8 // self.bits
        base = sum(
            d_out * (-(-d_in // in_a_byte) + 2 * d_in // self.group) for _, d_out, d_in in shape.linears
        )
        return base + (0 if self.merged else self.trainable(shape, case))

    def check(self, shape: "ModelShape", case: Case) -> None:
        layers = adapted(shape, None)
        for name, _, d_in in layers:
            if d_in % self.group:
                widths = {width for _, _, width in layers}
                able = [
                    size for size in range(1, min(widths) + 1) if all(width % size == 0 for width in widths)
                ]
                near = sorted(sorted(able, key=lambda size: abs(size - self.group))[:6])
                raise InvalidRequest(
                    f"group {self.group} does not divide the {d_in} inputs of {name}. These divide the "
                    f"inputs of every layer: {', '.join(map(str, near))}.",
                    param="adapter.group",
                )
