"""LoRA with a fixed pair subtracted: y = W x + s (g B A - c B_0 A_0) x, the base untouched.

PiSSA and OLoRA train from W - s B_0 A_0 with B A = B_0 A_0 at the start (g = c = 1); Delta-LoRA adds lambda
* s * (B A - B_K A_K) to W (g = 1 + lambda, c = lambda). Written like this the base needs no change, so it
may be shared, sharded or held in 4 bits, and the sum is a plain LoRA of rank 2 r: s [g B, -c B_0] [A; A_0].

Shapes: A and A_0 are (r, d_in), B and B_0 (d_out, r).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_service.attached import Attached
from peft_service.tuners.low_rank import broadcast, down, factors_of, lora_layers, save_factors, up


class DownPair(nn.Linear):
    """x -> (A x, A_0 x)."""

    fixed: Tensor

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return F.linear(x_BTD, self.weight), F.linear(x_BTD, self.fixed)


class UpPair(nn.Linear):
    """(h, h_0) -> gain * B h - share * B_0 h_0."""

    fixed: Tensor
    gain = 1.0
    share = 1.0

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        live, fixed = pair
        made = F.linear(live, self.weight) * self.gain
        return made - self.share * F.linear(fixed, self.fixed) if self.share else made


class Referenced(Attached):
    """Trains B A beside a fixed pair, which is the values that A and B have when this is made."""

    def __init__(self, model: Any, scaling: float) -> None:
        super().__init__(model)
        self.layers = lora_layers(model)
        self.scaling = scaling
        for layer in self.layers.values():
            for module, kind in ((down(layer), DownPair), (up(layer), UpPair)):
                # The module stays, with its parameters, and only computes more.
                module.__class__ = kind
                module.register_buffer("fixed", module.weight.detach().clone(), persistent=False)
        broadcast([module.fixed for module in self.modules()])

    def modules(self) -> list[Any]:
        return [module for layer in self.layers.values() for module in (down(layer), up(layer))]

    def set_shares(self, gain: float, share: float) -> None:
        for layer in self.layers.values():
            up(layer).gain, up(layer).share = gain, share

    def shares(self) -> tuple[float, float]:
        first = up(next(iter(self.layers.values())))
        return first.gain, first.share

    def state(self) -> dict[str, Tensor]:
        state = {"shares": torch.tensor(self.shares(), dtype=torch.float64)}
        for name, layer in self.layers.items():
            for part, module in (("A", down(layer)), ("B", up(layer))):
                state[f"fixed.{name}.{part}"] = module.fixed.detach().float().cpu().clone()
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        gain, share = (float(value) for value in state["shares"])
        self.set_shares(gain, share)
        for name, layer in self.layers.items():
            for part, module in (("A", down(layer)), ("B", up(layer))):
                module.fixed.copy_(state[f"fixed.{name}.{part}"])

    def save(self, trainable: Mapping[str, Tensor], directory: Path, base: tuple[str, str | None]) -> None:
        gain, share = self.shares()
        factors = {}
        for name, (a, b) in factors_of(self.layers, trainable).items():
            layer = self.layers[name]
            fixed_a, fixed_b = (
                module.fixed.detach().cpu().to(a.dtype) for module in (down(layer), up(layer))
            )
            factors[name] = (a, gain * b)
            if share:
                factors[name] = (torch.cat([a, fixed_a]), torch.cat([gain * b, -share * fixed_b], dim=1))
        save_factors(self.model, factors, self.scaling, trainable, directory, base)
