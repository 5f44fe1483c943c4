"""UniPELT: LoRA, a prefix and an adapter together, each behind a gate of its own.  Mao et al. 2021,
arXiv:2110.07577.

    q, v        W x + g B A x                       no α / r
    FFN's end   h + g E(x), x = LN(h + r), where no norm follows h + r (Pfeiffer's placement)
    attention   [g P_K; K], [g P_V; V]              keys of a prefix are not rotated
    g           = mean over a row's tokens of sigmoid(w z + b), one number a row and place; z is the input of
    that place

as AdapterHub computes it, but for padding: a mean over pads too would let the answer depend on how a batch is
cut. `gates_see_padding` is AdapterHub's. Parameters a layer: of the adapter 2dm + d + m, of each linear layer
r (d_in + d_out), of the prefix 2 P k, and for each gate the width of its input and one.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft.utils import PeftType
from torch import Tensor, nn

from peft_service.sites import QUERY_AND_VALUE
from peft_service.tuners import prompts, side_cache, sites
from peft_service.tuners.bottleneck import (
    ACTIVATIONS,
    AfterLinear,
    AroundNorm,
    AtEnd,
    Bottleneck,
    PlacedModel,
    Tap,
)
from peft_service.tuners.registration import register
from peft_service.tuners.tiny_attention import additive
from peft_service.tuners.wrapper import Wrapper, WrapperConfig, add


@dataclass
class UniPELTConfig(WrapperConfig):
    rank: int = field(default=8)
    virtual_tokens: int = field(default=10)
    """P."""
    bottleneck_size: int = field(default=48)
    activation: Literal["relu", "gelu", "swish", "tanh"] = field(default="relu")
    gates_see_padding: bool = field(default=False)
    placement: Literal["pfeiffer"] = field(default="pfeiffer")
    """Of the adapter; there is no other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("UNIPELT")
        for name in ("rank", "virtual_tokens", "bottleneck_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}.")
        if self.activation not in ACTIVATIONS or self.placement != "pfeiffer":
            raise ValueError(f"activation is one of {', '.join(ACTIVATIONS)}, and placement is pfeiffer.")


class RealTokens:
    """Which tokens of the pass at work are no padding. Kept until the next pass: a replay needs them too."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None

    def watch(self, model: Any) -> None:
        # PEFT calls a task model's `forward` and so none of its hooks; its body is called.
        body = getattr(model, model.base_model_prefix, model)
        self.handles = [
            module.register_forward_pre_hook(self.see, with_kwargs=True)
            for module in {id(m): m for m in (model, body)}.values()
        ]

    def unwatch(self) -> None:
        for handle in self.handles:
            handle.remove()

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        called = side_cache.arguments(module, args, kwargs)
        mask, ids = called.get("attention_mask"), called.get("input_ids")
        self.mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if self.mask is None or ids is None or ids.shape != self.mask.shape or bool(self.mask[:, 0].all()):
            return None
        if called.get("position_ids") is not None:
            return None
        # Padding on the left: a prefix has no position, and its distance would grow with the padding.
        return args, {**kwargs, "position_ids": (self.mask.long().cumsum(-1) - 1).clamp(min=0)}

    def of(self, x_BTD: Tensor) -> Tensor | None:
        """(B, T), True where there is a token; None: everywhere."""
        if self.mask is None:
            return None
        return self.mask[:, -x_BTD.shape[1] :].to(x_BTD.device).bool()


class Gate(nn.Module):
    """z (B, T, d) to g (B, 1, 1) in (0, 1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, z_BTD: Tensor, real_BT: Tensor | None) -> Tensor:
        opened = torch.sigmoid(self.linear(z_BTD.to(self.linear.weight.dtype)))
        weight = torch.ones_like(opened) if real_BT is None else real_BT[..., None].to(opened.dtype)
        mean: Tensor = (opened * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
        return mean


class GatedLoRA(nn.Module):
    """x (B, T, d_in) to what is added (B, T, d_out)."""

    def __init__(self, d_in: int, d_out: int, rank: int, zero: bool) -> None:
        super().__init__()
        self.gate = Gate(d_in)
        self.down = nn.Linear(d_in, rank, bias=False)
        self.up = nn.Linear(rank, d_out, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        if zero:
            nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        added: Tensor = self.gate(x, real) * self.up(self.down(x.to(self.down.weight.dtype)))
        return added


class GatedBottleneck(nn.Module):
    """x (B, T, d) to what is added."""

    def __init__(self, config: UniPELTConfig, width: int) -> None:
        super().__init__()
        self.gate = Gate(width)
        self.adapter = Bottleneck(
            width, config.bottleneck_size, config.activation, 1.0, 0.0, config.init_weights
        )

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        added: Tensor = self.gate(x, real) * self.adapter(x)
        return added


class GatedPrefix(nn.Module):
    """z (B, T, d) to keys and values of the prefix, each (B, heads, P, head size)."""

    def __init__(self, width: int, tokens: int, heads: int, size: int) -> None:
        super().__init__()
        self.gate = Gate(width)
        self.keys = nn.Parameter(torch.randn(tokens, heads * size))
        self.values = nn.Parameter(torch.randn(tokens, heads * size))
        self.heads = heads

    def forward(self, z: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        gate = self.gate(z, real)[..., None]

        def shaped(x: Tensor) -> Tensor:
            made: Tensor = gate * x.view(len(x), self.heads, -1).transpose(0, 1)[None]
            return made

        return shaped(self.keys), shaped(self.values)


class _Gated:
    tokens: RealTokens
    settings: dict[str, Any]

    def real(self: Any, adapter_name: str, x: Tensor) -> Tensor | None:
        return None if self.settings[adapter_name].gates_see_padding else self.tokens.of(x)

    def delta(self: Any, adapter_name: str, x: Tensor) -> Tensor:
        made: Tensor = self.part(adapter_name)(x, self.real(adapter_name, x))
        return made


class GatedAroundNorm(_Gated, AroundNorm):
    """LN(z + g E(LN(z)))."""


class GatedAtEnd(_Gated, AtEnd):
    """h + g E(h + r)."""


class GatedLinear(_Gated, AfterLinear):
    """W x + g B A x."""

    def change(self, adapter_name: str, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return add(output, self.delta(adapter_name, args[0]))


class Prefixed(_Gated, Wrapper):
    """Around an attention block: puts keys and values in front of its own, through its cache."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        names = self.running()
        if not names:
            return self.base_layer(*args, **kwargs)
        block = self.get_base_layer()
        called = side_cache.arguments(block, args, kwargs)
        hidden: Tensor = called["hidden_states"]
        cache = called.get("past_key_values")
        prefixes = [self.part(name)(hidden, self.real(name, hidden)) for name in names]
        keys, values = (torch.cat(parts, dim=2).to(hidden.dtype) for parts in zip(*prefixes, strict=True))
        causal = any(getattr(module, "is_causal", False) for module in block.modules())
        length = hidden.shape[1]
        seen = length + (cache.get_seq_length() if cache is not None else 0)
        mask = additive(called.get("attention_mask"), causal, length, seen, hidden.device)
        if mask is not None:
            mask = nn.functional.pad(mask, (keys.shape[2], 0)).clamp(min=torch.finfo(hidden.dtype).min)
            mask = mask.to(hidden.dtype)
        called |= {"attention_mask": mask, "past_key_values": Behind(keys, values, cache)}
        return self.base_layer(**called)


class Behind:
    """A cache whose keys and values stand behind a prefix; it keeps none of the prefix."""

    def __init__(self, keys_BHPS: Tensor, values_BHPS: Tensor, cache: Any) -> None:
        self.keys, self.values, self.cache = keys_BHPS, values_BHPS, cache

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, *args, **kwargs)
        return torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)


class UniPELTModel(PlacedModel):
    prefix = "unipelt_"
    containers = ("unipelt_parts",)

    def targets(self, config: Any) -> str:
        if self.model.config.is_encoder_decoder:
            raise ValueError("UniPELT is for encoders and decoders: T5's positions count a prefix as text.")
        found = (sites.ATTENTION_BLOCK, QUERY_AND_VALUE)
        for pattern in found:
            if not sites.found(self.model, pattern):
                raise ValueError("cannot tell the attention of this architecture; name target_modules.")
        return "|".join((*found, super().targets(config)))

    def layer(self, config: Any, name: str, module: nn.Module) -> Any:
        if re.fullmatch(sites.ATTENTION_BLOCK, name):
            return Prefixed(module, self.containers)
        if re.fullmatch(QUERY_AND_VALUE, name):
            sites.width_of(module)
            return GatedLinear(module, self.containers)
        return super().layer(config, name, module)

    def kind(self, placed: type[Any]) -> type[Any]:
        return {AroundNorm: GatedAroundNorm, AtEnd: GatedAtEnd}[placed]

    def parts(self, config: Any, name: str, wrapper: Wrapper) -> tuple[nn.Module, ...]:
        from peft.tuners.tuners_utils import _get_in_out_features

        if isinstance(wrapper, Tap):
            return (nn.Identity(),)
        if isinstance(wrapper, Prefixed):
            shape = prompts.prefix_shape(self.model)
            heads = shape["num_attention_heads"]
            size = shape["token_dim"] // heads
            return (GatedPrefix(sites.hidden_size(self.model), config.virtual_tokens, heads, size),)
        if isinstance(wrapper, GatedLinear):
            d_in, d_out = _get_in_out_features(wrapper.get_base_layer())
            return (GatedLoRA(d_in, d_out, config.rank, config.init_weights),)
        return (GatedBottleneck(config, sites.width_of(wrapper.get_base_layer())),)

    def join(self) -> None:
        super().join()
        gated: list[Any] = [wrapper for _, wrapper in self.wrappers() if isinstance(wrapper, _Gated)]
        tokens = next((w.tokens for w in gated if "tokens" in w.__dict__), None)
        if tokens is None:
            tokens = RealTokens()
            tokens.watch(self.model)
        for wrapper in gated:
            wrapper.tokens = tokens
            wrapper.settings = {**wrapper.__dict__.get("settings", {}), **self.peft_config}

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        watching = {id(w.tokens): w.tokens for _, w in self.wrappers() if isinstance(w, _Gated)}
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for tokens in watching.values():
            tokens.unwatch()
        # PEFT looks for the linear layers where they were before their attention block was put back.
        for name, module in list(model.named_modules()):
            if self.owns(module):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.base_layer)
        return model


register("unipelt", UniPELTConfig, UniPELTModel)
