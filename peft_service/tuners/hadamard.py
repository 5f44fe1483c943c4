"""Hadamard adapter: y = w ⊙ a + b on self-attention's output, and the following norm's own weights.

Chen et al. 2023, arXiv:2407.11033. w (d,) starts at 1 and b (d,) at 0 behind the output projection of
self-attention; the norm that sees the result next trains as a copy of the base's. Parameters a layer: 2d, and
2d of a LayerNorm or d of an RMSNorm. Where the output projection has a bias, all of it merges.
"""

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft.utils import PeftType
from torch import Tensor, nn

from peft_service.attached import Attached
from peft_service.tuners import sites
from peft_service.tuners.registration import register
from peft_service.tuners.wrapper import (
    Affine,
    AffineWrapper,
    Wrapper,
    WrapperConfig,
    WrapperModel,
    copy_of,
)

if TYPE_CHECKING:
    from peft_service.train import Engine


@dataclass
class HadamardConfig(WrapperConfig):
    train_norms: bool = field(default=True)
    """Whether the norm after self-attention trains too, as in the paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("HADAMARD")


class NormCopy(Wrapper):
    """Runs the adapter's copy of the norm instead of the base's."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        names = self.running()
        if not names:
            return self.base_layer(*args, **kwargs)
        if len(names) > 1:
            raise ValueError(f"norms of several adapters cannot be combined; active are {', '.join(names)}.")
        hidden: Tensor = args[0]
        return self.part(names[0])(hidden.float(), *args[1:], **kwargs).to(hidden.dtype)

    def obstacle(self, adapter_name: str) -> str | None:
        return None

    def fold(self, adapter_name: str) -> None:
        for mine, base in zip(
            self.part(adapter_name).parameters(), self.get_base_layer().parameters(), strict=True
        ):
            base.copy_(mine.to(base.dtype))


class HadamardModel(WrapperModel):
    prefix = "hadamard_"
    containers = ("hadamard_parts",)

    def targets(self, config: Any) -> str:
        if not config.train_norms:
            return sites.ATTENTION_OUTPUT
        return f"{sites.ATTENTION_OUTPUT}|{sites.norm_after_attention(self.model)}"

    def layer(self, config: Any, name: str, module: nn.Module) -> Wrapper:
        if sites.is_norm(module) and not re.fullmatch(sites.ATTENTION_OUTPUT, name):
            return NormCopy(module, self.containers)
        sites.width_of(module)
        return AffineWrapper(module, self.containers)

    def parts(self, config: Any, name: str, wrapper: Wrapper) -> tuple[nn.Module, ...]:
        base = wrapper.get_base_layer()
        if isinstance(wrapper, NormCopy):
            return (copy_of(base),)
        return (Affine(sites.width_of(base), shift=True),)


class Staged(Attached):
    """The head alone for `first` steps, then the adapter, with the head or without.

    What rests has a gradient of zero, set by hooks on the leaf parameters, which work under every ZeRO stage.
    The second stage starts with new moments: old ones would go on moving a head that rests.
    """

    def __init__(self, model: Any, first: int, head_in_second: bool) -> None:
        super().__init__(model)
        self.first, self.step = first, 0
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                adapter = f".{HadamardModel.containers[0]}." in name
                if adapter or (first and not head_in_second):
                    parameter.register_hook(self._resting(first=adapter))

    def before_step(self, step: int) -> None:
        self.step = step

    def _resting(self, first: bool) -> Any:
        """The hook of a parameter that rests in the first stage, or in the second."""

        def hook(gradient: Tensor) -> Tensor | None:
            return torch.zeros_like(gradient) if (self.step < self.first) == first else None

        return hook

    def after_update(self, engine: "Engine", step: int) -> None:
        if step == self.first - 1:
            state = engine.state()
            for key, tensor in state.items():
                if key.startswith("exp_avg"):
                    tensor.zero_()
            engine.load_state(state | {"step": torch.zeros((), dtype=torch.int64)})


register("hadamard", HadamardConfig, HadamardModel)
