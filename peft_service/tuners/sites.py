"""Where in a transformer a method goes: patterns of module names, matched whole, over many architectures."""

import re
from typing import Any

from torch import nn

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


def names(model: nn.Module) -> list[str]:
    """Names of the modules, without what lies inside of a tuner's layers."""
    return [name for name, _ in model.named_modules() if name and "base_layer" not in name.split(".")]


def found(model: nn.Module, pattern: str) -> list[str]:
    return [name for name in names(model) if re.fullmatch(pattern, name)]


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


def norm_after_attention(model: nn.Module) -> str:
    """Pattern of the norm that is the first to see self-attention's output.

    Raises:
        ValueError: it cannot be told for this architecture.
    """
    kind = _kind(model)
    return _first(model, (*([_POST_NORM[kind]] if kind in _POST_NORM else []), *_NORM_AFTER_ATTENTION))


def norm_after_ffn(model: nn.Module) -> str | None:
    """Pattern of the norm that is applied to residual + feed-forward output; None where norms come first."""
    if _kind(model) in _POST_NORM:
        return r"(?:.*\.)?\d+\.final_layer_norm"
    return next((pattern for pattern in _NORM_AFTER_FFN if found(model, pattern)), None)


def ffn_entrance(model: nn.Module) -> str:
    """Pattern of the module whose input is the residual stream that enters the feed-forward network.

    Raises:
        ValueError: it cannot be told for this architecture, as where attention and FFN run side by side.
    """
    if _kind(model) in _POST_NORM:
        return r"(?:.*\.)?\d+\.fc1"
    pattern = _first(model, _FFN_ENTRANCE_POST if norm_after_ffn(model) is not None else _FFN_ENTRANCE_PRE)
    entrances = sorted(block_of(name) for name in found(model, pattern))
    if entrances != sorted(block_of(name) for name in found(model, FFN_OUTPUT)):
        raise ValueError(
            f"{_kind(model)}: not every feed-forward network has one entrance and one output. Place the "
            'adapter after the linear layers instead (placement "houlsby").'
        )
    return pattern


def layers_of(model: nn.Module) -> str:
    """Pattern of the transformer layers, outermost ones only.

    Raises:
        ValueError: none was found.
    """
    t5 = r"(?:.*\.)?block\.\d+"
    pattern = t5 if found(model, t5) else LAYER
    return _first(model, (pattern,))


def is_norm(module: nn.Module) -> bool:
    """LayerNorm or any RMSNorm: one weight vector of the width of the hidden states."""
    name = type(module).__name__
    weight = getattr(module, "weight", None)
    return (isinstance(module, nn.LayerNorm) or name.endswith(("RMSNorm", "LayerNorm"))) and (
        weight is not None and len(shape_of(weight)) == 1
    )


def width_of(module: nn.Module) -> int:
    """Width of what the module returns.

    Raises:
        ValueError: it is no linear layer and no norm.
    """
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, Conv1D):
        return int(module.nf)
    if is_norm(module):
        return int(shape_of(module.weight)[0])
    raise ValueError(f"{type(module).__name__} is neither a linear layer nor a norm.")


def shape_of(parameter: Any) -> tuple[int, ...]:
    """The whole parameter's shape, also where ZeRO-3 has cut it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def hidden_size(model: nn.Module) -> int:
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(text.hidden_size)


def _kind(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def _first(model: nn.Module, patterns: tuple[str, ...]) -> str:
    for pattern in patterns:
        if found(model, pattern):
            return pattern
    raise ValueError(
        f"{_kind(model)}: cannot tell where this method goes in this architecture. "
        "Name the modules in target_modules."
    )
