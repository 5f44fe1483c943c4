"""Full fine-tuning: every weight of the base trains, the head too, and the result is a model of its own."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peft_service.methods import Capabilities, Case, Material, Method

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape

NO_NF4 = (
    "it changes the base's own weights, and a weight of four bits has no small step to take. Use the base "
    "without base.quantize, or QLoRA"
)
NO_SWITCH = "it is applied to the base's own weights and reverted. Use LoRA for switching"


class Full(Method):
    kind: Literal["full"] = "full"

    learning_rate: ClassVar[float] = 1e-5
    title: ClassVar[str] = "Full fine-tuning"
    family: ClassVar[str] = "full"
    paper: ClassVar[str] = "https://arxiv.org/abs/1810.04805"
    """BERT's, which made it the standard way from a pretrained model to a task."""
    summary: ClassVar[str] = "Every weight trains; the result is a checkpoint that needs no base."
    formula: ClassVar[str] = "θ ← AdamW(θ, ∇L); all N parameters that the task's model has, tied ones once"
    use_when: ClassVar[str] = (
        "There is much data, a new language or domain, and memory for 16 bytes a parameter."
    )
    limits: ClassVar[str] = "An artifact as large as the base; forgets more of the base than adapters do."
    aliases: ClassVar[dict[str, dict[str, Any]]] = {
        "full_fine_tuning": {},
        "full_ft": {},
        "full_parameter": {},
        "sft_full": {},
        "fine_tuning": {},
        "finetune": {},
    }
    can: ClassVar[Capabilities] = Capabilities(
        nf4=False,
        mergeable=False,
        hot_switch=False,
        carrier="model",
        servers=("vllm", "ray_serve_llm"),
        why={
            "nf4": NO_NF4,
            "mergeable": "the artifact is the whole model already, nothing is left to merge it into",
            "hot_switch": "every result is a whole model. Use LoRA, or a sparse delta (LT-SFT)",
        },
    )

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.tuners.in_place import WholeModel

        return WholeModel(model, self.kind, [name for name, _ in model.named_parameters()])

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        return shape.for_task(case.task).parameters
