"""Xattn tuning: only the decoder's cross-attention trains.  Gheini, Ren, May 2021, arXiv:2104.08771.

The paper trains the embeddings of a new language besides ({src, tgt} + xattn); `embeddings` does.
"""

import re
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peft_service.errors import InvalidRequest
from peft_service.methods import Capabilities, Case, Material, Method
from peft_service.methods.full import NO_SWITCH

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape

_ATTENTION = re.compile(r"(^|\.)(EncDecAttention|encoder_attn|crossattention|enc_attn|encoder_attention)\.")
_NORM = re.compile(
    r"(^|\.)(encoder_attn_layer_norm|enc_attn_layer_norm|encoder_attention_layer_norm"
    r"|decoder\.block\.\d+\.layer\.1\.layer_norm)(\.|$)"
)


_EMBEDDING = re.compile(r"(^|\.)(shared|encoder\.embed_tokens)\.weight$")


class Xattn(Method):
    kind: Literal["xattn"] = "xattn"
    norms: bool = False
    """Train the norms of the cross-attention too."""
    embeddings: bool = False
    """Train the embeddings too, for a language that is new to the base: the encoder's, or the one matrix that
    encoder, decoder and output share (T5, BART)."""

    learning_rate: ClassVar[float] = 5e-4
    title: ClassVar[str] = "Xattn tuning"
    family: ClassVar[str] = "selective"
    paper: ClassVar[str] = "https://arxiv.org/abs/2104.08771"
    summary: ClassVar[str] = "Only the attention of the decoder on the encoder trains."
    formula: ClassVar[str] = (
        "q, k, v and o of the cross-attention train in place; 4d² (+ 4d biases) a decoder layer, + its "
        "norm, + V·d of the embeddings"
    )
    use_when: ClassVar[str] = "A translation model is to learn a language pair without forgetting others."
    limits: ClassVar[str] = (
        "Encoder-decoders only. No rows are added to the vocabulary: a new language takes the base's tokens."
    )
    aliases: ClassVar[dict[str, dict[str, Any]]] = {
        "cross_attention": {},
        "cross_attention_tuning": {},
        "xattention": {},
        "src_xattn": {"embeddings": True},
    }
    can: ClassVar[Capabilities] = Capabilities(
        architectures=("encoder_decoder",),
        tasks=("seq2seq_lm", "sequence_classification", "question_answering"),
        nf4=False,
        carrier="delta",
        servers=(),
        weight_decay=False,
        hot_switch=False,
        why={
            "architectures": "it trains the attention of a decoder on an encoder, which only "
            "encoder-decoders (T5, BART, Marian) have. Use LoRA on q_proj and v_proj",
            "tasks": "the model for that task has no cross-attention, or is no encoder-decoder. Use LoRA",
            "nf4": "it changes the base's own weights. Use LoRA on the cross-attention's layers",
            "weight_decay": "decay pulls pretrained weights towards zero, whatever the data say. Set it to 0",
            "hot_switch": NO_SWITCH,
        },
    )

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.tuners.in_place import InPlace, body

        return InPlace(model, self.kind, [name for name in body(model) if self._trains(name)])

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        part = shape.for_task(case.task)
        sizes = [(f"{name}.weight", d_out * d_in) for name, d_out, d_in in part.linears]
        sizes += [(f"{name}.weight", size) for name, size in part.norms]
        words = part.embedding_parameters if self.embeddings else 0
        return words + sum(size for name, size in (*sizes, *part.biases) if self._trains(name))

    def check(self, shape: "ModelShape", case: Case) -> None:
        if not self.model_copy(update={"embeddings": False}).trainable(shape, case):
            raise InvalidRequest(
                f"xattn: no cross-attention was found in this {shape.model_type or 'base'}; known are those "
                "of T5, BART, mBART, M2M100, Marian and Pegasus. Use LoRA with targets of your own.",
                code="method_not_applicable",
                param="adapter.kind",
            )

    def _trains(self, name: str) -> bool:
        return bool(
            _ATTENTION.search(name)
            or (self.norms and _NORM.search(name))
            or (self.embeddings and _EMBEDDING.search(name))
        )
