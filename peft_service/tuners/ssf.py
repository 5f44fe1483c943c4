"""SSF: y = γ ⊙ x + β behind every linear layer and norm of a frozen transformer.

Lian et al. 2022, arXiv:2210.08823. γ (d_out,) starts at 1 and β (d_out,) at 0, so step 0 is the base;
`init="paper"` draws both with deviation 0.02 as the authors' code does. Parameters: Σ d_out over the chosen
modules, twice where there is a β. γ and β become part of weight and bias in a merge; a β where the base has
no bias cannot.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from peft.utils import PeftType
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_service.tuners import sites
from peft_service.tuners.registration import register
from peft_service.tuners.wrapper import Affine, AffineWrapper, Wrapper, WrapperConfig, WrapperModel

SHIFTS = ("where_bias", "all", "none")


@dataclass
class SSFConfig(WrapperConfig):
    shift: Literal["where_bias", "all", "none"] = field(default="where_bias")
    """Where β is: beside the base's own biases (so that it merges), everywhere, or nowhere."""
    init: Literal["identity", "paper"] = field(default="identity")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("SSF")
        if self.shift not in SHIFTS:
            raise ValueError(f"shift is one of {', '.join(SHIFTS)}, not {self.shift!r}.")
        if self.init not in ("identity", "paper"):
            raise ValueError(f'init is "identity" or "paper", not {self.init!r}.')


class SSFModel(WrapperModel):
    prefix = "ssf_"
    containers = ("ssf_parts",)

    def targets(self, config: Any) -> str:
        last = set()
        for name, module in sites.modules(self.model).items():
            adaptable = isinstance(module, nn.Linear | Conv1D) or sites.is_norm(module)
            if sites.index_of(name) is not None and adaptable:
                last.add(name.rpartition(".")[2])
        if not last:
            raise ValueError("no numbered layer of the base has a linear layer or a norm.")
        return rf"(?:.*\.)?\d+\.(?:.*\.)?(?:{'|'.join(map(re.escape, sorted(last)))})"

    def layer(self, config: Any, name: str, module: nn.Module) -> AffineWrapper:
        sites.width_of(module)  # refuses what is neither a linear layer nor a norm
        return AffineWrapper(module, self.containers)

    def parts(self, config: Any, name: str, wrapper: Wrapper) -> tuple[nn.Module, ...]:
        base = wrapper.get_base_layer()
        has_bias = getattr(base, "bias", None) is not None
        affine = Affine(
            sites.width_of(base), config.shift == "all" or (config.shift == "where_bias" and has_bias)
        )
        if config.init == "paper":
            nn.init.normal_(affine.gamma, 1.0, 0.02)
            if affine.beta is not None:
                nn.init.normal_(affine.beta, 0.0, 0.02)
        return (affine,)


register("ssf", SSFConfig, SSFModel)
