"""ORPO: supervised learning of the better answer, and a penalty on the odds of the worse.

Hong et al. 2024, arXiv:2403.07691, equations 6 and 7. With p(y) = exp(mean log-probability of y's tokens) and
odds(y) = p(y) / (1 - p(y)):

    L = NLL(x, y⁺) - β · log σ(log odds(y⁺) - log odds(y⁻))

The likelihood is of prompt *and* answer, as in TRL and in the authors' own code, and a mean over those tokens
of the step; the second term is a mean over its pairs. Of an encoder-decoder, likelihood is of the answer.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from peft_service.objectives import Objective, Rows
from peft_service.objectives.sft import IGNORE
from peft_service.tasks import Architecture, Task


class ORPO(Objective):
    kind: Literal["orpo"] = "orpo"
    beta: float = Field(default=0.1, ge=0, le=100)
    """Weight of the odds ratio: the paper's λ."""

    rows: ClassVar[Rows] = "pairs"
    formats: ClassVar[tuple[str, ...]] = ("preference",)
    summary: ClassVar[str] = (
        "Learn to write the better of two answers and not the worse, in one go from the base."
    )
    paper: ClassVar[str] = "Hong et al. 2024, arXiv:2403.07691"
    formula: ClassVar[str] = (
        "NLL(x, y⁺) - β log σ(log odds(y⁺) - log odds(y⁻)), odds = p/(1-p), p = π(y)^(1/|y|)"
    )
    measure: ClassVar[str] = (
        "how often the better answer's tokens have the larger mean log-probability, on held-out pairs"
    )
    rate_scale: ClassVar[float] = 0.25
    """5e-5 where LoRA's own rate is 2e-4: the paper learns Mistral at 5e-6, where SFT takes 2e-5."""
    packs: ClassVar[bool] = True

    def task(self, architecture: Architecture) -> Task:
        return "seq2seq_lm" if architecture == "encoder_decoder" else "causal_lm"

    def targets(self, batch: Any) -> Any:
        from peft_service import logps

        return logps.pairs_in(batch)

    def shared(self, model: Any, batches: Sequence[Any]) -> Any:
        """(pairs, tokens of their prompts and better answers) of the step."""
        from peft_service import logps

        return logps.pairs_and_tokens(batches, prompts=True)

    def loss_sum(self, model: Any, batch: Any) -> tuple[Any, Any]:
        from peft_service import logps

        # One pass over the logits for both terms: of the whole better text, and of the answers alone.
        whole_BU = logps.whole_targets_of(batch)
        logps_BU = logps.token_logps(logps.logits_of(model, batch), whole_BU)
        answers_BU = logps_BU.masked_fill(logps.targets_of(batch) == IGNORE, 0.0)
        pairs = logps.Pairs.of(logps.sums_of(batch, answers_BU, 2), logps.counts_of(batch, 2))
        # A token that is certain has infinite odds, and their gradient is no number.
        better_P, worse_P = (average.clamp(max=-1e-7) for average in pairs.averages())
        log_odds_P = (better_P - worse_P) - ((-better_P.expm1()).log() - (-worse_P.expm1()).log())
        loss, right = pairs.sums(logps.smoothed(log_odds_P, 0.0), better_P - worse_P)
        shared = self.shared(model, [batch]) if batch.shared is None else batch.shared
        whole_P = logps.sums_of(batch, logps_BU, 2)[0::2]
        nll = -whole_P.masked_fill(~pairs.real_P, 0.0).sum()
        return self.beta * loss + logps.per_pair(nll, shared), right
