"""BitFit: only the bias vectors of the base train, in place.  Ben Zaken et al. 2021, arXiv:2106.10199."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service.errors import InvalidRequest
from peft_service.methods import Capabilities, Case, Material, Method, matches
from peft_service.methods.full import NO_SWITCH

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape


class BitFit(Method):
    kind: Literal["bitfit"] = "bitfit"
    targets: tuple[str, ...] | None = Field(None, min_length=1)
    """Last parts of the names of the modules whose biases train; None: all. The paper's smaller variant is
    `["query", "intermediate.dense"]` of a BERT."""

    learning_rate: ClassVar[float] = 1e-3
    title: ClassVar[str] = "BitFit"
    family: ClassVar[str] = "selective"
    paper: ClassVar[str] = "https://arxiv.org/abs/2106.10199"
    summary: ClassVar[str] = "Only the bias vectors of linear layers and norms train; all matrices stay."
    formula: ClassVar[str] = "y = W x + b, only b trains; the sum of the sizes of all biases"
    use_when: ClassVar[str] = "Small data on an encoder such as BERT: about 0.1 % of the weights."
    limits: ClassVar[str] = "Bases without biases (LLaMA, T5) have nothing to train."
    aliases: ClassVar[dict[str, dict[str, Any]]] = {"bias_only": {}, "bias_tuning": {}}
    can: ClassVar[Capabilities] = Capabilities(
        nf4=False,
        carrier="delta",
        servers=(),
        weight_decay=False,
        hot_switch=False,
        why={
            "nf4": "bitsandbytes casts the biases of its layers to the compute dtype while they train. Use "
            "kind peft with type BEFT, which adds biases of its own, or QLoRA",
            "weight_decay": "decay pulls a pretrained bias towards zero, whatever the data say. Set it to 0",
            "hot_switch": NO_SWITCH,
        },
    )

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.tuners.in_place import InPlace, body
        from peft_service.tuners.sites import shape_of

        parameters = dict(model.named_parameters())
        vectors = [name for name in body(model) if len(shape_of(parameters[name])) == 1]
        return InPlace(model, self.kind, [name for name in vectors if self._trains(name)])

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        return sum(size for name, size in shape.for_task(case.task).biases if self._trains(name))

    def check(self, shape: "ModelShape", case: Case) -> None:
        biases = shape.for_task(case.task).biases
        if not biases:
            raise InvalidRequest(
                f"bitfit trains bias vectors, and this {shape.model_type or 'base'} has none. What does "
                "the like there: kind peft with type BEFT (adds biases to linear layers) or LN_TUNING "
                "(trains the "
                "norms), or kind ia3 (scales keys, values and the feed-forward network).",
                code="method_not_applicable",
                param="adapter.kind",
            )
        for target in self.targets or ():
            if not any(matches(name.removesuffix(".bias"), target) for name, _ in biases):
                there = sorted({name.removesuffix(".bias").split(".")[-1] for name, _ in biases})
                raise InvalidRequest(
                    f"targets: no module with a bias is called {target!r}. There are: {', '.join(there)}.",
                    param="adapter.targets",
                )

    def _trains(self, name: str) -> bool:
        module, _, kind = name.rpartition(".")
        return kind == "bias" and (self.targets is None or any(matches(module, t) for t in self.targets))
