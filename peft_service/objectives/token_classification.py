"""Token classification: cross-entropy of the tag of every word, at the word's first token."""

from typing import Any, ClassVar, Literal

from peft_service.objectives import Objective, Rows
from peft_service.objectives.sft import IGNORE
from peft_service.tasks import Architecture, Task


class TokenClassification(Objective):
    kind: Literal["token_classification"] = "token_classification"

    rows: ClassVar[Rows] = "tags"
    formats: ClassVar[tuple[str, ...]] = ("token_classification",)
    default_for: ClassVar[tuple[str, ...]] = formats
    summary: ClassVar[str] = "Learn the tag of every word."
    paper: ClassVar[str] = "Devlin et al. 2018, arXiv:1810.04805, section 5.3"
    formula: ClassVar[str] = "-log softmax(z_t)_y, mean over the words of the step, at their first tokens"
    measure: ClassVar[str] = "the share of held-out words whose tag is right"

    def task(self, architecture: Architecture) -> Task:
        return "token_classification"

    def targets(self, batch: Any) -> Any:
        return (batch.labels_BT != IGNORE).sum()

    def loss_sum(self, model: Any, batch: Any) -> tuple[Any, Any]:
        import torch.nn.functional as F

        logits_BTC = model(**batch.inputs).logits[:, -batch.tokens_BT.shape[1] :].float()
        nll = F.cross_entropy(
            logits_BTC.flatten(0, 1), batch.labels_BT.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        right = (logits_BTC.argmax(-1) == batch.labels_BT) & (batch.labels_BT != IGNORE)
        return nll, right.sum()
