"""Which modules of a loaded model a method means: linear layers of its blocks, by suffix where possible."""

import re
from typing import Any

from peft_service.methods import matches
from peft_service.tasks import IN_BLOCK

_NOT_ADAPTED = re.compile(r"\.experts\.|\.gate$")


def linear_layers(model: Any, targets: tuple[str, ...] | None = None) -> list[str]:
    """Names of the linear layers of the transformer's blocks that `targets` name; None: of all.

    The same layers as `ModelShape.linears` has, in the order of the model.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    from peft_service.tuners import sites

    return [
        name
        for name, module in sites.modules(model).items()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and IN_BLOCK.search(name)
        and not _NOT_ADAPTED.search(name)
        and (targets is None or any(matches(name, target) for target in targets))
    ]


def shortest(model: Any, names: list[str]) -> list[str]:
    """The shortest common endings that name exactly the modules `names`: what an adapter's config should say.

    Servers expect `q_proj`; where an ending is not enough (BERT's `dense` is also its pooler), whole names.
    """
    every = [name for name, _ in model.named_modules()]
    for parts in (1, 2, 3):
        endings = sorted({".".join(name.split(".")[-parts:]) for name in names})
        if {name for name in every if any(matches(name, ending) for ending in endings)} == set(names):
            return endings
    return sorted(names)
