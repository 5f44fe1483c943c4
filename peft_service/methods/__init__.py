"""What is trained. One file a method; nothing else in the code knows its name."""

from typing import TYPE_CHECKING, Any, ClassVar

from peft_service.variants import Frozen, union_of, variants_of


class Method(Frozen):
    """A fine-tuning method: its hyperparameters, its arithmetic and how it is attached to a model."""

    kind: str

    learning_rate: ClassVar[float]
    """This method's own good default, used when the request gives none."""
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""

    def attach(self, model: Any, seed: int) -> Any:
        """Return `model` (a transformers PreTrainedModel) with this method's parameters added, in float32.

        Everything else is frozen. The same seed gives the same initial values on every rank.
        """
        raise NotImplementedError

    def trainable(self, shape: Any) -> int:
        """How many parameters will train on a base of this `ModelShape`; the formula of the paper."""
        raise NotImplementedError

    def check(self, shape: Any, quantize: str | None) -> None:
        """Refuse a base that this method cannot work on, with the nearest thing that does.

        Raises:
            InvalidRequest: `param` names the key of the request.
        """


METHODS = variants_of(Method, __name__, __path__)
if TYPE_CHECKING:
    AnyMethod = Method
else:
    AnyMethod = union_of(METHODS)
