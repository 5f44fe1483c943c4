"""LoRAHub at work: LoRAs as one, and the search for their weights.

Shapes: N sources, w (N,); of a layer A (R, d_in) and B (d_out, R), where R is the sum of the sources' ranks,
or their common rank.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peft_service.attached import Attached
from peft_service.errors import InvalidRequest, RunFailed
from peft_service.methods import Case, Material
from peft_service.tuners.experts import Expert, experts, layers_of
from peft_service.tuners.low_rank import attach_lora, down, lora_layers, save_factors, up

if TYPE_CHECKING:
    from peft_service.methods.lorahub import LoRAHub

_PREFIX = "base_model.model."
STEP = 0.3
"""Standard deviation of the first mutation, as a share of the bound."""


class Mix(Attached):
    """A LoRA that nothing trains; `found` has what the search says of itself."""

    def __init__(
        self, model: Any, factors: Mapping[str, tuple[Tensor, Tensor]], found: Mapping[str, Any]
    ) -> None:
        super().__init__(model)
        self.factors, self.found = dict(factors), dict(found)

    def save(self, trainable: Mapping[str, Tensor], directory: Path, base: tuple[str, str | None]) -> None:
        save_factors(self.model, self.factors, 1.0, trainable, directory, base)
        (directory / "lorahub.json").write_text(json.dumps(self.found, indent=1) + "\n")


def attach_mix(model: Any, case: Case, method: "LoRAHub", material: Material) -> Mix:
    """
    Raises:
        InvalidRequest: a source cannot be mixed, or there are no rows.
        RunFailed: no mix is better than the base alone.
    """
    if material.sample is None:
        raise InvalidRequest(
            "lorahub chooses weights by rows of the training file, and there are none.", param="adapter.kind"
        )
    rows = material.sample(method.rows)
    found = experts(model, material.sources)
    one = mixed(found, [1.0] * len(found), method.compose)
    rank = max(len(a) for a, _ in one.values())
    # alpha = rank: the scalings are in B already.
    made = attach_lora(model, case, rank=rank, alpha=rank, targets=tuple(one), dropout=0.0)
    made.requires_grad_(False)
    made.eval()
    layers = {name.removeprefix(_PREFIX): layer for name, layer in lora_layers(made).items()}
    targets = max(1, sum(int(material.objective.targets(batch)) for batch in rows))

    def loss(weights: Sequence[float]) -> float:
        put(layers, mixed(found, weights, method.compose))
        with torch.no_grad():
            nll = sum(float(material.objective.loss_sum(made, batch)[0]) for batch in rows)
        return nll / targets + method.l1 * float(np.mean(np.abs(weights)))

    def search() -> dict[str, Any]:
        return searched(loss, len(found), bound=method.bound, evaluations=method.evaluations, seed=case.seed)

    decided: dict[str, Any] = material.decided("lorahub", search)
    if not any(decided["weights"]):
        raise RunFailed(
            "no mix of the sources has less loss on the rows than the base alone: give other sources, a "
            "smaller l1, or train a lora",
            code="no_better_mix",
        )
    factors = mixed(found, decided["weights"], method.compose)
    put(layers, factors)
    return Mix(made, {f"{_PREFIX}{name}": pair for name, pair in factors.items()}, decided)


def mixed(
    found: Sequence[Expert], weights: Sequence[float], compose: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> (A, B) with B A = Σ w_i B_i A_i, or, by factors, A = Σ w_i A_i and B = Σ w_i B_i.

    Raises:
        InvalidRequest: by factors, of unequal ranks.
    """
    made = {}
    for name in layers_of(found):
        pairs = [(w, *expert[name]) for w, expert in zip(weights, found, strict=True) if name in expert]
        if compose == "deltas":
            made[name] = (torch.cat([a for _, a, _ in pairs]), torch.cat([w * b for w, _, b in pairs], 1))
            continue
        if len({len(a) for _, a, _ in pairs}) > 1:
            raise InvalidRequest(
                f"compose factors adds A to A, and the sources' ranks at {name} are "
                f"{', '.join(str(len(a)) for _, a, _ in pairs)}: use compose deltas.",
                param="adapter.compose",
            )
        a_RI = torch.stack([w * a for w, a, _ in pairs]).sum(0)
        made[name] = (a_RI, torch.stack([w * b for w, _, b in pairs]).sum(0))
    return made


def put(layers: Mapping[str, Any], factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Write A and B into peft's layers, with zeros up to their rank."""
    with torch.no_grad():
        for name, (a, b) in factors.items():
            for parameter, value in ((down(layers[name]).weight, a), (up(layers[name]).weight.T, b.T)):
                parameter.zero_()
                parameter[: len(value)] = value.to(parameter)


def searched(
    loss: Callable[[Sequence[float]], float], count: int, *, bound: float, evaluations: int, seed: int
) -> dict[str, Any]:
    """Weights in [-bound, bound] with little loss: {"weights", "loss", "of_the_base", "of_the_sources"}.

    (1+1) evolution strategy: a child replaces its parent if it is not worse; the step grows by 1.5 then, and
    shrinks by 1.5^(-1/4) otherwise, so that it stays where one in five succeeds.
    """
    nothing = np.zeros(count)
    alone = [np.eye(count)[place] * min(1.0, bound) for place in range(count)]
    starts = [nothing, *alone, np.full(count, min(1.0 / count, bound))]
    losses = [loss(start.tolist()) for start in starts]
    best = int(np.argmin(losses))
    parent, least, size = starts[best], losses[best], STEP * bound
    for trial in range(evaluations):
        child = np.clip(parent + size * _normal(seed, trial, count), -bound, bound)
        said = loss(child.tolist())
        if said <= least:
            parent, least, size = child, said, size * 1.5
        else:
            size *= 1.5**-0.25
    return {
        "weights": parent.tolist(),
        "loss": least,
        "of_the_base": losses[0],
        "of_the_sources": losses[1 : count + 1],
    }


def _normal(seed: int, trial: int, count: int) -> NDArray[np.float64]:
    """Normal values from Philox's raw output by Box and Muller: numpy keeps only that stable (NEP 19)."""
    key = hashlib.sha256(f"lorahub {seed} {trial}".encode()).digest()
    raw = np.random.Philox(key=np.frombuffer(key[:16], dtype="<u8")).random_raw(2 * count)
    uniform = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) / float(1 << 53)
    values: NDArray[np.float64] = np.sqrt(-2 * np.log(uniform[:count])) * np.cos(2 * np.pi * uniform[count:])
    return values
