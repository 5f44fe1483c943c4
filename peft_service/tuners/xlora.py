"""X-LoRA at work: peft's router over frozen LoRAs, and an artifact that has them beside it."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_service.attached import Attached
from peft_service.errors import InvalidRequest
from peft_service.methods import Case
from peft_service.targets import linear_layers
from peft_service.tasks import PEFT_TASKS
from peft_service.tuners.experts import experts, layers_of

if TYPE_CHECKING:
    from peft_service.methods.xlora import XLoRA

_OF_AN_EXPERT = ("adapter_config.json", "adapter_model.safetensors")


class Router(Attached):
    def __init__(self, model: Any, sources: Sequence[Path]) -> None:
        super().__init__(model)
        self.sources = tuple(sources)

    def save(self, trainable: Mapping[str, Tensor], directory: Path, base: tuple[str, str | None]) -> None:
        self.save_peft(self.model, trainable, directory, base)
        for number, source in enumerate(self.sources):
            (directory / str(number)).mkdir(exist_ok=True)
            for name in _OF_AN_EXPERT:
                shutil.copy(source / name, directory / str(number) / name)
        config = directory / "adapter_config.json"
        places = {"adapters": {str(number): str(number) for number in range(len(self.sources))}}
        config.write_text(
            json.dumps(json.loads(config.read_text()) | places, indent=2, sort_keys=True) + "\n"
        )


def attach_router(model: Any, case: Case, method: "XLoRA", sources: Sequence[Path]) -> Router:
    """
    Raises:
        InvalidRequest: a source is no plain LoRA, or they do not adapt what `targets` says.
    """
    from peft import TaskType, XLoraConfig, get_peft_model

    found = set(layers_of(experts(model, sources)))
    if method.layerwise and (other := found ^ set(linear_layers(model, method.targets))):
        raise InvalidRequest(
            f"targets name other layers than the sources adapt, the first is {min(other)}: set targets to "
            f"{sorted({name.split('.')[-1] for name in found})}.",
            param="adapter.targets",
        )
    config = XLoraConfig(
        task_type=TaskType(PEFT_TASKS[case.task]),
        hidden_size=model.config.get_text_config().hidden_size,
        adapters={str(number): str(source) for number, source in enumerate(sources)},
        xlora_depth=method.depth,
        xlora_size=method.size,
        xlora_dropout_p=0.0,
        layerwise_scalings=method.layerwise,
        softmax_temperature=method.temperature,
    )
    model.config.use_cache = False  # peft insists
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        made = get_peft_model(model, config)
    made.requires_grad_(False)
    classifier = made.base_model.internal_xlora_classifier
    classifier.float().requires_grad_(True)
    # peft gives it the base's dtype, and what it reads with it.
    classifier.layers[0].register_forward_pre_hook(lambda module, args: (args[0].to(module.weight.dtype),))
    return Router(made, sources)


def load_router(base: Any, directory: Path) -> Any:
    """The artifact on its base: peft itself would look for the LoRAs where they were when it was trained."""
    from peft import PeftModel, XLoraConfig

    config = XLoraConfig.from_pretrained(str(directory))
    config.adapters = {name: str(directory / name) for name in config.adapters}
    base.config.use_cache = False
    return PeftModel.from_pretrained(base, str(directory), config=config)
