"""GRPO: the model answers each prompt several times, graders judge, and what is better than its group gains.

Shao et al. 2024, arXiv:2402.03300, equation 3, with one update for each set of answers: the policy that wrote
them is then the one that is updated, so the ratio ρ = π/π_old is 1 and clipping it never acts, but its
gradient is that of log π. With A_i the advantage of answer i, and π at the temperature that it wrote with:

    token   l_it = -ρ_it A_i + β ρ_it (e^d - d - 1),   d = log π_ref(y_it) - log π(y_it)

    dapo, bnpo   sum of l over all tokens of the step / their number   Yu et al. 2025, arXiv:2503.14476
    grpo         mean over the answers of the mean over their tokens
    dr_grpo      sum over all tokens / (answers × max_new_tokens)      Liu et al. 2025, arXiv:2503.20783

The second ρ is not in GRPO's paper. It changes no value, but makes the gradient that of the reverse KL
instead of a biased one: DeepSeek-V3.2, arXiv:2512.02556, and TRL. `kl_gradient` "paper" leaves it out.

TRL's names. Its bnpo divides by the tokens of each microbatch; here nothing depends on how a step is split,
so bnpo is dapo. The reference is the base without its adapter.

    A_i = (r_i - mean of the group) / (std + 1e-4)

std with n - 1: of the group, of the whole step (`batch`), or 1 without the 1e-4 (`none`, as in Dr. GRPO).
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service.errors import InvalidRequest
from peft_service.graders import AnyGrader
from peft_service.objectives import Objective, Rows
from peft_service.tasks import Architecture, Task

if TYPE_CHECKING:
    from peft_service.methods import Method


class GRPO(Objective):
    kind: Literal["grpo"] = "grpo"

    grader: AnyGrader
    """Who says how good an answer is; OpenAI's types."""
    group_size: int = Field(8, ge=2, le=256)
    """Answers to each prompt."""
    max_new_tokens: int = Field(256, ge=1, le=32_768)
    """Of an answer; one that is cut off there is judged as it is."""
    temperature: float = Field(1.0, gt=0, le=5)
    """Answers are written at it, and learned at it."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sampled from the likeliest tokens that have this much probability together; 1: from all."""
    top_k: int | None = Field(None, ge=1)
    """Sampled from so many of the likeliest tokens; none: from all."""
    beta: float = Field(0.0, ge=0, le=10)
    """How much the distance from the base costs; 0: nothing, and no forward pass of the base."""
    kl_gradient: Literal["unbiased", "paper"] = "unbiased"
    """Of the distance from the base: that of the reverse KL, or the paper's, which is biased."""
    loss_type: Literal["dapo", "grpo", "dr_grpo", "bnpo"] = "dapo"
    """Whether every token weighs the same (dapo), or every answer (grpo), or as much as in dr_grpo."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What an advantage is divided by: the spread of the rewards in its group, or in the step, or nothing."""

    rows: ClassVar[Rows] = "prompts"
    formats: ClassVar[tuple[str, ...]] = ("prompts", "chat", "prompt_completion")
    default_for: ClassVar[tuple[str, ...]] = ("prompts",)
    aliases: ClassVar[dict[str, dict[str, Any]]] = {"reinforcement": {}}
    summary: ClassVar[str] = "Answer prompts, and learn from what graders say of the answers."
    paper: ClassVar[str] = "Shao et al. 2024, arXiv:2402.03300"
    formula: ClassVar[str] = "-A log π(y), A = (r - mean r) / std r in the group of answers to a prompt"
    measure: ClassVar[str] = "the graders' mean score of answers to held-out prompts"
    rate_scale: ClassVar[float] = 0.1
    generates: ClassVar[bool] = True

    def task(self, architecture: Architecture) -> Task:
        return "seq2seq_lm" if architecture == "encoder_decoder" else "causal_lm"

    def check(self, method: "Method") -> None:
        if self.beta > 0 and method.can.carrier not in ("peft", "registered"):
            raise InvalidRequest(
                f"beta is {self.beta:g}, which compares with the base at every step, but {method.kind} "
                "changes the base itself: set beta to 0, or take a method whose adapter can be switched off, "
                "such as lora",
                code="method_not_applicable",
                param="beta",
            )

    @property
    def by_token(self) -> bool:
        """Whether every token is a target, or every answer."""
        return self.loss_type in ("dapo", "bnpo")

    def targets(self, batch: Any) -> Any:
        from peft_service import logps
        from peft_service.objectives.sft import IGNORE

        found_BU = logps.targets_of(batch) != IGNORE
        return found_BU.sum() if self.by_token else found_BU.any(1).sum()

    def loss_sum(self, model: Any, batch: Any) -> tuple[Any, Any]:
        """As the base class has it; of loss types by answer, right is the mean over an answer's tokens.

        Raises:
            InvalidRequest: beta is above 0 and the model has no adapter that could be taken away.
        """
        from peft_service import logps
        from peft_service.objectives.sft import IGNORE

        targets_BU = logps.targets_of(batch)
        logits_BUV = logps.precise(logps.logits_of(model, batch))
        logps_BU = logps.token_logps(logits_BUV / self.temperature, targets_BU)
        ratio_BU = (logps_BU - logps_BU.detach()).exp()
        loss_BU = -batch.advantages_S[: len(logps_BU), None] * ratio_BU
        if self.beta > 0:
            gap_BU = self._base_logps(model, batch, targets_BU) - logps_BU
            kl_BU = gap_BU.exp() - gap_BU - 1
            loss_BU = loss_BU + self.beta * (kl_BU * ratio_BU if self.kl_gradient == "unbiased" else kl_BU)
        found_BU = targets_BU != IGNORE
        weights_BU = found_BU.to(loss_BU.dtype)
        if self.loss_type == "grpo":
            weights_BU = weights_BU / found_BU.sum(1, keepdim=True).clamp(min=1)
        elif self.loss_type == "dr_grpo":
            weights_BU = weights_BU / self.max_new_tokens
        right_BU = (logits_BUV.detach().argmax(-1) == targets_BU) & found_BU
        if self.by_token:
            right = right_BU.sum()
        else:
            right = (right_BU.sum(1) / found_BU.sum(1).clamp(min=1)).sum()
        return (loss_BU * weights_BU).sum(), right

    def _base_logps(self, model: Any, batch: Any, targets_BU: Any) -> Any:
        import torch

        from peft_service import logps

        adapted = getattr(model, "module", model)
        if not hasattr(adapted, "disable_adapter"):
            raise InvalidRequest(
                "beta above 0 compares with the base, and this method changes the base itself: "
                "set beta to 0, or take a method that adds an adapter (lora)",
                code="no_reference",
                param="method.grpo.beta",
            )
        with torch.no_grad(), adapted.disable_adapter():
            logits_BUV = logps.precise(logps.logits_of(model, batch))
            return logps.token_logps(logits_BUV / self.temperature, targets_BU)
