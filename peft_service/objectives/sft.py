"""Supervised fine-tuning: cross-entropy on the target tokens only, in float32."""

from typing import Any, Literal

from peft_service.objectives import Objective

IGNORE = -100


class SFT(Objective):
    kind: Literal["sft"] = "sft"

    def loss_sum(self, model: Any, batch: Any) -> tuple[Any, Any]:
        import torch.nn.functional as F

        logits_BTV = model(input_ids=batch.tokens_BT, attention_mask=batch.mask_BT).logits[:, :-1].float()
        targets_BT = batch.labels_BT[:, 1:]
        nll = F.cross_entropy(
            logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        right = ((logits_BTV.argmax(-1) == targets_BT) & (targets_BT != IGNORE)).sum()
        return nll, right
