"""UniPELT: LoRA, a prefix and an adapter, each with a learned gate.  Mao et al. 2021, arXiv:2110.07577.

The formulas are AdapterHub's (`peft_service.tuners.unipelt`), which follow the authors' code where it differs
from the paper: no α / r, one gate a place, and the gate of a row is a mean over its tokens. That mean is why
it does not write text here: it would see what is to be written, and would be another while it is written
token by token.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service import sites
from peft_service.methods import Capabilities, Case, Material, Method
from peft_service.methods.adapter import NO_SERVER, Activation, widths
from peft_service.methods.prefix_tuning import STARTS, check_prefix, prefix_values

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape


class UniPELT(Method):
    kind: Literal["unipelt"] = "unipelt"
    rank: int = Field(8, ge=1, le=512)
    """r of LoRA on queries and values."""
    virtual_tokens: int = Field(10, ge=1, le=1024)
    """P, the length of the prefix."""
    size: int = Field(48, ge=1, le=65536)
    """m, the width of the adapter."""
    activation: Activation = "relu"

    learning_rate: ClassVar[float] = 5e-4
    title: ClassVar[str] = "UniPELT"
    family: ClassVar[str] = "hybrid"
    paper: ClassVar[str] = "https://arxiv.org/abs/2110.07577"
    summary: ClassVar[str] = (
        "LoRA, prefix and adapter in one, and gates that learn which of them a row needs."
    )
    formula: ClassVar[str] = (
        "W x + g B A x at q and v, [g P_K; K], [g P_V; V], h + g E(LN(h + r)); Σ r(d_in + d_out) + d_in + 1 "
        "over q and "
        "v, and 2Pk + d + 1 and 2dm + 2d + m + 1 a layer"
    )
    use_when: ClassVar[str] = "Few rows and no time to find out which method suits the task."
    limits: ClassVar[str] = "Not for text: encoders and decoders that classify, tag or answer by a span."
    aliases: ClassVar[dict[str, dict[str, Any]]] = {}
    small: ClassVar[dict[str, Any]] = {"rank": 4, "virtual_tokens": 5, "size": 8}
    can: ClassVar[Capabilities] = Capabilities(
        architectures=("decoder", "encoder"),
        tasks=("sequence_classification", "token_classification", "question_answering"),
        carrier="registered",
        starts_as_base=False,
        mergeable=False,
        servers=("peft",),
        why={
            "architectures": "its prefix would count as text in T5's relative positions. Use kind hybrid "
            "with lora "
            "and adapter as parts",
            "tasks": "a gate is the mean over all tokens of a row, so while training it would see the "
            "answer, and "
            "it would change with every token that is written. Use kind hybrid with lora, adapter and "
            "prefix_tuning, which is the same without gates",
            "starts_as_base": STARTS,
            "mergeable": "its gates depend on the input, so no weight of the base can express it. Use lora",
            "servers": NO_SERVER,
        },
    )

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.attached import Attached
        from peft_service.tuners.unipelt import UniPELTConfig
        from peft_service.tuners.wrapper import attach

        return Attached(
            attach(
                model,
                case,
                UniPELTConfig,
                rank=self.rank,
                virtual_tokens=self.virtual_tokens,
                bottleneck_size=self.size,
                activation=self.activation,
            )
        )

    def positions(self) -> int:
        return 0  # the prefix is inside of attention, where rows count on as if it were not there

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        names = set(sites.of_shape(shape).found(sites.QUERY_AND_VALUE))
        lora = sum(self.rank * (i + o) + i + 1 for name, o, i in shape.linears if name in names)
        d, m = shape.hidden, self.size
        adapters = len(widths(self.kind, "pfeiffer", shape)) * (2 * d * m + d + m + d + 1)
        return lora + adapters + prefix_values(shape, self.virtual_tokens) + shape.layers * (d + 1)

    def check(self, shape: "ModelShape", case: Case) -> None:
        check_prefix(shape, self.kind)
        places = sites.of_shape(shape)
        ends = widths(self.kind, "pfeiffer", shape)
        blocks = places.found(sites.ATTENTION_BLOCK)
        if not places.found(sites.QUERY_AND_VALUE) or not len(blocks) == len(ends) == shape.layers:
            raise sites.unknown(self.kind, shape, "the attention blocks with their queries and values")
