"""Bottleneck adapters: a small two-layer network beside or behind parts of a frozen transformer.

    δ(x) = s · (U σ(D x + b_D) + b_U)        D (m, d), U (d, m), U and b_U zero at the start

Three placements, each as AdapterHub computes it:

    houlsby   y + δ(y) after self-attention's output projection and after the FFN's (Houlsby et al. 2019,
              arXiv:1902.00751)
    pfeiffer  after the FFN only: h + δ(LN(h + r)) before the residual r is added, where LN is the layer's own
              (Pfeiffer et al. 2020, arXiv:2005.00247); in layers that start with their norms h + δ(h + r)
    parallel  h + δ(r) with s = 4, where r is the residual stream that enters the FFN (He et al. 2021,
              arXiv:2110.04366)

Parameters: a position has 2dm + d + m; houlsby has two a layer, the others one.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_service.tuners import sites
from peft_service.tuners.registration import register
from peft_service.tuners.wrapper import Wrapper, WrapperConfig, WrapperModel, add

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "swish": functional.silu,
    "tanh": torch.tanh,
}
PLACEMENTS = ("houlsby", "pfeiffer", "parallel")


@dataclass
class BottleneckConfig(WrapperConfig):
    placement: Literal["houlsby", "pfeiffer", "parallel"] = field(default="houlsby")
    bottleneck_size: int = field(default=64)
    activation: Literal["relu", "gelu", "swish", "tanh"] = field(default="relu")
    scale: float | None = field(default=None)
    """s; None: 4 in parallel, else 1."""
    dropout: float = field(default=0.0)
    """On what the adapter adds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "BOTTLENECK"
        check_bottleneck(self)


def check_bottleneck(config: Any) -> None:
    """Fill in the scale and refuse values that no adapter can have."""
    from peft.utils import PeftType

    config.peft_type = PeftType(config.peft_type)
    if config.placement not in PLACEMENTS:
        raise ValueError(f"placement is one of {', '.join(PLACEMENTS)}, not {config.placement!r}.")
    if config.activation not in ACTIVATIONS:
        raise ValueError(f"activation is one of {', '.join(ACTIVATIONS)}, not {config.activation!r}.")
    if config.bottleneck_size < 1:
        raise ValueError(f"bottleneck_size is at least 1, not {config.bottleneck_size}.")
    if config.scale is None:
        config.scale = 4.0 if config.placement == "parallel" else 1.0


class Bottleneck(nn.Module):
    """x (…, d) to δ(x) (…, d), in float32."""

    def __init__(
        self, width: int, size: int, activation: str, scale: float, dropout: float, zero: bool
    ) -> None:
        super().__init__()
        self.down = nn.Linear(width, size)
        self.up = nn.Linear(size, width)
        self.activation = activation
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.down.bias)
        if zero:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = ACTIVATIONS[self.activation](self.down(x.to(self.down.weight.dtype)))
        out: Tensor = self.dropout(self.up(inner) * self.scale)
        return out


class Tap(Wrapper):
    """Keeps the residual stream that enters the FFN until the adapter at its end asks for it."""

    def __init__(self, base_layer: nn.Module, containers: tuple[str, ...]) -> None:
        super().__init__(base_layer, containers)
        self.seen: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.running():
            self.seen = args[0] if args else next(iter(kwargs.values()))
        return self.base_layer(*args, **kwargs)

    def take(self) -> Tensor:
        """The stream, once: an activation must not outlive its pass."""
        if self.seen is None:
            raise RuntimeError("the FFN's output was computed without its entrance; run the whole layer.")
        seen, self.seen = self.seen, None
        return seen


class Placed(Wrapper):
    """A wrapper with a residual function: `delta` of the first container, or of a subclass's more."""

    def delta(self, adapter_name: str, x: Tensor) -> Tensor:
        made: Tensor = self.part(adapter_name)(x)
        return made


class AfterLinear(Placed):
    """y + δ(y)."""

    def change(self, adapter_name: str, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return add(output, self.delta(adapter_name, output))


class AroundNorm(Placed):
    """LN(z + δ(LN(z))), where the norm's input z is h + r."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        z, *rest = args
        for name in self.running():
            z = add(z, self.delta(name, self.base_layer(z, *rest, **kwargs)))
        return self.base_layer(z, *rest, **kwargs)


class AtEnd(Placed):
    """h + δ(h + r), or h + δ(r) beside the FFN; r comes from the tap of the same layer."""

    def __init__(self, base_layer: nn.Module, containers: tuple[str, ...], beside: bool) -> None:
        super().__init__(base_layer, containers)
        self.beside = beside
        self.tap: tuple[Tap, ...] = ()  # in a tuple: the tap is no submodule of this one

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.base_layer(*args, **kwargs)
        names = self.running()
        if names:
            stream = self.tap[0].take()
            for name in names:
                output = add(output, self.delta(name, stream if self.beside else output + stream))
        return output


class PlacedModel(WrapperModel):
    """Puts residual functions at the sites of a placement."""

    def targets(self, config: Any) -> str:
        if config.placement == "houlsby":
            return f"{sites.ATTENTION_OUTPUT}|{sites.FFN_OUTPUT}"
        norm = sites.norm_after_ffn(self.model)
        if config.placement == "pfeiffer" and norm is not None:
            return norm
        return f"{sites.FFN_OUTPUT}|{sites.ffn_entrance(self.model)}"

    def layer(self, config: Any, name: str, module: nn.Module) -> Any:
        if config.placement == "houlsby":
            sites.width_of(module)
            return self.kind(AfterLinear)(module, self.containers)
        if re.fullmatch(sites.FFN_OUTPUT, name):
            return self.kind(AtEnd)(module, self.containers, beside=config.placement == "parallel")
        if config.placement == "pfeiffer" and (norm := sites.norm_after_ffn(self.model)):
            if re.fullmatch(norm, name):
                return self.kind(AroundNorm)(module, self.containers)
        elif re.fullmatch(sites.ffn_entrance(self.model), name):
            return Tap(module, self.containers)
        raise ValueError(
            f'placement "{config.placement}" has no place at {name}; "houlsby" wraps any linear layer.'
        )

    def kind(self, placed: type[Any]) -> type[Any]:
        """The class to use for `placed`; a subclass may need another `delta`."""
        return placed

    def join(self) -> None:
        taps = {sites.block_of(name): w for name, w in self.wrappers() if isinstance(w, Tap)}
        for name, wrapper in self.wrappers():
            if isinstance(wrapper, AtEnd):
                tap = taps.get(sites.block_of(name))
                if tap is None:
                    raise ValueError(f"{name}: the entrance of its feed-forward network is not a target.")
                wrapper.tap = (tap,)


class BottleneckModel(PlacedModel):
    prefix = "bottleneck_"
    containers = ("bottleneck_parts",)

    def parts(self, config: Any, name: str, wrapper: Wrapper) -> tuple[nn.Module, ...]:
        if isinstance(wrapper, Tap):
            return (nn.Identity(),)
        return (bottleneck(config, sites.width_of(wrapper.get_base_layer())),)


def bottleneck(config: Any, width: int) -> Bottleneck:
    return Bottleneck(
        width,
        config.bottleneck_size,
        config.activation,
        config.scale,
        config.dropout,
        config.init_weights,
    )


register("bottleneck", BottleneckConfig, BottleneckModel)
