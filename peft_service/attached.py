"""A model with a method's parameters on it, as it is trained on one rank: what the loop asks a method.

Most methods need only the defaults. Others sample a rank a step, mask gradients, read them to move a budget,
or train in phases; all of that is a function of the step and of `state`, never of a running generator, so
that ranks agree and a resume is exact.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from peft_service.errors import GateFailed

if TYPE_CHECKING:
    from peft_service.batches import Batch
    from peft_service.train import Engine


class Attached:
    """Values and hooks of one training; subclasses live beside their tuner."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        """What the forward pass calls: a PeftModel, or the transformers model itself."""

    def ratio(self, name: str) -> float:
        """What the learning rate is multiplied with for the parameter `name` (of `model`)."""
        return 1.0

    def inputs(self, batch: "Batch") -> dict[str, Any]:
        """What the forward pass gets besides tokens and mask."""
        return {}

    def before_step(self, step: int) -> None:
        """Called on every rank before the first microbatch of step `step` (from 0)."""

    def rate(self, step: int) -> float:
        """What the scheduled learning rate of the step is multiplied with; 0: gradients are read only."""
        return 1.0

    def phase(self, step: int, steps: int) -> tuple[int, int]:
        """(step within its phase, steps of the phase): each phase has a whole learning-rate schedule."""
        return step, steps

    def penalty(self) -> Tensor | None:
        """Added to the loss of a step, once; never part of the loss that is reported. Asked after each
        forward pass."""
        return None

    def before_update(self, engine: "Engine", step: int) -> None:
        """The step's gradients are complete: `engine.gradient(name)`. Collective."""

    def after_update(self, engine: "Engine", step: int) -> None:
        """The parameters have moved. A phase ends here, through `engine.state` and `engine.load_state`.
        Collective."""

    def state(self) -> dict[str, Tensor]:
        """What a resume needs besides parameters and moments; CPU tensors, the same on every rank."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""

    def save(self, trainable: Mapping[str, Tensor], directory: Path, base: "tuple[str, str | None]") -> None:
        """Write the artifact. `trainable` has every trainable parameter, full size, by its name in `model`;
        `base` is the base's id and revision. One rank calls this while the others hold the parameters
        gathered."""
        self.save_peft(self.model, trainable, directory, base)

    @staticmethod
    def save_peft(
        model: Any,
        trainable: Mapping[str, Tensor],
        directory: Path,
        base: "tuple[str, str | None]",
        **fields: Any,
    ) -> None:
        """The adapter of a PeftModel in PEFT's own layout; `fields` of its configuration are other than the
        live one's, where the file has less than what trained."""
        model.save_pretrained(
            directory, state_dict=dict(trainable), safe_serialization=True, save_embedding_layers=False
        )
        # PEFT's card names the trainer's local path as the base; ours is written when the adapter has a name.
        (directory / "README.md").unlink(missing_ok=True)
        config = directory / "adapter_config.json"
        told = (
            json.loads(config.read_text())
            | {"base_model_name_or_path": base[0], "revision": base[1]}
            | fields
        )
        # A set's order is another in every process, and so the file's bytes would be.
        for live in model.peft_config.values():
            sets = [name for name, value in vars(live).items() if isinstance(value, set)]
            told |= {name: sorted(told[name]) for name in sets if isinstance(told.get(name), list)}
        config.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")


def check_gathered(trainable: Mapping[str, Tensor]) -> None:
    """
    Raises:
        GateFailed: a tensor is empty, as ZeRO-3 leaves what was not gathered.
    """
    empty = sorted(name for name, tensor in trainable.items() if tensor.numel() == 0)
    if empty:
        raise GateFailed(
            f"{len(empty)} of {len(trainable)} gathered tensors are empty, the first is {empty[0]}"
        )


def head_modules(model: Any) -> list[str]:
    """Names of the modules that the task added to the base (`artifact.load_base` found them missing).

    Of a head of several layers, the layers: merging asks every module that PEFT has wrapped for its weight.
    The names that PEFT wraps on its own are left whole.
    """
    found: list[str] = []
    for name in getattr(model, "new_head", ()):
        inner = [
            f"{name}.{child}" for child, module in model.get_submodule(name).named_children()
            if any(True for _ in module.parameters())
        ]  # fmt: skip
        whole = name.rpartition(".")[2] in ("classifier", "score", "qa_outputs")
        found += [name] if whole or not inner else inner
    return found
