"""P-tuning v2: a prefix in every layer and a head, for classes and tags.  Liu et al. 2021, arXiv:2110.07602.

A prefix without an MLP, as in the paper, on encoders too. The authors' code has dropout on the prefix, the
paper has not, and nor has this.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service.methods import Capabilities, Case, Material, Method
from peft_service.methods.prefix_tuning import NO_CHECKPOINTING, STARTS, check_prefix, prefix_values
from peft_service.methods.prompt_tuning import NOT_MERGEABLE

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape


class PTuningV2(Method):
    kind: Literal["p_tuning_v2"] = "p_tuning_v2"
    virtual_tokens: int = Field(20, ge=1, le=1024)

    learning_rate: ClassVar[float] = 5e-3
    title: ClassVar[str] = "P-tuning v2"
    family: ClassVar[str] = "soft prompt"
    paper: ClassVar[str] = "https://arxiv.org/abs/2110.07602"
    summary: ClassVar[str] = "Deep prompts with a classification head: a prefix in every layer."
    formula: ClassVar[str] = (
        "K = [P_K; K], V = [P_V; V] in every layer, and a head; 2·L·P·k values + the head's"
    )
    use_when: ClassVar[str] = "Classes, tags or extracted answers with a small artifact."
    limits: ClassVar[str] = "No gradient checkpointing."
    aliases: ClassVar[dict[str, dict[str, Any]]] = {"deep_prompt_tuning": {}}
    small: ClassVar[dict[str, Any]] = {"virtual_tokens": 5}
    can: ClassVar[Capabilities] = Capabilities(
        architectures=("decoder", "encoder"),
        tasks=("sequence_classification", "token_classification", "question_answering"),
        gradient_checkpointing=False,
        starts_as_base=False,
        mergeable=False,
        servers=("peft",),
        why={
            "architectures": "of encoder-decoders, transformers' classes with a head take no keys and values "
            "from outside. Use LoRA, or prefix_tuning to write text",
            "tasks": "to write text use prefix_tuning, which is the same without a head",
            "gradient_checkpointing": NO_CHECKPOINTING,
            "starts_as_base": STARTS,
            "mergeable": NOT_MERGEABLE,
        },
    )

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft import PrefixTuningConfig

        from peft_service.tuners import prompts

        shape = prompts.prefix_shape(model)
        fields = {"num_virtual_tokens": self.virtual_tokens, **shape}
        left = case.task == "sequence_classification" and not model.config.is_encoder_decoder
        made = prompts.attach_prompt(model, case, PrefixTuningConfig, **fields)
        return prompts.Prompted(made, positions=left and hasattr(model, "score"))

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        return prefix_values(shape, self.virtual_tokens)

    def check(self, shape: "ModelShape", case: Case) -> None:
        check_prefix(shape, self.kind)
