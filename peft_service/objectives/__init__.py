"""What is minimised. One file an objective: the loss of a microbatch as a sum, and what it is divided by."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peft_service.tasks import Architecture, Task
from peft_service.variants import Frozen, union_of, variants_of

Rows = Literal["text", "pairs", "unpaired", "prompts", "classes", "class_sets", "values", "tags", "answers"]
"""What an objective needs a row to be. text: prompt and answer, or a document; pairs: a prompt with a better
and a worse answer; unpaired: an answer that is good or bad; prompts: no answer at all, graders judge;
classes, class_sets, values: a text with one class, any number of classes, a number."""


class Objective(Frozen):
    """The loss. `loss_sum` SUMS over the targets of a microbatch; the loop divides (design §7.1).

    What is a target (a token, a row, a pair) is the objective's to say; every target weighs the same.
    """

    kind: str

    rows: ClassVar[Rows] = "text"
    formats: ClassVar[tuple[str, ...]]
    """Kinds of the data formats that it learns from."""
    default_for: ClassVar[tuple[str, ...]] = ()
    """Those of them that mean this objective where the request names none."""
    aliases: ClassVar[dict[str, dict[str, Any]]] = {}
    """Other names that a request may use as `method.type` -> the fields that they set."""
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    measure: ClassVar[str] = "the loss on held-out rows"
    """What is better after training than before, on rows that were not trained on."""
    rate_scale: ClassVar[float] = 1.0
    """What the method's own learning rate is multiplied with by default."""
    needs_reference: ClassVar[bool] = False
    """Whether `batch.reference_S` must have the log-probabilities of the base."""
    packs: ClassVar[bool] = False
    """Whether rows may be put behind one another into one sequence: true where every target is a token."""
    generates: ClassVar[bool] = False
    """Whether a step's rows are prompts that the model itself answers first (`peft_service.rollout`)."""

    def task(self, architecture: Architecture) -> Task:
        """What the model must be able to do."""
        raise NotImplementedError

    def labels(self, found: tuple[str, ...]) -> tuple[str, ...]:
        """Names of the outputs of the head, given the labels of the training file."""
        return found

    def check(self, method: "Method") -> None:
        """Refuse a method that this objective cannot be learned with.

        Raises:
            InvalidRequest: says why, and what does work.
        """

    def targets(self, batch: Any) -> Any:
        """How many targets the batch has, as a 0-dim tensor."""
        raise NotImplementedError

    def loss_sum(self, model: Any, batch: Any) -> tuple[Any, Any]:
        """(sum of the loss over the batch's targets, number of targets predicted right), as 0-dim tensors."""
        raise NotImplementedError

    def shared(self, model: Any, batches: "Sequence[Any]") -> Any:
        """Sums over this rank's microbatches that the loss of each needs of the whole step, as a float64
        vector; the loop adds them up over ranks and puts the result into `batch.shared`. None: nothing is."""
        return None


if TYPE_CHECKING:
    from peft_service.methods import Method

OBJECTIVES = variants_of(Objective, __name__, __path__)
if TYPE_CHECKING:
    AnyObjective = Objective
else:
    AnyObjective = union_of(OBJECTIVES)
