"""Hadamard adapter: y = w ⊙ a + b on self-attention's output, and the norm behind it.  Chen et al. 2023.

arXiv:2407.11033. Two stages: first the task's head alone, then w (d,), b (d,) and the norm that follows
self-attention, which trains as a copy of the base's; where the task has no head there is only the second. The
paper does not say whether the head goes on training; here it does, unless `head_in_second` is false.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service import sites
from peft_service.errors import InvalidRequest
from peft_service.methods import Capabilities, Case, Material, Method, head
from peft_service.methods.adapter import NO_SERVER

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape


class Hadamard(Method):
    kind: Literal["hadamard"] = "hadamard"
    first_stage: float = Field(0.3, ge=0, lt=1)
    """Share of the steps in which only the head trains."""
    head_in_second: bool = True
    """Whether the head trains in the second stage too."""
    train_norms: bool = True
    """Whether the norm behind self-attention trains, as in the paper."""

    learning_rate: ClassVar[float] = 5e-3
    title: ClassVar[str] = "Hadamard adapter"
    family: ClassVar[str] = "adapter"
    paper: ClassVar[str] = "https://arxiv.org/abs/2407.11033"
    summary: ClassVar[str] = "One scale and one shift for what self-attention says, and the norm behind it."
    formula: ClassVar[str] = (
        "w ⊙ a + b; 2d values a layer + 2d of a LayerNorm or d of an RMSNorm: 0.034 % of BERT"
    )
    use_when: ClassVar[str] = "Classification with an encoder such as BERT and an artifact of some kilobytes."
    limits: ClassVar[str] = (
        "Merges only where self-attention ends in a layer with a bias (BERT, GPT-2, BART), not into LLaMA "
        "or T5. "
        "The learning rate's schedule goes over both stages."
    )
    aliases: ClassVar[dict[str, dict[str, Any]]] = {"hadamard_adapter": {}}
    can: ClassVar[Capabilities] = Capabilities(
        carrier="registered",
        weight_decay=False,
        mergeable=False,
        servers=("peft",),
        why={
            "weight_decay": "w rests at 1 and the norms at the base's values, and decay pulls them to 0. "
            "Set it to 0",
            "mergeable": "b needs a bias to go to, which bases such as LLaMA and T5 do not have. PEFT's own "
            "merge_and_unload does it on those that have one (BERT, GPT-2, BART)",
            "servers": NO_SERVER,
        },
    )

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.attached import head_modules
        from peft_service.tuners.hadamard import HadamardConfig, Staged
        from peft_service.tuners.wrapper import attach

        adapted = attach(model, case, HadamardConfig, train_norms=self.train_norms)
        steps = (
            min(round(self.first_stage * case.steps), max(0, case.steps - 1)) if head_modules(model) else 0
        )
        return Staged(adapted, steps, self.head_in_second)

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        places = sites.of_shape(shape)
        count = 2 * shape.hidden * len(places.found(sites.ATTENTION_OUTPUT))
        if self.train_norms:
            norms = set(places.found(places.norm_after_attention))
            count += sum(size for name, size in shape.norms if name in norms)
            biases = {name.removesuffix(".bias"): size for name, size in shape.biases}
            count += sum(biases.get(name, 0) for name in norms)
        return count

    def check(self, shape: "ModelShape", case: Case) -> None:
        places = sites.of_shape(shape)
        if not places.found(sites.ATTENTION_OUTPUT):
            raise sites.unknown(self.kind, shape, "where self-attention ends")
        if self.train_norms:
            try:
                _ = places.norm_after_attention
            except ValueError:
                raise InvalidRequest(
                    "hadamard cannot tell the norm behind self-attention in this "
                    f"{shape.model_type or 'base'}: set train_norms to false, or use ssf.",
                    param="adapter.train_norms",
                ) from None
        if head(shape, case) and self.first_stage and case.steps == 1:
            raise InvalidRequest(
                "hadamard trains in two stages, but this run has one step. Train longer, or set first_stage "
                "to 0.",
                param="training.max_steps",
            )
