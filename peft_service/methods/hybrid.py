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
    **dict.fromkeys(("lora", "dora", "lora_plus", "ia3"), 0),
    **dict.fromkeys(("adapter", "ssf"), 1),
    **dict.fromkeys(("tiny_attention", "pasta"), 2),
    **dict.fromkeys(("prompt_tuning", "prefix_tuning", "p_tuning_v2"), 3),
}
"""Methods that can be parts -> how far out they lie: on linear layers, behind them, around whole blocks, in
front of the input. Inner ones are attached first, so that outer ones find the modules that they name."""
GROUPS = {
    **dict.fromkeys(("lora", "dora", "lora_plus"), "LoRA"),
    **dict.fromkeys(("prompt_tuning", "prefix_tuning", "p_tuning_v2"), "prompt"),
}
"""Methods of which one model can have only one, as PEFT keeps them in the same place."""
NOT_WHOLE = "its parts are different things; load a part alone, from its own directory, and merge that"


def _part(value: Any) -> Any:
    """A method from its request."""
    if isinstance(value, Method):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        raise ValueError('a part is an object with a "kind", for example {"kind": "lora", "rank": 8}')
    from peft_service.methods import METHODS

    known = names().get(spelled(value["kind"]))
    if known is None or known[0] not in LEVELS:
        raise ValueError(
            f"{value['kind']!r} cannot be a part: it changes the base's own weights, trains in phases, "
            f"starts "
            f"from other adapters or is no method. What can: {', '.join(sorted(LEVELS))}"
        )
    kind, preset = known
    if outside := [name for name in preset if "." in name]:
        raise ValueError(
            f"{value['kind']!r} sets {outside[0]}, which is the whole job's: set it there, and use {kind}"
        )
    variant = next(variant for variant in METHODS if variant.model_fields["kind"].default == kind)
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
    servers=("peft",),
    why={
        "starts_as_base": "a part does not",
        "mergeable": NOT_WHOLE,
        "servers": "no server loads several kinds of adapter as one. Load it with peft_service.artifact.load",
    },
)


def together(parts: "tuple[Method, ...]") -> Capabilities:
    """The intersection, and for each limit the part that it is of."""
    why = dict(GENERAL.why)
    fields: dict[str, Any] = {}
    for name in ("architectures", "tasks", "zero_stages"):
        values = getattr(Capabilities(), name)
        fields[name] = tuple(value for value in values if all(value in getattr(p.can, name) for p in parts))
    for name in ("nf4", "gradient_checkpointing", "weight_decay", "starts_as_base"):
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
    summary: ClassVar[str] = "Any combination of LoRA, adapters, scales, prefix and prompt, trained together."
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
