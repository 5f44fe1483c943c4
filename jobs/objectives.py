"""OpenAI's `method` in a request: the objective that it names, with its values, or the one of the file.

No objective is known here by its name, but for those that OpenAI has a name of its own for: what a request
may say of one is made from the fields in the objective's own file.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal, cast

from pydantic import Field, GetJsonSchemaHandler, create_model

from jobs.body import check, nearest, unknown_key
from jobs.hyperparameters import Hyperparameters, constrained, optional, or_auto
from peft_service.errors import InvalidRequest
from peft_service.methods import spelled
from peft_service.objectives import OBJECTIVES, Objective
from peft_service.spec import DataFile
from peft_service.tasks import Architecture, Task, tasks_of
from peft_service.variants import Frozen, kind_of

OPENAI: Mapping[str, str | None] = {"supervised": None, "dpo": "dpo", "reinforcement": "grpo"}
"""OpenAI's names -> objectives; None: the one that the format of the file means."""
BESIDE = ("grader", "teacher")
"""Fields of an objective that stand beside `hyperparameters` and not in them."""
UNSUPERVISED = ("pairs", "unpaired", "prompts")
"""Rows that `supervised` does not learn from."""
LEAST_LABELS = {"classes": 2, "tags": 2, "class_sets": 1}
"""By the rows of an objective."""


def objectives() -> dict[str, type[Objective]]:
    """By kind."""
    return {kind_of(variant): cast("type[Objective]", variant) for variant in OBJECTIVES}


@cache
def text_formats() -> tuple[str, ...]:
    """Formats that an objective of plain texts and answers learns from."""
    found = {name for variant in objectives().values() if variant.rows == "text" for name in variant.formats}
    return tuple(sorted(found))


@dataclass(frozen=True)
class Named:
    """What a name in `method.type` means."""

    name: str
    kind: str | None
    """None: the format of the file decides."""
    preset: Mapping[str, Any] = field(default_factory=dict)


@cache
def names() -> dict[str, Named]:
    """Every name of an objective that a request may use, as `spelled` has it."""
    found: dict[str, Named] = {}
    for kind, variant in objectives().items():
        for name, preset in {kind: {}, **variant.aliases}.items():
            if spelled(name) in found and found[spelled(name)].kind != kind:
                raise TypeError(f"two objectives are called {name}")
            found.setdefault(spelled(name), Named(name, kind, preset))
    of_openai = {
        spelled(name): Named(name, kind)
        for name, kind in OPENAI.items()
        if kind is None or kind in objectives()
    }
    return {**found, **of_openai}


# ------------------------------------------------------------------------------------------------ the schema


def _own(variant: type[Objective]) -> dict[str, Any]:
    """The fields of an objective that are hyperparameters, each also `auto`."""
    return {
        name: optional(or_auto(constrained(info)), info.description)
        for name, info in variant.model_fields.items()
        if name != "kind" and name not in BESIDE
    }


_REINFORCEMENT = {
    "compute_multiplier": optional(
        or_auto(Annotated[float, Field(gt=0.00001, le=10)]), "Scales how many answers each prompt gets."
    ),
    "eval_interval": optional(or_auto(Annotated[int, Field(ge=1)]), "`training.eval_steps`"),
    "eval_samples": optional(or_auto(Annotated[int, Field(ge=1)]), "`evaluation.rows`"),
    "reasoning_effort": optional(
        Literal["default", "low", "medium", "high"], "Only `default`: a base here has no such setting."
    ),
}
"""OpenAI's, of objectives whose rows are answered first."""


@cache
def request_model(name: str) -> type[Frozen]:
    """The object beside `method.type` of this name (see `names`)."""
    kind = names()[spelled(name)].kind
    if kind is None:
        fields: dict[str, Any] = {"hyperparameters": optional(Hyperparameters, None)}
        return create_model("SupervisedMethod", __base__=Frozen, **fields)
    return _model_of(kind)


@cache
def _model_of(kind: str) -> type[Frozen]:
    variant = objectives()[kind]
    numbers: dict[str, Any] = {**(_REINFORCEMENT if variant.generates else {}), **_own(variant)}
    model = create_model(f"{variant.__name__}Hyperparameters", __base__=Hyperparameters, **numbers)
    fields: dict[str, Any] = {"hyperparameters": optional(model, None)}
    for name in BESIDE:
        if name in variant.model_fields:
            info = variant.model_fields[name]
            fields[name] = optional(constrained(info), info.description)
    if variant.generates:
        fields["response_format"] = optional(dict[str, Any], 'Only `{"type": "text"}`.')
    return create_model(
        f"{variant.__name__}Method", __base__=Frozen, __doc__=variant.summary or None, **fields
    )


@cache
def method_model() -> type[Frozen]:
    """`method` as a whole, with every name in its plain spelling."""
    known = sorted(names().values(), key=lambda named: (named.name not in OPENAI, named.name))
    by_file = "What the format of the file means."
    described = " ".join(
        f"`{named.name}`: {objectives()[named.kind].summary if named.kind else by_file}" for named in known
    )
    fields: dict[str, Any] = {
        "type": (str, Field("supervised", description=f"What is minimised. {described}"))
    }
    for named in known:
        fields[named.name] = optional(request_model(named.name), None)
    return create_model(
        "MethodRequest",
        __base__=Frozen,
        __doc__="The objective of the job, and its values in the object of the same name.",
        **fields,
    )


class MethodSchema:
    """Puts the schema of `method` in the place of that of a plain object."""

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [handler(method_model().__pydantic_core_schema__), {"type": "null"}]}


# ------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Asked:
    """What a request says of its objective, checked by itself."""

    named: Named | None = None
    """None: nothing."""
    where: str = "method"
    """Path of the object with its values, as the user wrote it."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """For the objective's own fields."""
    automatic: tuple[str, ...] = ()
    """Fields that are given as "auto"."""
    written: Mapping[str, str] = field(default_factory=dict)
    """Path of a field under `where` -> the path under which the user wrote it."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """All else that stands in `hyperparameters`."""

    @property
    def teacher(self) -> str | None:
        """The id or URI of the model that is learned from."""
        return self.values.get("teacher") or None


def asked(raw: Any) -> Asked:
    """Check `method`.

    Raises:
        InvalidRequest: `param` is the key as the user wrote it.
    """
    if raw is None:
        return Asked()
    if not isinstance(raw, dict):
        raise InvalidRequest("method must be an object", code="invalid_value", param="method")
    given = {key: value for key, value in raw.items() if value is not None}
    named = _named(given.pop("type", "supervised"))
    parts = {}
    for key in given:
        other = names().get(spelled(key))
        if other is None:
            known = ["type", *(each.name for each in names().values())]
            raise InvalidRequest(
                unknown_key(f"method.{key}", known), code="unknown_parameter", param=f"method.{key}"
            )
        if (other.kind, other.preset) != (named.kind, named.preset):
            raise InvalidRequest(
                f"method.{key} is given but method.type is {named.name!r}: set method.type to "
                f"{other.name!r}, or leave method.{key} out",
                code="method_not_supported",
                param=f"method.{key}",
            )
        parts[key] = given[key]
    if len(parts) > 1:
        first, second = list(parts)[:2]
        raise InvalidRequest(
            f"method.{first} and method.{second} are one thing: give one of them",
            code="conflicting_parameters",
            param=f"method.{second}",
        )
    key, part = next(iter(parts.items()), (named.name, {}))
    return _values(named, f"method.{key}", part)


def _named(name: Any) -> Named:
    if not isinstance(name, str):
        raise InvalidRequest(
            "method.type must be the name of an objective", code="invalid_value", param="method.type"
        )
    named = names().get(spelled(name))
    if named is None:
        known = [*OPENAI, *(each.name for each in names().values())]
        near = difflib.get_close_matches(spelled(name), names(), n=1, cutoff=0.6)
        hint = f"did you mean {names()[near[0]].name!r}?" if near else nearest(name, set(known))
        raise InvalidRequest(
            f"method.type: there is no objective {name[:60]!r}; {hint}",
            code="method_not_supported",
            param="method.type",
        )
    return named


def _values(named: Named, where: str, part: Any) -> Asked:
    body = check(request_model(named.name), part, where)
    given = body.model_dump(exclude_unset=True, exclude_none=True)
    numbers = given.pop("hyperparameters", {})
    _response_format(given.pop("response_format", None), where)
    effort = numbers.pop("reasoning_effort", "default")
    if effort != "default":
        raise InvalidRequest(
            f"{where}.hyperparameters.reasoning_effort is {effort!r}: a base here has no such setting, only "
            "'default' can be given; say in the prompts how much to think, and max_new_tokens how long",
            code="unsupported_parameter",
            param=f"{where}.hyperparameters.reasoning_effort",
        )
    if named.kind is None:
        return Asked(named, where, numbers=numbers)
    fields = objectives()[named.kind].model_fields
    own = {name: numbers.pop(name) for name in list(numbers) if name in fields}
    written = {f"{where}.{name}": f"{where}.hyperparameters.{name}" for name in own}
    automatic = tuple(name for name, value in own.items() if value == "auto")
    values = {name: value for name, value in own.items() if value != "auto"}
    for name, value in named.preset.items():
        if values.get(name, value) != value:
            raise InvalidRequest(
                f"method.type {named.name!r} means {name} {value!r}, but {where}.hyperparameters.{name} is "
                f"{values[name]!r}: leave it out",
                code="conflicting_parameters",
                param=f"{where}.hyperparameters.{name}",
            )
        values[name] = value
        written[f"{where}.{name}"] = "method.type"
    multiplier = numbers.pop("compute_multiplier", "auto")
    if multiplier != "auto":
        path = f"{where}.hyperparameters.compute_multiplier"
        if "group_size" in values:
            raise InvalidRequest(
                f"{path} scales group_size, which is given too: give one of them",
                code="conflicting_parameters",
                param=path,
            )
        values["group_size"] = max(2, round(fields["group_size"].default * multiplier))
        written[f"{where}.group_size"] = path
    values |= {name: given[name] for name in BESIDE if name in given}
    return Asked(named, where, values, automatic, written, numbers)


def _response_format(wanted: Any, where: str) -> None:
    if wanted not in (None, {"type": "text"}):
        raise InvalidRequest(
            f'{where}.response_format: only {{"type": "text"}} can be given; sampling is not held to a '
            "schema here. Let the grader score answers of another form 0, and say the form in the prompts",
            code="unsupported_parameter",
            param=f"{where}.response_format",
        )


# -------------------------------------------------------------------------------------------- file and base


def objective_for(
    asked: Asked, files: Sequence[DataFile], shape: Any, param: str = "training_file"
) -> Objective:
    """The objective of a job that trains on these files, the first of which decides where nothing is said.

    Args:
        shape: the ModelShape of the base.

    Raises:
        InvalidRequest: no objective, or not this one, learns from such a file or on such a base; says what
            does.
    """
    first = files[0]
    kind = asked.named.kind if asked.named is not None else None
    variant = objectives()[kind] if kind is not None else _meant(first, asked, param)
    objective = check(variant, {**asked.values, "kind": kind_of(variant)}, asked.where, asked.written)
    learns(objective, first, param)
    if "teacher" in variant.model_fields and not asked.teacher:
        raise InvalidRequest(
            f"{asked.where}.teacher is required: the id or URI of the model that is learned from",
            code="invalid_value",
            param=f"{asked.where}.teacher",
        )
    _on_base(objective, first, shape)
    labels = {label for file in files for label in file.labels}
    if len(labels) < (least := LEAST_LABELS.get(objective.rows, 0)):
        raise InvalidRequest(
            f"the file {first.id} has {len(labels)} label{'' if len(labels) == 1 else 's'}: "
            f"a classification needs {least} at least",
            param=param,
        )
    return objective


def learns(objective: Objective, file: DataFile, param: str) -> None:
    """
    Raises:
        InvalidRequest: the objective does not learn from files of this format.
    """
    if file.format in objective.formats:
        return
    others = _types_for(file.format)
    means = (
        f"such a file is for method.type {_or(others)}" if others else "no objective learns from such a file"
    )
    raise InvalidRequest(
        f"{param}: {file.id} has {file.format} records, but {objective.kind} learns from "
        f"{_or(objective.formats)}; {means}",
        code="format_not_applicable",
        param=param,
    )


def _meant(file: DataFile, asked: Asked, param: str) -> type[Objective]:
    """The objective that the format of a file means where the request names none, or only `supervised`."""
    able = [variant for variant in objectives().values() if file.format in variant.formats]
    meant = next((variant for variant in able if file.format in variant.default_for), None)
    if meant is not None and not _must_be_named(meant, asked):
        return meant
    said = "method.type is 'supervised'" if asked.named is not None else "method.type is not given"
    if not able:
        raise InvalidRequest(
            f"{param}: {file.id} has {file.format} records, and no objective learns from such a file",
            code="format_not_applicable",
            param=param,
        )
    raise InvalidRequest(
        f"{param}: {file.id} has {file.format} records, and {said}: set method.type to "
        f"{_or(_types_for(file.format))}",
        code="method_required",
        param="method.type",
    )


def _must_be_named(variant: type[Objective], asked: Asked) -> bool:
    """Whether it is never meant by a file alone: `supervised` means another kind of rows, or some of its
    values have to be given."""
    if asked.named is not None:
        return variant.rows in UNSUPERVISED
    return any(info.is_required() for info in variant.model_fields.values())


def _types_for(format: str) -> list[str]:
    """What `method.type` can be for such a file; first the one that it means by itself."""
    able = [variant for variant in objectives().values() if format in variant.formats]
    able.sort(key=lambda variant: format not in variant.default_for)
    return [
        "supervised"
        if format in variant.default_for and variant.rows not in UNSUPERVISED
        else _name_of(kind_of(variant))
        for variant in able
    ]


def _on_base(objective: Objective, file: DataFile, shape: Any) -> None:
    task = objective.task(shape.architecture)
    if task in tasks_of(shape.architecture):
        return
    able = sorted(
        {
            name
            for variant in objectives().values()
            if _task(variant, shape.architecture) in tasks_of(shape.architecture)
            for name in variant.formats
        }
    )
    words = shape.architecture.replace("_", "-")
    raise InvalidRequest(
        f"the file {file.id} is of the format {file.format}, which as {objective.kind} teaches "
        f"{task.replace('_', ' ')}, but the base is an {words} model ({shape.model_type}); such a base "
        f"learns from: {', '.join(able)}",
        code="base_not_applicable",
        param="model",
    )


def _task(variant: type[Objective], architecture: Architecture) -> Task:
    """Of an objective whose fields have no values yet."""
    bare: Any = variant
    task: Task = bare.model_construct().task(architecture)
    return task


def _name_of(kind: str) -> str:
    """OpenAI's name of an objective where it has one, else its kind."""
    return next((name for name, known in OPENAI.items() if known == kind), kind)


def _or(words: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


# -------------------------------------------------------------------------------------------------- telling


def told(spec: Mapping[str, Any], hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """`method` of a job object: what one would send to get this job again.

    Args:
        spec: of the job, as JSON.
        hyperparameters: OpenAI's three, resolved.
    """
    objective, format = spec["objective"], spec["data"]["training"]["format"]
    kind = objective["kind"]
    variant = objectives().get(kind)
    meant = variant is not None and format in variant.default_for and variant.rows not in UNSUPERVISED
    own = {name: value for name, value in objective.items() if name not in ("kind", *BESIDE)}
    plain = variant is not None and all(own[name] == variant.model_fields[name].default for name in own)
    type = "supervised" if meant and plain else _name_of(kind)
    numbers = dict(hyperparameters)
    if type != "supervised":
        numbers |= own
    if variant is not None and variant.generates:
        more = {
            "eval_interval": spec["training"].get("eval_steps"),
            "eval_samples": (spec.get("evaluation") or {}).get("rows"),
            "reasoning_effort": "default",
        }
        numbers |= {name: value for name, value in more.items() if value is not None}
    part = {"hyperparameters": numbers, **{name: objective[name] for name in BESIDE if objective.get(name)}}
    return {"type": type, type: part}
