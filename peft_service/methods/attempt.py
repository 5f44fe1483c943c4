"""ATTEMPT: every row gets a prompt of its own, mixed from those of other tasks.  Asai et al. 2022,
arXiv:2205.11961.

    input = [P_row; E(x)]      P_row = P_target + Σ_j a_j P_j
    a = softmax_j(P̂_j · LN(W_up SiLU(W_down x̂)) / T)

over the frozen source prompts P_1 … P_S and P_target itself; x̂ is the maximum over the row's embedded prompt,
P̂_j that over the tokens of P_j. The paper's T is d·e.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service.errors import InvalidRequest
from peft_service.methods import Capabilities, Case, Material, Method
from peft_service.methods.prompt_tuning import NOT_MERGEABLE, STARTS, check_width

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape


class Attempt(Method):
    kind: Literal["attempt"] = "attempt"
    sources: tuple[str, ...] = Field(min_length=1, max_length=16)
    """Published prompts, as `name@version`; they stay as they are and go into the artifact."""
    virtual_tokens: int = Field(20, ge=1, le=1024)
    """P, as the sources have it."""
    size: int = Field(100, ge=1, le=16384)
    """r, the width inside the attention."""
    temperature: float | None = Field(None, gt=0, le=1e6)
    """T, by which the attention's logits are divided; None: d·e, as in the paper."""
    attention_rate: float = Field(1 / 3, gt=0, le=10)
    """What the learning rate is multiplied with for the attention; the authors' is a third."""

    learning_rate: ClassVar[float] = 1e-2
    title: ClassVar[str] = "ATTEMPT"
    family: ClassVar[str] = "multi-task"
    paper: ClassVar[str] = "https://arxiv.org/abs/2205.11961"
    summary: ClassVar[str] = "A prompt for every row: a new one plus a mix of other tasks' frozen prompts."
    formula: ClassVar[str] = (
        "P_row = P_target + Σ_j softmax_j(P̂_j · LN(W_up SiLU(W_down x̂)) / (d·e)) P_j; "
        "P·d + 2·d·r + 2·d values train, S·P·d more are kept"
    )
    use_when: ClassVar[str] = (
        "Prompts of several tasks are there, and which of them helps differs from row to row."
    )
    limits: ClassVar[str] = (
        "Sources have the same number of virtual tokens. The mix is of a row's prompt and not of its "
        "answer: rows without a prompt all get the same. An encoder's class is then read from "
        "the first virtual token."
    )
    sources_of: ClassVar[tuple[str, ...]] = ("prompt_tuning", "spot")
    as_sources: ClassVar[tuple[str, ...]] = ("virtual_tokens",)
    small: ClassVar[dict[str, Any]] = {"virtual_tokens": 5, "size": 8, "sources": ("one@1", "two@1")}
    can: ClassVar[Capabilities] = Capabilities(
        packing=False,
        starts_as_base=False,
        mergeable=False,
        carrier="registered",
        servers=("peft",),
        why={
            "starts_as_base": STARTS,
            "mergeable": NOT_MERGEABLE,
            "servers": "no server computes a prompt from the row; spot starts from the same sources and is "
            "one plain prompt",
        },
    )

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.tuners import attempt, prompts
        from peft_service.tuners.task_prompts import source_prompts

        given = source_prompts(material.sources, self.virtual_tokens, prompts.width_of(model))
        return attempt.attach(model, case, self, given)

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        d = shape.hidden
        return self.virtual_tokens * d + 2 * d * self.size + 2 * d

    def stored(self, shape: "ModelShape", case: Case) -> int | None:
        return self.trainable(shape, case) + len(self.sources) * self.virtual_tokens * shape.hidden

    def check(self, shape: "ModelShape", case: Case) -> None:
        check_width(shape, self.kind)
        if shape.architecture == "encoder_decoder" and case.task != "seq2seq_lm":
            raise InvalidRequest(
                f"attempt does not work for {case.task.replace('_', ' ')} on a {shape.model_type}, whose "
                "decoder reads the encoder's ids again. Use LoRA, or an encoder.",
                code="method_not_applicable",
                param="adapter.kind",
            )
