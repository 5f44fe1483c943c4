"""What is done to published adapters without training. One file an operation; nothing else knows its name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from peft_service.errors import InvalidRequest
from peft_service.methods import METHODS, Method
from peft_service.tasks import Task
from peft_service.variants import Frozen, kind_of, union_of, variants_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Described:
    """What the catalog and the store tell about an adapter that is operated on."""

    reference: str
    record: Mapping[str, Any]
    """Its manifest's: spec, name, metrics."""
    config: Mapping[str, Any] | None
    """Its adapter_config.json; None: it is no PEFT adapter."""

    @property
    def method(self) -> str:
        return str(self.record["spec"]["method"]["kind"])

    @property
    def ranks(self) -> tuple[int, ...]:
        """Every rank that its layers have; empty: it is no LoRA."""
        if self.config is None or self.config.get("peft_type") != "LORA":
            return ()
        return tuple(sorted({self.config["r"], *(self.config.get("rank_pattern") or {}).values()}))


@dataclass(frozen=True)
class Work:
    """What an operation gets on a worker."""

    base: Path
    base_id: str
    revision: str | None
    quantize: str | None
    """How the base was held when the adapters were trained."""
    task: Task
    labels: tuple[str, ...]
    sources: tuple[Path, ...]
    """Directories of the adapters, every file proven by its checksum."""
    out: Path
    """An empty directory for the result."""


@dataclass(frozen=True)
class Done:
    facts: dict[str, float]
    """What was measured; goes into the manifest as its metrics."""
    inputs: "dict[str, Tensor]"
    outputs: "dict[str, Tensor]"
    """What the result answered to `inputs`: the gate compares."""


Weight = Annotated[float, Field(ge=-1000, le=1000)]
"""Of an adapter in a sum."""


class Operation(Frozen):
    """Makes one artifact from published adapters of one base."""

    kind: str

    title: ClassVar[str]
    summary: ClassVar[str]
    exact: ClassVar[bool]
    """Whether the result computes what its name says up to float32's rounding, whatever the adapters are."""
    ways: ClassVar[Mapping[str, tuple[bool, str]]] = {}
    """Of an operation that has several: way -> whether it is exact, and what it does."""
    takes: ClassVar[tuple[int, int]] = (1, 1)
    """How many adapters, at least and at most."""

    def check(self, sources: Sequence[Described]) -> None:
        """Refuse what cannot work, before a job exists.

        Raises:
            InvalidRequest: says why, and the nearest thing that works.
        """

    def also(self, sources: Sequence[Described]) -> tuple[str, ...]:
        """Ids of further adapters that it reads, behind those that the request names."""
        return ()

    def makes(self, sources: Sequence[Described]) -> Method:
        """The method that the result is an artifact of; called after `check`."""
        raise NotImplementedError

    def run(self, work: Work) -> Done:
        """Write the result into `work.out`, without tokenizer and task.

        Raises:
            RunFailed: it is not what it should be; says by how much.
        """
        raise NotImplementedError


def method_called(kind: str) -> type[Method] | None:
    return next((variant for variant in METHODS if kind_of(variant) == kind), None)  # type: ignore[return-value]


def mergeable(source: Described) -> None:
    """
    Raises:
        InvalidRequest: what it adds cannot be written into the base's weights.
    """
    method = method_called(source.method)
    if method is not None and method.can.mergeable:
        return
    why = "nothing is known of its method here" if method is None else method.can.why.get("mergeable")
    raise InvalidRequest(
        f"{source.reference} is a {source.method}, and its change cannot be written into the base's weights: "
        f"{why or 'it is no change of them'}",
        code="not_mergeable",
        param="adapters",
    )


def plain_lora(source: Described, what: str) -> None:
    """
    Raises:
        InvalidRequest: it is no LoRA whose update is scaling * B A and nothing else.
    """
    config = source.config or {}
    told: list[tuple[object, str]] = [
        (not source.ranks, f"is no LoRA but a {source.method}"),
        (config.get("use_dora"), "is a DoRA, whose magnitudes are no part of B A"),
        (config.get("bias", "none") != "none" or config.get("lora_bias"), "has trained biases"),
    ]
    for wrong, words in told:
        if wrong:
            raise InvalidRequest(
                f"{source.reference} {words}: {what} takes plain LoRA. The operation convert makes one of "
                "it, with a measured error",
                code="not_a_lora",
                param="adapters",
            )


def nothing_besides(source: Described, what: str, head: bool = False) -> None:
    """
    Args:
        head: a classifier's head may be there, and goes along.

    Raises:
        InvalidRequest: modules were trained besides the adapter, for which the operation has no place.
    """
    config = source.config or {}
    saved = config.get("modules_to_save")
    if saved and not (head and config.get("task_type") not in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM")):
        raise InvalidRequest(
            f"{source.reference} has trained {', '.join(saved)} besides its updates, and {what} has no place "
            + ("for those" if head else "for several of them, heads or others")
            + ": merge it into the base, or give an adapter without",
            code="not_a_lora",
            param="adapters",
        )


OPERATIONS = variants_of(Operation, __name__, __path__)
"""At the end: the operations' files import the names above."""
if TYPE_CHECKING:
    AnyOperation = Operation
else:
    AnyOperation = union_of(OPERATIONS)
