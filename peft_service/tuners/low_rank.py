"""LoRA layers of peft on a model, with the head of its task, and LoRA files from any factors: what all
LoRA-like methods share.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_service.attached import Attached, head_modules
from peft_service.methods import Case
from peft_service.targets import linear_layers, shortest
from peft_service.tasks import PEFT_TASKS

ADAPTER = "default"
_PREFIX = "base_model.model."


def attach_lora(
    model: Any,
    case: Case,
    *,
    rank: int,
    alpha: int,
    targets: tuple[str, ...] | None,
    dropout: float,
    whole: Sequence[str] = (),
    **more: Any,
) -> Any:
    """A PeftModel with LoRA on the `targets`, in float32, and the modules `whole` trainable as they are;
    `more`
    are further fields of peft's LoraConfig."""
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=shortest(model, linear_layers(model, targets)),
        modules_to_save=[*whole, *head_modules(model)] or None,
        task_type=TaskType(PEFT_TASKS[case.task]),
        **more,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)  # peft draws A on the CPU before moving it, so all ranks draw the same
        # its default, autocast_adapter_dtype, keeps A and B in float32
        return get_peft_model(model, config)


def lora_layers(model: Any) -> dict[str, Any]:
    """Name in the PeftModel -> peft's LoRA layer, in the order of the model."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def down(layer: Any) -> Any:
    """The module that holds A (r, d_in)."""
    return layer.lora_A[ADAPTER]


def up(layer: Any) -> Any:
    """The module that holds B (d_out, r)."""
    return layer.lora_B[ADAPTER]


def names_of(layer_name: str) -> tuple[str, str]:
    """Names of A and B of a layer, as `Engine.trainable` has them."""
    return f"{layer_name}.lora_A.{ADAPTER}.weight", f"{layer_name}.lora_B.{ADAPTER}.weight"


def is_up(name: str) -> bool:
    """Whether the parameter is some B."""
    return f".lora_B.{ADAPTER}." in name


def factors_of(layers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> (A, B) from tensors by parameter name."""
    return {name: (tensors[names_of(name)[0]], tensors[names_of(name)[1]]) for name in layers}


def save_factors(
    model: Any,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    scaling: float,
    trainable: Mapping[str, Tensor],
    directory: Path,
    base: tuple[str, str | None],
) -> None:
    """Write a plain LoRA: of each layer A (r, d_in) and B (d_out, r), so that it adds scaling * B A.

    Layers may differ in r; those of rank 0 are left out. What `trainable` has besides, the head, goes with
    it.
    """
    inside = tuple(f"{name}." for name in factors)
    tensors = {name: value for name, value in trainable.items() if not name.startswith(inside)}
    for name, (a, b) in factors.items():
        if len(a):
            tensors |= dict(zip(names_of(name), (a.contiguous(), b.contiguous()), strict=True))
    Attached.save_peft(model, tensors, directory, base)
    ranks = {name.removeprefix(_PREFIX): len(a) for name, (a, _) in factors.items()}
    rank = max(ranks.values())
    different = {name: r for name, r in ranks.items() if r not in (rank, 0)}
    path = directory / "adapter_config.json"
    told = json.loads(path.read_text()) | {
        "r": rank,
        "lora_alpha": _number(scaling * rank),
        "rank_pattern": different,
        "alpha_pattern": {name: _number(scaling * r) for name, r in different.items()},
        "exclude_modules": [name for name, r in ranks.items() if r == 0] or None,
        "use_rslora": False,
        "init_lora_weights": True,
    }
    path.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")


def _number(value: float) -> int | float:
    return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value


def base_weight(layer: Any) -> Tensor:
    """W (d_out, d_in) of the frozen linear layer in float32, what NF4 stands for included."""
    from peft.utils.integrations import dequantize_module_weight
    from transformers.pytorch_utils import Conv1D

    base = layer.get_base_layer()
    weight: Tensor = dequantize_module_weight(base).detach().float()
    return weight.T if isinstance(base, Conv1D) else weight


def broadcast(tensors: "list[Tensor]") -> None:
    """Rank 0's values on every rank: what is computed from data or by a decomposition may differ in the last
    digit between machines."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)
