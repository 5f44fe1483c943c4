"""Prompt ensembling: N soft prompts for one task, and a vote.  Lester et al. 2021, arXiv:2104.08691."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service.errors import InvalidRequest
from peft_service.methods import Capabilities, Case, Material, Method, head
from peft_service.methods.prompt_tuning import NOT_MERGEABLE, STARTS, check_prompt

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape


class PromptEnsemble(Method):
    kind: Literal["prompt_ensemble"] = "prompt_ensemble"
    prompts: int = Field(5, ge=1, le=64)
    virtual_tokens: int = Field(20, ge=1, le=1024)
    init: Literal["vocab", "random"] = "vocab"
    """What the prompts start as: embeddings of random tokens, other ones for each, or normal noise."""
    vote: Literal["mean_log_prob", "majority"] = "mean_log_prob"

    learning_rate: ClassVar[float] = 1e-2
    title: ClassVar[str] = "Prompt ensembling"
    family: ClassVar[str] = "soft prompt"
    paper: ClassVar[str] = "https://arxiv.org/abs/2104.08691"
    summary: ClassVar[str] = "Several soft prompts for one task, asked in one batch, that vote."
    formula: ClassVar[str] = "loss = mean_n CE_n; log p = mean_n log p_n, or a majority vote; N·P·d values"
    use_when: ClassVar[str] = "A classifier by prompts should be better than the best single prompt."
    limits: ClassVar[str] = "Compute and activations are N times those of one prompt."
    small: ClassVar[dict[str, Any]] = {"prompts": 3, "virtual_tokens": 4}
    can: ClassVar[Capabilities] = Capabilities(
        packing=False,
        tasks=("causal_lm", "seq2seq_lm", "sequence_classification", "token_classification"),
        starts_as_base=False,
        mergeable=False,
        carrier="composite",
        servers=(),
        why={
            "tasks": "there is no vote on the two ends of an answer. Use prompt_tuning",
            "starts_as_base": STARTS,
            "mergeable": NOT_MERGEABLE,
        },
    )

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        import torch

        from peft_service.attached import head_modules
        from peft_service.tuners import prompts
        from peft_service.tuners.prompt_ensemble import Ensemble, Ensembled

        shape = (self.prompts, self.virtual_tokens, prompts.width_of(model))
        if self.init == "random":
            values = torch.randn(shape, generator=torch.Generator().manual_seed(case.seed))
        else:
            count = self.prompts * self.virtual_tokens
            values = prompts.first_values(model, "vocab", count, case.seed, None, None).view(shape)
        for name in head_modules(model):
            for parameter in model.get_submodule(name).parameters():
                parameter.requires_grad_(True)
                parameter.data = parameter.data.float()
        return Ensembled(Ensemble(model, values, self.vote), case.task)

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        return self.prompts * self.virtual_tokens * shape.hidden

    def stored(self, shape: "ModelShape", case: Case) -> int | None:
        # The head lies beside every prompt, so that each can be loaded alone.
        return self.trainable(shape, case) + (self.prompts - 1) * head(shape, case)

    def check(self, shape: "ModelShape", case: Case) -> None:
        check_prompt(shape, case, self.kind)
        if case.tasks:
            raise InvalidRequest(
                "prompt_ensemble has prompts for one task, and the rows of this file name several. Use "
                "prompt_tuning for each task.",
                param="training_file",
            )
