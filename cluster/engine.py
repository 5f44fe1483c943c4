"""ZeroEngine: gradients, optimizer state and parameters sharded by DeepSpeed ZeRO, stage 0 to 3.

DeepSpeed divides by the number of ranks and of microbatches; the contract of an Engine is a plain sum, so
that the loop alone decides what is divided by what. `managed_gradient_accumulation: false` makes `step()`
the end of an accumulation, however many microbatches it had.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from peft_service.attached import Attached
from peft_service.errors import InvalidRequest
from peft_service.spec import Training
from peft_service.train import adamw, full_copy

MOMENTS = ("exp_avg", "exp_avg_sq")


def prepare_process() -> None:
    """Join DeepSpeed to the process group that exists (Ray Train's or torchrun's). Call once per process."""
    # init_distributed would compile this C++ operator: a minute, and a crash where there is no compiler.
    # It serves DeepSpeed's inference collectives only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.logger.setLevel("WARNING")
    deepspeed.init_distributed(
        dist_backend=dist.get_backend() if dist.is_initialized() else "gloo", verbose=False
    )


class ZeroEngine:
    """An Engine on all ranks of the process group; every method is collective."""

    def __init__(
        self,
        attached: Attached,
        training: Training,
        *,
        stage: int,
        precision: str,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        device: torch.device | str = "cpu",
        persistence_threshold: int = 100_000,
    ) -> None:
        """The model has its trainable parameters in float32; bf16 trains bf16 copies of them with float32
        masters.

        Parameters of at most `persistence_threshold` elements are not sharded by stage 3.

        Raises:
            InvalidRequest: a combination that DeepSpeed computes wrongly or does not have.
        """
        if precision == "bf16" and stage == 0:
            raise InvalidRequest(
                "zero_stage 0 with bf16 has another rounding than the stages 1 to 3 and loses accuracy; "
                "use 1.",
                param="training.zero_stage",
            )
        if offload_parameters and stage != 3:
            raise InvalidRequest(
                "offload_parameters needs zero_stage 3.", param="training.offload_parameters"
            )
        if offload_optimizer and stage == 0:
            raise InvalidRequest(
                "offload_optimizer needs zero_stage 1 to 3.", param="training.offload_optimizer"
            )
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = torch.device(device)
        self.stage = stage
        self.max_grad_norm = training.max_grad_norm
        self.updates = 0
        model = attached.model
        zero: dict[str, Any] = {
            "stage": stage,
            "overlap_comm": stage == 2 and self.device.type == "cuda",
            "stage3_param_persistence_threshold": persistence_threshold,
        }
        if offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        if offload_parameters:
            zero["offload_param"] = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        optimizer = adamw(attached, training)
        if stage == 0:
            optimizer.register_step_pre_hook(self._clip_or_drop)
        self.engine, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=[p for group in optimizer.param_groups for p in group["params"]],
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "managed_gradient_accumulation": False,
                "gradient_clipping": 0.0 if stage == 0 else self.max_grad_norm,
                "bf16": {"enabled": precision == "bf16", "check_grad_overflow": True},
                "data_types": {"grad_accum_dtype": "fp32"},
                "zero_optimization": zero,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "steps_per_print": 10**9,
            },
        )
        # DeepSpeed's wrapper, not the bare module: ZeRO-3 gathers parameters in its forward hooks.
        self.model: nn.Module = self.engine
        self.parameters = {name: p for name, p in self.engine.module.named_parameters() if p.requires_grad}
        self._norm = math.nan
        self._reduced = False

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss * self.world)

    def step(self, learning_rate: float) -> float:
        for group in self._optimizer().param_groups:
            group["lr"] = learning_rate * group["ratio"]
        if self.stage in (1, 2) and not self._optimizer().state:
            # DeepSpeed links moments to parameters after its first group's step, when other groups have none.
            self._create_moments()
        with self._not_reduced_twice():
            self.engine.step()
        if self.stage == 0:
            norm = self._norm
        else:
            norm = float(self.engine.get_global_grad_norm())
            if self.engine.optimizer.overflow:
                norm = math.nan if math.isfinite(norm) else norm
        if math.isfinite(norm):
            self.updates += 1
        return norm

    def all_sum(self, x: Tensor) -> Tensor:
        total = x.to(self.device, copy=True)
        if self.world > 1:
            dist.all_reduce(total)
        return total

    def gradient(self, name: str) -> Tensor:
        self._reduce()
        parameter = self.parameters[name]
        if self.stage == 0:
            gradient = parameter.grad
        else:
            gradient = safe_get_full_grad(parameter)
        if gradient is None:
            return torch.zeros(getattr(parameter, "ds_shape", parameter.shape), device=self.device)
        full: Tensor = gradient.float()
        return full

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        with deepspeed.zero.GatheredParameters(
            list(self.parameters.values()), modifier_rank=None, enabled=self.stage == 3
        ):
            yield

    def state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {"step": torch.tensor(self.updates)}
        for name, parameter in self.parameters.items():
            if self.stage == 0:
                moments = self._optimizer().state.get(parameter, {})
                values = {key: moments.get(key, torch.zeros_like(parameter)) for key in MOMENTS}
                values["param"] = parameter
            else:
                values = {"param": safe_get_full_fp32_param(parameter)}
                for key in MOMENTS:
                    values[key] = (
                        safe_get_full_optimizer_state(parameter, key)
                        if self.updates
                        else torch.zeros_like(values["param"])
                    )
            for key, value in values.items():
                state[f"{key}.{name}"] = full_copy(value)
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.updates = int(state["step"])
        if self.updates or self._optimizer().state:
            self._create_moments()
        if self.stage == 3:
            with (
                deepspeed.zero.GatheredParameters(list(self.parameters.values()), modifier_rank=0),
                torch.no_grad(),
            ):
                if self.rank == 0:
                    for name, parameter in self.parameters.items():
                        parameter.copy_(state[f"param.{name}"])
        for name, parameter in self.parameters.items():
            if self.stage != 3:
                with torch.no_grad():
                    parameter.copy_(state[f"param.{name}"])
            if self.stage == 0:
                if self.updates:
                    for key in MOMENTS:
                        self._optimizer().state[parameter][key].copy_(state[f"{key}.{name}"])
                continue
            if self.stage == 3:
                # safe_set_full_… fails where a size is no multiple of the number of ranks.
                safe_set_local_fp32_param(parameter, self._share(state[f"param.{name}"]))
            else:
                safe_set_full_fp32_param(parameter, state[f"param.{name}"].to(self.device))
            for key in MOMENTS if self.updates else ():
                if self.stage == 3:
                    safe_set_local_optimizer_state(parameter, self._share(state[f"{key}.{name}"]), key)
                else:
                    safe_set_full_optimizer_state(parameter, state[f"{key}.{name}"].to(self.device), key)

    def trainable(self) -> dict[str, Tensor]:
        with self.gathered():
            return {name: p.detach().cpu().clone().contiguous() for name, p in self.parameters.items()}

    def close(self) -> None:
        """Give the memory and hooks back, so that another engine can be built in this process."""
        self.engine.destroy()

    def _share(self, full: Tensor) -> Tensor:
        """This rank's part of a tensor under stage 3; the last ranks' are filled up with zeros."""
        size = -(-full.numel() // self.world)
        flat = nn.functional.pad(full.flatten(), (0, size * self.world - full.numel()))
        return flat.narrow(0, size * self.rank, size).to(self.device)

    def _reduce(self) -> None:
        """Complete the gradients, as DeepSpeed's `step` otherwise does at its beginning: before that they are
        this rank's own (stages 0, 1) or nowhere that DeepSpeed's accessors look (2, and 3 with offload)."""
        if self._reduced:
            return
        self._reduced = True
        if self.stage >= 2:
            self.engine.optimizer.finalize_gradient_accumulation_boundary()
        else:
            self.engine._running_engine_step = True  # what makes this backward pass the last one
            self.engine.allreduce_gradients()
            self.engine._running_engine_step = False

    @contextlib.contextmanager
    def _not_reduced_twice(self) -> Iterator[None]:
        if not self._reduced:
            yield
            return
        self._reduced = False
        if self.stage >= 2:
            self.engine.optimizer.finalize_gradient_accumulation_boundary = lambda: None
            try:
                yield
            finally:
                del self.engine.optimizer.finalize_gradient_accumulation_boundary
        else:
            self.engine.enable_backward_allreduce = False
            try:
                yield
            finally:
                self.engine.enable_backward_allreduce = True

    def _optimizer(self) -> torch.optim.Optimizer:
        """torch's optimizer, which ZeRO wraps from stage 1 on."""
        outer = self.engine.optimizer
        return outer if self.stage == 0 else outer.optimizer  # type: ignore[no-any-return]

    def _create_moments(self) -> None:
        """torch's Adam creates its state at the first step: create it now, keyed as ZeRO keys it."""
        optimizer = self._optimizer()
        step = torch.tensor(float(self.updates))
        if self.stage == 0:
            flats = list(self.parameters.values())
        elif self.stage == 3:
            flats = self.engine.optimizer.fp32_partitioned_groups_flat
        elif hasattr(self.engine.optimizer, "fp32_groups_flat_partition"):
            flats = self.engine.optimizer.fp32_groups_flat_partition  # bf16 at stage 1 is a class of its own
        else:
            flats = self.engine.optimizer.single_partition_of_fp32_groups
        for flat in flats:
            if flat in optimizer.state:
                # In place: ZeRO links a parameter to its moments once, and to these tensors.
                for key in MOMENTS:
                    optimizer.state[flat][key].zero_()
                optimizer.state[flat]["step"] = step.clone()
                continue
            optimizer.state[flat] = {"step": step.clone(), **{key: torch.zeros_like(flat) for key in MOMENTS}}
        if self.stage in (1, 2):
            # Private, but the only thing that links the moments to the parameters before a first step; a test
            # resumes at every stage.
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _clip_or_drop(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        """Stage 0 has no ZeRO optimizer, and DeepSpeed then neither tells the norm nor looks whether it is
        finite."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._norm = float(nn.utils.clip_grad_norm_(parameters, self.max_grad_norm))
        if not math.isfinite(self._norm):
            optimizer.zero_grad(set_to_none=True)  # an update without gradients moves nothing
