"""LoRA-FA at work: A is a constant, and a hook on B's gradient projects it.

The hook sits on the parameter, so it works on the gradients of each microbatch under every ZeRO stage,
where peft's own optimizer for LoRA-FA does nothing; it is linear, so their sum is right.

Shapes: A is (r, d_in), B and its gradient (d_out, r).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_service.attached import Attached
from peft_service.tuners.low_rank import ADAPTER, down, lora_layers, names_of, save_factors, up


class Constant(nn.Module):
    """x -> A x. A buffer, not a frozen parameter: ZeRO-3 leaves it whole, and checkpoints have it."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().clone(), persistent=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return F.linear(x_BTD, self.weight)


class FixedDown(Attached):
    def __init__(self, model: Any, scaling: float, project: bool) -> None:
        super().__init__(model)
        self.scaling = scaling
        self.layers = lora_layers(model)
        self.projections: dict[str, Projection] = {}
        for name, layer in self.layers.items():
            layer.lora_A[ADAPTER] = Constant(down(layer).weight)
            if project:
                self.projections[name] = Projection(down(layer).weight, scaling)
                up(layer).weight.register_hook(self.projections[name])

    def state(self) -> dict[str, Tensor]:
        return {
            name: down(layer).weight.detach().float().cpu().clone() for name, layer in self.layers.items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name, layer in self.layers.items():
            down(layer).weight.copy_(state[name])
            if name in self.projections:
                self.projections[name].read(state[name])

    def save(self, trainable: Mapping[str, Tensor], directory: Path, base: tuple[str, str | None]) -> None:
        factors = {}
        for name, layer in self.layers.items():
            b = trainable[names_of(name)[1]]
            factors[name] = (down(layer).weight.detach().cpu().to(b.dtype), b)
        save_factors(self.model, factors, self.scaling, trainable, directory, base)


class Projection:
    """g -> (1/s²) g (A Aᵀ)⁻¹, a hook of B's gradient."""

    def __init__(self, a: Tensor, scaling: float) -> None:
        self.scaling = scaling
        self.read(a)

    def read(self, a: Tensor) -> None:
        gram = a.detach().double() @ a.detach().double().T
        self.factor = (torch.linalg.inv(gram) / self.scaling**2).float()

    def __call__(self, gradient: Tensor) -> Tensor:
        projected: Tensor = gradient.float() @ self.factor.to(gradient.device)
        return projected.to(gradient.dtype)
