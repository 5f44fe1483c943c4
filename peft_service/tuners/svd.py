"""LoRA as triples: y = W x + s B diag(e) A x, what AdaLoRA and IncreLoRA share.

Each of the r triples (a row of A, a value of e, a column of B) can be switched off; the artifact is a plain
LoRA with diag(e) A for A, of the triples that are left. Both methods ask A and B to be orthogonal: a
penalty whose value comes out of the layers' own forward pass, since under ZeRO-3 a parameter is whole only
there.

Shapes: A (r, d_in), B (d_out, r), e (r).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_service.attached import Attached
from peft_service.tuners.low_rank import ADAPTER, down, lora_layers, names_of, save_factors, up

if TYPE_CHECKING:
    from peft_service.train import Engine


class Part(nn.Linear):
    """A or B; `seen` is how far it is from orthogonal, as the last forward pass found it."""

    watched = False
    seen: Tensor | None = None

    def whole(self, alive: Tensor, by_row: bool) -> Tensor:
        """The weight; a copy where the penalty needs it, so that its gradient is added up in one place."""
        if not (self.watched and self.training and torch.is_grad_enabled()):
            return self.weight
        weight = self.weight.clone()
        vectors = (weight if by_row else weight.T)[alive].float()
        gram = vectors @ vectors.T
        self.seen = torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device))
        return weight


class Triples(Part):
    """x -> e * (A x)."""

    gate: nn.Parameter
    offset: Tensor
    """What the parameter `gate` was when its triple was last set to zero: e is the difference."""
    learning: Tensor
    """1 where e learns."""
    resting: Tensor
    """1 where e has the value of `gate` and does not learn."""

    def strength(self) -> Tensor:
        """e."""
        return (self.gate - self.offset) * self.learning + self.gate.detach() * self.resting

    def alive(self) -> Tensor:
        return (self.learning + self.resting) > 0

    def forward(self, x_BTD: Tensor) -> Tensor:
        return F.linear(x_BTD, self.whole(self.alive(), True)) * self.strength()


class Columns(Part):
    """h -> B h."""

    triples: tuple[Triples]
    """In a tuple: it is not this module's child."""

    def forward(self, hidden_BTR: Tensor) -> Tensor:
        return F.linear(hidden_BTR, self.whole(self.triples[0].alive(), False))


class TripleLayers(Attached):
    """A PeftModel whose LoRA layers are triples; what is switched on is decided by a subclass."""

    def __init__(self, model: Any, scaling: float, gate: float, orthogonal: float, seed: int) -> None:
        """e starts at `gate`, A and B normal with standard deviation 0.02; `orthogonal` weighs the
        penalty."""
        super().__init__(model)
        self.scaling, self.orthogonal = scaling, orthogonal
        self.layers = lora_layers(model)
        draw = torch.Generator().manual_seed(seed)
        for layer in self.layers.values():
            layer.scaling[ADAPTER] = scaling  # peft's would be by the number of places
            triples, columns = down(layer), up(layer)
            rank, like = triples.out_features, triples.weight
            for module in (triples, columns):
                with torch.no_grad():
                    module.weight.copy_(torch.randn(module.weight.shape, generator=draw) * 0.02)
            triples.__class__, columns.__class__ = Triples, Columns
            triples.register_parameter("gate", nn.Parameter(like.new_full((rank,), gate)))
            triples.register_buffer("offset", like.new_zeros(rank), persistent=False)
            triples.register_buffer("learning", like.new_ones(rank), persistent=False)
            triples.register_buffer("resting", like.new_zeros(rank), persistent=False)
            columns.triples = (triples,)
            triples.watched = columns.watched = orthogonal > 0

    def triples(self) -> list[Any]:
        return [down(layer) for layer in self.layers.values()]

    def penalty(self) -> Tensor | None:
        parts = [part for layer in self.layers.values() for part in (down(layer), up(layer))]
        seen = [part.seen for part in parts if part.seen is not None]
        for part in parts:
            part.seen = None
        return self.orthogonal * torch.stack(seen).sum() / len(parts) if seen else None

    def values(self, engine: "Engine") -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Layer -> copies of (A, e, B), whole. Collective."""
        with engine.gathered(), torch.no_grad():
            return {
                name: (
                    down(layer).weight.detach().float().clone(),
                    down(layer).strength().detach().float().clone(),
                    up(layer).weight.detach().float().clone(),
                )
                for name, layer in self.layers.items()
            }

    def state(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": getattr(down(layer), key).detach().float().cpu().clone()
            for name, layer in self.layers.items()
            for key in ("offset", "learning", "resting")
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name, layer in self.layers.items():
            for key in ("offset", "learning", "resting"):
                getattr(down(layer), key).copy_(state[f"{name}.{key}"])

    def save(self, trainable: Mapping[str, Tensor], directory: Path, base: tuple[str, str | None]) -> None:
        factors = {}
        for name, layer in self.layers.items():
            a, b = (trainable[part] for part in names_of(name))
            triples = down(layer)
            learning, resting, offset = (
                value.detach().cpu().to(a.dtype)
                for value in (triples.learning, triples.resting, triples.offset)
            )
            gate = trainable[gate_of(name)]
            strength = (gate - offset) * learning + gate * resting
            kept = (learning + resting) > 0
            factors[name] = ((a * strength[:, None])[kept], b[:, kept])
        save_factors(self.model, factors, self.scaling, trainable, directory, base)


def gate_of(layer_name: str) -> str:
    """Name of a layer's e."""
    return f"{layer_name}.lora_A.{ADAPTER}.gate"
