"""DoRA: W' = m (W + s B A) / ‖W + s B A‖, direction by LoRA and the length of each output's weights by
itself.

Liu et al. 2024, arXiv:2402.09353. m (d_out) starts at the lengths of W's rows; the norm counts as a
constant in the backward pass.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peft_service.methods import Capabilities, Case, Material, Method, adapted
from peft_service.methods.lora import LowRank

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape


class DoRA(LowRank, Method):
    kind: Literal["dora"] = "dora"

    learning_rate: ClassVar[float] = 2e-4
    title: ClassVar[str] = "DoRA"
    family: ClassVar[str] = "low rank"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.09353"
    summary: ClassVar[str] = "LoRA for the direction of the weights, a vector for their length."
    formula: ClassVar[str] = (
        "W' = m (W + s B A) / ‖W + s B A‖ by rows; rank * (d_in + d_out) + d_out values a layer"
    )
    use_when: ClassVar[str] = "Low ranks, where LoRA falls short; merge it before serving."
    limits: ClassVar[str] = "Slower than LoRA unless merged; vLLM does not serve it as an adapter."
    aliases: ClassVar[dict[str, dict[str, Any]]] = {"qdora": {"base.quantize": "nf4"}}
    small: ClassVar[dict[str, Any]] = {"rank": 4, "alpha": 8}
    can: ClassVar[Capabilities] = Capabilities(
        servers=("peft",), why={"servers": "vLLM and LoRAX load plain LoRA: merge it, or train lora"}
    )

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.attached import Attached

        return Attached(self.lora(model, case, use_dora=True))

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        return self.pairs(shape) + sum(d_out for _, d_out, _ in adapted(shape, self.targets))

    def check(self, shape: "ModelShape", case: Case) -> None:
        adapted(shape, self.targets)
