"""Prefix tuning: trainable keys and values in front of every layer's own.  Li, Liang 2021, arXiv:2101.00190.

With `reparametrised`, an MLP makes them from P small embeddings while it trains, as in the paper; only what
it makes is kept. k is the width of keys and values: with grouped queries narrower than the hidden states.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service.errors import InvalidRequest
from peft_service.methods import Capabilities, Case, Material, Method
from peft_service.methods.prompt_tuning import NOT_MERGEABLE

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape

STARTS = "every query sees the prefix from the first step on, and a value of zero takes attention too"
NO_CHECKPOINTING = (
    "the prefix is a cache of keys and values, which transformers does not use while it recomputes. Set "
    "training.gradient_checkpointing to false, or use prompt_tuning"
)


class PrefixTuning(Method):
    kind: Literal["prefix_tuning"] = "prefix_tuning"
    virtual_tokens: int = Field(30, ge=1, le=1024)
    reparametrised: bool = False
    """Make the prefix by an MLP while training."""
    encoder_hidden: int = Field(512, ge=1, le=65536)
    """Of that MLP."""
    zero_init: bool = False
    """Start keys and values at zero instead of at normal noise; of the MLP, the last layer is zeroed."""

    learning_rate: ClassVar[float] = 5e-3
    title: ClassVar[str] = "Prefix tuning"
    family: ClassVar[str] = "soft prompt"
    paper: ClassVar[str] = "https://arxiv.org/abs/2101.00190"
    summary: ClassVar[str] = "Trainable keys and values in front of those of every layer."
    formula: ClassVar[str] = (
        "K = [P_K; K], V = [P_V; V]; 2·L·P·k values (flat), with the MLP while training P·k + k·h + h + "
        "(h + 1)·2·L·k"
    )
    use_when: ClassVar[str] = "Generation with a small artifact, where prompt tuning is too weak."
    limits: ClassVar[str] = "Longer attention in every layer; of an encoder-decoder only the decoder."
    aliases: ClassVar[dict[str, dict[str, Any]]] = {"prefix": {}}
    small: ClassVar[dict[str, Any]] = {"virtual_tokens": 5, "encoder_hidden": 16}
    can: ClassVar[Capabilities] = Capabilities(
        tasks=("causal_lm", "seq2seq_lm"),
        gradient_checkpointing=False,
        starts_as_base=False,
        mergeable=False,
        servers=("peft",),
        why={
            "tasks": "for classes, tags and answers use p_tuning_v2, which is a prefix with a head",
            "gradient_checkpointing": NO_CHECKPOINTING,
            "starts_as_base": STARTS,
            "mergeable": NOT_MERGEABLE,
        },
    )

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft import PrefixTuningConfig

        from peft_service.tuners import prompts

        return prompts.Prompted(
            prompts.attach_prompt(
                model,
                case,
                PrefixTuningConfig,
                num_virtual_tokens=self.virtual_tokens,
                prefix_projection=self.reparametrised,
                encoder_hidden_size=self.encoder_hidden if self.reparametrised else None,
                init_weights="zero" if self.zero_init else None,
                **prompts.prefix_shape(model),
            )
        )

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        if not self.reparametrised:
            return prefix_values(shape, self.virtual_tokens)
        width, hidden = shape.kv_width, self.encoder_hidden
        out = 2 * (shape.decoder_layers or shape.layers) * width
        return self.virtual_tokens * width + (width + 1) * hidden + (hidden + 1) * out

    def stored(self, shape: "ModelShape", case: Case) -> int | None:
        return prefix_values(shape, self.virtual_tokens)

    def check(self, shape: "ModelShape", case: Case) -> None:
        check_prefix(shape, self.kind)


def prefix_values(shape: "ModelShape", tokens: int) -> int:
    """2·L·P·k, L the decoder's layers where there is one beside an encoder."""
    return 2 * (shape.decoder_layers or shape.layers) * tokens * shape.kv_width


_WITHOUT_CACHE = {"distilbert", "albert", "mpnet", "deberta-v2", "modernbert"}


def check_prefix(shape: "ModelShape", kind: str) -> None:
    """Refuse bases whose classes take no keys and values from outside."""
    if shape.model_type in _WITHOUT_CACHE:
        raise InvalidRequest(
            f"{kind}: transformers' {shape.model_type} takes no keys and values from outside "
            "(past_key_values), so "
            "a prefix has no way in. Use LoRA, or a BERT, RoBERTa or ELECTRA.",
            code="method_not_applicable",
            param="adapter.kind",
        )
