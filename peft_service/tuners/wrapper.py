"""What the tuners of this package share: a layer that wraps a module and changes what it returns.

Parameters of an adapter live in small modules (`parts`) that are called inside the wrapper's forward: ZeRO-3
gathers them there, and gradient checkpointing replays them there. They are float32; what they compute is cast
to the dtype of the hidden states at the very end.
"""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeGuard

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    check_adapters_to_merge,
    check_target_module_exists,
)
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn

from peft_service.attached import head_modules
from peft_service.methods import Case
from peft_service.tasks import PEFT_TASKS
from peft_service.tuners import sites


class NotMergeable(ValueError):
    """This adapter cannot become part of the base's weights; the message says why."""


@dataclass
class WrapperConfig(PeftConfig):  # type: ignore[misc]
    """Fields that every tuner of this package has; `target_modules` None: the places the paper names."""

    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    """Numbers of the transformer layers that are adapted; None: all."""
    layers_pattern: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    """Modules that train and are saved whole besides the adapter, as a classifier."""
    init_weights: bool = field(default=True)
    """False draws the weights that start at zero too, so that the adapter does something; for tests."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights is not True and self.init_weights is not False:
            raise ValueError(f"init_weights is True or False, not {self.init_weights!r}.")


class Wrapper(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """Calls `base_layer`, then every active adapter's parts, in the order of activation.

    The parts of adapter `a` are `getattr(self, c)[a]` for each container `c`; container names start with the
    tuner's prefix.
    """

    def __init__(self, base_layer: nn.Module, containers: tuple[str, ...]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapter_layer_names = containers
        for container in containers:
            setattr(self, container, nn.ModuleDict())
        self._active_adapter: str | list[str] = []
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self.pristine: dict[str, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        # A model may ask its layer or norm for an attribute, as Qwen does for `attention_type`.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def add(
        self,
        adapter_name: str,
        parts: tuple[nn.Module, ...],
        inference_mode: bool,
        frozen: tuple[str, ...] = (),
    ) -> None:
        """Take in an adapter's modules, one a container; those in `frozen` containers never train."""
        if frozen:
            self.frozen_peft_weight_names[adapter_name] = frozen
        base = next(iter(self.get_base_layer().parameters()), None)
        for container, part in zip(self.adapter_layer_names, parts, strict=True):
            part.float()
            # Meta: peft's low_cpu_mem_usage assigns the loaded tensors itself.
            if base is not None and not any(value.is_meta for value in part.parameters()):
                part.to(base.device)
            getattr(self, container)[adapter_name] = part
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def part(self, adapter_name: str) -> nn.Module:
        """The adapter's module in the first container."""
        module: nn.Module = getattr(self, self.adapter_layer_names[0])[adapter_name]
        return module

    def running(self) -> list[str]:
        """Adapters that change this call."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return []
        if self.merged:
            return []
        there = getattr(self, self.adapter_layer_names[0])
        return [name for name in self.active_adapters if name in there]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.base_layer(*args, **kwargs)
        for name in self.running():
            output = self.change(name, output, args, kwargs)
        return output

    def change(self, adapter_name: str, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the adapter makes of the base's output."""
        raise NotImplementedError

    def obstacle(self, adapter_name: str) -> str | None:
        """Why this adapter cannot be merged here; None if it can."""
        return "what it computes depends on the input in a way no weight of the base can express"

    def fold(self, adapter_name: str) -> None:
        """Put the adapter into the base's weights, for good; called on unmerged, mergeable layers."""
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in getattr(self, self.adapter_layer_names[0]):
                continue
            if reason := self.obstacle(name):
                raise NotMergeable(f"adapter {name} on {type(self.get_base_layer()).__name__}: {reason}.")
            base = self.get_base_layer()
            if not self.pristine:
                # γ may be 0 and rounding loses digits: only a copy brings the base back.
                self.pristine = {key: value.detach().clone() for key, value in base.named_parameters()}
            with torch.no_grad():
                self.fold(name)
            if safe_merge and not all(bool(torch.isfinite(value).all()) for value in base.parameters()):
                self._restore()
                raise ValueError(f"merging adapter {name} gives values that are not finite.")
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        if self.merged:
            self._restore()
            self.merged_adapters.clear()

    def _restore(self) -> None:
        for key, value in self.get_base_layer().named_parameters():
            value.data.copy_(self.pristine[key])
        self.pristine = {}


class WrapperModel(BaseTuner):  # type: ignore[misc]
    """Puts a tuner's layers in place. A subclass says where (`targets`) and what (`layer`, `parts`)."""

    prefix: str
    tuner_layer_cls = Wrapper
    target_module_mapping: ClassVar[dict[str, Any]] = {}
    containers: ClassVar[tuple[str, ...]]
    frozen: ClassVar[tuple[str, ...]] = ()
    """Containers whose modules never train."""

    def targets(self, config: Any) -> str:
        """Pattern of the names of the modules to wrap when the configuration names none.

        Raises:
            ValueError: the method has no place in this architecture.
        """
        raise NotImplementedError

    def layer(self, config: Any, name: str, module: nn.Module) -> Any:
        """The wrapper for `module`, without adapters."""
        raise NotImplementedError

    def parts(self, config: Any, name: str, wrapper: Wrapper) -> tuple[nn.Module, ...]:
        """A new adapter's modules, one a container."""
        raise NotImplementedError

    def join(self) -> None:
        """Introduce wrappers to each other, after all are in place."""

    def wrappers(self) -> Iterator[tuple[str, Wrapper]]:
        """This tuner's own, by name; in a hybrid there are others' around and inside them."""
        for name, module in self.model.named_modules():
            if self.owns(module):
                yield name, module

    def owns(self, module: nn.Module) -> TypeGuard[Wrapper]:
        return isinstance(module, Wrapper) and module.adapter_layer_names == self.containers

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            peft_config.target_modules = self.targets(peft_config)
        elif isinstance(peft_config.target_modules, list):
            peft_config.target_modules = set(peft_config.target_modules)
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        found = check_target_module_exists(peft_config, key)
        layers = peft_config.layers_to_transform
        # PEFT ignores layers_to_transform beside a pattern.
        matched = found is True or isinstance(found, re.Match)
        if not matched or layers is None or not isinstance(peft_config.target_modules, str):
            return found
        return sites.index_of(key) in ([layers] if isinstance(layers, int) else layers)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if self.owns(target):
            self._add(peft_config, adapter_name, current_key, target)
            return
        wrapper = self.layer(peft_config, current_key, target)
        if adapter_name in self.active_adapters:
            wrapper._active_adapter = [adapter_name]
        self._add(peft_config, adapter_name, current_key, wrapper)
        self._replace_module(parent, target_name, wrapper, target)

    def _add(self, config: Any, adapter_name: str, name: str, wrapper: Wrapper) -> None:
        wrapper.add(adapter_name, self.parts(config, name, wrapper), config.inference_mode, self.frozen)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # PEFT's own copies `weight`, which containers lack, and moves parameters already there.
        if isinstance(parent, Wrapper) and child_name != "base_layer":
            # The wrapper lends its base's attributes; whoever uses them is the base.
            parent = parent.get_base_layer()
        setattr(parent, child_name, new_module)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self.join()

    def _check_merge_allowed(self) -> None:
        # Before the first weight changes, so that a refused merge leaves the model as it was.
        super()._check_merge_allowed()
        for name, wrapper in self.wrappers():
            for adapter in wrapper.running():
                if reason := wrapper.obstacle(adapter):
                    raise NotMergeable(f"{self.prefix.rstrip('_')} cannot be merged at {name}: {reason}.")

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT would ignore it and give every row the active adapter: another tenant's answer.
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"{self.prefix.rstrip('_')}: one adapter a batch. adapter_names is for LoRA; use set_adapter."
            )
        yield

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT's own finds the name only when it is last or last but one.
        named = "|".join(map(re.escape, cls.containers))
        shorter, count = re.subn(
            rf"(^|\.)({named})\.{re.escape(adapter_name)}(?=\.|$)", r"\1\2", key, count=1
        )
        return shorter if count else str(super()._remove_adapter_name_from_key(key, adapter_name))


def attach(model: Any, case: Case, kind: type[WrapperConfig], **fields: Any) -> Any:
    """A PeftModel with the tuner whose configuration is `kind`, and with the head of the task.

    Its first values depend on the case's seed alone.
    """
    from peft import TaskType, get_peft_model

    config = kind(
        task_type=TaskType(PEFT_TASKS[case.task]), modules_to_save=head_modules(model) or None, **fields
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        return get_peft_model(model, config)


class Affine(nn.Module):
    """y to γ ⊙ y + β, in float32; without β where `shift` is false."""

    def __init__(self, width: int, shift: bool) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.beta = nn.Parameter(torch.zeros(width)) if shift else None

    def forward(self, y: Tensor) -> Tensor:
        scaled = y.to(self.gamma.dtype) * self.gamma
        return scaled if self.beta is None else scaled + self.beta


class AffineWrapper(Wrapper):
    """γ ⊙ y + β after a linear layer or a norm; part of its weights when merged."""

    def change(self, adapter_name: str, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.part(adapter_name)(output).to(output.dtype)

    def obstacle(self, adapter_name: str) -> str | None:
        base: Any = self.get_base_layer()
        if not base.weight.is_floating_point():
            return "its base is quantized; merge into the base in 16 or 32 bits"
        affine: Any = self.part(adapter_name)
        if affine.beta is not None and getattr(base, "bias", None) is None:
            return "it adds a vector, and this layer of the base has no bias to hold it"
        return None

    def fold(self, adapter_name: str) -> None:
        affine: Any = self.part(adapter_name)
        beta = None if affine.beta is None else affine.beta.detach()
        fold_affine(self.get_base_layer(), affine.gamma.detach(), beta)


def add(hidden_BTD: Tensor, delta_BTD: Tensor) -> Tensor:
    """hidden + delta in float32 (or wider), in hidden's dtype."""
    return (hidden_BTD + delta_BTD).to(hidden_BTD.dtype)


def first(output: Any) -> Tensor:
    """The hidden states of an output that may be a tuple that starts with them."""
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


def with_first(output: Any, hidden: Tensor) -> Any:
    """The same output with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple | list) else hidden


def fold_affine(base: nn.Module, gamma_D: Tensor, beta_D: Tensor | None) -> None:
    """Change `base` so that it returns γ ⊙ y + β where it returned y.

    Raises:
        NotMergeable: `base` multiplies by something else than its weight.
    """
    from transformers.pytorch_utils import Conv1D

    weight: Tensor = base.weight  # type: ignore[assignment]
    bias = getattr(base, "bias", None)
    gamma = gamma_D.to(weight.device)
    norm = sites.is_norm(base)
    if norm:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            probe = torch.randn(4, *weight.shape, dtype=weight.dtype).to(weight.device)
        wanted = base(probe).float() * gamma
        if beta_D is not None:
            wanted = wanted + beta_D.to(weight.device)
    # Linear has (out, in), Conv1D (in, out), a norm (out).
    rows = gamma[:, None] if isinstance(base, nn.Linear) else gamma
    if not norm and not isinstance(base, nn.Linear | Conv1D):
        raise NotMergeable(f"{type(base).__name__} is neither a linear layer nor a norm")
    before = weight.detach().clone()
    weight.copy_((weight.float() * rows).to(weight.dtype))
    if bias is not None:
        before_bias = bias.detach().clone()
        shifted = bias.float() * gamma + (0 if beta_D is None else beta_D.to(weight.device))
        bias.copy_(shifted.to(bias.dtype))
    if norm:
        tolerance = 1e-4 if weight.dtype == torch.float32 else 0.1
        if not torch.allclose(base(probe).float(), wanted, rtol=tolerance, atol=tolerance):
            # Gemma's norms multiply by 1 + weight.
            weight.copy_(before)
            if bias is not None:
                bias.copy_(before_bias)
            raise NotMergeable(f"{type(base).__name__} does not simply multiply by its weight")


def copy_of(module: nn.Module) -> nn.Module:
    """A float32 copy of a small module with its own parameters, also where ZeRO-3 has cut the original's."""
    parameters = list(module.parameters())
    with gather_params_ctx(parameters, modifier_rank=None):
        memo: dict[int, Any] = {
            id(value): nn.Parameter(value.detach().float().clone()) for value in parameters
        }
        return copy.deepcopy(module, memo)
