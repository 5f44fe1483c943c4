"""Child-tuning: only a child network of the base gets gradients.  Xu et al. 2021, arXiv:2109.05687.

F (task-free) draws another mask every step; D (task-driven) keeps the share of the weights that has the
largest Fisher information on the task. All of the base's weights count, embeddings and norms too, but not the
head. As in the paper the mask is on gradients. D reads the Fisher information, the mean of the squared
gradient of a step, in a first phase in which nothing moves; the authors' code clips each tensor's gradient
before squaring, which is not in the paper and not done here.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service.errors import InvalidRequest
from peft_service.methods import Capabilities, Case, Material, Method
from peft_service.methods.full import NO_NF4, NO_SWITCH

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape


class ChildTuning(Method):
    kind: Literal["child_tuning"] = "child_tuning"
    variant: Literal["f", "d"] = "d"
    """`f`: another random child every step; `d`: the weights that matter for the task."""
    share: float = Field(0.3, gt=0, le=1)
    """Share of the weights in the child network: p of the paper."""
    fisher: float = Field(0.1, gt=0, lt=1)
    """`d`: share of the steps that only read gradients."""

    learning_rate: ClassVar[float] = 2e-5
    title: ClassVar[str] = "Child-tuning"
    family: ClassVar[str] = "selective"
    paper: ClassVar[str] = "https://arxiv.org/abs/2109.05687"
    summary: ClassVar[str] = "Full fine-tuning in which only a part of the weights gets gradients."
    formula: ClassVar[str] = (
        "g ← g ⊙ M / p with M ~ Bernoulli(p) each step (f), or g ← g ⊙ M with M the top p of Σ g² (d); all N "
        "weights have optimizer state, p·N are kept (d)"
    )
    use_when: ClassVar[str] = "Full fine-tuning overfits: small data and a large encoder."
    limits: ClassVar[str] = "Needs the memory of full fine-tuning; d also 4 bytes a weight on the CPU."
    aliases: ClassVar[dict[str, dict[str, Any]]] = {
        "child_tuning_f": {"variant": "f"},
        "child_tuning_d": {"variant": "d"},
    }
    small: ClassVar[dict[str, Any]] = {"fisher": 0.2}
    can: ClassVar[Capabilities] = Capabilities(
        nf4=False,
        carrier="delta",
        servers=(),
        weight_decay=False,
        hot_switch=False,
        why={
            "nf4": NO_NF4,
            "weight_decay": "decay moves the weights outside of the child network too. Set it to 0",
            "hot_switch": NO_SWITCH,
        },
    )

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.tuners.in_place import ChildD, ChildF, first_phase

        if self.variant == "f":
            return ChildF(model, self.kind, self.share, case.seed)
        return ChildD(model, self.kind, self.share, first_phase(self.fisher, case.steps))

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        return shape.for_task(case.task).body_parameters

    def stored(self, shape: "ModelShape", case: Case) -> int | None:
        every = self.trainable(shape, case)
        return every if self.variant == "f" else max(1, round(self.share * every))

    def check(self, shape: "ModelShape", case: Case) -> None:
        if self.variant == "d" and case.steps == 1:
            raise InvalidRequest(
                "child_tuning d reads gradients in a first phase and trains in a second, but this run has "
                'one step. Train longer, or use variant "f".',
                param="training.max_steps",
            )
