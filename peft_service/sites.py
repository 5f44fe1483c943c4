"""Where in a transformer a method goes: patterns of module names, matched whole, over many architectures.

No torch: the API counts with a checkpoint's names (`of_shape`) what a worker finds in the model
(`peft_service.tuners.sites`).
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from peft_service.errors import InvalidRequest

if TYPE_CHECKING:
    from peft_service.base_model import ModelShape

ATTENTION_OUTPUT = (
    r"(?:.*\.)?(?:attention\.output\.dense|attention\.out_lin|self_attn\.(?:o_proj|out_proj|dense)"
    r"|SelfAttention\.o|attn\.(?:c_proj|out_proj)|attn\.attention\.out_proj|self_attention\.dense"
    r"|attention\.(?:dense|wo))"
)
"""The linear layer that ends self-attention."""

FFN_OUTPUT = (
    r"(?:.*\.)?(?:\d+\.output\.dense|ffn\.lin2|mlp\.(?:down_proj|c_proj|fc2|fc_out|dense_4h_to_h)"
    r"|DenseReluDense\.wo|\d+\.fc2|ffn\.down_proj)"
)
"""The linear layer that ends the feed-forward network."""

ATTENTION_BLOCK = r"(?:.*\.)?(?:\d+\.(?:attention|self_attn|attn|self_attention)|block\.\d+\.layer\.0)"
"""The module that gets the mask and the cache of self-attention and returns the hidden states first."""

QUERY_AND_VALUE = r".*\.(?:query|value|q_proj|v_proj|q_lin|v_lin|q|v|c_attn|query_key_value)"
"""The linear layers that make queries and values; where one makes keys too, the whole of it."""

LAYER = r"(?:.*\.)?(?:layers?|h|block|blocks)\.\d+"
"""A transformer layer. In T5 the three sub-layers of a block match too; see `layers_of`."""

_POST_NORM = {
    "bart": r"(?:.*\.)?\d+\.(?:self_attn_layer_norm)",
    "marian": r"(?:.*\.)?\d+\.(?:self_attn_layer_norm)",
}
_NORM_AFTER_ATTENTION = (
    r"(?:.*\.)?attention\.output\.LayerNorm",  # BERT and its family
    r"(?:.*\.)?\d+\.sa_layer_norm",  # DistilBERT
    r"(?:.*\.)?\d+\.post_attention_layernorm",  # LLaMA, Mistral, Qwen, Gemma, GPT-NeoX, BLOOM
    r"(?:.*\.)?\d+\.ln_2",  # GPT-2
    r"(?:.*\.)?block\.\d+\.layer\.1\.layer_norm",  # T5, where every sub-layer starts with its norm
)
_NORM_AFTER_FFN = (r"(?:.*\.)?\d+\.output\.LayerNorm", r"(?:.*\.)?\d+\.output_layer_norm")
_FFN_ENTRANCE_POST = (r"(?:.*\.)?\d+\.intermediate\.dense", r"(?:.*\.)?ffn\.lin1")
_FFN_ENTRANCE_PRE = (
    r"(?:.*\.)?\d+\.pre_feedforward_layernorm",
    r"(?:.*\.)?\d+\.post_attention_layernorm",
    r"(?:.*\.)?\d+\.ln_2",
    r"(?:.*\.)?(?:encoder\.block\.\d+\.layer\.1|decoder\.block\.\d+\.layer\.2)\.layer_norm",
)


@dataclass(frozen=True)
class Sites:
    """The modules of one model."""

    kind: str
    """transformers' model type."""
    names: tuple[str, ...]

    def found(self, pattern: str) -> list[str]:
        return [name for name in self.names if re.fullmatch(pattern, name)]

    @property
    def norm_after_attention(self) -> str:
        """Pattern of the norm that is the first to see self-attention's output.

        Raises:
            ValueError: it cannot be told for this architecture.
        """
        post = [_POST_NORM[self.kind]] if self.kind in _POST_NORM else []
        return self._first((*post, *_NORM_AFTER_ATTENTION))

    @cached_property
    def norm_after_ffn(self) -> str | None:
        """Pattern of the norm of residual + feed-forward output; None where norms come first."""
        if self.kind in _POST_NORM:
            return r"(?:.*\.)?\d+\.final_layer_norm"
        return next((pattern for pattern in _NORM_AFTER_FFN if self.found(pattern)), None)

    @cached_property
    def ffn_entrance(self) -> str:
        """Pattern of the module whose input is the residual stream that enters the feed-forward network.

        Raises:
            ValueError: it cannot be told for this architecture, as where attention and FFN run side by side.
        """
        if self.kind in _POST_NORM:
            return r"(?:.*\.)?\d+\.fc1"
        pattern = self._first(_FFN_ENTRANCE_POST if self.norm_after_ffn is not None else _FFN_ENTRANCE_PRE)
        entrances = sorted(block_of(name) for name in self.found(pattern))
        if entrances != sorted(block_of(name) for name in self.found(FFN_OUTPUT)):
            raise ValueError(
                f"{self.kind}: not every feed-forward network has one entrance and one output. Place the "
                'adapter after the linear layers instead (placement "houlsby").'
            )
        return pattern

    @property
    def layers(self) -> str:
        """Pattern of the transformer layers, outermost ones only.

        Raises:
            ValueError: none was found.
        """
        t5 = r"(?:.*\.)?block\.\d+"
        return self._first((t5 if self.found(t5) else LAYER,))

    def _first(self, patterns: tuple[str, ...]) -> str:
        for pattern in patterns:
            if self.found(pattern):
                return pattern
        raise ValueError(
            f"{self.kind}: cannot tell where this method goes in this architecture. "
            "Name the modules in target_modules."
        )


def of_shape(shape: "ModelShape") -> Sites:
    """The modules that a checkpoint's linear layers and norms are, and lie in."""
    names: dict[str, None] = {}
    for module in [name for name, _, _ in shape.linears] + [name for name, _ in shape.norms]:
        parts = module.split(".")
        names.update((".".join(parts[:count]), None) for count in range(1, len(parts) + 1))
    return Sites(shape.model_type, tuple(names))


def unknown(kind: str, shape: "ModelShape", what: str) -> InvalidRequest:
    """The refusal of a base in which a method has no place."""
    return InvalidRequest(
        f"{kind} cannot tell {what} in this {shape.model_type or 'base'} from the names of its modules. Use "
        "lora, which adapts every linear layer whatever it is called.",
        code="method_not_applicable",
        param="adapter.kind",
    )


def block_of(name: str) -> str:
    """The innermost numbered module that `name` lies in, by which the sites of one layer find each other."""
    match = re.match(r"(.*\.\d+)(?:\.|$)", name)
    if match is None:
        raise ValueError(f"{name} does not lie in a numbered layer.")
    return match.group(1)


def index_of(name: str) -> int | None:
    """Number of the transformer layer that `name` lies in; None outside."""
    match = re.match(r".*?\.(\d+)(?:\.|$)", name)
    return int(match.group(1)) if match else None
