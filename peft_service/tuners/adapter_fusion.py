"""AdapterFusion: attention over N frozen bottleneck adapters, per position.

Pfeiffer et al. 2020, arXiv:2005.00247. At every place of the members, with x what a bottleneck would read
and u_i = δ_i(x) what member i would add:

    δ(x) = Σ_i softmax_i(⟨Q x, K u_i⟩) V u_i      Q, K (d, d) with bias ~ N(0, 0.02), V = I + 1e-6 without

No member's output contains the residual, and scores are not divided by √d; that is AdapterHub's code. The
members are part of the artifact and never train. Parameters a place: 3d² + 2d.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_service.attached import Attached
from peft_service.tuners import sites
from peft_service.tuners.bottleneck import (
    AfterLinear,
    AroundNorm,
    AtEnd,
    PlacedModel,
    Tap,
    bottleneck,
    check_bottleneck,
)
from peft_service.tuners.registration import register
from peft_service.tuners.wrapper import Wrapper, WrapperConfig

MEMBERS = "adapter_fusion_members"
MIXER = "adapter_fusion_mixer"


@dataclass
class AdapterFusionConfig(WrapperConfig):
    members: list[str] = field(default_factory=list)
    """Names of the fused adapters, in order; all have the shape that the next fields say."""
    placement: Literal["houlsby", "pfeiffer", "parallel"] = field(default="pfeiffer")
    bottleneck_size: int = field(default=64)
    activation: Literal["relu", "gelu", "swish", "tanh"] = field(default="relu")
    scale: float | None = field(default=None)
    dropout: float = field(default=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "ADAPTER_FUSION"
        check_bottleneck(self)
        if not self.members or len(set(self.members)) != len(self.members):
            raise ValueError(f"members are at least one name, each once; not {self.members!r}.")


class Value(nn.Linear):
    """u to V u, and how far V is from the identity: strength · Σ (V - I)², None where it is not asked for."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, bias=False)
        self.strength = 0.0

    def forward(self, u: Tensor) -> Any:
        penalty = None
        if self.training and self.strength:
            # Here and not from outside: ZeRO-3 has the weight together only inside, and where an output of
            # the module leads back to it.
            identity = torch.eye(len(self.weight), dtype=self.weight.dtype, device=self.weight.device)
            penalty = self.strength * (self.weight - identity).square().sum()
        return super().forward(u), penalty


class Mixer(nn.Module):
    """x (…, d) and the members' u (…, N, d) to what is added (…, d)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.penalty: Tensor | None = None
        """Of the last forward pass, see `Value`."""
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = Value(width)
        for linear in (self.query, self.key):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        nn.init.constant_(self.value.weight, 1e-6)
        with torch.no_grad():
            self.value.weight.fill_diagonal_(1.0)

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        query = self.query(x.to(self.query.weight.dtype))
        # ZeRO-3 gathers when a module is called: K and V are applied to u, not folded into Q.
        scores = torch.einsum("...d,...nd->...n", query, self.key(u))
        values, self.penalty = self.value(u)
        mixed: Tensor = torch.einsum("...n,...nd->...d", scores.softmax(-1), values)
        return mixed


class _Fused:
    def delta(self: Any, adapter_name: str, x: Tensor) -> Tensor:
        members = getattr(self, MEMBERS)[adapter_name].values()
        made: Tensor = getattr(self, MIXER)[adapter_name](x, torch.stack([m(x) for m in members], dim=-2))
        return made


class FusedAfterLinear(_Fused, AfterLinear):
    """y + δ(y)."""


class FusedAroundNorm(_Fused, AroundNorm):
    """LN(z + δ(LN(z)))."""


class FusedAtEnd(_Fused, AtEnd):
    """h + δ(h + r) or h + δ(r)."""


class AdapterFusionModel(PlacedModel):
    prefix = "adapter_fusion_"
    containers = (MEMBERS, MIXER)
    frozen = (MEMBERS,)

    def kind(self, placed: type[Any]) -> type[Any]:
        return {AfterLinear: FusedAfterLinear, AroundNorm: FusedAroundNorm, AtEnd: FusedAtEnd}[placed]

    def parts(self, config: Any, name: str, wrapper: Wrapper) -> tuple[nn.Module, ...]:
        if isinstance(wrapper, Tap):
            return nn.Identity(), nn.Identity()
        width = sites.width_of(wrapper.get_base_layer())
        # Numbers, not names: PEFT takes a name in a key for another adapter's.
        members = nn.ModuleDict(
            {f"member_{number}": bottleneck(config, width) for number in range(len(config.members))}
        )
        return members, Mixer(width)

    def load_members(self, directories: dict[str, str | Path], adapter_name: str = "default") -> None:
        """Fill in the members from saved BOTTLENECK adapters, by their names in the configuration.

        Raises:
            ValueError: a name is missing or unknown, or an adapter has another shape than the fusion's.
        """
        from peft import PeftConfig

        config = self.peft_config[adapter_name]
        if set(directories) != set(config.members):
            raise ValueError(f"members are {config.members}, not {sorted(directories)}.")
        for number, member in enumerate(config.members):
            theirs: Any = PeftConfig.from_pretrained(str(directories[member]))
            for key in ("placement", "bottleneck_size", "activation", "scale"):
                if getattr(theirs, key, None) != getattr(config, key):
                    raise ValueError(
                        f"member {member}: its {key} is {getattr(theirs, key, None)!r}, "
                        f"the fusion's {getattr(config, key)!r}."
                    )
            saved = load_file(Path(directories[member]) / "adapter_model.safetensors")
            left = set(saved)
            for name, wrapper in self.wrappers():
                if isinstance(wrapper, Tap):
                    continue
                start = f"base_model.model.{name}.bottleneck_parts."
                part = getattr(wrapper, MEMBERS)[adapter_name][f"member_{number}"]
                state = {key.removeprefix(start): saved[key] for key in saved if key.startswith(start)}
                part.load_state_dict(state)
                left -= {start + key for key in state}
            # A head belongs to the member's own task.
            left = {key for key in left if ".bottleneck_parts." in key}
            if left:
                raise ValueError(f"member {member} has weights that have no place here: {sorted(left)[:3]}.")

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        # A trainer may pass what it trained only; the members belong to the artifact all the same.
        whole = dict(state_dict)
        for key, value in model.state_dict().items():
            if f".{MEMBERS}.{adapter_name}." in key and key not in whole:
                if value.numel() == 0:
                    raise ValueError(f"{key} is empty: gather the members before saving under ZeRO-3.")
                whole[key] = value
        made: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, whole, unwanted_adapter_names
        )
        return made


class Fusion(Attached):
    """Keeps the members on the CPU: they never train, and ZeRO-3 cuts what does not train as well."""

    def __init__(self, model: Any, strength: float) -> None:
        super().__init__(model)
        self.mixers = [module for module in model.modules() if isinstance(module, Mixer)]
        for mixer in self.mixers:
            mixer.value.strength = strength
        self.members = {
            name: value.detach().to("cpu", torch.float32, copy=True)
            for name, value in model.named_parameters()
            if f".{MEMBERS}." in name
        }

    def penalty(self) -> Tensor | None:
        found = [mixer.penalty for mixer in self.mixers if mixer.penalty is not None]
        return torch.stack(found).sum() if found else None

    def save(self, trainable: Mapping[str, Tensor], directory: Path, base: "tuple[str, str | None]") -> None:
        self.save_peft(self.model, {**self.members, **trainable}, directory, base)


register("adapter_fusion", AdapterFusionConfig, AdapterFusionModel)
