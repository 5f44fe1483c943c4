"""What is minimised. One file an objective: the loss of a microbatch as a sum, and what it is divided by."""

from typing import TYPE_CHECKING, Any, ClassVar

from peft_service.tasks import Architecture, Task
from peft_service.variants import Frozen, union_of, variants_of


class Objective(Frozen):
    """The loss. `loss_sum` SUMS over the targets of a microbatch; the loop divides (design §7.1)."""

    kind: str

    formats: ClassVar[tuple[str, ...]]
    """Kinds of the data formats that it learns from; a file of such a format means this objective."""
    summary: ClassVar[str] = ""

    def task(self, architecture: Architecture) -> Task:
        """What the model must be able to do."""
        raise NotImplementedError

    def targets(self, batch: Any) -> Any:
        """How many targets the batch has, as a 0-dim tensor."""
        raise NotImplementedError

    def loss_sum(self, model: Any, batch: Any) -> tuple[Any, Any]:
        """(sum of the loss over the batch's targets, number of targets predicted right), as 0-dim tensors."""
        raise NotImplementedError


OBJECTIVES = variants_of(Objective, __name__, __path__)
if TYPE_CHECKING:
    AnyObjective = Objective
else:
    AnyObjective = union_of(OBJECTIVES)
