"""Published LoRAs as experts: their matrices, read by peft, for methods that mix them.

Shapes: A is (r, d_in), B (d_out, r) with the LoRA's scaling in it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from peft_service.errors import InvalidRequest
from peft_service.tuners.low_rank import ADAPTER, down, lora_layers, up

_PREFIX = "base_model.model."

Expert = dict[str, tuple[Tensor, Tensor]]
"""Layer of the base -> (A, B), float32 on the CPU."""


def experts(model: Any, sources: Sequence[Path]) -> list[Expert]:
    """The LoRAs in these directories; `model`, their base, is left as it was.

    Raises:
        InvalidRequest: one is no plain LoRA, or one of another base; says which.
    """
    from peft import PeftModel

    found = []
    for number, directory in enumerate(sources):
        param = f"adapter.sources[{number}]"
        path = directory / "adapter_config.json"
        told = json.loads(path.read_text()) if path.exists() else {"peft_type": "no PEFT adapter"}
        wrong = [
            reason
            for bad, reason in (
                (told["peft_type"] != "LORA", f"is {told['peft_type']}"),
                (told.get("use_dora"), "is a DoRA"),
                (told.get("bias", "none") != "none", "has trained biases"),
                (told.get("modules_to_save"), f"has trained {told.get('modules_to_save')} besides"),
            )
            if bad
        ]
        if wrong:
            raise InvalidRequest(
                f"{param} {wrong[0]}, and only a plain LoRA of a language model can be mixed: give one, or "
                "convert it first.",
                param=param,
            )
        loaded: Any = PeftModel.from_pretrained(model, str(directory))
        expert = {}
        for name, layer in lora_layers(loaded).items():
            a, b = down(layer).weight.detach(), up(layer).weight.detach()
            expert[name.removeprefix(_PREFIX)] = (
                a.float().cpu().clone(),
                (b.float() * layer.scaling[ADAPTER]).cpu().clone(),
            )
        loaded.unload()
        found.append(expert)
    return found


def layers_of(found: Sequence[Expert]) -> dict[str, tuple[int, int]]:
    """Every layer that some expert adapts -> (d_out, d_in)."""
    return {name: (b.shape[0], a.shape[1]) for expert in found for name, (a, b) in expert.items()}
