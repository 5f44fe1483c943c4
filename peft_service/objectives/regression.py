"""Regression: the squared distance of one output from the number of a row."""

from typing import Any, ClassVar, Literal

from peft_service.objectives import Objective, Rows
from peft_service.objectives.sft import IGNORE
from peft_service.tasks import Architecture, Task


class Regression(Objective):
    kind: Literal["regression"] = "regression"

    rows: ClassVar[Rows] = "values"
    formats: ClassVar[tuple[str, ...]] = ("regression",)
    default_for: ClassVar[tuple[str, ...]] = formats
    summary: ClassVar[str] = "Learn the number of a text, or of a pair of texts."
    paper: ClassVar[str] = "Devlin et al. 2018, arXiv:1810.04805, section 4.1 (STS-B)"
    formula: ClassVar[str] = "(f(x) - y)², mean over the rows of the step"
    measure: ClassVar[str] = "the mean squared error on held-out rows"

    def task(self, architecture: Architecture) -> Task:
        return "sequence_classification"

    def labels(self, found: tuple[str, ...]) -> tuple[str, ...]:
        return ("value",)

    def targets(self, batch: Any) -> Any:
        return (batch.labels_BT[:, 0] != IGNORE).sum()

    def loss_sum(self, model: Any, batch: Any) -> tuple[Any, Any]:
        """Of a number nothing is right or wrong: the second sum is always 0."""
        from peft_service import logps

        values_B = logps.precise(model(**batch.inputs).logits[:, 0])
        loss_B = (values_B - batch.values_BK[:, 0]) ** 2
        loss = loss_B.masked_fill(batch.labels_BT[:, 0] == IGNORE, 0.0).sum()
        return loss, loss.new_zeros(())
