"""LT-SFT: sparse fine-tuning of a lottery ticket.  Ansell et al. 2021, arXiv:2110.07560.

First all weights train; the K that moved most are kept, all go back to the base's values, and in the second
phase only those K train. The result is a sparse difference: those of a language and of a task add up
(`peft_service.delta.apply`). The learning rate's schedule goes over both phases; the authors start it anew.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service.errors import InvalidRequest
from peft_service.methods import Capabilities, Case, Material, Method
from peft_service.methods.full import NO_NF4, NO_SWITCH

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape


class LTSFT(Method):
    kind: Literal["lt_sft"] = "lt_sft"
    density: float = Field(0.08, gt=0, le=1)
    """Share of the weights in question that the result changes: K / N."""
    first_phase: float = Field(0.5, gt=0, lt=1)
    """Share of the steps in which all weights train."""
    embeddings: bool = False
    """The token embedding is in question too. Adam moves the rows of tokens that never occur as far as any,
    by gradients that are small and never change sign: where it is tied to the output they would be chosen."""

    learning_rate: ClassVar[float] = 5e-5
    title: ClassVar[str] = "LT-SFT"
    family: ClassVar[str] = "selective"
    paper: ClassVar[str] = "https://arxiv.org/abs/2110.07560"
    summary: ClassVar[str] = "Finds the weights that matter by full fine-tuning, then trains only those anew."
    formula: ClassVar[str] = (
        "K = density·N of the largest |θ₁ - θ₀|; θ ← θ₀, then only those K train; all N have optimizer "
        "state, K are kept"
    )
    use_when: ClassVar[str] = "Differences are to be added: a language and a task learned apart."
    limits: ClassVar[str] = "Needs the memory of full fine-tuning and 4 bytes a weight on the CPU."
    aliases: ClassVar[dict[str, dict[str, Any]]] = {
        "lottery_ticket_sft": {},
        "lottery_ticket_sparse_fine_tuning": {},
        "sparse_fine_tuning": {},
        "composable_sft": {},
    }
    small: ClassVar[dict[str, Any]] = {"density": 0.2}
    can: ClassVar[Capabilities] = Capabilities(
        nf4=False,
        carrier="delta",
        servers=(),
        weight_decay=False,
        hot_switch=False,
        why={
            "nf4": NO_NF4,
            "weight_decay": "decay moves the weights that the difference leaves alone. Set it to 0",
            "hot_switch": NO_SWITCH,
        },
    )

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.tuners.in_place import LotteryTicket, first_phase

        phase = first_phase(self.first_phase, case.steps)
        return LotteryTicket(model, self.kind, self.density, phase, self.embeddings)

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        left_out = 0 if self.embeddings else shape.embedding_parameters
        return shape.for_task(case.task).body_parameters - left_out

    def stored(self, shape: "ModelShape", case: Case) -> int | None:
        return max(1, round(self.density * self.trainable(shape, case)))

    def check(self, shape: "ModelShape", case: Case) -> None:
        if case.steps == 1:
            raise InvalidRequest(
                "lt_sft trains in two phases, but this run has one step. Train longer, or use kind full.",
                param="training.max_steps",
            )
