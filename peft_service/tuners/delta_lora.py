"""Delta-LoRA at work: from step K on, (1 + lambda) s B A - lambda s B_K A_K instead of s B A.

Both terms carry 1 + lambda times the gradient that the method gives A and B (the base's share of B A counts
as a constant there), so a hook on each divides by it; the gradient of x is that of the whole sum.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_service.tuners.low_rank import down, up
from peft_service.tuners.reference import Referenced, UpPair

if TYPE_CHECKING:
    from peft_service.train import Engine


class Moving(Referenced):
    def __init__(self, model: Any, scaling: float, share: float, begin: int) -> None:
        super().__init__(model, scaling)
        self.share, self.begin = share, begin
        self.set_shares(1.0, 0.0)
        for layer in self.layers.values():
            hook = _undone(up(layer))
            down(layer).weight.register_hook(hook)
            up(layer).weight.register_hook(hook)
        if begin == 0:
            self.set_shares(1.0 + share, share)

    def after_update(self, engine: "Engine", step: int) -> None:
        if step + 1 != self.begin:
            return
        with engine.gathered(), torch.no_grad():
            for module in self.modules():
                module.fixed.copy_(module.weight)
        self.set_shares(1.0 + self.share, self.share)


def _undone(module: UpPair) -> Callable[[Tensor], Tensor]:
    def divide(gradient: Tensor) -> Tensor:
        return gradient if module.gain == 1.0 else gradient / module.gain

    return divide
