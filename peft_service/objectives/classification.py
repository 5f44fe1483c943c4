"""Classification: cross-entropy of the class of a row; in multi-task data, among the classes of its own task.

One output layer holds the heads of all tasks side by side (their labels are `task/label`), and a row sees the
slice of its task: the same as a head for each task, and every rank touches all of it, as ZeRO needs.
"""

from typing import Any, ClassVar, Literal

from peft_service.objectives import Objective, Rows
from peft_service.objectives.sft import IGNORE
from peft_service.tasks import Architecture, Task


class Classification(Objective):
    kind: Literal["classification"] = "classification"

    rows: ClassVar[Rows] = "classes"
    formats: ClassVar[tuple[str, ...]] = ("classification",)
    default_for: ClassVar[tuple[str, ...]] = formats
    summary: ClassVar[str] = "Learn the class of a text, or of a pair of texts."
    paper: ClassVar[str] = "Devlin et al. 2018, arXiv:1810.04805, section 4.1"
    formula: ClassVar[str] = "-log softmax(z)_y, mean over the rows of the step"
    measure: ClassVar[str] = "the share of held-out rows whose class is right"

    def task(self, architecture: Architecture) -> Task:
        return "sequence_classification"

    def targets(self, batch: Any) -> Any:
        return (batch.labels_BT != IGNORE).sum()

    def loss_sum(self, model: Any, batch: Any) -> tuple[Any, Any]:
        import torch.nn.functional as F

        logits_BC = model(**batch.inputs).logits.float()
        if batch.allowed_BC is not None:
            logits_BC = logits_BC.masked_fill(~batch.allowed_BC, float("-inf"))
        targets_B = batch.labels_BT[:, 0]
        nll = F.cross_entropy(logits_BC, targets_B, ignore_index=IGNORE, reduction="sum")
        return nll, ((logits_BC.argmax(-1) == targets_B) & (targets_B != IGNORE)).sum()
