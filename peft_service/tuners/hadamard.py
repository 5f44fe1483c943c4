"""Hadamard adapter: y = w ⊙ a + b on self-attention's output, and the following norm's own weights.

Chen et al. 2023, arXiv:2407.11033. w (d,) starts at 1 and b (d,) at 0 behind the output projection of
self-attention; the norm that sees the result next trains as a copy of the base's. Parameters a layer: 2d, and
2d of a LayerNorm or d of an RMSNorm. Where the output projection has a bias, all of it merges.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from peft.utils import PeftType
from torch import Tensor, nn

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


register("hadamard", HadamardConfig, HadamardModel)
