"""P-tuning: virtual tokens anywhere in a template, made by an encoder.  Liu et al. 2021, arXiv:2103.10385.

The authors also tuned the language model in their few-shot experiments; here it stays frozen.
"""

import re
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import field_validator

from peft_service.errors import InvalidRequest
from peft_service.methods import Capabilities, Case, Material, Method
from peft_service.methods.prompt_tuning import NOT_MERGEABLE, check_width

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape

_TEMPLATE = re.compile(r"(?:\{prompt:(\d+)\})?\{text\}(?:\{prompt:(\d+)\})?(\{answer\})?")


class PTuning(Method):
    kind: Literal["p_tuning"] = "p_tuning"
    template: str = "{prompt:10}{text}{prompt:10}"
    """Where the virtual tokens stand: numbers of them before the text and behind it, in front of the answer
    where one is written (`{answer}` at the end may be said)."""
    encoder: Literal["lstm", "mlp", "none"] = "lstm"
    """What makes them while they train."""

    learning_rate: ClassVar[float] = 1e-3
    title: ClassVar[str] = "P-tuning"
    family: ClassVar[str] = "soft prompt"
    paper: ClassVar[str] = "https://arxiv.org/abs/2103.10385"
    summary: ClassVar[str] = (
        "Virtual tokens anywhere in a template, tied together by an LSTM while they train."
    )
    formula: ClassVar[str] = "h = MLP(BiLSTM(e)); P·d values are kept, P·d and the encoder's train"
    use_when: ClassVar[str] = "Understanding tasks, and prompts around the text and not only before it."
    limits: ClassVar[str] = "Literal words are no part of the template: they belong into the data's text."
    aliases: ClassVar[dict[str, dict[str, Any]]] = {"p_tuning_v1": {}}
    small: ClassVar[dict[str, Any]] = {"template": "{prompt:3}{text}{prompt:2}"}
    can: ClassVar[Capabilities] = Capabilities(
        starts_as_base=False,
        mergeable=False,
        carrier="registered",
        servers=("peft",),
        why={
            "starts_as_base": "virtual tokens stand in the input from the first step on",
            "mergeable": NOT_MERGEABLE,
        },
    )

    @field_validator("template")
    @classmethod
    def _is_a_template(cls, value: str) -> str:
        found = _TEMPLATE.fullmatch(value)
        if found is None or not 1 <= sum(int(part or 0) for part in found.groups()[:2]) <= 1024:
            raise ValueError(
                "write {prompt:3}{text}{prompt:2}: numbers of virtual tokens before the text and behind "
                "it, at "
                "least one and at most 1024 in all; virtual tokens behind an answer would say nothing."
            )
        return value

    def positions(self) -> int:
        return sum(self._numbers())

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        import torch
        from peft import TaskType, get_peft_model

        from peft_service.attached import head_modules
        from peft_service.tasks import PEFT_TASKS
        from peft_service.tuners.template_prompt import (
            TemplatePromptConfig,
            TemplatePrompted,
            input_embedding,
        )

        before, between = self._numbers()
        embedding = model.get_submodule(input_embedding(model))
        config = TemplatePromptConfig(
            before=before,
            between=between,
            encoder=self.encoder,
            width=embedding.embedding_dim,
            vocabulary=embedding.num_embeddings,
            modules_to_save=head_modules(model) or None,
            task_type=TaskType(PEFT_TASKS[case.task]),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(case.seed)
            made = get_peft_model(model, config)
        return TemplatePrompted(made, config, case.task == "causal_lm")

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        d = shape.hidden
        lstm = 2 * (4 * (d // 2) * (d + d // 2 + 2)) * 2  # both layers see d inputs
        encoder = {"none": 0, "mlp": 3 * (d * d + d), "lstm": lstm + 2 * (d * d + d)}[self.encoder]
        return self.positions() * d + encoder

    def stored(self, shape: "ModelShape", case: Case) -> int | None:
        return self.positions() * shape.hidden

    def check(self, shape: "ModelShape", case: Case) -> None:
        check_width(shape, self.kind)
        if shape.architecture == "encoder_decoder" and case.task != "seq2seq_lm":
            raise InvalidRequest(
                f"p_tuning does not work for {case.task.replace('_', ' ')} on a {shape.model_type}, whose "
                "decoder reads "
                "the encoder's ids again. Use LoRA, or an encoder.",
                code="method_not_applicable",
                param="adapter.kind",
            )

    def _numbers(self) -> tuple[int, int]:
        """(virtual tokens before the text, behind it)."""
        found = _TEMPLATE.fullmatch(self.template)
        before, between = found.groups()[:2] if found else (None, None)
        return int(before or 0), int(between or 0)
