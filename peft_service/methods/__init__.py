"""What is trained. One file a method; nothing else in the code knows its name."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service.errors import InvalidRequest
from peft_service.tasks import (
    ARCHITECTURES,
    TASKS,
    Architecture,
    Task,
    has_known_head,
    head_parameters,
)
from peft_service.variants import Frozen, union_of, variants_of

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape

Carrier = Literal["peft", "registered", "delta", "model", "composite"]
"""How the artifact is stored. `peft`: a PEFT adapter that plain peft loads; `registered`: the same, after
`import peft_service.tuners`; `delta`: changed base weights (`peft_service.delta`); `model`: a whole
transformers model; `composite`: a manifest of several of these (`peft_service.artifact`)."""
SERVERS = ("peft", "vllm", "ray_serve_llm", "lorax")


class Capabilities(Frozen):
    """Where a method works. For everything it cannot do, `why` has the reason and what does work."""

    architectures: tuple[Architecture, ...] = ARCHITECTURES
    tasks: tuple[Task, ...] = TASKS
    nf4: bool = True
    """Trains beside a base held in 4 bits."""
    zero_stages: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
    gradient_checkpointing: bool = True
    packing: bool = True
    """Several rows can stand in one line of a batch: nothing of the method looks from one token at another.
    Virtual tokens are counted by `positions` and are none either."""
    weight_decay: bool = True
    """False: decay would move values that the method promises to leave alone."""
    starts_as_base: bool = True
    """The first forward pass gives what the base gives."""
    mergeable: bool = True
    """The result can be written into the base's weights, exactly in float32."""
    hot_switch: bool = True
    """Several of them live on one base and are switched without touching it."""
    carrier: Carrier = "peft"
    servers: tuple[str, ...] = SERVERS
    """Which servers can load it at best; the manifest of an adapter says it of that very adapter."""
    why: dict[str, str] = Field(default_factory=dict)
    """Field of this class -> the reason for the limit, and the nearest thing that works."""


class Case(Frozen):
    """What a method is attached for; plain values, known at submit."""

    task: Task = "causal_lm"
    labels: tuple[str, ...] = ()
    """Of a classifying task."""
    tasks: tuple[str, ...] = ()
    """Names of the tasks in multi-task data; row i of a batch belongs to `tasks[task_B[i]]`."""
    quantize: str | None = None
    steps: int = 0
    """Optimizer steps of the whole run."""
    seed: int = 0
    weight_decay: float = 0.0
    gradient_checkpointing: bool = False
    max_seq_len: int = 2048


@dataclass(frozen=True)
class Material:
    """What a method may read on a worker, when it is attached."""

    sources: tuple[Path, ...] = ()
    """Directories of the adapters that the method's `sources` name."""
    tokenizer: Any = None
    sample: "Callable[[int], list[Any]] | None" = None
    """The first n rows of the training order as microbatches (`batches.Batch`) of one row."""
    objective: Any = None
    decided: "Callable[[str, Callable[[], Any]], Any]" = field(default=lambda name, compute: compute())
    """A value (JSON) that is computed once a job: the same on every rank and in every attempt."""


class Method(Frozen):
    """A fine-tuning method: its hyperparameters, its arithmetic and how it is attached to a model.

    A head that the task needs is not the method's affair: it is trained and saved with all of them. A shape
    that a method gets is the one for the task (`ModelShape.for_task`).
    """

    kind: str

    learning_rate: ClassVar[float]
    """This method's own good default, used when the request gives none."""
    title: ClassVar[str] = ""
    family: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    """What it computes, and how many parameters that trains, for the documentation."""
    use_when: ClassVar[str] = ""
    limits: ClassVar[str] = ""
    corrections: ClassVar[tuple[str, ...]] = ()
    """What is often said of it and is not so; braces take numbers of docs/methods/claims.json (measured by
    tools/measure_claims.py)."""
    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Other names that a request may use -> the fields that they set (`base.quantize` among them)."""
    sources_of: ClassVar[tuple[str, ...]] = ()
    """Kinds of the methods whose published adapters it starts from; such a method has a field `sources`."""
    as_sources: ClassVar[tuple[str, ...]] = ()
    """Fields in which it must be as those are."""
    trains: ClassVar[bool] = True
    """False: attaching it is all there is; no step is taken, and rows are only read."""
    needs_tasks: ClassVar[bool] = False
    """Whether its data must name the task of every row."""
    extends_context: ClassVar[bool] = False
    """Whether it trains on rows longer than the base's context."""
    small: ClassVar[Mapping[str, Any]] = {}
    """Fields with which the conformance suite trains it on a base of hidden size 32."""
    can: ClassVar[Capabilities] = Capabilities()

    def rate(self) -> float:
        """The default learning rate with these hyperparameters."""
        return type(self).learning_rate

    def positions(self) -> int:
        """Places of the base's context that it fills beside a row's own tokens."""
        return int(getattr(self, "virtual_tokens", 0))

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        """`model` (a transformers PreTrainedModel) with this method's parameters added, in float32.

        Everything else is frozen. The same seed gives the same initial values on every rank. Hooks and ties
        are made here: once an engine has it, no parameter can be added.
        """
        raise NotImplementedError

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        """How many parameters train on a base of this shape, without the head; the formula of the paper."""
        raise NotImplementedError

    def stored(self, shape: "ModelShape", case: Case) -> int | None:
        """How many values the artifact has, without the head; None: only known when it has been trained."""
        return self.trainable(shape, case)

    def check(self, shape: "ModelShape", case: Case) -> None:
        """Refuse a base or a case that this method cannot work on, with the nearest thing that does.

        What `can` says has been checked before.

        Raises:
            InvalidRequest: `param` names the key of the request.
        """


def head(shape: "ModelShape", case: Case) -> int:
    """Parameters of the head that the task puts on this base."""
    return head_parameters(
        case.task, shape.model_type, shape.hidden, len(case.labels), bool(shape.pooler_parameters)
    )


def trainable(method: Method, shape: "ModelShape", case: Case) -> int:
    """Parameters that train, the head among them."""
    return method.trainable(shape.for_task(case.task), case) + head(shape, case)


def stored(method: Method, shape: "ModelShape", case: Case) -> int | None:
    """Values in the artifact, the head's among them."""
    count = method.stored(shape.for_task(case.task), case)
    return None if count is None else count + head(shape, case)


def admit(method: Method, shape: "ModelShape", case: Case) -> None:
    """Refuse what cannot work, before anything is queued.

    Raises:
        InvalidRequest: says why, and what does work.
    """
    can, kind = method.can, method.kind
    shape = shape.for_task(case.task)

    def refuse(limit: str, seen: str, param: str) -> None:
        why = can.why.get(limit, "it is not defined there")
        raise InvalidRequest(f"{kind} does not work {seen}: {why}", code="method_not_applicable", param=param)

    if shape.architecture not in can.architectures:
        words = shape.architecture.replace("_", "-")
        such = f"on {words} models such as this {shape.model_type or 'base'}"
        refuse("architectures", such, "adapter.kind")
    if not has_known_head(shape.model_type, case.task):
        raise InvalidRequest(
            f"for {case.task.replace('_', ' ')}, a {shape.model_type} base has no head that is known here; "
            "take a BERT, a T5 or a LLaMA-like base",
            code="base_not_applicable",
            param="model",
        )
    if case.task not in can.tasks:
        refuse("tasks", f"for {case.task.replace('_', ' ')}", "adapter.kind")
    if case.quantize and not can.nf4:
        refuse("nf4", f"on a base held in {case.quantize}", "base.quantize")
    if case.gradient_checkpointing and not can.gradient_checkpointing:
        refuse("gradient_checkpointing", "with gradient checkpointing", "training.gradient_checkpointing")
    if case.weight_decay and not can.weight_decay:
        refuse("weight_decay", f"with weight_decay {case.weight_decay:g}", "training.weight_decay")
    if method.needs_tasks and not case.tasks:
        raise InvalidRequest(
            f'{kind} learns several tasks: give every row of the training file its "task"',
            code="method_not_applicable",
            param="training_file",
        )
    method.check(shape, case)


def adapted(
    shape: "ModelShape", targets: tuple[str, ...] | None, param: str = "adapter.targets"
) -> list[tuple[str, int, int]]:
    """(name, d_out, d_in) of the linear layers that `targets` name; None: all of the transformer's blocks.

    Raises:
        InvalidRequest: a target that matches nothing; says what there is.
    """
    names = [name for name, _, _ in shape.linears]
    there = sorted({name.split(".")[-1] for name in names})
    for target in targets or ():
        if not any(matches(name, target) for name in names):
            raise InvalidRequest(
                f"targets: no linear layer of the base is called {target!r}. It has: {', '.join(there)}.",
                param=param,
            )
    if not names:
        raise InvalidRequest("the base has no linear layer that could be adapted.", param="model")
    return [
        linear for linear in shape.linears if targets is None or any(matches(linear[0], t) for t in targets)
    ]


def matches(name: str, target: str) -> bool:
    """Whether the module `name` is the target, or ends in it."""
    return name == target or name.endswith(f".{target}")


_SPELLINGS = re.compile(r"[\s_\-/().]+")


def names() -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Every name that a request may use for a method, as `spelled` has it -> its kind and preset fields."""
    found: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for variant in METHODS:
        kind = str(variant.model_fields["kind"].default)
        method: Any = variant
        for name, preset in {kind: {}, **method.aliases}.items():
            # One method may be spelled the same twice: `long_lora` is `longlora`.
            if found.get(spelled(name), (kind, preset)) != (kind, preset):
                raise TypeError(f"two methods are called {name}")
            found[spelled(name)] = (kind, preset)
    return found


def spelled(name: str) -> str:
    """A name as it is compared: `LoRA-FA`, `lora_fa` and `lora fa` are one."""
    return _SPELLINGS.sub("", name.lower().replace("+", "plus").replace("³", "3"))


METHODS = variants_of(Method, __name__, __path__)
"""At the end: the methods' files import the names above."""
if TYPE_CHECKING:
    AnyMethod = Method
else:
    AnyMethod = union_of(METHODS)
