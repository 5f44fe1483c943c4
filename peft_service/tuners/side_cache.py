"""Keeps what a tuner remembers of earlier tokens in the model's own generation cache.

There it is reordered with the beams, cropped, repeated and dropped with everything else.
"""

import inspect
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache


class SideLayer(DynamicLayer):  # type: ignore[misc]
    """A further layer of a cache; no layer of the model writes to it."""

    def __init__(self, owner: tuple[int, str]) -> None:
        super().__init__()
        self.owner = owner


def remember(
    cache: Any, owner: tuple[int, str], keys: Tensor, values: Tensor, layers: int
) -> tuple[Tensor, Tensor]:
    """Append keys and values (B, H, T, …) to the owner's; returns all so far. `layers`: of the model."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    # A cache made without the model's configuration grows layer by layer, by position.
    while len(cache.layers) < layers and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    mine = next((layer for layer in cache.layers if getattr(layer, "owner", None) == owner), None)
    if mine is None:
        mine = SideLayer(owner)
        cache.layers.append(mine)
    everything: tuple[Tensor, Tensor] = mine.update(keys, values)
    return everything


def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a module is called with, by the names of its parameters; all further keywords among them."""
    bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    return {**bound.pop("kwargs", {}), **bound}


def decoder_layers(model: nn.Module) -> int:
    """An upper bound of the layers that write to a generation cache."""
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    named = ("num_hidden_layers", "num_decoder_layers", "decoder_layers")
    return max(int(getattr(text, name, None) or 0) for name in named)
