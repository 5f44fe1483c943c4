"""Deltas: base weights that were changed in place, as an artifact that is applied, reverted and added.

A directory has `delta.safetensors` and `delta_config.json`. Of every changed tensor the file holds either all
values (`<tensor>`), or the flat positions and values of those that changed (`<tensor>.index` int64,
`<tensor>.value` float32). Values, not differences: so one delta gives the trained weights bit for bit, which
base + (trained - base) would not. Several deltas are added as differences to the base, in float64, so that
their order does not matter. Names are those of the transformers model with the task's head.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_service.errors import InvalidRequest

WEIGHTS = "delta.safetensors"
CONFIG = "delta_config.json"
FORMAT = "peft-service/delta/1"


@dataclass
class Delta:
    """What one training changed."""

    dense: dict[str, Tensor]
    """Tensor -> its values."""
    sparse: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Tensor -> (flat positions, values)."""
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> int:
        """How many weights it sets."""
        return sum(t.numel() for t in self.dense.values()) + sum(v.numel() for _, v in self.sparse.values())


def save(delta: Delta, directory: Path) -> None:
    """Write a delta's two files."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in delta.dense.items()}
    for name, (index, value) in delta.sparse.items():
        tensors |= {f"{name}.index": index.contiguous(), f"{name}.value": value.contiguous()}
    save_file(tensors, directory / WEIGHTS)
    config = {"format": FORMAT, **delta.config}
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load(directory: Path) -> Delta:
    """Read what `save` has written.

    Raises:
        InvalidRequest: it is no delta.
    """
    config = json.loads((directory / CONFIG).read_text())
    if config.get("format") != FORMAT:
        raise InvalidRequest(f"{directory.name}: format {config.get('format')!r} is not {FORMAT!r}")
    tensors = load_file(directory / WEIGHTS)
    sparse = {
        name.removesuffix(".index"): (tensor, tensors[name.removesuffix(".index") + ".value"])
        for name, tensor in tensors.items()
        if name.endswith(".index")
    }
    parts = {f"{name}{end}" for name in sparse for end in (".index", ".value")}
    dense = {name: tensor for name, tensor in tensors.items() if name not in parts}
    return Delta(dense, sparse, config)


class Applied:
    """Deltas that are on a model; `revert` gives the base back, bit for bit."""

    def __init__(self, model: nn.Module, originals: Mapping[str, Tensor]) -> None:
        self.model = model
        self._originals = dict(originals)

    def revert(self) -> None:
        """Put the base's own values back. Twice is once."""
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in self._originals.items():
                parameters[name].copy_(tensor)
        self._originals = {}


def apply(model: nn.Module, deltas: Iterable[Delta]) -> Applied:
    """Put deltas on a model, in place. One sets its values; several add up their differences to the base.

    Raises:
        InvalidRequest: a tensor is not in the model, or has another shape: it is another base.
    """
    several = list(deltas)
    parameters = dict(model.named_parameters())
    wanted = {name for delta in several for name in (*delta.dense, *delta.sparse)}
    if strange := sorted(wanted - parameters.keys()):
        raise InvalidRequest(f"the delta changes {strange[0]}, which this model does not have: another base?")
    for delta in several:
        for name, tensor in delta.dense.items():
            if tensor.shape != parameters[name].shape:
                raise InvalidRequest(
                    f"the delta's {name} is {list(tensor.shape)}, the model's {list(parameters[name].shape)}"
                )
    originals = {name: parameters[name].detach().clone() for name in wanted}
    with torch.no_grad():
        for name in sorted(wanted):
            target, original = parameters[name], originals[name]
            holders = [delta for delta in several if name in delta.dense or name in delta.sparse]
            if len(holders) == 1:
                target.copy_(_values(holders[0], name, original))
                continue
            total = original.double()
            differences = [_values(delta, name, original).double() - original.double() for delta in holders]
            # Floating-point addition of three or more depends on the order: the same set, the same sum.
            for difference in sorted(differences, key=lambda d: (float(d.sum()), float(d.abs().sum()))):
                total = total + difference
            target.copy_(total)
    return Applied(model, originals)


def _values(delta: Delta, name: str, original: Tensor) -> Tensor:
    """The tensor as this delta alone would make it."""
    if name in delta.dense:
        return delta.dense[name].to(original.device)
    index, value = delta.sparse[name]
    made = original.float().flatten().clone()
    made[index.to(original.device)] = value.float().to(original.device)
    return made.view(original.shape)
