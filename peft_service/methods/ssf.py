"""SSF: scale and shift what comes out of linear layers and norms, y = γ ⊙ x + β.  Lian et al. 2022,
arXiv:2210.08823.

γ starts at 1 and β at 0, so step 0 is the base; `init` paper draws both with deviation 0.02 around that, as
the authors' code does.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peft_service import sites
from peft_service.errors import InvalidRequest
from peft_service.methods import Capabilities, Case, Material, Method

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape


class SSF(Method):
    kind: Literal["ssf"] = "ssf"
    shift: Literal["where_bias", "all", "none"] = "where_bias"
    """Where β is: beside the base's own biases, everywhere, or nowhere."""
    init: Literal["identity", "paper"] = "identity"

    learning_rate: ClassVar[float] = 5e-3
    title: ClassVar[str] = "SSF"
    family: ClassVar[str] = "scale and shift"
    paper: ClassVar[str] = "https://arxiv.org/abs/2210.08823"
    summary: ClassVar[str] = (
        "Learned scales and shifts behind every linear layer and norm; they merge for free."
    )
    formula: ClassVar[str] = "y = γ ⊙ x + β; d_out values for every γ and every β"
    use_when: ClassVar[str] = "Nothing may be added at inference, and some tenths of a per mille have to do."
    limits: ClassVar[str] = (
        "The paper is about vision. On bases without biases (LLaMA, T5) the default has no β; with shift "
        "all it "
        "has, and then does not merge there."
    )
    aliases: ClassVar[dict[str, dict[str, Any]]] = {"scale_and_shift": {}, "scaling_shifting": {}}
    can: ClassVar[Capabilities] = Capabilities(
        carrier="registered",
        weight_decay=False,
        servers=("peft",),
        why={
            "weight_decay": "γ rests at 1 and decay pulls it to 0, which shrinks the base. Set it to 0",
            "servers": "vLLM, LoRAX and Ray Serve load LoRA files only. Merge it into the base for them",
        },
    )

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.attached import Attached
        from peft_service.tuners.ssf import SSFConfig
        from peft_service.tuners.wrapper import attach

        return Attached(attach(model, case, SSFConfig, shift=self.shift, init=self.init))

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        sizes = [(name, d_out) for name, d_out, _ in shape.linears] + list(shape.norms)
        biased = {name.removesuffix(".bias") for name, _ in shape.biases}

        def shifts(name: str) -> bool:
            return self.shift == "all" or (self.shift == "where_bias" and name in biased)

        return sum(
            size * (2 if shifts(name) else 1) for name, size in sizes if sites.index_of(name) is not None
        )

    def check(self, shape: "ModelShape", case: Case) -> None:
        if not self.trainable(shape, case):
            raise InvalidRequest(
                f"ssf finds no linear layer or norm in the layers of this {shape.model_type or 'base'}: use "
                f"lora.",
                code="method_not_applicable",
                param="adapter.kind",
            )
