"""The learning rate as a function of the step: nothing to save, nothing to restore."""

import math

from peft_service.spec import Training


def learning_rate(step: int, steps: int, training: Training) -> float:
    """The rate of step `step` (counted from 0) of `steps`.

    Linear warm-up over ceil(warmup_ratio * steps) steps, whose first one already moves; then constant, or
    down to zero as a half cosine or a line. The last step still has a positive rate.
    """
    warmup = math.ceil(training.warmup_ratio * steps)
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    if training.schedule == "constant":
        return training.learning_rate
    left = 1 - (step - warmup) / (steps - warmup)
    if training.schedule == "linear":
        return training.learning_rate * left
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * (1 - left)))
