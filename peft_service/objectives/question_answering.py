"""Extractive question answering: cross-entropy of an answer's first and last token among those of the row."""

from typing import Any, ClassVar, Literal

from peft_service.objectives import Objective, Rows
from peft_service.objectives.sft import IGNORE
from peft_service.tasks import Architecture, Task


class QuestionAnswering(Objective):
    kind: Literal["question_answering"] = "question_answering"

    rows: ClassVar[Rows] = "answers"
    formats: ClassVar[tuple[str, ...]] = ("question_answering",)
    default_for: ClassVar[tuple[str, ...]] = formats
    summary: ClassVar[str] = "Learn where in a text the answer to a question stands."
    paper: ClassVar[str] = "Devlin et al. 2018, arXiv:1810.04805, section 4.2"
    formula: ClassVar[str] = (
        "-log softmax(s)_first - log softmax(e)_last, mean over both ends of the step's rows"
    )
    measure: ClassVar[str] = "the share of held-out answers' ends that are right"

    def task(self, architecture: Architecture) -> Task:
        return "question_answering"

    def targets(self, batch: Any) -> Any:
        return (batch.labels_BT != IGNORE).sum()

    def loss_sum(self, model: Any, batch: Any) -> tuple[Any, Any]:
        import torch
        import torch.nn.functional as F

        made = model(**batch.inputs)
        nll, right = [], []
        for place, logits_BT in enumerate((made.start_logits, made.end_logits)):
            # Not on virtual tokens in front, nor on padding.
            logits_BT = logits_BT[:, -batch.tokens_BT.shape[1] :].float()
            logits_BT = logits_BT.masked_fill(batch.mask_BT == 0, torch.finfo(torch.float32).min)
            targets_B = batch.labels_BT[:, place]
            nll.append(F.cross_entropy(logits_BT, targets_B, ignore_index=IGNORE, reduction="sum"))
            right.append(((logits_BT.argmax(-1) == targets_B) & (targets_B != IGNORE)).sum())
        return nll[0] + nll[1], right[0] + right[1]
