"""LoRA+ at work: the learning rate of every B is a multiple of that of the rest."""

from typing import Any

from peft_service.attached import Attached
from peft_service.tuners.low_rank import is_up


class FasterUp(Attached):
    def __init__(self, model: Any, multiple: float) -> None:
        super().__init__(model)
        self.multiple = multiple

    def ratio(self, name: str) -> float:
        return self.multiple if is_up(name) else 1.0
