"""Hybrid: several methods on one base, trained together.  Surveys: 2410.19878; S4, Chen et al. 2023,
arXiv:2301.01821.

    y = what all parts make of it, one after the other; the number of parameters is the sum

`parts` are requests for methods, for example `[{"kind": "lora", "rank": 8}, {"kind": "adapter", "size":
32}]`. The artifact has a directory for each, which loads alone; `peft_service.artifact.load` puts them
together.
"""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, WithJsonSchema, model_validator

from peft_service.errors import InvalidRequest
from peft_service.methods import Capabilities, Case, Material, Method, admit, head, names, spelled

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape

LEVELS = {
    "bitfit": 0,
    **dict.fromkeys(("lora", "dora", "lora_plus", "ia3"), 1),
    **dict.fromkeys(("adapter", "ssf"), 2),
    "tiny_attention": 3,
    "pasta": 4,
    **dict.fromkeys(("prompt_tuning", "prefix_tuning", "p_tuning_v2"), 5),
}
"""Methods that can be parts -> how far out they lie: in the base itself, on linear layers, behind them,
around attention blocks, around whole layers, in front of the input. Inner ones are attached first, so that
outer ones find the modules that they name."""
GROUPS = {
    **dict.fromkeys(("lora", "dora", "lora_plus"), "LoRA"),
    **dict.fromkeys(("prompt_tuning", "prefix_tuning", "p_tuning_v2"), "prompt"),
}
"""Methods of which one model can have only one, as PEFT keeps them in the same place."""
APART = {
    frozenset({"pasta", "prompt_tuning"}): (
        "pasta finds special tokens by their ids, and a prompt in front of the input is embeddings, which "
        "have none; take prefix_tuning (p_tuning_v2 for classes) instead of prompt_tuning"
    ),
}
"""Two methods that cannot be parts of one model, and why."""
NOT_WHOLE = "its parts are different things; load a part alone, from its own directory, and merge that"


def _obstacle(method: type[Method]) -> str:
    """Why a method is no part, from what it says of itself, and what is nearest to it."""
    carrier = method.can.carrier
    if method.sources_of:
        return "it starts from published adapters; train it alone, or combine those by an operation"
    if method.needs_tasks:
        return "it wants the task of every row, which other parts do not know; train it alone, or take lora"
    if carrier in ("delta", "model"):
        return "it changes the base's own matrices, which the others leave as they are; take lora, or bitfit"
    if method.family == "hybrid" or carrier == "composite":
        return "it is several things itself; name those that you want as parts"
    if method.family == "soft prompt":
        return "it takes the model's input over; take prompt_tuning or prefix_tuning"
    if method.family == "low rank":
        return "it keeps account of layers that other parts replace under it; take lora"
    return "it trains in phases or replaces layers that other parts want; take adapter, or lora"


def _part(value: Any) -> Any:
    """A method from its request."""
    if isinstance(value, Method):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        raise ValueError('a part is an object with a "kind", for example {"kind": "lora", "rank": 8}')
    from peft_service.methods import METHODS

    known = names().get(spelled(value["kind"]))
    if known is None:
        raise ValueError(f"{value['kind']!r} is no method. Parts can be: {', '.join(sorted(LEVELS))}")
    if known[0] not in LEVELS:
        variant: Any = next(v for v in METHODS if v.model_fields["kind"].default == known[0])
        raise ValueError(
            f"{value['kind']!r} cannot be a part: {_obstacle(variant)}. What can: {', '.join(sorted(LEVELS))}"
        )
    kind, preset = known
    if outside := [name for name in preset if "." in name]:
        raise ValueError(
            f"{value['kind']!r} sets {outside[0]}, which is the whole job's: set it there, and use {kind}"
        )
    variant = next(v for v in METHODS if v.model_fields["kind"].default == kind)
    return variant.model_validate({**preset, **value, "kind": kind})


Part = Annotated[
    SerializeAsAny[Method],
    BeforeValidator(_part),
    WithJsonSchema(
        {"type": "object", "required": ["kind"], "properties": {"kind": {"enum": sorted(LEVELS)}}}
    ),
]


class _Together:
    """What holds for all parts: of the class in general, of an object for its own parts."""

    def __get__(self, method: Any, owner: Any) -> Capabilities:
        return GENERAL if method is None else together(method.parts)


GENERAL = Capabilities(
    carrier="composite",
    starts_as_base=False,
    mergeable=False,
    servers=(),
    why={
        "starts_as_base": "a part does not",
        "mergeable": NOT_WHOLE,
        "servers": "nothing but peft_service.artifact.load puts several kinds of adapter on one base; peft "
        "loads each part alone, from its own directory",
    },
)


def together(parts: "tuple[Method, ...]") -> Capabilities:
    """The intersection, and for each limit the part that it is of."""
    why = dict(GENERAL.why)
    fields: dict[str, Any] = {}
    for name in ("architectures", "tasks", "zero_stages"):
        values = getattr(Capabilities(), name)
        fields[name] = tuple(value for value in values if all(value in getattr(p.can, name) for p in parts))
    for name in ("nf4", "gradient_checkpointing", "packing", "weight_decay", "starts_as_base"):
        fields[name] = all(getattr(p.can, name) for p in parts)
    for name in fields:
        limited = next((p for p in parts if name in p.can.why), None)
        if limited is not None:
            why[name] = f"its part {limited.kind}: {limited.can.why[name]}"
        else:
            why.pop(name, None)
    return GENERAL.model_copy(update={**fields, "why": why})


class Hybrid(Method):
    kind: Literal["hybrid"] = "hybrid"
    parts: tuple[Part, ...] = Field(min_length=2, max_length=8)
    """The methods, each as in `adapter` of a request."""

    learning_rate: ClassVar[float] = 2e-4
    title: ClassVar[str] = "Hybrid"
    family: ClassVar[str] = "hybrid"
    paper: ClassVar[str] = "https://arxiv.org/abs/2301.01821"
    summary: ClassVar[str] = (
        "Any combination of LoRA, adapters, scales, biases, prefix and prompt, trained together."
    )
    formula: ClassVar[str] = "all parts at once; the sum of their parameters"
    use_when: ClassVar[str] = "One method is not enough, or a combination from a paper is to be tried."
    limits: ClassVar[str] = (
        "One LoRA-like and one prompt-like part. Each part learns at its own default rate in proportion: "
        "the rate "
        "of the job is that of the slowest part. With a head, each part's directory has it."
    )
    aliases: ClassVar[dict[str, dict[str, Any]]] = {"combination": {}}
    small: ClassVar[dict[str, Any]] = {
        "parts": ({"kind": "lora", "rank": 4, "alpha": 8}, {"kind": "adapter", "size": 8}, {"kind": "ia3"})
    }
    can: ClassVar[Any] = _Together()

    @model_validator(mode="after")
    def _combine(self) -> Self:
        for number, part in enumerate(self.parts):
            for other in self.parts[:number]:
                if part.kind == other.kind:
                    raise ValueError(
                        f"parts: {part.kind} is there twice; give one of them more capacity instead"
                    )
                if why := APART.get(frozenset((part.kind, other.kind))):
                    raise ValueError(f"parts: {why}")
                if (group := GROUPS.get(part.kind)) and group == GROUPS.get(other.kind):
                    raise ValueError(
                        f"parts: {other.kind} and {part.kind} both are a {group}, and PEFT has room for "
                        f"one; leave "
                        "one out"
                    )
            init = getattr(part, "init", None)
            if init in ("pissa", "olora", "eva", "loftq", "orthogonal"):
                raise ValueError(f"parts: init {init} is saved as another LoRA; use init default in a part")
        return self

    @property
    def ordered(self) -> list[Method]:
        """The parts, inner ones first."""
        return sorted(self.parts, key=lambda part: LEVELS[part.kind])

    def rate(self) -> float:
        return min(part.rate() for part in self.parts)

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.tuners.hybrid import attach

        ratios = [part.rate() / self.rate() for part in self.ordered]
        return attach(model, case, material, self.ordered, ratios)

    def positions(self) -> int:
        return sum(part.positions() for part in self.parts)

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        return sum(part.trainable(shape, case) for part in self.parts)

    def stored(self, shape: "ModelShape", case: Case) -> int | None:
        counts = [part.stored(shape, case) for part in self.parts]
        known = [count for count in counts if count is not None]
        # The caller adds one head, and every part has it.
        return sum(known) + (len(counts) - 1) * head(shape, case) if len(known) == len(counts) else None

    def check(self, shape: "ModelShape", case: Case) -> None:
        for part in self.parts:
            try:
                admit(part, shape, case)
            except InvalidRequest as error:
                raise InvalidRequest(
                    f"hybrid, part {part.kind}: {error.message}", code=error.code, param="adapter.parts"
                ) from error
