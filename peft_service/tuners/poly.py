"""Poly at work: peft's layers, with a draw of the mix that is the same on every rank and in every microbatch.

Shapes: T tasks, H splits, S skills; logits (T, H * S).
"""

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.poly import PolyLayer
from peft.tuners.poly.router import EPS, PolyRouter
from torch import Tensor

from peft_service.attached import Attached, head_modules
from peft_service.methods import Case
from peft_service.targets import linear_layers, shortest
from peft_service.tasks import PEFT_TASKS

if TYPE_CHECKING:
    from peft_service.batches import Batch
    from peft_service.methods.poly import Poly


class StepRouter(PolyRouter):  # type: ignore[misc]
    """peft's router, but what it draws is set from outside, and a replayed forward pass finds its tasks."""

    uniform: Tensor | None
    """(T, H * S) in (0, 1); None: the mean."""
    tasks: Tensor | None

    def forward(self, task_ids: Tensor | None, input_ids: Tensor) -> Tensor:
        """(B, H, S), each row of S with sum 1."""
        # Gradient checkpointing replays a block after peft has taken back the hooks that pass the tasks on.
        known = self.tasks if task_ids is None else task_ids
        if known is None:
            raise ValueError("Poly needs every row's task: pass task_ids.")
        logits = self.module_logits
        if self.training and self.uniform is not None:
            uniform = self.uniform.to(logits)
            logits = logits + uniform.log() - (-uniform).log1p()
        chosen_BHS = torch.sigmoid(logits[known.to(logits.device)]).view(-1, self.n_splits, self.n_skills)
        mix: Tensor = chosen_BHS / (chosen_BHS.sum(dim=-1, keepdim=True) + EPS)
        return mix


class Routed(Attached):
    def __init__(self, model: Any, seed: int, sampled: bool) -> None:
        super().__init__(model)
        self.seed, self.sampled = seed, sampled
        self.routers: list[Any] = []
        for layer in model.modules():
            if isinstance(layer, PolyLayer):
                router = layer.poly_router["default"]
                # Its parameters and their names stay: the file is peft's own.
                router.__class__ = StepRouter
                router.uniform = router.tasks = None
                self.routers.append(router)

    def inputs(self, batch: "Batch") -> dict[str, Any]:
        for router in self.routers:
            router.tasks = batch.task_B
        return {"task_ids": batch.task_B}

    def before_step(self, step: int) -> None:
        if self.sampled:
            for number, router in enumerate(self.routers):
                width = router.n_splits * router.n_skills
                router.uniform = drawn(self.seed, step, number, (router.n_tasks, width))


def drawn(seed: int, step: int, layer: int, shape: tuple[int, int]) -> Tensor:
    """Uniform values in (0, 1) that depend on the arguments alone, float32."""
    key = hashlib.sha256(f"poly {seed} {step} {layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
    return torch.rand(shape, generator=generator, dtype=torch.float64).clamp(1e-6, 1 - 1e-6).float()


def attach_poly(model: Any, case: Case, method: "Poly") -> Routed:
    """peft's Poly on the method's targets, drawn from the case's seed."""
    from peft import PolyConfig, TaskType, get_peft_model

    config = PolyConfig(
        r=method.rank,
        n_tasks=len(case.tasks),
        n_skills=method.skills,
        n_splits=method.splits,
        target_modules=shortest(model, linear_layers(model, method.targets)),
        modules_to_save=head_modules(model) or None,
        task_type=TaskType(PEFT_TASKS[case.task]),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        made = get_peft_model(model, config)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # peft gives them the dtype of the base
    return Routed(made, case.seed, method.sampled)
