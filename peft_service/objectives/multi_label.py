"""Multi-label classification: of each class, whether a row belongs to it; cross-entropy of yes and no.

A target is a (row, class): the loss of a step is then the mean over both, which is what transformers computes
for `problem_type="multi_label_classification"`. In multi-task data a row has the classes of its task only.
"""

from typing import Any, ClassVar, Literal

from peft_service.objectives import Objective, Rows
from peft_service.objectives.sft import IGNORE
from peft_service.tasks import Architecture, Task


class MultiLabel(Objective):
    kind: Literal["multi_label"] = "multi_label"

    rows: ClassVar[Rows] = "class_sets"
    formats: ClassVar[tuple[str, ...]] = ("multi_label",)
    default_for: ClassVar[tuple[str, ...]] = formats
    summary: ClassVar[str] = "Learn which classes a text, or a pair of texts, belongs to: any number of them."
    paper: ClassVar[str] = "Nam et al. 2014, arXiv:1312.5419"
    formula: ClassVar[str] = "-y_k log σ(z_k) - (1 - y_k) log σ(-z_k), mean over rows and classes of the step"
    measure: ClassVar[str] = "the share of (row, class) that are right on held-out rows"

    def task(self, architecture: Architecture) -> Task:
        return "sequence_classification"

    def targets(self, batch: Any) -> Any:
        return _asked(batch).sum()

    def loss_sum(self, model: Any, batch: Any) -> tuple[Any, Any]:
        import torch.nn.functional as F

        from peft_service import logps

        logits_BK, asked_BK = logps.precise(model(**batch.inputs).logits), _asked(batch)
        truth_BK = batch.values_BK.to(logits_BK.dtype)
        loss_BK = F.binary_cross_entropy_with_logits(logits_BK, truth_BK, reduction="none")
        right_BK = ((logits_BK > 0) == (truth_BK > 0.5)) & asked_BK
        return loss_BK.masked_fill(~asked_BK, 0.0).sum(), right_BK.sum()


def _asked(batch: Any) -> Any:
    """(B, K) bool: where there is something to learn."""
    asked_BK = (batch.labels_BT[:, :1] != IGNORE).expand_as(batch.values_BK)
    return asked_BK if batch.allowed_BC is None else asked_BK & batch.allowed_BC
