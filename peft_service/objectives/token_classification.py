"""Token classification: cross-entropy of the tag of every word, at the word's first token."""

from typing import Any, ClassVar, Literal

from peft_service.objectives import Objective
from peft_service.objectives.sft import IGNORE
from peft_service.tasks import Architecture, Task


class TokenClassification(Objective):
    kind: Literal["token_classification"] = "token_classification"

    formats: ClassVar[tuple[str, ...]] = ("token_classification",)
    summary: ClassVar[str] = "Learn the tag of every word."

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
