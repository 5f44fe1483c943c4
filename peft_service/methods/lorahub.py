"""LoRAHub: the mix of published LoRAs that suits a few rows, found without gradients.

Huang et al. 2023, arXiv:2307.13269. ΔW = Σ w_i s_i B_i A_i, with the weights w (one a source, in every layer
the same) that have the least mean loss on the rows + l1 * mean |w_i|. They are searched by a (1+1) evolution
strategy with the rule of one fifth (Rechenberg 1973), which begins with the best of: nothing, each source
alone, their mean. The paper sums factors instead (`compose` factors: ΔW = (Σ w_i s_i B_i)(Σ w_i A_i)), where
products of different sources come in, and searches with another strategy.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service.methods import Capabilities, Case, Material, Method

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape

PLAIN_LORAS = (
    "lora",
    "lora_plus",
    "lora_fa",
    "lora_drop",
    "dylora",
    "delta_lora",
    "adalora",
    "increlora",
    "lorahub",
)
"""Methods whose artifact is a plain LoRA."""


class LoRAHub(Method):
    kind: Literal["lorahub"] = "lorahub"
    sources: tuple[str, ...] = Field(min_length=1, max_length=32)
    """Published LoRAs of this base, as `name@version`."""
    rows: int = Field(16, ge=1, le=1024)
    """Rows of the training file that the weights are judged by."""
    evaluations: int = Field(60, ge=1, le=10_000)
    """How many mixes are tried, after nothing, each source and their mean."""
    bound: float = Field(1.5, gt=0, le=10)
    """No weight is larger."""
    l1: float = Field(0.05, ge=0, le=10)
    compose: Literal["deltas", "factors"] = "deltas"

    learning_rate: ClassVar[float] = 1e-3
    title: ClassVar[str] = "LoRAHub"
    family: ClassVar[str] = "multi-task"
    paper: ClassVar[str] = "https://arxiv.org/abs/2307.13269"
    summary: ClassVar[str] = "One LoRA mixed from published ones for a few rows, without gradients."
    formula: ClassVar[str] = "ΔW = Σ w_i s_i B_i A_i; one weight a source is searched, nothing is trained"
    use_when: ClassVar[str] = "A handful of rows of a new task, and LoRAs of related tasks are there."
    limits: ClassVar[str] = (
        "The result's rank is the sum of the sources' (with compose factors, which needs equal ranks, the "
        "same). It is never worse than the base or than a source on the rows it is judged by, which says "
        "little of other rows."
    )
    aliases: ClassVar[dict[str, dict[str, Any]]] = {}
    sources_of: ClassVar[tuple[str, ...]] = PLAIN_LORAS
    trains: ClassVar[bool] = False
    small: ClassVar[dict[str, Any]] = {"sources": ("one@1", "two@1"), "rows": 4, "evaluations": 12}
    can: ClassVar[Capabilities] = Capabilities(
        tasks=("causal_lm", "seq2seq_lm"),
        starts_as_base=False,
        why={
            "tasks": "a new head has to be trained, and nothing is trained here: use lora with that data",
            "starts_as_base": "it is the found mix from the start",
        },
    )

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.tuners.lorahub import attach_mix

        return attach_mix(model, case, self, material)

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        return 0

    def stored(self, shape: "ModelShape", case: Case) -> None:
        return None
