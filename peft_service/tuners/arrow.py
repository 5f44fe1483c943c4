"""Arrow: every token goes to the LoRAs whose main direction it has.  Ostapenko et al. 2024, arXiv:2405.11157.

    y = W x + Σ_e c_e s_e B_e A_e x     c = softmax over the top k of |p_e · x| / τ, zero elsewhere

p_e is the first right singular vector of B_e A_e. Nothing is trained. With general LoRAs, the mean of their A
is taken from every A_e and that of their B from every B_e first (GenKnowSub, ACL 2025, short papers, 54). Of
a layer: A (E, r, d_in), B with the scaling (E, d_out, r), p (E, d_in).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils import PeftType
from torch import Tensor, nn

from peft_service.attached import Attached
from peft_service.errors import InvalidRequest
from peft_service.methods import Case
from peft_service.targets import shortest
from peft_service.tasks import PEFT_TASKS
from peft_service.tuners.experts import Expert, experts, layers_of
from peft_service.tuners.registration import register
from peft_service.tuners.wrapper import Wrapper, WrapperConfig, WrapperModel, add

if TYPE_CHECKING:
    from pathlib import Path

    from peft_service.methods.arrow import Arrow


@dataclass
class ArrowConfig(WrapperConfig):
    experts: int = field(default=2)
    rank: int = field(default=8)
    """The largest of the experts'; smaller ones are filled up with zeros."""
    top_k: int = field(default=3)
    temperature: float = field(default=1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("ARROW")
        for name in ("experts", "rank", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}.")
        if self.temperature <= 0:
            raise ValueError(f"temperature is above 0, not {self.temperature}.")


class RoutedLoRAs(nn.Module):
    """x (…, d_in) to what is added (…, d_out)."""

    def __init__(self, d_in: int, d_out: int, config: Any) -> None:
        super().__init__()
        self.top_k = min(config.top_k, config.experts)
        self.temperature = config.temperature
        drawn = torch.zeros if config.init_weights else torch.randn
        self.downs = nn.Parameter(drawn(config.experts, config.rank, d_in))
        self.ups = nn.Parameter(drawn(config.experts, d_out, config.rank))
        self.prototypes = nn.Parameter(drawn(config.experts, d_in))

    def weights(self, x: Tensor) -> Tensor:
        """c (…, E), with sum 1 over at most top_k experts."""
        likeness = (x @ self.prototypes.T).abs()
        best, places = likeness.topk(self.top_k, dim=-1)
        shares = (best / self.temperature).softmax(-1)
        return torch.zeros_like(likeness).scatter(-1, places, shares)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.downs.dtype)
        inner = x @ self.downs.flatten(0, 1).T  # (…, E·r)
        mixed = inner.view(*x.shape[:-1], *self.downs.shape[:2]) * self.weights(x)[..., None]
        out: Tensor = mixed.flatten(-2) @ self.ups.transpose(1, 2).flatten(0, 1)
        return out


class RoutedWrapper(Wrapper):
    def change(self, adapter_name: str, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return add(output, self.part(adapter_name)(args[0]))

    def obstacle(self, adapter_name: str) -> str | None:
        return "which LoRAs a token gets depends on the token; merge one of them"


class ArrowModel(WrapperModel):
    prefix = "arrow_"
    containers = ("arrow_experts",)
    frozen = ("arrow_experts",)

    def targets(self, config: Any) -> str:
        raise ValueError("arrow adapts the layers that its experts adapt; name target_modules.")

    def layer(self, config: Any, name: str, module: nn.Module) -> RoutedWrapper:
        return RoutedWrapper(module, self.containers)

    def parts(self, config: Any, name: str, wrapper: Wrapper) -> tuple[nn.Module, ...]:
        d_in, d_out = _get_in_out_features(wrapper.get_base_layer())
        return (RoutedLoRAs(d_in, d_out, config),)


class Still(Attached):
    """Nothing trains; what is saved is on the model already."""

    def save(self, trainable: "Any", directory: "Path", base: tuple[str, str | None]) -> None:
        mine = {n: p.detach().cpu() for n, p in self.model.named_parameters() if ".arrow_experts." in n}
        self.save_peft(self.model, mine, directory, base)


def attach_arrow(model: Any, case: Case, method: "Arrow", sources: "Sequence[Path]") -> Still:
    """
    Raises:
        InvalidRequest: a source is no plain LoRA, or they do not adapt the same layers.
    """
    from peft import TaskType, get_peft_model

    found = routed(experts(model, sources), method.general)
    rank = max(len(a) for expert in found for a, _ in expert.values())
    config = ArrowConfig(
        experts=len(found),
        rank=rank,
        top_k=method.top_k,
        temperature=method.temperature,
        target_modules=shortest(model, list(layers_of(found))),
        task_type=TaskType(PEFT_TASKS[case.task]),
    )
    made = get_peft_model(model, config)
    with torch.no_grad():
        for name in layers_of(found):
            part: Any = made.get_submodule(f"base_model.model.{name}").part("default")
            for place, expert in enumerate(found):
                a, b = expert[name]
                part.downs[place, : len(a)] = a.to(part.downs)
                part.ups[place, :, : len(a)] = b.to(part.ups)
                part.prototypes[place] = prototype(a, b).to(part.prototypes)
    made.requires_grad_(False)
    return Still(made)


def routed(found: list[Expert], general: int) -> list[Expert]:
    """The experts that tokens go to: all but the last `general`, which are taken from the others.

    Raises:
        InvalidRequest: the LoRAs do not adapt the same layers, or with general ones not with the same rank.
    """
    for number, expert in enumerate(found):
        if other := sorted(expert.keys() ^ found[0].keys()):
            raise InvalidRequest(
                f"arrow routes among LoRAs on the same layers, and sources 0 and {number} differ in "
                f"{other[0]}: give LoRAs with the same targets.",
                param=f"adapter.sources[{number}]",
            )
    if not general:
        return found
    if len({len(a) for expert in found for a, _ in expert.values()}) > 1:
        raise InvalidRequest(
            "general LoRAs are subtracted matrix by matrix, which needs equal ranks: set general to 0.",
            param="adapter.general",
        )
    tasks, known = found[:-general], found[-general:]

    def less(name: str, place: int, own: Tensor) -> Tensor:
        return own - torch.stack([expert[name][place] for expert in known]).mean(0)

    return [{name: (less(name, 0, a), less(name, 1, b)) for name, (a, b) in e.items()} for e in tasks]


def prototype(a_RI: Tensor, b_OR: Tensor) -> Tensor:
    """The first right singular vector of B A (d_in,), by a decomposition of r columns."""
    q_IR, r_RR = torch.linalg.qr(a_RI.double().T)
    _, _, right = torch.linalg.svd(b_OR.double() @ r_RR.T, full_matrices=False)
    first: Tensor = q_IR @ right[0]
    return first.float()


register("arrow", ArrowConfig, ArrowModel)
