"""Poly: every task has its own mix of a few LoRAs, its skills.  Ponti et al. 2022, arXiv:2202.13914.

    y = W x + (1 / rank) B_t A_t x      A_t = Σ_i w_ti A_i,  B_t = Σ_i w_ti B_i,  w_t = z_t / Σ_i z_ti

A_i (rank, d_in), B_i (d_out, rank) for i = 1…skills. While training, z_t is a relaxed Bernoulli variable
(temperature 1) with the logits of task t, afterwards their sigmoid. With `splits` H > 1 inputs and outputs
are cut into H parts, each with a mix of its own: multi-head routing (Caccia et al. 2022, arXiv:2211.03831).
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service.errors import InvalidRequest
from peft_service.methods import Capabilities, Case, Material, Method, adapted

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape


class Poly(Method):
    kind: Literal["poly"] = "poly"
    rank: int = Field(8, ge=1, le=512)
    skills: int = Field(4, ge=1, le=64)
    """S, the LoRAs that all tasks share."""
    splits: int = Field(1, ge=1, le=64)
    """H, parts of a layer that are mixed on their own."""
    sampled: bool = True
    """Draw z anew at every step, as the papers do; false trains with its mean."""
    targets: tuple[str, ...] | None = Field(None, min_length=1)
    """Last parts of the module names that are adapted; None: every linear layer of the blocks."""

    learning_rate: ClassVar[float] = 1e-3
    title: ClassVar[str] = "Poly"
    family: ClassVar[str] = "multi-task"
    paper: ClassVar[str] = "https://arxiv.org/abs/2202.13914"
    summary: ClassVar[str] = "A few LoRAs that all tasks share, and for each task its own mix of them."
    formula: ClassVar[str] = (
        "y = W x + (1 / rank) (Σ w_ti B_i)(Σ w_ti A_i) x; skills * rank * (d_in + d_out) + "
        "tasks * splits * skills values a layer"
    )
    use_when: ClassVar[str] = "Many related tasks with few rows each: they share what they have in common."
    limits: ClassVar[str] = (
        "Whoever serves it passes task_ids, a tensor with one number a row (the task's place among the "
        "sorted names; with beams, once a beam), to forward and generate: plain peft does that, adapter "
        "servers do not. While training, z is drawn once a step and task, not once a row, so that it does "
        "not depend on how many workers there are. peft's Poly has neither alpha nor dropout."
    )
    aliases: ClassVar[dict[str, dict[str, Any]]] = {"polytropon": {}, "mhr": {"splits": 8}}
    needs_tasks: ClassVar[bool] = True
    small: ClassVar[dict[str, Any]] = {"rank": 4, "skills": 3, "splits": 2}
    can: ClassVar[Capabilities] = Capabilities(
        mergeable=False,
        gradient_checkpointing=False,
        servers=("peft",),
        why={
            "gradient_checkpointing": "peft tells its layers the rows' tasks for the forward pass only, so "
            "blocks that are computed again mix the skills otherwise, and gradients are wrong. Take mtl_lora",
            "mergeable": "every task has other weights; train a lora for each task to merge one",
            "servers": "the mix depends on the row's task, which only peft passes on: train lora for vLLM",
        },
    )

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.tuners.poly import attach_poly

        return attach_poly(model, case, self)

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        layers = adapted(shape, self.targets)
        skills = sum(self.skills * self.rank * (d_in + d_out) for _, d_out, d_in in layers)
        return skills + len(layers) * len(case.tasks) * self.splits * self.skills

    def check(self, shape: "ModelShape", case: Case) -> None:
        if shape.model_type == "gpt2":
            raise InvalidRequest(
                "peft's Poly takes no layers of the kind that gpt2 has (Conv1D): use mtl_lora there.",
                code="method_not_applicable",
                param="adapter.kind",
            )
        biased = {name.removesuffix(".bias") for name, _ in shape.biases}
        for name, d_out, d_in in adapted(shape, self.targets):
            if case.quantize and name in biased:
                raise InvalidRequest(
                    f"peft's Poly writes into what {name} says, which a layer with a bias in {case.quantize} "
                    "does not allow: hold the base in full, or use mtl_lora.",
                    code="method_not_applicable",
                    param="base.quantize",
                )
            if d_in % self.splits or d_out % self.splits:
                raise InvalidRequest(
                    f"splits {self.splits} cannot cut {name} ({d_in} to {d_out}) into equal parts: set "
                    "splits to a divisor of both, or to 1.",
                    param="adapter.splits",
                )
