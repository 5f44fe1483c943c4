"""Prompt tuning: P trainable embeddings in front of the input.  Lester et al. 2021, arXiv:2104.08691."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service.errors import InvalidRequest
from peft_service.methods import Capabilities, Case, Material, Method

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape

STARTS = "virtual tokens stand in front of the input from the first step on"
NOT_MERGEABLE = "it adds tokens to the input and changes no weight"
NO_ENCODER_DECODER = (
    "of encoder-decoders, transformers' classes with that head take no embeddings as input. Use LoRA, or "
    "p_tuning_v2 on an encoder"
)


def check_width(shape: "ModelShape", kind: str) -> None:
    """Refuse a base whose embeddings are not as wide as its hidden states, which peft assumes."""
    if shape.vocab and shape.embedding_parameters not in (0, shape.vocab * shape.hidden):
        raise InvalidRequest(
            f"{kind}: the embeddings of this {shape.model_type} are "
            f"{shape.embedding_parameters // shape.vocab} wide "
            f"and its hidden states {shape.hidden}; peft takes them for the same. Use LoRA, or "
            "prefix_tuning.",
            code="method_not_applicable",
            param="adapter.kind",
        )


class PromptTuning(Method):
    kind: Literal["prompt_tuning"] = "prompt_tuning"
    virtual_tokens: int = Field(20, ge=1, le=1024)
    init: Literal["vocab", "random", "text"] = "vocab"
    """What the prompt starts as: embeddings of random tokens, normal noise, or the embeddings of `text`."""
    text: str | None = Field(None, min_length=1)
    """With `init` text: its tokens, repeated or cut to `virtual_tokens`."""

    learning_rate: ClassVar[float] = 1e-2
    title: ClassVar[str] = "Prompt tuning"
    family: ClassVar[str] = "soft prompt"
    paper: ClassVar[str] = "https://arxiv.org/abs/2104.08691"
    summary: ClassVar[str] = "Trainable embeddings in front of the input; the whole base stays frozen."
    formula: ClassVar[str] = "input = [p_1 … p_P; E(x)]; P·d values"
    use_when: ClassVar[str] = "Very large bases and very small artifacts; one batch may hold many tasks."
    limits: ClassVar[str] = (
        "Slow to learn on small bases. An encoder's class is then read from the first virtual token."
    )
    corrections: ClassVar[tuple[str, ...]] = (
        "“For a black-box model behind an API, prompt tuning is the only fine-tuning that is possible.” "
        "It needs "
        "gradients, and embeddings as input, which such an API does not have. With the nearest real "
        "tokens in the "
        "place of a trained prompt nothing is left: on the shipped base the held-out loss is "
        "{black_box[base_loss]:.2f} without, {black_box[prompt_loss]:.2f} with the prompt, and "
        "{black_box[nearest_tokens_loss]:.2f} with its nearest tokens.",
    )
    aliases: ClassVar[dict[str, dict[str, Any]]] = {"soft_prompt": {}, "soft_prompts": {}, "prompt": {}}
    small: ClassVar[dict[str, Any]] = {"virtual_tokens": 5}
    can: ClassVar[Capabilities] = Capabilities(
        starts_as_base=False,
        mergeable=False,
        servers=("peft",),
        why={"starts_as_base": STARTS, "mergeable": NOT_MERGEABLE},
    )

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        import torch
        from peft import PromptTuningConfig

        from peft_service.tuners import prompts

        # One module also for encoder-decoders: of two, peft trains only the first, and saves both.
        made = prompts.attach_prompt(
            model,
            case,
            PromptTuningConfig,
            num_virtual_tokens=self.virtual_tokens,
            token_dim=prompts.width_of(model),
            num_transformer_submodules=1,
        )
        if self.init != "random":
            values = prompts.first_values(
                model, self.init, self.virtual_tokens, case.seed, self.text, material.tokenizer
            )
            with torch.no_grad():
                made.prompt_encoder["default"].embedding.weight.copy_(values)
        return prompts.Prompted(made)

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        return self.virtual_tokens * shape.hidden

    def check(self, shape: "ModelShape", case: Case) -> None:
        if (self.init == "text") != (self.text is not None):
            raise InvalidRequest(
                'prompt_tuning: `text` and init "text" belong together; give both, or use init "vocab".',
                param="adapter.text",
            )
        check_prompt(shape, case, self.kind)


def check_prompt(shape: "ModelShape", case: Case, kind: str) -> None:
    """What every method with virtual input tokens needs of a base."""
    check_width(shape, kind)
    if shape.architecture == "decoder" and case.task == "sequence_classification":
        raise InvalidRequest(
            f"{kind} does not work for sequence classification on a {shape.model_type}: such a decoder is "
            "padded on "
            "the left, and peft puts the prompt in front of the padding, so that an answer would depend "
            "on the "
            'other rows of its batch. Use p_tuning with template "{prompt:20}{text}", whose prompt is '
            "beside the text.",
            code="method_not_applicable",
            param="adapter.kind",
        )
    if shape.architecture == "encoder_decoder" and case.task != "seq2seq_lm":
        raise InvalidRequest(
            f"{kind} does not work for {case.task.replace('_', ' ')} on a {shape.model_type}: "
            f"{NO_ENCODER_DECODER}.",
            code="method_not_applicable",
            param="adapter.kind",
        )
