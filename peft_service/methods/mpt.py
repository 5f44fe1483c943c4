"""Multitask prompt tuning: a prompt that all tasks share, times a matrix of low rank for each task.

    P_t = P* ⊙ (u_t v_tᵀ)       P* (P, d), u_t (P, rank), v_t (rank, d)

Wang et al. 2023, arXiv:2303.02861. u_t v_tᵀ starts near one, so every task starts near the shared prompt. The
paper's distillation from prompts of single tasks is not part of it.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service.methods import Capabilities, Case, Material, Method
from peft_service.methods.prompt_tuning import NOT_MERGEABLE, STARTS, check_prompt

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape


class MPT(Method):
    kind: Literal["mpt"] = "mpt"
    virtual_tokens: int = Field(20, ge=1, le=1024)
    rank: int = Field(1, ge=1, le=64)

    learning_rate: ClassVar[float] = 1e-2
    title: ClassVar[str] = "Multitask prompt tuning"
    family: ClassVar[str] = "multi-task"
    paper: ClassVar[str] = "https://arxiv.org/abs/2303.02861"
    summary: ClassVar[str] = "One prompt for all tasks, and for each task a low-rank factor on it."
    formula: ClassVar[str] = "P_t = P* ⊙ (u_t v_tᵀ); P·d + tasks * rank * (P + d) values"
    use_when: ClassVar[str] = "Several tasks on a very large base, with prompts as small as can be."
    limits: ClassVar[str] = (
        "Whoever serves it passes task_ids, a tensor with one number a row (the task's place among the "
        "sorted names), to forward and generate: plain peft does that, adapter servers do not. Of an "
        "encoder-decoder, peft's forward takes labels and ignores decoder_input_ids; generate is as ever. "
        "The shared prompt is learned without the paper's distillation."
    )
    aliases: ClassVar[dict[str, dict[str, Any]]] = {"multitask_prompt_tuning": {}}
    needs_tasks: ClassVar[bool] = True
    small: ClassVar[dict[str, Any]] = {"virtual_tokens": 5, "rank": 2}
    can: ClassVar[Capabilities] = Capabilities(
        tasks=("causal_lm", "seq2seq_lm", "sequence_classification", "token_classification"),
        starts_as_base=False,
        mergeable=False,
        servers=("peft",),
        why={
            "tasks": "peft does not pass task_ids to a multitask prompt there; use poly or mtl_lora",
            "starts_as_base": STARTS,
            "mergeable": NOT_MERGEABLE,
        },
    )

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.tuners.task_prompts import attach_mpt

        return attach_mpt(model, case, self)

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        tokens, width = self.virtual_tokens, shape.hidden
        return tokens * width + len(case.tasks) * self.rank * (tokens + width)

    def check(self, shape: "ModelShape", case: Case) -> None:
        check_prompt(shape, case, self.kind)
