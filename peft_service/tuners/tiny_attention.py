"""Tiny-attention adapter: a second, very narrow self-attention behind each attention block.

    z = Up(MHA_a(Down(LN(h))))     h ← h + z      Down: d → 3a, MHA over a in n_heads heads, Up: a → d

Zhao et al. 2022, arXiv:2211.01979. h (B, T, d) is what the attention block returns. Up starts at zero. The
adapter sees exactly the positions that the block sees: its mask, or its causality where there is none, and it
keeps its own keys and values in the generation cache. With n experts, each row of a training batch goes
through one of them (`Experts` draws which), and evaluation uses the mean of their weights. Parameters a block
and expert:
3d + 4ad + 4a² + 7a, which is 7d + 11 at a = 1.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.utils import PeftType
from torch import Tensor, nn

from peft_service.attached import Attached
from peft_service.tuners import side_cache, sites
from peft_service.tuners.registration import register
from peft_service.tuners.wrapper import Wrapper, WrapperConfig, WrapperModel, add, first, with_first

if TYPE_CHECKING:
    from peft_service.batches import Batch


@dataclass
class TinyAttentionConfig(WrapperConfig):
    size: int = field(default=1)
    """a, the width of the attention."""
    heads: int = field(default=1)
    experts: int = field(default=1)
    dropout: float = field(default=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("TINY_ATTENTION")
        if self.size < 1 or self.heads < 1 or self.size % self.heads:
            raise ValueError(f"size {self.size} must be a multiple of heads {self.heads}, both at least 1.")
        if self.experts < 1:
            raise ValueError(f"experts is at least 1, not {self.experts}.")


class TinyAttention(nn.Module):
    """h (B, T, d) to z (B, T, d); every parameter has the experts first."""

    def __init__(self, width: int, size: int, heads: int, experts: int, dropout: float, zero: bool) -> None:
        super().__init__()
        self.heads = heads
        self.chosen: Tensor | None = None
        """(B,) the expert of each row of the batch to come; None: row b has expert b mod n."""
        self.dropout = nn.Dropout(dropout)

        def drawn(*shape: int) -> nn.Parameter:
            # All experts start equal: the mean of unrelated draws would be no attention at all.
            one = torch.randn(shape) / math.sqrt(shape[-1])
            return nn.Parameter(one.expand(experts, *shape).clone())

        self.norm_weight = nn.Parameter(torch.ones(experts, width))
        self.norm_bias = nn.Parameter(torch.zeros(experts, width))
        self.down_weight = drawn(3 * size, width)
        self.down_bias = nn.Parameter(torch.zeros(experts, 3 * size))
        self.in_weight = drawn(3 * size, size)
        self.in_bias = nn.Parameter(torch.zeros(experts, 3 * size))
        self.out_weight = drawn(size, size)
        self.out_bias = nn.Parameter(torch.zeros(experts, size))
        self.up_weight = drawn(width, size)
        self.up_bias = nn.Parameter(torch.zeros(experts, width))
        if zero:
            nn.init.zeros_(self.up_weight)

    def forward(
        self,
        h_BTD: Tensor,
        remember: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        scores_mask: Callable[[int, int], Tensor | None],
    ) -> Tensor:
        rows, experts = h_BTD.shape[0], self.up_bias.shape[0]
        chosen = torch.arange(rows) % experts if self.chosen is None else self.chosen
        chosen = chosen.to(h_BTD.device)

        def of(parameter: Tensor) -> Tensor:
            """The weights for each row (B, …), or for all (1, …)."""
            return parameter[chosen] if self.training and experts > 1 else parameter.mean(0, keepdim=True)

        def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return x @ of(weight).transpose(1, 2) + of(bias)[:, None]

        def split(x_BTA: Tensor) -> Tensor:
            return x_BTA.reshape(*x_BTA.shape[:2], self.heads, -1).transpose(1, 2)

        x = h_BTD.to(self.up_weight.dtype)
        x = nn.functional.layer_norm(x, x.shape[-1:]) * of(self.norm_weight)[:, None]
        x = x + of(self.norm_bias)[:, None]
        tripled = linear(x, self.down_weight, self.down_bias).chunk(3, dim=-1)
        weights, biases = self.in_weight.chunk(3, dim=1), self.in_bias.chunk(3, dim=1)
        q, k, v = (
            split(linear(part, weight, bias))
            for part, weight, bias in zip(tripled, weights, biases, strict=True)
        )
        k, v = remember(k, v)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        mask = scores_mask(q.shape[-2], k.shape[-2])
        if mask is not None:
            # A mask of a sliding window has its last keys only.
            k, v, scores = (k, v, scores) if mask.shape[-1] == 1 else _last(mask.shape[-1], k, v, scores)
            scores = scores + mask
        attended = (self.dropout(scores.softmax(-1)) @ v).transpose(1, 2).flatten(2)
        return linear(linear(attended, self.out_weight, self.out_bias), self.up_weight, self.up_bias)


def _last(length: int, k: Tensor, v: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if length > k.shape[-2]:
        raise ValueError(f"{length} keys in the mask, {k.shape[-2]} in the adapter: use a cache that grows.")
    return k[..., -length:, :], v[..., -length:, :], scores[..., -length:]


class TinyAttentionWrapper(Wrapper):
    """Around an attention block: reads its mask and cache, changes the hidden states it returns."""

    layers = 0

    def change(self, adapter_name: str, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        called = side_cache.arguments(self.get_base_layer(), args, kwargs)
        cache = called.get("past_key_values")
        mask = called.get("attention_mask", called.get("mask"))
        hidden = first(output)

        def remember(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            if cache is None:
                return k, v
            return side_cache.remember(cache, (id(self), adapter_name), k, v, self.layers)

        def scores_mask(queries: int, keys: int) -> Tensor | None:
            return additive(without_prefix(mask, cache, keys), self.causal(), queries, keys, hidden.device)

        return with_first(output, add(hidden, self.part(adapter_name)(hidden, remember, scores_mask)))

    def causal(self) -> bool:
        return any(getattr(module, "is_causal", False) for module in self.get_base_layer().modules())


def without_prefix(mask: Any, cache: Any, keys: int) -> Any:
    """The mask of the positions that the adapter has keys of.

    A trained prefix (a part of a hybrid) is in the block's cache, in front, and in nobody else's.
    """
    behind = isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[-1] > keys
    if behind and cache is not None and cache.get_seq_length() == mask.shape[-1]:
        return mask[..., -keys:]
    return mask


def additive(mask: Any, causal: bool, queries: int, keys: int, device: torch.device) -> Tensor | None:
    """A block's mask as float32 to be added to scores (B, H, queries, keys); None: everything is visible.

    Raises:
        ValueError: the attention implementation has masks of another form.
    """
    lowest = torch.finfo(torch.float32).min  # not -inf: a row that sees nothing must stay finite
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(f"masks of the form {type(mask).__name__} are not supported; use sdpa or eager.")
    if mask is not None and mask.ndim == 4:
        mask = mask[:, :1]
        if mask.dtype == torch.bool:
            return torch.zeros(mask.shape, device=device).masked_fill(~mask, lowest)
        visible: Tensor = mask.float().clamp(min=lowest)
        return visible
    together = None
    if causal and queries > 1:
        seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        together = torch.zeros(seen.shape, device=device).masked_fill(~seen, lowest)[None, None]
    if mask is not None:
        padded = torch.zeros(mask.shape, device=device).masked_fill(mask == 0, lowest)[:, None, None]
        together = padded if together is None else torch.minimum(padded, together)
    return together


class TinyAttentionModel(WrapperModel):
    prefix = "tiny_attention_"
    containers = ("tiny_attention_parts",)

    def targets(self, config: Any) -> str:
        if not sites.found(self.model, sites.ATTENTION_BLOCK):
            raise ValueError("cannot tell the attention blocks of this architecture; name target_modules.")
        return sites.ATTENTION_BLOCK

    def layer(self, config: Any, name: str, module: nn.Module) -> TinyAttentionWrapper:
        wrapper = TinyAttentionWrapper(module, self.containers)
        wrapper.layers = side_cache.decoder_layers(self.model)
        return wrapper

    def parts(self, config: Any, name: str, wrapper: Wrapper) -> tuple[nn.Module, ...]:
        width = sites.hidden_size(self.model)
        part = TinyAttention(
            width, config.size, config.heads, config.experts, config.dropout, config.init_weights
        )
        return (part,)

    def average_experts(self, adapter_name: str = "default") -> None:
        """Replace the experts by their mean, for deployment; outputs in evaluation stay the same."""
        for _, wrapper in self.wrappers():
            if adapter_name in wrapper.tiny_attention_parts:
                for parameter in wrapper.part(adapter_name).parameters():
                    parameter.data = parameter.data.mean(0, keepdim=True)
        self.peft_config[adapter_name].experts = 1


class Experts(Attached):
    """Draws an expert for every row: a function of seed, step and the row's tokens.

    So it does not matter how a batch is cut among microbatches and workers, and no batch is too small.
    """

    def __init__(self, model: Any, seed: int) -> None:
        super().__init__(model)
        self.seed, self.step = seed, 0
        self.experts = int(model.peft_config["default"].experts)
        self.parts = [module for module in model.modules() if isinstance(module, TinyAttention)]

    def before_step(self, step: int) -> None:
        self.step = step

    def inputs(self, batch: "Batch") -> dict[str, Any]:
        if self.experts > 1:
            tokens, mask = batch.tokens_BT.cpu(), batch.mask_BT.cpu().bool()
            rows = [row[real].tolist() for row, real in zip(tokens, mask, strict=True)]
            chosen = torch.tensor([drawn(self.seed, self.step, row) % self.experts for row in rows])
            for part in self.parts:
                part.chosen = chosen
        return {}

    def save(self, trainable: Mapping[str, Tensor], directory: Path, base: "tuple[str, str | None]") -> None:
        mean = {
            name: tensor.mean(0, keepdim=True) if f".{TinyAttentionModel.containers[0]}." in name else tensor
            for name, tensor in trainable.items()
        }
        self.save_peft(self.model, mean, directory, base, experts=1)


def drawn(seed: int, step: int, row: list[int]) -> int:
    """A number that is one function of its arguments, on every machine."""
    digest = hashlib.sha256(f"expert {seed} {step} {row}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


register("tiny_attention", TinyAttentionConfig, TinyAttentionModel)
