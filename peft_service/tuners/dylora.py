"""DyLoRA at work: every A gives only its first b outputs, scaled so that alpha / r becomes alpha / b.

Shapes: A is (r, d_in), B (d_out, r).
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_service.attached import Attached
from peft_service.tuners.low_rank import down, factors_of, lora_layers, save_factors, up


class Truncated(nn.Linear):
    """x -> (r / b) (A x with all but the first b zeroed)."""

    trained = 1
    """b while it trains."""
    served = 1
    """b otherwise."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        b = self.trained if self.training else self.served
        hidden = F.linear(x_BTD, self.weight)
        kept = torch.arange(self.out_features, device=hidden.device) < b
        return hidden * (kept.to(hidden.dtype) * (self.out_features / b))


class AnyRank(Attached):
    def __init__(self, model: Any, alpha: float, seed: int, frozen: bool, served: int) -> None:
        super().__init__(model)
        self.alpha, self.seed, self.served = alpha, seed, served
        self.layers = lora_layers(model)
        self.rank = down(next(iter(self.layers.values()))).out_features
        self.sampled = self.rank
        for layer in self.layers.values():
            module = down(layer)
            module.__class__ = Truncated
            module.served, module.trained = served, self.rank
            if frozen:
                module.weight.register_hook(self._row)
                up(layer).weight.register_hook(self._column)

    def before_step(self, step: int) -> None:
        self.sampled = sampled_rank(self.seed, step, self.rank)
        for layer in self.layers.values():
            down(layer).trained = self.sampled

    def _row(self, gradient_RD: Tensor) -> Tensor:
        only = torch.arange(len(gradient_RD), device=gradient_RD.device) == self.sampled - 1
        kept: Tensor = gradient_RD * only[:, None]
        return kept

    def _column(self, gradient_DR: Tensor) -> Tensor:
        only = torch.arange(gradient_DR.shape[1], device=gradient_DR.device) == self.sampled - 1
        kept: Tensor = gradient_DR * only
        return kept

    def save(self, trainable: Mapping[str, Tensor], directory: Path, base: tuple[str, str | None]) -> None:
        b = self.served
        factors = {
            name: (down_RD[:b], up_DR[:, :b])
            for name, (down_RD, up_DR) in factors_of(self.layers, trainable).items()
        }
        save_factors(self.model, factors, self.alpha / b, trainable, directory, base)


def sampled_rank(seed: int, step: int, rank: int) -> int:
    """b of a step, uniform in 1..rank: the same on every rank and after every resume."""
    digest = hashlib.sha256(f"dylora {seed} {step}".encode()).digest()
    return 1 + int.from_bytes(digest[:8], "little") % rank
