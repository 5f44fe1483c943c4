"""From the body of `POST /fine_tuning/jobs` to a FineTuneSpec with every "auto" resolved.

Four dialects arrive here: OpenAI's `method.supervised.hyperparameters`, its older top-level
`hyperparameters`, the flat keys that some hosts put in there (`lora_r`, `learning_rate`, …), and our own
`adapter`, `base`, `training`, `data`, `resources`. They are one request: a value given twice must be the same
value.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field, WithJsonSchema, create_model, field_validator

from jobs.body import check, unknown_key
from jobs.db import PRIORITY_HIGHEST, PRIORITY_LOWEST, PRIORITY_NORMAL
from peft_service import methods
from peft_service.errors import InvalidRequest
from peft_service.methods import METHODS, Method
from peft_service.objectives import OBJECTIVES, Objective
from peft_service.operations import OPERATIONS
from peft_service.spec import (
    NAME_PATTERN,
    Base,
    Data,
    DataFile,
    FineTuneSpec,
    Resources,
    Source,
    Training,
    case_of,
)
from peft_service.tasks import tasks_of
from peft_service.variants import Frozen, kind_of

AUTO_FIELDS = ("n_epochs", "batch_size", "learning_rate", "max_seq_len")
ALIASES = {
    "r": "rank",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "use_rslora": "rslora",
}
"""Names that PEFT and others give to the fields of a method."""
MAX_SEQ_LEN = 2048
LEAST_SEQ_LEN = 8
UNSUPPORTED_METHODS = ("dpo", "reinforcement")


def methods_by_kind() -> dict[str, type[Method]]:
    return {kind_of(method): cast("type[Method]", method) for method in METHODS}


def defaults_of(method: type[Method]) -> dict[str, Any]:
    """The values of a method's fields that a request leaves out; a field that it must give is not there."""
    found = {}
    for name, info in method.model_fields.items():
        if not info.is_required():
            value = info.get_default(call_default_factory=True)
            found[name] = list(value) if isinstance(value, tuple) else value
    return found


def operation_named(name: str) -> str | None:
    """The operation on adapters that somebody means who asks for a method of this name."""
    spelled = methods.spelled(name)
    return next(
        (
            kind
            for kind in map(kind_of, OPERATIONS)
            if spelled.removesuffix("adapter").removesuffix("s") in (kind, f"adapter{kind}")
            or spelled == f"adapter{kind}"
        ),
        None,
    )


def known_names() -> list[str]:
    """Every name of a method that a request may use."""
    return [
        name for variant in METHODS for name in (kind_of(variant), *cast("type[Method]", variant).aliases)
    ]


def objective_for(file: DataFile, shape: Any) -> Objective:
    """What a file of this format teaches on such a base.

    Raises:
        InvalidRequest: the base cannot do it; says what it can.
    """
    objectives: list[Objective] = [cast("Objective", variant.model_validate({})) for variant in OBJECTIVES]
    objective = next(objective for objective in objectives if file.format in objective.default_for)
    task = objective.task(shape.architecture)
    if task not in tasks_of(shape.architecture):
        able = [
            name
            for other in objectives
            for name in other.formats
            if other.task(shape.architecture) in tasks_of(shape.architecture)
        ]
        words = shape.architecture.replace("_", "-")
        raise InvalidRequest(
            f"the file {file.id} is of the format {file.format}, which teaches {task.replace('_', ' ')}, but "
            f"the base is an {words} model ({shape.model_type}); such a base learns from: {', '.join(able)}",
            code="base_not_applicable",
            param="model",
        )
    if len(file.labels) < 2 and task in ("sequence_classification", "token_classification"):
        raise InvalidRequest(
            f"the file {file.id} has {len(file.labels)} label: a classification needs two at least",
            param="training_file",
        )
    return objective


def _adapter_schema() -> dict[str, Any]:
    """JSON schema of `adapter`: any method, with other keys beside its own because there are aliases."""
    schemas = [method.model_json_schema() | {"additionalProperties": True} for method in METHODS]
    return {"anyOf": [*schemas, {"type": "null"}], "default": None}


def _constrained(name: str) -> Any:
    """The type and limits that `Training` has for this field, so that they are written once."""
    info = Training.model_fields[name]
    kind: Any = Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation
    return _or_auto(kind) if name in AUTO_FIELDS else kind


def _or_auto(kind: Any) -> Any:
    # Azure's clients write -1 for "auto".
    return Annotated[kind | Literal["auto"], BeforeValidator(lambda value: "auto" if value == -1 else value)]


def _optional(name: str) -> Any:
    return (_constrained(name) | None, Field(None, description=Training.model_fields[name].description))


MULTIPLIER: Any = _or_auto(Annotated[float, Field(gt=0, le=10_000)]) | None

TrainingRequest: type[Frozen] = create_model(
    "TrainingRequest",
    __base__=Frozen,
    __doc__="How the parameters move; what is left out, or `auto`, is resolved and reported.",
    learning_rate_multiplier=(
        MULTIPLIER,
        Field(None, description="Scales the method's own default learning rate."),
    ),
    **{name: _optional(name) for name in Training.model_fields},
)

_FLAT_TRAINING = ("learning_rate", "warmup_ratio", "weight_decay", "max_grad_norm")
_FLAT_ADAPTER = {"lora_r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}

Hyperparameters: type[Frozen] = create_model(
    "Hyperparameters",
    __base__=Frozen,
    __doc__="OpenAI's three, and the flat names that other hosts of this API take.",
    learning_rate_multiplier=(
        MULTIPLIER,
        Field(None, description="Scales the method's own default learning rate."),
    ),
    lora=(bool | None, Field(None, description="True: train a LoRA adapter (the default).")),
    lora_r=(int | None, Field(None, description="`adapter.rank`")),
    lora_alpha=(int | None, Field(None, description="`adapter.alpha`")),
    lora_dropout=(float | None, Field(None, description="`adapter.dropout`")),
    packing=(bool | None, Field(None, description="Only false: rows are not packed.")),
    **{name: _optional(name) for name in ("n_epochs", "batch_size", *_FLAT_TRAINING)},
)


class Supervised(Frozen):
    hyperparameters: Hyperparameters | None = None


class MethodRequest(Frozen):
    """OpenAI's `method`: the objective of the job. Supervised fine-tuning is supported."""

    type: str = "supervised"
    supervised: Supervised | None = None
    dpo: dict[str, Any] | None = None
    reinforcement: dict[str, Any] | None = None


class BaseRequest(Frozen):
    """More about the base that `model` names."""

    uri: str | None = Field(None, min_length=1, max_length=2048)
    """Where its safetensors are, if `model` is not registered yet: `file://`, `s3://` or `hf://`."""
    revision: str | None = Field(None, min_length=1, max_length=256)
    quantize: Literal["nf4", "none"] | None = None
    """`nf4` holds the frozen weights in 4 bits."""


class DataRequest(Frozen):
    too_long: Literal["error", "drop", "right", "left"] | None = None
    """What happens to a row longer than `training.max_seq_len`."""
    task_temperature: float | None = Field(None, gt=0, le=100)
    """Of a multi-task file, draw rows so that a task of n rows has a share of n^(1/T)."""


Metadata = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]


class CreateJob(Frozen):
    """A fine-tuning job: OpenAI's request, and our extensions below `metadata`."""

    model: str = Field(min_length=1, max_length=2048)
    """A registered base (`GET /v1/base_models`), or a `file://`, `s3://` or `hf://org/name@revision` URI."""
    training_file: str = Field(min_length=1, max_length=128)
    """Id of an uploaded file with purpose `fine-tune`."""
    validation_file: str | None = Field(None, min_length=1, max_length=128)
    suffix: str | None = Field(None, pattern=NAME_PATTERN)
    """Part of the fine-tuned model's name: letters, digits, `.`, `_` and `-`, at most 64."""
    seed: int | None = Field(None, ge=0, le=2**31 - 1)
    """Default 0: the same request gives the same adapter."""
    method: MethodRequest | None = None
    hyperparameters: Hyperparameters | None = None
    integrations: list[Any] | None = None
    metadata: Metadata | None = None

    name: str | None = Field(None, pattern=NAME_PATTERN)
    """The adapter's name in the catalog. The suffix is the same thing: give one. Default: base and method."""
    adapter: Annotated[dict[str, Any] | None, WithJsonSchema(_adapter_schema())] = None
    """The method, by `kind` (default `lora`), and its own fields; `GET /v1/methods` lists both."""
    base: BaseRequest | None = None
    training: TrainingRequest | None = None
    data: DataRequest | None = None
    resources: Resources | None = None
    priority: int = Field(PRIORITY_NORMAL, ge=PRIORITY_LOWEST, le=PRIORITY_HIGHEST)
    """Higher goes first; jobs of one priority go in order of arrival."""

    @field_validator("suffix", "name", mode="after")
    @classmethod
    def _no_path(cls, value: str | None) -> str | None:
        if value is not None and ".." in value:
            raise ValueError("must not contain '..'")
        return value


@dataclass(frozen=True)
class Wanted:
    """A request in one dialect, checked by itself; what it needs from the database is not yet known."""

    body: CreateJob
    method: Method
    quantize: Literal["nf4"] | None
    training: dict[str, Any]
    """Values for fields of `Training`, without "auto"; and `learning_rate_multiplier`, if given."""
    written: Mapping[str, str]
    """Canonical path of a value -> the path under which the user wrote it."""


@dataclass(frozen=True)
class Known:
    """What the service knows about the base: its record, and the context length its config states."""

    base: Base
    context_length: int | None


@dataclass(frozen=True)
class Resolved:
    spec: FineTuneSpec
    reasons: dict[str, str] = field(default_factory=dict)
    """For every value that the service chose: why this one."""


def read(raw: Mapping[str, Any]) -> Wanted:
    """Check everything that the request alone can tell.

    Raises:
        InvalidRequest: `param` is the key as the user wrote it.
    """
    body = check(CreateJob, raw)
    _refuse_unsupported(body)
    values = _Merged()
    for where, part in _parts(body):
        values.take(where, part.model_dump(exclude_unset=True))
    method, quantize = _method_of(body, values)
    training = values.under("training")
    if training.get("learning_rate") is not None and training.get("learning_rate_multiplier") is not None:
        raise InvalidRequest(
            f"{values.written['training.learning_rate']} and "
            f"{values.written['training.learning_rate_multiplier']} are both given: give the rate, or "
            "a multiple of the method's default, not both",
            code="conflicting_parameters",
            param=values.written["training.learning_rate_multiplier"],
        )
    return Wanted(body, method, quantize, training, values.written)


def _refuse_unsupported(body: CreateJob) -> None:
    if body.name is not None and body.suffix not in (None, body.name):
        raise InvalidRequest(
            f"name is {body.name!r} and suffix is {body.suffix!r}: they are one thing here, give one of them",
            code="conflicting_parameters",
            param="name",
        )
    if body.integrations:
        raise InvalidRequest(
            "integrations are not supported, leave them out: metrics are in events and result files",
            code="unsupported_parameter",
            param="integrations",
        )
    method = body.method
    if method is None:
        return
    if method.type != "supervised":
        raise InvalidRequest(
            f"method.type {method.type!r} is not supported; supported is: supervised",
            code="method_not_supported",
            param="method.type",
        )
    for name in UNSUPPORTED_METHODS:
        if getattr(method, name) is not None:
            raise InvalidRequest(
                f"method.{name} is given but method.type is 'supervised'",
                code="method_not_supported",
                param=f"method.{name}",
            )


def _parts(body: CreateJob) -> list[tuple[str, Frozen]]:
    parts: list[tuple[str, Frozen | None]] = [("training", body.training)]
    if body.method is not None and body.method.supervised is not None:
        parts.append(("method.supervised.hyperparameters", body.method.supervised.hyperparameters))
    parts.append(("hyperparameters", body.hyperparameters))
    return [(where, part) for where, part in parts if part is not None]


class _Merged:
    """Values by their one canonical path, each with the path under which the user wrote it."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.written: dict[str, str] = {}

    def take(self, where: str, given: Mapping[str, Any]) -> None:
        for name, value in given.items():
            if value is None or (value == "auto" and name in (*AUTO_FIELDS, "learning_rate_multiplier")):
                continue
            if name == "packing":
                if value:
                    raise InvalidRequest(
                        f"{where}.packing: rows are not packed in this version; give false or leave it out",
                        code="unsupported_parameter",
                        param=f"{where}.packing",
                    )
            elif name == "lora":
                if not value:
                    raise InvalidRequest(
                        f"{where}.lora is false, but this service trains adapters only; leave it out",
                        code="unsupported_parameter",
                        param=f"{where}.lora",
                    )
                self.put("adapter.kind", "lora", f"{where}.{name}")
            elif name in _FLAT_ADAPTER:
                self.put(f"adapter.{_FLAT_ADAPTER[name]}", value, f"{where}.{name}")
            else:
                self.put(f"training.{name}", value, f"{where}.{name}")

    def put(self, path: str, value: Any, written: str) -> None:
        if path in self.values and self.values[path] != value:
            raise InvalidRequest(
                f"{self.written[path]} is {self.values[path]!r} but {written} is {value!r}: give one of them",
                code="conflicting_parameters",
                param=written,
            )
        self.values.setdefault(path, value)
        self.written.setdefault(path, written)

    def under(self, prefix: str) -> dict[str, Any]:
        return {
            path.removeprefix(f"{prefix}."): value
            for path, value in self.values.items()
            if path.startswith(f"{prefix}.")
        }


def _method_of(body: CreateJob, values: _Merged) -> tuple[Method, Literal["nf4"] | None]:
    quantize: Literal["nf4"] | None = "nf4" if body.base is not None and body.base.quantize == "nf4" else None
    given = dict(body.adapter or {})
    variants = methods_by_kind()
    for key in ("kind", "type"):
        if key == "type" and "type" in variants[values.values.get("adapter.kind", "lora")].model_fields:
            continue
        kind = given.pop(key, None)
        if kind is None:
            continue
        if not isinstance(kind, str):
            raise InvalidRequest(
                f"adapter.{key} must be the name of a method", code="invalid_value", param=f"adapter.{key}"
            )
        named = methods.names().get(methods.spelled(kind))
        if named is None and (operation := operation_named(kind)):
            raise InvalidRequest(
                f"adapter.{key}: {kind} is an operation on existing adapters: POST /v1/adapters/operations "
                f'with {{"operation": {{"kind": "{operation}"}}, "adapters": [...]}}, or peft-service '
                f"operate {operation}",
                code="method_not_supported",
                param=f"adapter.{key}",
            )
        if named is None:
            raise InvalidRequest(
                f"adapter.{key}: there is no method {kind!r}; "
                f"{unknown_key(kind, sorted(known_names())).partition(': ')[2]}",
                code="method_not_supported",
                param=f"adapter.{key}",
            )
        written, (kind, preset) = kind, named
        for name, value in preset.items():
            if name != "base.quantize":
                values.put(f"adapter.{name}", value, f"adapter.{key}")
                continue
            if body.base is not None and body.base.quantize == "none":
                raise InvalidRequest(
                    f"adapter is {written}, which is {kind} on a 4-bit base, but base.quantize is 'none'",
                    code="conflicting_parameters",
                    param="base.quantize",
                )
            quantize = value
        values.put("adapter.kind", kind, f"adapter.{key}")
    kind = values.values.get("adapter.kind", "lora")
    known = variants[kind].model_fields
    for name, value in given.items():
        target = name if name in known else ALIASES.get(name, name)
        values.put(f"adapter.{target}", value, f"adapter.{name}")
    for name in values.under("adapter"):
        written = values.written[f"adapter.{name}"]
        if name not in known and not written.startswith("adapter."):
            raise InvalidRequest(
                f"{written} is no field of the method {kind!r}", code="unknown_parameter", param=written
            )
    return check(
        variants[kind], {**values.under("adapter"), "kind": kind}, "adapter", values.written
    ), quantize


def resolve(
    wanted: Wanted,
    training: DataFile,
    validation: DataFile | None,
    known: Known,
    shape: Any,
    sources: tuple[Source, ...] = (),
) -> Resolved:
    """The spec: every value concrete, and for the chosen ones a reason in words.

    Args:
        shape: the base's ModelShape, so that the method can refuse a base it cannot work on.
        sources: the adapters that the method's own `sources` name.
    """
    body, given, written = wanted.body, dict(wanted.training), dict(wanted.written)
    reasons: dict[str, str] = {}
    multiplier = given.pop("learning_rate_multiplier", None)
    rate = wanted.method.rate()
    if "n_epochs" not in given:
        given["n_epochs"] = auto_epochs(training.rows)
        reasons["n_epochs"] = f"{training.rows} rows: enough epochs for 100 examples, at most 25,000"
    if "batch_size" not in given:
        given["batch_size"] = auto_batch_size(training.rows)
        reasons["batch_size"] = (
            f"{training.rows} rows: a 64th of them, between 4 and 32, and no more than there are"
        )
    if "learning_rate" not in given:
        given["learning_rate"] = rate * (multiplier or 1.0)
        if multiplier is not None:
            written["training.learning_rate"] = written["training.learning_rate_multiplier"]
        reasons["learning_rate"] = (
            f"{kind_of(type(wanted.method))}'s own {rate:g} times {multiplier or 1.0:g}"
        )
    context, taken = known.context_length, wanted.method.positions()
    room = MAX_SEQ_LEN if context is None else context - taken
    but = f", of which {kind_of(type(wanted.method))} takes {taken}" if taken else ""
    if room < LEAST_SEQ_LEN:
        raise InvalidRequest(
            f"the context of the base is {context}{but}, which leaves no room for a row: take at most "
            f"{(context or 0) // 2} virtual tokens",
            code="invalid_value",
            param="adapter",
        )
    if "max_seq_len" not in given:
        given["max_seq_len"] = min(MAX_SEQ_LEN, room)
        reasons["max_seq_len"] = (
            f"{MAX_SEQ_LEN}, or the base's context of {context or 'unknown'} tokens{but and but + ','} "
            "if that is less"
        )
    elif context is not None and given["max_seq_len"] > room and not wanted.method.extends_context:
        raise InvalidRequest(
            f"training.max_seq_len is {given['max_seq_len']}, but the context of the base is {context}{but}: "
            f"{room} is the most",
            code="invalid_value",
            param="training.max_seq_len",
        )
    name = body.name or body.suffix or default_name(known.base.id, kind_of(type(wanted.method)))
    base = known.base.model_copy(update={"quantize": wanted.quantize, "architecture": shape.architecture})
    spec = FineTuneSpec(
        name=name,
        base=base,
        method=wanted.method,
        objective=objective_for(training, shape),
        data=Data(
            training=training,
            validation=validation,
            too_long=(body.data and body.data.too_long) or "error",
            task_temperature=body.data and body.data.task_temperature,
        ),
        sources=sources,
        training=check(Training, given, "training", written),
        resources=body.resources or Resources(),
        seed=body.seed or 0,
    )
    methods.admit(spec.method, shape, case_of(spec, shape))
    return Resolved(spec, reasons)


def auto_epochs(rows: int) -> int:
    """3, more for tiny files and fewer for huge ones: the rule of OpenAI's own cookbook.

    (github.com/openai/openai-cookbook, "Data preparation and analysis for chat model fine-tuning".)
    """
    if rows * 3 < 100:
        return min(25, 100 // rows)
    if rows * 3 > 25_000:
        return max(1, 25_000 // rows)
    return 3


def auto_batch_size(rows: int) -> int:
    """A 64th of the rows as a power of two, from 4 to 32, at most all rows: small batches suit adapters."""
    return min(rows, max(4, min(32, 1 << max(0, (rows // 64).bit_length() - 1))))


def default_name(base_id: str, kind: str) -> str:
    """A name for the catalog when the user gave none: what it was made from."""
    stem = re.sub(r"[^A-Za-z0-9._-]+|\.{2,}", "-", base_id.rsplit("/", 1)[-1]).strip("._-")
    return f"{stem[: 63 - len(kind)].rstrip('._-') or 'adapter'}-{kind}"


def hyperparameters_of(spec: FineTuneSpec) -> dict[str, Any]:
    """OpenAI's three, as numbers, and the learning rate that they amount to."""
    rate = spec.method.rate()
    return {
        "n_epochs": spec.training.n_epochs,
        "batch_size": spec.training.batch_size,
        "learning_rate_multiplier": float(f"{spec.training.learning_rate / rate:.6g}"),
        "learning_rate": spec.training.learning_rate,
    }
