"""MTL-LoRA: one LoRA for several tasks, each with a scaling and a mix of up-projections of its own.

    y = W x + s Σ_i softmax_i(w_t / τ) B_i diag(λ_t) A x       s = alpha / rank

Yang et al. 2024, arXiv:2410.09437. A (rank, d_in) and B_i (d_out, rank), i = 1…ups, are shared; λ_t (rank)
and w_t (ups) belong to task t. Every B_i starts at zero, λ and w at one.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service.methods import Capabilities, Case, Material, Method, adapted

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape


class MTLLoRA(Method):
    kind: Literal["mtl_lora"] = "mtl_lora"
    rank: int = Field(8, ge=1, le=512)
    alpha: float = Field(16, gt=0, le=4096)
    ups: int = Field(3, ge=1, le=64)
    """n, the up-projections that every task mixes."""
    temperature: float = Field(0.05, gt=0, le=100)
    """τ; small values let a task choose one up-projection."""
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] | None = Field(None, min_length=1)
    """Last parts of the module names that are adapted; None: every linear layer of the blocks."""

    learning_rate: ClassVar[float] = 3e-4
    title: ClassVar[str] = "MTL-LoRA"
    family: ClassVar[str] = "multi-task"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.09437"
    summary: ClassVar[str] = "One LoRA for several tasks, with a few values of its own for each."
    formula: ClassVar[str] = (
        "y = W x + s Σ softmax_i(w_t / τ) B_i diag(λ_t) A x; rank * d_in + ups * rank * d_out + "
        "tasks * (rank + ups) values a layer"
    )
    use_when: ClassVar[str] = "A few tasks that help each other, on one adapter hardly larger than a LoRA."
    limits: ClassVar[str] = (
        "Whoever serves it imports peft_service.tuners and passes row_tasks, one number a row (the task's "
        "place among the sorted names), to forward and generate; adapter servers do not."
    )
    aliases: ClassVar[dict[str, dict[str, Any]]] = {}
    needs_tasks: ClassVar[bool] = True
    small: ClassVar[dict[str, Any]] = {"rank": 4, "alpha": 8, "ups": 2}
    can: ClassVar[Capabilities] = Capabilities(
        mergeable=False,
        carrier="registered",
        servers=("peft",),
        why={
            "mergeable": "every task has other weights; train a lora for each task to merge one",
            "servers": "its weights depend on the row's task, which no server passes on: train lora for vLLM",
        },
    )

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        import torch
        from peft import TaskType, get_peft_model

        from peft_service.attached import head_modules
        from peft_service.targets import linear_layers, shortest
        from peft_service.tasks import PEFT_TASKS
        from peft_service.tuners.mtl_lora import MTLLoRAConfig, RowTasks

        config = MTLLoRAConfig(
            tasks=len(case.tasks),
            rank=self.rank,
            alpha=self.alpha,
            ups=self.ups,
            temperature=self.temperature,
            dropout=self.dropout,
            target_modules=shortest(model, linear_layers(model, self.targets)),
            modules_to_save=head_modules(model) or None,
            task_type=TaskType(PEFT_TASKS[case.task]),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(case.seed)
            return RowTasks(get_peft_model(model, config))

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        return sum(
            self.rank * d_in + self.ups * self.rank * d_out + len(case.tasks) * (self.rank + self.ups)
            for _, d_out, d_in in adapted(shape, self.targets)
        )

    def check(self, shape: "ModelShape", case: Case) -> None:
        adapted(shape, self.targets)
