"""LoRA-drop at work: which layers matter, and one A and one B under several layers.

Shapes: A is (r, d_in), B (d_out, r), a layer's input x (B, T, d_in).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_service.attached import Attached
from peft_service.errors import InvalidRequest
from peft_service.methods import Material
from peft_service.tuners.low_rank import down, lora_layers, names_of, save_factors, up

if TYPE_CHECKING:
    from peft_service.methods.lora_drop import LoRADrop

ROWS_PER_UPDATE = 8


class Shared(Attached):
    """LoRA in which some layers have the parameters of another: `owner` is layer -> layer."""

    def __init__(self, model: Any, scaling: float, owner: Mapping[str, str]) -> None:
        super().__init__(model)
        self.scaling, self.owner = scaling, dict(owner)
        self.layers = lora_layers(model)
        for name, other in self.owner.items():
            if name != other:
                down(self.layers[name]).weight = down(self.layers[other]).weight
                up(self.layers[name]).weight = up(self.layers[other]).weight

    def save(self, trainable: Mapping[str, Tensor], directory: Path, base: tuple[str, str | None]) -> None:
        factors = {}
        for name, other in self.owner.items():
            a, b = (trainable[part] for part in names_of(other))
            # safetensors refuses tensors that share memory.
            factors[name] = (a, b) if name == other else (a.clone(), b.clone())
        save_factors(self.model, factors, self.scaling, trainable, directory, base)


def attach_dropped(model: Any, method: "LoRADrop", material: Material) -> Shared:
    """`model` has a LoRA on every layer; afterwards the unimportant of a kind have one in common.

    Raises:
        InvalidRequest: there are no rows to decide by.
    """
    if material.sample is None:
        raise InvalidRequest(
            "lora_drop decides by rows of the training file, and there are none.", param="adapter.kind"
        )
    shares: dict[str, float] = material.decided("lora_drop", lambda: importance(model, method, material))
    return Shared(model, method.scaling, owners(shares, kinds(model), method.kept))


def kinds(model: Any) -> dict[tuple[str, int, int], list[str]]:
    """(last name, d_out, d_in) -> names of such layers."""
    found: dict[tuple[str, int, int], list[str]] = {}
    for name, layer in lora_layers(model).items():
        key = (name.split(".")[-1], up(layer).weight.shape[0], down(layer).weight.shape[1])
        found.setdefault(key, []).append(name)
    return found


def owners(
    shares: Mapping[str, float],
    kinds: Mapping[tuple[str, int, int], list[str]],
    kept: Callable[[int], int],
) -> dict[str, str]:
    """Layer -> the layer whose parameters it has. Ties go to the layer that comes first."""
    made: dict[str, str] = {}
    for names in kinds.values():
        ranked = sorted(names, key=lambda name: -shares[name])
        own = set(ranked[: kept(len(names))])
        rest = [name for name in names if name not in own]
        made |= {name: name if name in own else rest[0] for name in names}
    return made


def importance(model: Any, method: "LoRADrop", material: Material) -> dict[str, float]:
    """Layer -> its share of Σ ‖s B A x‖² among the layers of its kind, after a pass of training over the
    sample. The model is left as it was."""
    assert material.sample is not None
    rows = material.sample(method.sample_rows)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    before = {name: value.detach().clone() for name, value in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=method.sample_rate, weight_decay=0.0)
    was_training = model.training
    model.eval()
    for start in range(0, len(rows), ROWS_PER_UPDATE):
        part = rows[start : start + ROWS_PER_UPDATE]
        targets = max(1, sum(int(material.objective.targets(batch)) for batch in part))
        for batch in part:
            (material.objective.loss_sum(model, batch)[0] / targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    sums = measured(model, method.scaling, rows)
    with torch.no_grad():
        for name, value in trained.items():
            value.copy_(before[name])
    model.train(was_training)
    shares: dict[str, float] = {}
    for names in kinds(model).values():
        total = sum(sums[name] for name in names) or 1.0
        shares |= {name: sums[name] / total for name in names}
    return shares


def measured(model: Any, scaling: float, rows: list[Any]) -> dict[str, float]:
    """Layer -> Σ ‖s B A x‖² over all tokens of the rows."""
    sums: dict[str, float] = {}

    def see(name: str, layer: Any) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            says = up(layer)(down(layer)(args[0].to(down(layer).weight.dtype))) * scaling
            sums[name] = sums.get(name, 0.0) + float(says.double().square().sum())

        return hook

    layers = lora_layers(model)
    handles = [layer.register_forward_pre_hook(see(name, layer)) for name, layer in layers.items()]
    with torch.no_grad():
        for batch in rows:
            model(**batch.inputs)
    for handle in handles:
        handle.remove()
    return {name: sums.get(name, 0.0) for name in layers}
