"""What is minimised. One file an objective; SFT's is the mean negative log-likelihood of target tokens."""

from typing import TYPE_CHECKING, Any

from peft_service.variants import Frozen, union_of, variants_of


class Objective(Frozen):
    """The loss. `loss_sum` SUMS over the target tokens of a microbatch; the loop divides (design §7.1)."""

    kind: str

    def loss_sum(self, model: Any, batch: Any) -> tuple[Any, Any]:
        """(sum of the loss over the batch's targets, number of targets predicted right), as 0-dim tensors."""
        raise NotImplementedError


OBJECTIVES = variants_of(Objective, __name__, __path__)
if TYPE_CHECKING:
    AnyObjective = Objective
else:
    AnyObjective = union_of(OBJECTIVES)
