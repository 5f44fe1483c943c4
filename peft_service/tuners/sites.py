"""Where in a loaded model a method goes (`peft_service.sites` has the patterns), and what stands there."""

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_service.sites import (
    ATTENTION_BLOCK,
    ATTENTION_OUTPUT,
    FFN_OUTPUT,
    LAYER,
    Sites,
    block_of,
    index_of,
)

__all__ = [
    "ATTENTION_BLOCK",
    "ATTENTION_OUTPUT",
    "FFN_OUTPUT",
    "LAYER",
    "block_of",
    "ffn_entrance",
    "found",
    "hidden_size",
    "index_of",
    "is_norm",
    "layers_of",
    "modules",
    "names",
    "norm_after_attention",
    "norm_after_ffn",
    "of",
    "shape_of",
    "width_of",
]


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """The base's own modules by name: behind a layer of a tuner what it wraps, and nothing of its inside."""
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name and not name.startswith(inside or ("\0",)):
            if isinstance(module, BaseTunerLayer):
                inside += (f"{name}.",)
                module = module.get_base_layer()
            found[name] = module
    return found


def names(model: nn.Module) -> list[str]:
    """Their names."""
    return list(modules(model))


def of(model: nn.Module) -> Sites:
    """The places of this model."""
    return Sites(_kind(model), tuple(names(model)))


def found(model: nn.Module, pattern: str) -> list[str]:
    return of(model).found(pattern)


def norm_after_attention(model: nn.Module) -> str:
    """See `Sites.norm_after_attention`."""
    return of(model).norm_after_attention


def norm_after_ffn(model: nn.Module) -> str | None:
    """See `Sites.norm_after_ffn`."""
    return of(model).norm_after_ffn


def ffn_entrance(model: nn.Module) -> str:
    """See `Sites.ffn_entrance`."""
    return of(model).ffn_entrance


def layers_of(model: nn.Module) -> str:
    """See `Sites.layers`."""
    return of(model).layers


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

    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
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
