"""VeRA at work: peft's layers, and the shared projections in the checkpoint and in the file."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_service.attached import Attached, head_modules
from peft_service.methods import Case
from peft_service.targets import linear_layers, shortest
from peft_service.tasks import PEFT_TASKS

if TYPE_CHECKING:
    from peft_service.methods.vera import VeRA

PROJECTIONS = ("base_model.vera_A.default", "base_model.vera_B.default")


class Projected(Attached):
    def __init__(self, model: Any, stored: bool) -> None:
        super().__init__(model)
        self.stored = stored

    def projections(self) -> dict[str, Tensor]:
        whole: Any = self.model
        return dict(
            zip(PROJECTIONS, (whole.base_model.vera_A.default, whole.base_model.vera_B.default), strict=True)
        )

    def state(self) -> dict[str, Tensor]:
        return {name: tensor.detach().float().cpu().clone() for name, tensor in self.projections().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self.projections().items():
            tensor.copy_(state[name])

    def save(self, trainable: Mapping[str, Tensor], directory: Path, base: tuple[str, str | None]) -> None:
        fixed = {name: tensor.detach().cpu().clone() for name, tensor in self.projections().items()}
        self.save_peft(self.model, {**trainable, **(fixed if self.stored else {})}, directory, base)


def attach_vera(model: Any, case: Case, method: "VeRA") -> Projected:
    """peft's VeRA on the method's targets; A and B are drawn from its own seed."""
    from peft import TaskType, VeraConfig, get_peft_model

    config = VeraConfig(
        r=method.rank,
        d_initial=method.d_initial,
        vera_dropout=method.dropout,
        target_modules=shortest(model, linear_layers(model, method.targets)),
        projection_prng_key=method.projection_seed,
        save_projection=method.save_projection,
        modules_to_save=head_modules(model) or None,
        task_type=TaskType(PEFT_TASKS[case.task]),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        return Projected(get_peft_model(model, config), method.save_projection)
