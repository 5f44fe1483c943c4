"""LoRA layers of peft on a model, with the head of its task: the start of every LoRA-like method."""

from typing import Any

import torch

from peft_service.attached import head_modules
from peft_service.methods import Case
from peft_service.targets import linear_layers, shortest
from peft_service.tasks import PEFT_TASKS


def attach_lora(
    model: Any,
    case: Case,
    *,
    rank: int,
    alpha: int,
    targets: tuple[str, ...] | None,
    dropout: float,
    **more: Any,
) -> Any:
    """A PeftModel with LoRA on the `targets`, in float32; `more` are further fields of peft's LoraConfig."""
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=shortest(model, linear_layers(model, targets)),
        modules_to_save=head_modules(model) or None,
        task_type=TaskType(PEFT_TASKS[case.task]),
        **more,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)  # peft draws A on the CPU before moving it, so all ranks draw the same
        # its default, autocast_adapter_dtype, keeps A and B in float32
        return get_peft_model(model, config)
