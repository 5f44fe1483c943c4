"""Supervised fine-tuning: cross-entropy on the target tokens only, in float32."""

from typing import Any, ClassVar, Literal

from peft_service.objectives import Objective
from peft_service.tasks import Architecture, Task

IGNORE = -100


class SFT(Objective):
    kind: Literal["sft"] = "sft"

    formats: ClassVar[tuple[str, ...]] = ("chat", "instruction", "prompt_completion")
    summary: ClassVar[str] = "Learn to write the answers of the rows."

    def task(self, architecture: Architecture) -> Task:
        return "seq2seq_lm" if architecture == "encoder_decoder" else "causal_lm"

    def targets(self, batch: Any) -> Any:
        labels_BT = batch.labels_BT if batch.decoder_BT is not None else batch.labels_BT[:, 1:]
        return (labels_BT != IGNORE).sum()

    def loss_sum(self, model: Any, batch: Any) -> tuple[Any, Any]:
        import torch.nn.functional as F

        if batch.decoder_BT is not None:
            # An encoder-decoder: the decoder's inputs are the targets, one place later.
            logits_BTV = model(**batch.inputs).logits.float()
            targets_BT = batch.labels_BT
        else:
            # Virtual tokens, where a method has them, stand in front of the row.
            logits_BTV = model(**batch.inputs).logits[:, -batch.tokens_BT.shape[1] :][:, :-1].float()
            targets_BT = batch.labels_BT[:, 1:]
        nll = F.cross_entropy(
            logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        right = ((logits_BTV.argmax(-1) == targets_BT) & (targets_BT != IGNORE)).sum()
        return nll, right
