"""MAM adapter: a short prefix and a scaled parallel adapter on the FFN.  He et al. 2021, arXiv:2110.04366.

    [P_K; K], [P_V; V] in every layer, and h + s E(r), s = 4, beside the feed-forward network

A composition of `prefix_tuning` and `adapter` in its parallel variant; each part's directory loads alone.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service.methods import Capabilities, Case, Material, Method
from peft_service.methods.adapter import Activation, Adapter
from peft_service.methods.hybrid import GENERAL, NOT_WHOLE, Hybrid
from peft_service.methods.p_tuning_v2 import PTuningV2
from peft_service.methods.prefix_tuning import NO_CHECKPOINTING, STARTS, PrefixTuning
from peft_service.tasks import CLASSIFYING

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape


class MAM(Method):
    kind: Literal["mam"] = "mam"
    virtual_tokens: int = Field(30, ge=1, le=1024)
    """P, the length of the prefix."""
    size: int = Field(512, ge=1, le=65536)
    """m, the width of the adapter."""
    scale: float = Field(4.0, gt=0, le=1000)
    """s."""
    activation: Activation = "relu"

    learning_rate: ClassVar[float] = 5e-5
    title: ClassVar[str] = "MAM adapter"
    family: ClassVar[str] = "hybrid"
    paper: ClassVar[str] = "https://arxiv.org/abs/2110.04366"
    summary: ClassVar[str] = (
        "A short prefix in every layer and a scaled adapter beside every feed-forward network."
    )
    formula: ClassVar[str] = "[P_K; K], [P_V; V] and h + 4 E(r); 2LPk + L(2dm + d + m) values"
    use_when: ClassVar[str] = "Accuracy near full fine-tuning with some per cent of the weights."
    limits: ClassVar[str] = (
        "No gradient checkpointing. Of an encoder-decoder the prefix is on the decoder alone."
    )
    aliases: ClassVar[dict[str, dict[str, Any]]] = {"mam_adapter": {}, "mix_and_match": {}}
    small: ClassVar[dict[str, Any]] = {"virtual_tokens": 5, "size": 8}
    can: ClassVar[Capabilities] = Capabilities(
        carrier="composite",
        gradient_checkpointing=False,
        starts_as_base=False,
        mergeable=False,
        servers=(),
        why={
            "gradient_checkpointing": NO_CHECKPOINTING,
            "starts_as_base": STARTS,
            "mergeable": NOT_WHOLE,
            "servers": GENERAL.why["servers"],
        },
    )

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.tuners.hybrid import attach

        whole = self._whole(case)
        return attach(model, case, material, whole.ordered, [1.0, 1.0])

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        return self._whole(case).trainable(shape, case)

    def stored(self, shape: "ModelShape", case: Case) -> int | None:
        return self._whole(case).stored(shape, case)

    def check(self, shape: "ModelShape", case: Case) -> None:
        self._whole(case).check(shape, case)

    def _whole(self, case: Case) -> Hybrid:
        prefix = PTuningV2 if case.task in CLASSIFYING else PrefixTuning
        adapter = Adapter(variant="parallel", size=self.size, scale=self.scale, activation=self.activation)
        return Hybrid(parts=(adapter, prefix(virtual_tokens=self.virtual_tokens)))
