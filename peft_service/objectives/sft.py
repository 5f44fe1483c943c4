"""Supervised fine-tuning: cross-entropy on the target tokens only, in float32."""

from typing import Any, ClassVar, Literal

from peft_service.objectives import Objective
from peft_service.tasks import Architecture, Task

IGNORE = -100


class SFT(Objective):
    kind: Literal["sft"] = "sft"

    formats: ClassVar[tuple[str, ...]] = (
        "chat", "sharegpt", "instruction", "prompt_completion", "tokens", "segments",
    )  # fmt: skip
    default_for: ClassVar[tuple[str, ...]] = formats
    aliases: ClassVar[dict[str, dict[str, Any]]] = {"supervised": {}}
    summary: ClassVar[str] = "Learn to write the answers of the rows."
    paper: ClassVar[str] = "Ouyang et al. 2022, arXiv:2203.02155, section 3.5"
    formula: ClassVar[str] = "-log p(y_t | x, y_<t), mean over the target tokens of the step"
    measure: ClassVar[str] = "the loss of a target token on held-out rows"
    packs: ClassVar[bool] = True

    def task(self, architecture: Architecture) -> Task:
        return "seq2seq_lm" if architecture == "encoder_decoder" else "causal_lm"

    def targets(self, batch: Any) -> Any:
        labels_BT = batch.labels_BT if batch.decoder_BT is not None else batch.labels_BT[:, 1:]
        return (labels_BT != IGNORE).sum()

    def loss_sum(self, model: Any, batch: Any) -> tuple[Any, Any]:
        from peft_service import logps

        return logps.next_token_loss(model, batch)
