"""Several adapters on one base at once, trained together and saved each on its own.

PEFT keeps one type of adapter a model. So each part is injected into the same transformers model, one after
the other, and a prompt or prefix is wrapped around at the end; what a part freezes of an earlier one is
opened again.
Every part has its own PeftModel over that one model. Later parts wrap earlier ones, which changes the names
of those; a part's file has the names that its parameters had before, so that it loads alone, and that all
load in this order (`peft_service.artifact`).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_service.artifact import COMPOSITE, COMPOSITE_FORMAT
from peft_service.attached import Attached, head_modules
from peft_service.methods import Case, Material, Method
from peft_service.tuners.in_place import InPlace, is_in

if TYPE_CHECKING:
    from peft_service.batches import Batch


MODULES = ".modules_to_save.default."


class Together(Attached):
    """`parts`: in the order of attaching; `own`: the parameters of each, by id; `ratios`: of their rates."""

    def __init__(self, parts: Sequence[Attached], own: Sequence[set[int]], ratios: Sequence[float]):
        super().__init__(parts[-1].model)
        self.parts, self.ratios = list(parts), list(ratios)
        outer = {id(parameter): name for name, parameter in self.model.named_parameters()}
        trained = set().union(*own)
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        self.names: list[dict[str, str]] = []
        """Of each part: name in the whole model -> in the part's PeftModel."""
        for part, mine in zip(parts, own, strict=True):
            named = part.model.named_parameters()
            if isinstance(part, InPlace):
                # Its names are the base's own; the head that trains is the copy that PEFT has made of it.
                named = ((_plain(name), p) for name, p in named if id(p) in mine or MODULES in name)
                self.names.append({outer[id(p)]: name for name, p in named})
            else:
                self.names.append({outer[id(p)]: name for name, p in named if id(p) in mine})

    def ratio(self, name: str) -> float:
        # A head is in all of them, and goes with the first.
        number = next(n for n, names in enumerate(self.names) if name in names)
        return self.ratios[number] * self.parts[number].ratio(self.names[number][name])

    def inputs(self, batch: "Batch") -> dict[str, Any]:
        given: dict[str, Any] = {}
        for part in self.parts:
            given |= part.inputs(batch)
        return given

    def before_step(self, step: int) -> None:
        for part in self.parts:
            part.before_step(step)

    def penalty(self) -> Tensor | None:
        found = [penalty for part in self.parts if (penalty := part.penalty()) is not None]
        return torch.stack(found).sum() if found else None

    def state(self) -> dict[str, Tensor]:
        return {
            f"{n}.{key}": tensor for n, part in enumerate(self.parts) for key, tensor in part.state().items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for n, part in enumerate(self.parts):
            mine = f"{n}."
            part.load_state({k.removeprefix(mine): t for k, t in state.items() if k.startswith(mine)})

    def save(self, trainable: Mapping[str, Tensor], directory: Path, base: "tuple[str, str | None]") -> None:
        places = [f"part-{number}" for number in range(len(self.parts))]
        for part, names, place in zip(self.parts, self.names, places, strict=True):
            own = {name: trainable[outer] for outer, name in names.items()}
            part.save(own, directory / place, base)
            if not isinstance(part, InPlace):
                _as_alone(directory / place / "adapter_model.safetensors")
        told = {"format": COMPOSITE_FORMAT, "parts": places}
        (directory / COMPOSITE).write_text(json.dumps(told, indent=2) + "\n")


def _as_alone(path: Path) -> None:
    """Name the tensors as if nothing lay around the layers that they are of."""
    save_file({name.replace(".base_layer", ""): t for name, t in load_file(path).items()}, path)


def _plain(name: str) -> str:
    """The name that a parameter of the base, or of PEFT's copy of its head, has in the base alone."""
    return name.replace(".base_layer", "").replace(MODULES, ".")


def attach(
    model: Any, case: Case, material: Material, methods: Sequence[Method], ratios: Sequence[float]
) -> Together:
    """All `methods` on `model`, in this order."""
    parts: list[Attached] = []
    own: list[set[int]] = []
    for method in methods:
        # PEFT would take this part for another adapter of the same type, and overwrite its settings.
        model.__dict__.pop("peft_config", None)
        part = method.attach(model, case, material)
        parts.append(part)
        earlier = set().union(*own)
        # Beside an in-place part there is one of PEFT, which trains a copy of the head instead.
        heads = head_modules(model) if isinstance(part, InPlace) else ()
        own.append(
            {
                id(parameter)
                for name, parameter in part.model.named_parameters()
                if parameter.requires_grad
                and not is_in(name, heads)
                and (id(parameter) not in earlier or MODULES in name)
            }
        )
    return Together(parts, own, ratios)
