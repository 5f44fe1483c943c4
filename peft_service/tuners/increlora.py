"""IncreLoRA at work: the gradient of a layer's whole change, its score, and who grows.

Shapes: ΔW = s B diag(e) A and its gradient G are (d_out, d_in); of both only some rows are taken.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_service.methods import Case
from peft_service.tuners.low_rank import broadcast, down, up
from peft_service.tuners.svd import TripleLayers

if TYPE_CHECKING:
    from peft_service.methods.increlora import IncreLoRA
    from peft_service.train import Engine

RESERVE = 1e-5
"""e of a triple that learns ahead, and its first value when it is put to work."""


class Tap(torch.autograd.Function):
    """y, and on the way back G += (dL/dy)ᵀ x on some rows.

    x is saved through autograd, so that gradient checkpointing may recompute it.
    """

    @staticmethod
    def forward(ctx: Any, y_BTD: Tensor, x_BTD: Tensor, sink: "Sink") -> Tensor:
        ctx.save_for_backward(x_BTD)
        ctx.sink = sink
        return y_BTD.view_as(y_BTD)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x_BTD,) = ctx.saved_tensors
        ctx.sink.add(gradient, x_BTD)
        return gradient, None, None


class Sink:
    """G of one layer, on the rows `rows`, summed over microbatches."""

    def __init__(self, d_out: int, d_in: int, rows: int) -> None:
        count = min(rows, d_out)
        self.rows = torch.arange(count) * d_out // count
        self.share = count / d_out
        self.size = d_out * d_in
        self.d_in = d_in
        self.total: Tensor | None = None
        self.open = True

    def add(self, gradient: Tensor, x: Tensor) -> None:
        if not self.open:
            return
        chosen = gradient.flatten(0, -2)[:, self.rows.to(gradient.device)].float()
        part = chosen.T @ x.flatten(0, -2).float()
        self.total = part if self.total is None else self.total + part

    def take(self, device: torch.device) -> Tensor:
        """G so far; empties it."""
        found = self.total
        self.total = None
        return torch.zeros(len(self.rows), self.d_in, device=device) if found is None else found.to(device)


class Grown(TripleLayers):
    def __init__(self, model: Any, method: "IncreLoRA", case: Case) -> None:
        super().__init__(model, method.scaling, RESERVE, method.orthogonal, case.seed)
        self.method = method
        self.decisions = method.decisions(case)
        count = len(self.layers)
        self.ranks = [1] * count
        self.mean = torch.zeros(count, dtype=torch.float64)
        self.spread = torch.zeros(count, dtype=torch.float64)
        self.sinks = []
        for layer in self.layers.values():
            sink = Sink(up(layer).out_features, down(layer).in_features, method.score_rows)
            self.sinks.append(sink)
            layer.register_forward_hook(_tapped(sink))
        self.switch()

    def switch(self) -> None:
        """Put as many triples to work as `ranks` says, and while ranks grow one more in reserve."""
        for triples, rank in zip(self.triples(), self.ranks, strict=True):
            place = torch.arange(triples.out_features, device=triples.gate.device)
            triples.learning.copy_(place < rank)
            triples.resting.copy_((place == rank) if self.growing() else torch.zeros_like(place))
        for sink in self.sinks:
            sink.open = self.growing()

    def growing(self) -> bool:
        return sum(self.ranks) < self.method.rank * len(self.ranks)

    def before_step(self, step: int) -> None:
        for sink in self.sinks:
            sink.total = None

    def before_update(self, engine: "Engine", step: int) -> None:
        if not self.growing():
            return
        now = []
        for (a, e, b), sink in zip(self.values(engine).values(), self.sinks, strict=True):
            gradient = engine.all_sum(sink.take(engine.device))
            change = self.scaling * (b[sink.rows.to(b.device)] * e) @ a
            now.append(float((change * gradient.to(change.device)).abs().sum()) / sink.share / sink.size**0.5)
        score = torch.tensor(now, dtype=torch.float64, device=engine.device)
        broadcast([score])
        score = score.cpu()
        self.mean = self.method.beta1 * self.mean + (1 - self.method.beta1) * score
        self.spread = self.method.beta2 * self.spread + (1 - self.method.beta2) * (score - self.mean).abs()

    def after_update(self, engine: "Engine", step: int) -> None:
        if step + 1 not in self.decisions or not self.growing():
            return
        done = (self.decisions.index(step + 1) + 1) / len(self.decisions)
        count = len(self.ranks)
        wanted = count + round((self.method.rank - 1) * count * done)
        self.ranks = grown(self.ranks, (self.mean * self.spread).tolist(), wanted, self.method.max_rank)
        self.switch()

    def state(self) -> dict[str, Tensor]:
        own = {"ranks": torch.tensor(self.ranks), "mean": self.mean.clone(), "spread": self.spread.clone()}
        return {**super().state(), **own}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        self.ranks = [int(rank) for rank in state["ranks"]]
        self.mean, self.spread = state["mean"].clone(), state["spread"].clone()
        self.switch()


def _tapped(sink: Sink) -> Any:
    def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if sink.open and module.training and torch.is_grad_enabled() and output.requires_grad:
            return Tap.apply(output, args[0], sink)  # type: ignore[no-any-return, no-untyped-call]
        return output

    return hook


def grown(ranks: list[int], scores: list[float], wanted: int, limit: int) -> list[int]:
    """`ranks` with their sum raised to `wanted`: one more for each of the best, round after round."""
    ranks = list(ranks)
    order = sorted(range(len(ranks)), key=lambda index: -scores[index])
    while (missing := wanted - sum(ranks)) > 0:
        able = [index for index in order if ranks[index] < limit]
        for index in able[:missing]:
            ranks[index] += 1
    return ranks
