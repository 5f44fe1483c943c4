"""AdaLoRA at work: scores from the gradients of all ranks, and which triples are left.

peft's allocator reads `.grad`, which ZeRO-3 does not have, and takes out more than the budget says when
scores are equal. This one asks the engine, and keeps exactly the budget: among equals the first.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_service.methods import Case
from peft_service.tuners.low_rank import broadcast, names_of
from peft_service.tuners.svd import TripleLayers, gate_of

if TYPE_CHECKING:
    from peft_service.methods.adalora import AdaLoRA
    from peft_service.train import Engine


class Pruned(TripleLayers):
    def __init__(self, model: Any, method: "AdaLoRA", case: Case) -> None:
        super().__init__(model, method.scaling, 0.0, method.orthogonal, case.seed)
        self.method = method
        self.begin = method.first_decision(case)
        self.end = method.last_decision(case)
        self.initial = method.initial_rank * len(self.layers)
        self.target = method.rank * len(self.layers)
        self.mean: dict[str, Tensor] = {}
        """Averaged sensitivity, by parameter."""
        self.spread: dict[str, Tensor] = {}

    def budget(self, updates: int) -> int | None:
        """How many triples stay after so many updates; None: nothing is decided now."""
        if updates == self.end:
            return self.target
        if not self.begin < updates < self.end or updates % self.method.interval:
            return None
        left = 1 - (updates - self.begin) / (self.end - self.begin)
        return int((self.initial - self.target) * left**3 + self.target)

    def before_update(self, engine: "Engine", step: int) -> None:
        if step >= self.end:
            return
        for name, values in self.values(engine).items():
            a, b = names_of(name)
            for key, value in zip((a, gate_of(name), b), values, strict=True):
                # e's gradient is that of the parameter behind it: they differ by a constant.
                now = (value * engine.gradient(key).to(value.device)).abs()
                mean = self.mean.setdefault(key, torch.zeros_like(now))
                spread = self.spread.setdefault(key, torch.zeros_like(now))
                mean.mul_(self.method.beta1).add_(now, alpha=1 - self.method.beta1)
                spread.mul_(self.method.beta2).add_((now - mean).abs(), alpha=1 - self.method.beta2)

    def scores(self) -> Tensor:
        """Of every triple, layer after layer."""
        found = []
        for name in self.layers:
            a, b = names_of(name)
            of_a, of_e, of_b = (self.mean[key] * self.spread[key] for key in (a, gate_of(name), b))
            found.append(of_e + of_a.mean(dim=1) + of_b.mean(dim=0))
        return torch.cat(found)

    def after_update(self, engine: "Engine", step: int) -> None:
        if (budget := self.budget(step + 1)) is None:
            return
        scores = self.scores()
        kept = torch.zeros(len(scores), device=engine.device)
        kept[scores.argsort(descending=True, stable=True)[:budget].to(kept.device)] = 1
        broadcast([kept])
        with engine.gathered(), torch.no_grad():
            for triples, keep in zip(
                self.triples(), torch.split(kept, self.method.initial_rank), strict=True
            ):
                mask = keep.to(triples.offset)
                if step + 1 == self.end:
                    triples.learning.copy_(mask)
                # e = 0 now; until the end it may grow again.
                triples.offset.copy_(torch.where(mask > 0, triples.offset, triples.gate))
        if step + 1 == self.end:
            self.mean, self.spread = {}, {}

    def state(self) -> dict[str, Tensor]:
        state = super().state()
        for kind, values in (("mean", self.mean), ("spread", self.spread)):
            state |= {f"{kind}.{key}": value.detach().cpu().clone() for key, value in values.items()}
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        device = self.triples()[0].offset.device
        for kind, values in (("mean", self.mean), ("spread", self.spread)):
            values.clear()
            values.update(
                {
                    key.removeprefix(f"{kind}."): value.to(device, copy=True)
                    for key, value in state.items()
                    if key.startswith(f"{kind}.")
                }
            )
