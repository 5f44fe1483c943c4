"""VeRA: y = W x + b ⊙ (B (d ⊙ (A x))), A and B random, fixed and shared by all layers.

Kopiczko et al. 2023, arXiv:2310.11454. A (rank, widest d_in) and B (widest d_out, rank) are cut to each
layer's size; d (rank) starts at `d_initial`, b (d_out) at zero.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service.methods import Capabilities, Case, Material, Method, adapted

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape


class VeRA(Method):
    kind: Literal["vera"] = "vera"
    rank: int = Field(256, ge=1, le=4096)
    """r, the rows of A and columns of B; only d, of that many values, trains."""
    d_initial: float = Field(0.1, gt=0, le=10)
    """First value of d."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of A."""
    targets: tuple[str, ...] | None = Field(None, min_length=1)
    """Last parts of the module names that are adapted; None: every linear layer of the transformer's
    blocks."""
    save_projection: bool = True
    """False leaves A and B out of the file; who loads it then draws them anew, and must draw the same."""
    projection_seed: int = Field(0, ge=0, lt=2**31)
    """What A and B are drawn from, whatever the seed of the training: adapters live on one base only with the
    same A and B."""

    learning_rate: ClassVar[float] = 2e-3
    title: ClassVar[str] = "VeRA"
    family: ClassVar[str] = "low rank"
    paper: ClassVar[str] = "https://arxiv.org/abs/2310.11454"
    summary: ClassVar[str] = "Two vectors a layer, around random matrices that all layers share."
    formula: ClassVar[str] = "y = W x + b ⊙ B (d ⊙ A x); rank + d_out values a layer"
    use_when: ClassVar[str] = "Very many adapters, each as small as can be."
    limits: ClassVar[str] = (
        "Below LoRA at equal cost. The file has A and B besides the vectors: rank * (widest d_in + widest "
        "d_out) "
        "values, unless save_projection is false. Adapters are switched on one base only if they have the "
        "same rank, projection_seed and widest layers."
    )
    aliases: ClassVar[dict[str, dict[str, Any]]] = {}
    small: ClassVar[dict[str, Any]] = {"rank": 16}
    can: ClassVar[Capabilities] = Capabilities(
        servers=("peft",), why={"servers": "vLLM and LoRAX load plain LoRA: merge it, or train lora"}
    )

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.tuners.vera import attach_vera

        return attach_vera(model, case, self)

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        return sum(self.rank + d_out for _, d_out, _ in adapted(shape, self.targets))

    def stored(self, shape: "ModelShape", case: Case) -> int:
        if not self.save_projection:
            return self.trainable(shape, case)
        layers = adapted(shape, self.targets)
        widest = max(d_in for _, _, d_in in layers) + max(d_out for _, d_out, _ in layers)
        return self.trainable(shape, case) + self.rank * widest

    def check(self, shape: "ModelShape", case: Case) -> None:
        adapted(shape, self.targets)
