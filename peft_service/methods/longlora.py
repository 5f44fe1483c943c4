"""LongLoRA: a longer context from training with attention in groups, half of the heads' groups shifted.

Chen et al. 2023, arXiv:2309.12307. While it trains, a head sees the earlier tokens of its own group of
G = share * T tokens only; the groups of the second half of the heads begin G / 2 later, which links
neighbours. Evaluation and use have the base's full attention. LoRA is on the attention's projections, and the
embedding and all norms train whole. Where T is more than the T0 tokens of the base, positions are divided by
ceil(T / T0).

Of the authors' two variants this is the split one, where the tokens before and after the shifted groups are
groups of their own: the other rolls the last tokens to the front, where the first can see them.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service.errors import InvalidRequest
from peft_service.methods import Capabilities, Case, Material, Method, adapted

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
ROTARY = ("llama", "mistral", "qwen2", "qwen3", "gemma")
"""Model types with rotary positions and an attention, over all earlier tokens, that can be exchanged."""


class LongLoRA(Method):
    kind: Literal["longlora"] = "longlora"
    rank: int = Field(8, ge=1, le=512)
    """r, the rows of A and columns of B."""
    alpha: int = Field(16, ge=1, le=4096)
    """What is added is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of A."""
    context: int | None = Field(None, ge=8, le=1_048_576)
    """T, the tokens that the result is to take; None: training.max_seq_len."""
    share: float = Field(0.25, gt=0, le=1)
    """G as a part of T. The same for every batch, so that a row does not depend on the rows beside it."""

    learning_rate: ClassVar[float] = 2e-5
    """The authors': embeddings and norms train with it too."""
    title: ClassVar[str] = "LongLoRA"
    family: ClassVar[str] = "low rank"
    paper: ClassVar[str] = "https://arxiv.org/abs/2309.12307"
    summary: ClassVar[str] = (
        "A longer context than the base's: attention in shifted groups while it trains, full attention after."
    )
    formula: ClassVar[str] = (
        "y = W x + (alpha / rank) B A x on q, k, v and o; positions p / ceil(T / T0); rank * (d_in + d_out) "
        "values a layer, vocabulary * d of the embedding and d a norm"
    )
    use_when: ClassVar[str] = (
        "Rows are longer than the base's context, which training.max_seq_len may exceed here."
    )
    limits: ClassVar[str] = (
        "Decoders with rotary positions, without 4 bits or sliding windows. The artifact holds the "
        "embedding. Rows much shorter than the context gain nothing: their attention is nearly full anyway."
    )
    aliases: ClassVar[dict[str, dict[str, Any]]] = {"long_lora": {}, "s2_attn": {}}
    small: ClassVar[dict[str, Any]] = {"rank": 4, "alpha": 8}
    extends_context: ClassVar[bool] = True
    can: ClassVar[Capabilities] = Capabilities(
        packing=False,
        architectures=("decoder",),
        nf4=False,
        starts_as_base=False,
        hot_switch=False,
        carrier="composite",
        servers=("peft",),
        why={
            "architectures": "its attention in groups is for causal decoders with rotary positions: "
            f"{', '.join(ROTARY)}. LoRA works on every architecture",
            "nf4": "embeddings and norms train too, which is not tried beside weights of 4 bits. "
            "Leave base.quantize out, or use QLoRA, within the base's own context",
            "starts_as_base": "beyond the base's context positions are interpolated, and nearer than the "
            "base knows them; within it the first evaluation gives what the base gives",
            "hot_switch": "beyond the base's context it changes the base's positions, for all adapters on "
            "it. LoRA keeps the base as it is",
        },
    )

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.tuners.longlora import Long
        from peft_service.tuners.low_rank import attach_lora

        return Long(
            model,
            self.length(case),
            self.share,
            lambda base, **more: attach_lora(
                base,
                case,
                rank=self.rank,
                alpha=self.alpha,
                targets=PROJECTIONS,
                dropout=self.dropout,
                **more,
            ),
        )

    def length(self, case: Case) -> int:
        """T."""
        return self.context or case.max_seq_len

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        pairs = sum(self.rank * (d_in + d_out) for _, d_out, d_in in adapted(shape, PROJECTIONS))
        return pairs + shape.embedding_parameters + sum(size for _, size in shape.norms)

    def stored(self, shape: "ModelShape", case: Case) -> int:
        """A head that is tied to the embedding is in the file a second time: plain peft asks for it."""
        twice = shape.tied and case.task == "causal_lm"
        return self.trainable(shape, case) + (shape.embedding_parameters if twice else 0)

    def check(self, shape: "ModelShape", case: Case) -> None:
        if shape.model_type not in ROTARY:
            raise InvalidRequest(
                f"{self.kind} does not work on {shape.model_type or 'this kind of'} models: it needs rotary "
                f"positions and an attention that can be exchanged, as {', '.join(ROTARY)} have. LoRA works "
                "here, within the base's context.",
                code="method_not_applicable",
                param="adapter.kind",
            )
        if self.context is not None and self.context < case.max_seq_len:
            raise InvalidRequest(
                f"context is {self.context}, but rows have up to {case.max_seq_len} tokens: set it to "
                f"{case.max_seq_len} or more, or training.max_seq_len to {self.context}.",
                param="adapter.context",
            )
