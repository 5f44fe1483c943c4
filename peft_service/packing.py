"""Packing: which rows stand behind one another in one line of a batch, so that little of it is padding.

Packing is how a step is computed, not what it computes: a line holds whole rows of one and the same step, no
token attends to another row, and positions restart. So the loss of a step, and the curve of a run, are those
without packing, and so they stay on another number of workers.
"""

import bisect
from collections.abc import Sequence
from typing import TYPE_CHECKING

from peft_service.errors import InvalidRequest

if TYPE_CHECKING:
    from peft_service.base_model import ModelShape
    from peft_service.spec import FineTuneSpec

PACKABLE = ("gemma", "gemma2", "gpt2", "gpt_neox", "llama", "mistral", "phi3", "qwen2", "qwen3")
"""Model types whose attention in transformers stays inside a sequence when positions restart: all tested."""


def admit(spec: "FineTuneSpec", shape: "ModelShape") -> None:
    """Refuse packing where rows would see one another.

    Raises:
        InvalidRequest: says what stands against it.
    """
    if not spec.training.packing:
        return
    method, objective, why = spec.method, spec.objective, ""
    if not objective.packs:
        why = f"the objective {objective.kind} reads one answer from each line"
    elif shape.architecture != "decoder":
        why = f"a {shape.model_type} reads a whole line at once"
    elif shape.model_type not in PACKABLE:
        why = f"of {shape.model_type} models it is not known that attention stays inside a row"
    elif method.positions():
        why = f"{method.kind} puts its virtual tokens in front of a line, not of each row"
    elif method.needs_tasks:
        why = f"{method.kind} knows one task for each line"
    elif not method.can.packing:
        why = method.can.why.get("packing", f"{method.kind} lets tokens look at others of the line")
    if why:
        raise InvalidRequest(
            f"training.packing is true, but {why}. Leave it out: rows are then sorted by length within each "
            "step, so that little is padded",
            code="packing_not_applicable",
            param="training.packing",
        )


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in bins of at most `capacity`: longest first, each where it leaves least room.

    Best-fit decreasing needs at most 11/9 of the fewest bins possible, and 1 (Johnson et al. 1974, SIAM J.
    Comput. 3(4)). What is longer than `capacity` is alone in a bin.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (room left, bin), sorted
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        at = bisect.bisect_left(room, (length, -1))
        if at < len(room):
            left, chosen = room.pop(at)
            bins[chosen].append(index)
        else:
            left, chosen = capacity, len(bins)
            bins.append([index])
        if left > length:
            bisect.insort(room, (left - length, chosen))
    return bins


def balanced(lengths: Sequence[int], capacity: int, multiple: int = 1) -> list[list[int]]:
    """As few bins as `best_fit` finds, made nearly equal, fullest first; their number is a multiple of
    `multiple` where there are rows enough.

    Every worker gets as many bins, and a batch is as wide as its widest bin: equal ones leave nobody waiting
    and nothing to pad. Longest first, each into the emptiest bin (Graham 1969, SIAM J. Appl. Math. 17(2)).
    """
    tight = best_fit(lengths, capacity)
    count = min(len(lengths), -(-len(tight) // multiple) * multiple)
    bins: list[list[int]] = [[] for _ in range(count)]
    used = [(0, number) for number in range(count)]
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        load, number = used.pop(0)
        if load and load + lengths[index] > capacity:
            # Equal bins are not always possible where best-fit's are: then those, however unequal.
            return sorted(tight, key=lambda bin: -sum(lengths[index] for index in bin))
        bins[number].append(index)
        bisect.insort(used, (load + lengths[index], number))
    return sorted(bins, key=lambda bin: -sum(lengths[index] for index in bin))
