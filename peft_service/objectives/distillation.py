"""Distillation: the distribution of a larger, frozen model at every target token.

Hinton et al. 2015, arXiv:1503.02531, section 2; reverse KL: Gu et al. 2023, arXiv:2306.08543; Jensen-Shannon:
Agarwal et al. 2023, arXiv:2306.13649, equation 1. With p the teacher's and q the student's distribution, both
softened by the temperature T:

    L = alpha · T² · D(p, q) + (1 - alpha) · (-log q₁(y)),  q₁: the student's at T = 1

    forward         D = KL(p ‖ q)     the student covers all that the teacher finds possible
    reverse         D = KL(q ‖ p)     the student keeps to what the teacher finds likely
    jensen_shannon  D = KL(p ‖ m)/2 + KL(q ‖ m)/2,  m = (p + q)/2

T² keeps the gradient's size when T changes (Hinton); TRL's GKDTrainer computes the same D and leaves it out.
Teacher and student must have one tokenizer. Where their vocabularies are padded to different sizes, only the
ids that both have are compared: no tokenizer gives the others.
"""

from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from peft_service.objectives import Objective
from peft_service.objectives.sft import IGNORE
from peft_service.tasks import Architecture, Task


class Distillation(Objective):
    kind: Literal["distillation"] = "distillation"
    teacher: str = ""
    """The base whose distribution is learned: its ID, or a URI as `model` takes. Its tokenizer must be the
    base's own."""
    temperature: float = Field(default=2.0, gt=0, le=100)
    """T: both distributions are softened by it."""
    alpha: float = Field(default=0.5, ge=0, le=1)
    """Weight of the teacher; the rest is of the rows' own tokens."""
    divergence: Literal["forward", "reverse", "jensen_shannon"] = "forward"
    """How far the two distributions are apart: forward covers all that the teacher finds possible, reverse
    keeps to what it finds likely, jensen_shannon is between them."""

    formats: ClassVar[tuple[str, ...]] = (
        "chat", "sharegpt", "instruction", "prompt_completion", "tokens", "segments", "text",
    )  # fmt: skip
    summary: ClassVar[str] = (
        "Learn to find likely what a larger model finds likely, in the answers of the rows."
    )
    paper: ClassVar[str] = "Hinton et al. 2015, arXiv:1503.02531"
    formula: ClassVar[str] = (
        "alpha T² D(p_teacher, p_student) - (1 - alpha) log p_student(y), mean over target tokens"
    )
    measure: ClassVar[str] = "the loss, of which the divergence from the teacher is part, on held-out rows"
    packs: ClassVar[bool] = True

    def task(self, architecture: Architecture) -> Task:
        return "seq2seq_lm" if architecture == "encoder_decoder" else "causal_lm"

    def targets(self, batch: Any) -> Any:
        from peft_service import logps

        return (logps.targets_of(batch) != IGNORE).sum()

    def loss_sum(self, model: Any, batch: Any) -> tuple[Any, Any]:
        """Raises TypeError without `batch.teacher`."""
        import torch
        import torch.nn.functional as F

        from peft_service import logps

        if batch.teacher is None:
            raise TypeError("distillation needs batch.teacher: a frozen model in evaluation mode")
        targets_BU = logps.targets_of(batch)
        found_BU = targets_BU != IGNORE
        with torch.no_grad():
            # Without what the student's method adds to its inputs.
            said_BUV = logps.logits_of(batch.teacher, replace(batch, extra={}))
            teacher_NV = logps.precise(said_BUV[found_BU])
            del said_BUV
        student_NV = logps.precise(logps.logits_of(model, batch)[found_BU])
        targets_N = targets_BU[found_BU]
        nll = F.cross_entropy(student_NV, targets_N, reduction="sum")
        right = (student_NV.argmax(-1) == targets_N).sum()

        common = min(student_NV.shape[-1], teacher_NV.shape[-1])
        log_q = (student_NV[:, :common] / self.temperature).log_softmax(-1)
        log_p = (teacher_NV[:, :common] / self.temperature).log_softmax(-1).to(log_q.dtype)
        if self.divergence == "forward":
            apart = _kl(log_p, log_q)
        elif self.divergence == "reverse":
            apart = _kl(log_q, log_p)
        else:
            log_m = torch.logaddexp(log_p, log_q) - torch.log(log_q.new_tensor(2.0))
            apart = (_kl(log_p, log_m) + _kl(log_q, log_m)) / 2
        return self.alpha * self.temperature**2 * apart + (1 - self.alpha) * nll, right


def _kl(log_a: Any, log_b: Any) -> Any:
    """KL(a ‖ b), summed over the rows of (N, V) log-probabilities."""
    return (log_a.exp() * (log_a - log_b)).sum()
