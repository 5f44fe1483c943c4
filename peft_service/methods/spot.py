"""SPoT: prompt tuning that starts from the prompts of other tasks.  Vu et al. 2021, arXiv:2110.07904.

With one source the first prompt is the source's, with several it is their mean. The artifact is a plain
prompt.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service.methods import Capabilities, Case, Material, Method
from peft_service.methods.prompt_tuning import NOT_MERGEABLE, STARTS, check_prompt

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape


class SPoT(Method):
    kind: Literal["spot"] = "spot"
    sources: tuple[str, ...] = Field(min_length=1, max_length=16)
    """Published prompts, as `name@version`."""
    virtual_tokens: int = Field(20, ge=1, le=1024)
    """P, as the sources have it."""

    learning_rate: ClassVar[float] = 1e-2
    title: ClassVar[str] = "SPoT"
    family: ClassVar[str] = "multi-task"
    paper: ClassVar[str] = "https://arxiv.org/abs/2110.07904"
    summary: ClassVar[str] = "Prompt tuning that begins with a prompt learned on another task."
    formula: ClassVar[str] = "input = [p_1 … p_P; E(x)], p at first the mean of the sources; P·d values"
    use_when: ClassVar[str] = "Prompt tuning is slow or unstable, and a prompt of a related task is there."
    limits: ClassVar[str] = (
        "Sources have the same number of virtual tokens. Which of many is most related is for the user to "
        "say."
    )
    aliases: ClassVar[dict[str, dict[str, Any]]] = {"soft_prompt_transfer": {}}
    sources_of: ClassVar[tuple[str, ...]] = ("prompt_tuning", "spot")
    as_sources: ClassVar[tuple[str, ...]] = ("virtual_tokens",)
    small: ClassVar[dict[str, Any]] = {"virtual_tokens": 5, "sources": ("one@1",)}
    can: ClassVar[Capabilities] = Capabilities(
        starts_as_base=False,
        mergeable=False,
        servers=("peft",),
        why={"starts_as_base": STARTS, "mergeable": NOT_MERGEABLE},
    )

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        import torch
        from peft import PromptTuningConfig

        from peft_service.tuners import prompts
        from peft_service.tuners.task_prompts import source_prompts

        given = source_prompts(material.sources, self.virtual_tokens, prompts.width_of(model))
        made = prompts.attach_prompt(
            model,
            case,
            PromptTuningConfig,
            num_virtual_tokens=self.virtual_tokens,
            token_dim=prompts.width_of(model),
            num_transformer_submodules=1,
        )
        with torch.no_grad():
            made.prompt_encoder["default"].embedding.weight.copy_(given.mean(0))
        return prompts.Prompted(made)

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        return self.virtual_tokens * shape.hidden

    def check(self, shape: "ModelShape", case: Case) -> None:
        check_prompt(shape, case, self.kind)
