"""Arrow: every token goes to the published LoRAs whose main direction it has, without training.

Ostapenko et al. 2024, arXiv:2405.11157; the formula is in `peft_service.tuners.arrow`.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service.errors import InvalidRequest
from peft_service.methods import Capabilities, Case, Material, Method
from peft_service.methods.lorahub import PLAIN_LORAS

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape


class Arrow(Method):
    kind: Literal["arrow"] = "arrow"
    sources: tuple[str, ...] = Field(min_length=2, max_length=64)
    """Published LoRAs of this base, as `name@version`, on the same layers."""
    top_k: int = Field(3, ge=1, le=64)
    """How many of them a token gets."""
    temperature: float = Field(1.0, gt=0, le=100)
    general: int = Field(0, ge=0, le=62)
    """The last so many sources are general knowledge: their mean is taken from the others."""

    learning_rate: ClassVar[float] = 1e-3
    title: ClassVar[str] = "Arrow"
    family: ClassVar[str] = "multi-task"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.11157"
    summary: ClassVar[str] = "Published LoRAs on one base, and every token goes to those that fit it."
    formula: ClassVar[str] = (
        "y = W x + Σ_e c_e s_e B_e A_e x, c the softmax of the top k |p_e · x|, p_e the first right singular "
        "vector of B_e A_e; nothing is trained"
    )
    use_when: ClassVar[str] = "A library of LoRAs, and nobody says to which task a question belongs."
    limits: ClassVar[str] = (
        "No row is learned from: a validation file is answered, that is all. The operation arrow makes the "
        "same without a file. All LoRAs are in the artifact and are computed for every token."
    )
    sources_of: ClassVar[tuple[str, ...]] = PLAIN_LORAS
    trains: ClassVar[bool] = False
    small: ClassVar[dict[str, Any]] = {"sources": ("one@1", "two@1"), "top_k": 1}
    can: ClassVar[Capabilities] = Capabilities(
        tasks=("causal_lm", "seq2seq_lm"),
        starts_as_base=False,
        mergeable=False,
        carrier="registered",
        servers=("peft",),
        why={
            "tasks": "a new head has to be trained, and nothing is trained here: use lora with that data",
            "starts_as_base": "the LoRAs are at work from the start",
            "mergeable": "which LoRAs a token gets depends on the token; combine them to merge their sum",
            "servers": "no server routes tokens: use combine, whose result is one plain LoRA",
        },
    )

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.tuners.arrow import attach_arrow

        return attach_arrow(model, case, self, material.sources)

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        return 0

    def stored(self, shape: "ModelShape", case: Case) -> None:
        return None

    def check(self, shape: "ModelShape", case: Case) -> None:
        if self.general > len(self.sources) - 2:
            raise InvalidRequest(
                f"general {self.general} of {len(self.sources)} sources leaves less than two to route among: "
                f"set general to {len(self.sources) - 2}.",
                param="adapter.general",
            )
