"""Continued pre-training: cross-entropy on every token of a document."""

from typing import Any, ClassVar, Literal

from peft_service.objectives import Objective
from peft_service.objectives.sft import IGNORE
from peft_service.tasks import Architecture, Task


class Pretraining(Objective):
    kind: Literal["pretraining"] = "pretraining"

    formats: ClassVar[tuple[str, ...]] = ("text",)
    default_for: ClassVar[tuple[str, ...]] = formats
    aliases: ClassVar[dict[str, dict[str, Any]]] = {"continued_pretraining": {}}
    summary: ClassVar[str] = (
        "Learn to go on with the documents of the file, from their first token to the last."
    )
    paper: ClassVar[str] = "Gururangan et al. 2020, arXiv:2004.10964"
    formula: ClassVar[str] = (
        "-log p(x_t | x_<t), mean over all tokens of the step but the first of a document"
    )
    measure: ClassVar[str] = "the loss of a token (log of the perplexity) on held-out documents"
    packs: ClassVar[bool] = True

    def task(self, architecture: Architecture) -> Task:
        # Of encoder-decoders too: a document has no source that an encoder could read, so they are refused.
        return "causal_lm"

    def targets(self, batch: Any) -> Any:
        from peft_service import logps

        return (logps.targets_of(batch) != IGNORE).sum()

    def loss_sum(self, model: Any, batch: Any) -> tuple[Any, Any]:
        from peft_service import logps

        return logps.next_token_loss(model, batch)
