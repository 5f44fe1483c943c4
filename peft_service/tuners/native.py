"""peft's own types as they are: what trains is saved together with what peft's file needs besides."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from peft_service.attached import Attached


class Native(Attached):
    """Some types share a parameter between layers, which peft looks for under each of its names, and some
    have projections in buffers, which are no parameters; neither is in `trainable`."""

    def __init__(self, model: Any, buffers: bool) -> None:
        super().__init__(model)
        self.buffers = buffers

    def save(self, trainable: Mapping[str, Tensor], directory: Path, base: "tuple[str, str | None]") -> None:
        model: Any = self.model
        first = {id(parameter): name for name, parameter in model.named_parameters()}
        every = dict(trainable)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if (known := first[id(parameter)]) in trainable:
                every[name] = trainable[known]
        kept = model.state_dict().keys() if self.buffers else ()
        every |= {
            name: buffer.detach().cpu()
            for name, buffer in model.named_buffers(remove_duplicate=False)
            if name in kept
        }
        self.save_peft(model, every, directory, base)
