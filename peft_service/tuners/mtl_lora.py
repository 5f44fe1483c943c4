"""MTL-LoRA: one LoRA for several tasks, each with its own scaling and its own mix of up-projections.

    y = W x + s Σ_i softmax_i(w_t / τ) B_i diag(λ_t) A x       s = alpha / rank

Yang et al. 2024, arXiv:2410.09437. A (r, d_in) and B_i (d_out, r), i = 1…n, are shared; λ_t (r,) and w_t (n,)
belong to task t. Every B_i starts at zero, λ and w at one. Row b of a batch has task `row_tasks[b]`, an
argument of forward and generate (peft keeps `task_ids` for methods of its own), or told with `set_tasks`.
Parameters a linear layer: r·d_in + n·r·d_out + T (r + n).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils import PeftType
from torch import Tensor, nn

from peft_service.attached import Attached
from peft_service.tuners import sites
from peft_service.tuners.registration import register
from peft_service.tuners.wrapper import Wrapper, WrapperConfig, WrapperModel, add

if TYPE_CHECKING:
    from peft_service.batches import Batch

QUERY_AND_VALUE = r".*\.(?:query|value|q_proj|v_proj|q_lin|v_lin|q|v|c_attn|query_key_value)"


@dataclass
class MTLLoRAConfig(WrapperConfig):
    tasks: int = field(default=2)
    """T; a task is a number from 0."""
    rank: int = field(default=8)
    alpha: float = field(default=16.0)
    ups: int = field(default=3)
    """n, the number of up-projections that are mixed."""
    temperature: float = field(default=0.05)
    """τ; small values let a task choose one up-projection."""
    dropout: float = field(default=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("MTL_LORA")
        for name in ("tasks", "rank", "ups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}.")
        if self.temperature <= 0:
            raise ValueError(f"temperature is above 0, not {self.temperature}.")


class Tasks:
    """The tasks of the current batch, shared by the tuner and its layers."""

    def __init__(self) -> None:
        self.ids: Tensor | None = None

    def of(self, rows: int, device: torch.device) -> Tensor:
        """One task a row (rows,); beams repeat theirs.

        Raises:
            ValueError: none are set, or they are of another batch.
        """
        if self.ids is None:
            raise ValueError("MTL-LoRA needs every row's task: pass row_tasks, or call set_tasks before.")
        if rows % len(self.ids):
            raise ValueError(f"the batch has {rows} rows, and set_tasks got {len(self.ids)} tasks.")
        return self.ids.to(device).repeat_interleave(rows // len(self.ids))


class TaskLoRA(nn.Module):
    """x (B, …, d_in) and a task a row (B,) to what is added (B, …, d_out)."""

    def __init__(self, d_in: int, d_out: int, config: Any) -> None:
        super().__init__()
        self.scaling = config.alpha / config.rank
        self.temperature = config.temperature
        self.dropout = nn.Dropout(config.dropout)
        self.down = nn.Parameter(torch.empty(config.rank, d_in))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        ups = torch.zeros if config.init_weights else torch.randn
        self.ups = nn.Parameter(ups(config.ups, d_out, config.rank))
        self.task_scale = nn.Parameter(torch.ones(config.tasks, config.rank))
        self.task_mix = nn.Parameter(torch.ones(config.tasks, config.ups))

    def forward(self, x: Tensor, task_B: Tensor) -> Tensor:
        between = (1,) * (x.ndim - 2)
        scale = self.task_scale[task_B].reshape(len(task_B), *between, -1)
        mix = (self.task_mix / self.temperature).softmax(-1)[task_B].reshape(len(task_B), *between, -1)
        inner = self.dropout(x.to(self.down.dtype)) @ self.down.T * scale
        # One product over (n, r) instead of n products.
        mixed = (mix[..., :, None] * inner[..., None, :]).flatten(-2)
        out: Tensor = mixed @ self.ups.transpose(0, 1).flatten(1).T * self.scaling
        return out


class TaskLoRAWrapper(Wrapper):
    batch: Tasks

    def change(self, adapter_name: str, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tasks = self.batch.of(args[0].shape[0], args[0].device)
        return add(output, self.part(adapter_name)(args[0], tasks))

    def obstacle(self, adapter_name: str) -> str | None:
        return "every task has other weights; keep it beside the base"


class MTLLoRAModel(WrapperModel):
    prefix = "mtl_lora_"
    containers = ("mtl_lora_parts",)

    def targets(self, config: Any) -> str:
        if not sites.found(self.model, QUERY_AND_VALUE):
            raise ValueError("cannot tell query and value of this architecture; name target_modules.")
        return QUERY_AND_VALUE

    def layer(self, config: Any, name: str, module: nn.Module) -> TaskLoRAWrapper:
        sites.width_of(module)
        return TaskLoRAWrapper(module, self.containers)

    def parts(self, config: Any, name: str, wrapper: Wrapper) -> tuple[nn.Module, ...]:
        d_in, d_out = _get_in_out_features(wrapper.get_base_layer())
        return (TaskLoRA(d_in, d_out, config),)

    def join(self) -> None:
        wrappers: list[Any] = [wrapper for _, wrapper in self.wrappers()]
        batch = next((w.batch for w in wrappers if "batch" in w.__dict__), Tasks())
        for wrapper in wrappers:
            wrapper.batch = batch

    def set_tasks(self, task_ids: Tensor | list[int] | None) -> None:
        """The task of every row of the batches to come; they stay until the next call.

        A backward pass with gradient checkpointing needs them too.

        Raises:
            ValueError: a task is unknown, or they are not one number a row.
        """
        ids = None if task_ids is None else torch.as_tensor(task_ids, dtype=torch.long)
        if ids is not None:
            known = min(self.peft_config[name].tasks for name in self.active_adapters)
            if ids.ndim != 1 or len(ids) == 0 or not 0 <= int(ids.min()) <= int(ids.max()) < known:
                raise ValueError(f"tasks are a number from 0 to {known - 1} for every row, not {task_ids}.")
        for _, wrapper in self.wrappers():
            wrapper.batch.ids = ids

    @contextmanager
    def tasks(self, task_ids: Tensor | list[int]) -> Iterator[None]:
        """`set_tasks` for the length of a `with`."""
        self.set_tasks(task_ids)
        try:
            yield
        finally:
            self.set_tasks(None)

    def forward(self, *args: Any, row_tasks: Tensor | list[int] | None = None, **kwargs: Any) -> Any:
        if row_tasks is None:
            return self.model.forward(*args, **kwargs)
        if torch.is_grad_enabled():
            # They stay for the backward pass: gradient checkpointing replays the layers there.
            self.set_tasks(row_tasks)
            return self.model.forward(*args, **kwargs)
        with self.tasks(row_tasks):
            return self.model.forward(*args, **kwargs)

    def generate(self, *args: Any, row_tasks: Tensor | list[int] | None = None, **kwargs: Any) -> Any:
        if row_tasks is None:
            return self.model.generate(*args, **kwargs)
        with self.tasks(row_tasks):
            return self.model.generate(*args, **kwargs)


class RowTasks(Attached):
    """Training: every forward pass is told its rows' tasks."""

    def inputs(self, batch: "Batch") -> dict[str, Any]:
        return {"row_tasks": batch.task_B}


register("mtl_lora", MTLLoRAConfig, MTLLoRAModel)
