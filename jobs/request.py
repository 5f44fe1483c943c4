"""From the body of `POST /fine_tuning/jobs` to a FineTuneSpec with every "auto" resolved.

Four dialects arrive here: OpenAI's `method.<type>.hyperparameters`, its older top-level `hyperparameters`,
the flat keys that some hosts put in there (`lora_r`, `learning_rate`, …), and our own `adapter`, `base`,
`training`, `data`, `evaluation`, `resources`. They are one request: a value given twice must be the same
value. What `method` may say is in objectives.py.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import BaseModel, Field, GetJsonSchemaHandler, WithJsonSchema, create_model, field_validator

from jobs import objectives
from jobs.body import check, unknown_key
from jobs.db import PRIORITY_HIGHEST, PRIORITY_LOWEST, PRIORITY_NORMAL
from jobs.hyperparameters import (
    AUTO_FIELDS,
    FLAT_ADAPTER,
    Hyperparameters,
    TrainingRequest,
    constrained,
    optional,
)
from jobs.objectives import Asked, MethodSchema
from peft_service import methods, packing, templates
from peft_service.columns import Columns, steps_of
from peft_service.columns import Source as ColumnSource
from peft_service.errors import InvalidRequest
from peft_service.formats.conversation import check_tools, template_tools
from peft_service.graders import AnyGrader
from peft_service.methods import METHODS, Method
from peft_service.objectives import Objective
from peft_service.operations import OPERATIONS
from peft_service.spec import (
    NAME_PATTERN,
    Base,
    Data,
    DataFile,
    FineTuneSpec,
    Generation,
    Resources,
    Source,
    Template,
    Training,
    case_of,
)
from peft_service.variants import Frozen, kind_of

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


def methods_by_kind() -> dict[str, type[Method]]:
    return {kind_of(method): cast("type[Method]", method) for method in METHODS}


def defaults_of(variant: type[Method] | type[Objective]) -> dict[str, Any]:
    """The values of the fields that a request leaves out; a field that it must give is not there."""
    found = {}
    for name, info in variant.model_fields.items():
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


def _adapter_schema() -> dict[str, Any]:
    """JSON schema of `adapter`: any method, with other keys beside its own because there are aliases."""
    schemas = [method.model_json_schema() | {"additionalProperties": True} for method in METHODS]
    return {"anyOf": [*schemas, {"type": "null"}], "default": None}


class _SchemaOf:
    """Puts the schema of a model in the place of that of a plain object."""

    def __init__(self, model: type[BaseModel]) -> None:
        self.model = model

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [handler(self.model.__pydantic_core_schema__), {"type": "null"}]}


class BaseRequest(Frozen):
    """More about the base that `model` names."""

    uri: str | None = Field(None, min_length=1, max_length=2048)
    """Where its safetensors are, if `model` is not registered yet: `file://`, `s3://` or `hf://`."""
    revision: str | None = Field(None, min_length=1, max_length=256)
    quantize: Literal["nf4", "none"] | None = None
    """`nf4` holds the frozen weights in 4 bits."""


Uri = Annotated[str, Field(min_length=1, max_length=2048)]
ColumnsRequest = Annotated[dict[str, Any] | None, _SchemaOf(Columns)]
Documents = Literal["line", "paragraph", "file"]


class SourceRequest(Frozen):
    """One more data set to train on."""

    file: Uri
    """Id of a file, or a URI as `training_file` takes."""
    weight: float | None = Field(None, gt=0, le=1e6)
    """Its share of an epoch; `data.weight` is that of the training file."""
    limit: int | None = Field(None, ge=1)
    """Only so many good rows from the beginning."""
    columns: ColumnsRequest = None
    """How its columns become the keys of a format."""
    documents: Documents | None = None


class TemplateRequest(Frozen):
    """A chat template in the place of the tokenizer's own: by its name, or written out."""

    name: str | None = Field(None, min_length=1, max_length=64)
    jinja: str | None = Field(None, min_length=1, max_length=templates.MAX_CHARACTERS)


class DataRequest(Frozen):
    """How the files are read."""

    too_long: Literal["error", "drop", "right", "left", "split"] | None = None
    """What happens to a row longer than `training.max_seq_len`. Default: documents are split, for all other
    rows it is an error."""
    task_temperature: float | None = Field(None, gt=0, le=100)
    """Of a multi-task file, draw rows so that a task of n rows has a share of n^(1/T)."""
    columns: ColumnsRequest = None
    """How the training file's columns become the keys of a format: `{"prompt": "question", …}`."""
    validation_columns: ColumnsRequest = None
    """The same of the validation file. Default: `columns`."""
    documents: Documents | None = None
    """What is one document in a plain text file. Default: a line."""
    limit: int | None = Field(None, ge=1)
    """Only so many good rows from the beginning of the training file."""
    weight: float | None = Field(None, gt=0, le=1e6)
    """The training file's share of an epoch, beside those of `sources`. Default: every row of all once."""
    sources: list[SourceRequest] | None = Field(None, max_length=100)
    """Data sets to train on together with the training file."""
    forgetting_file: Uri | None = None
    """Rows of what the base can do already: their loss is measured before and after training."""
    template: TemplateRequest | None = None
    """Default: the tokenizer's own."""
    train_on: Literal["assistant", "last_assistant", "all"] | None = None
    """What is learned: every assistant message (default), only a row's last one, or all tokens."""
    eos: Literal["turn", "last", "all"] | None = None
    """Which end tokens are learned: after every trained turn (default), only the last one's, or all."""
    turns: Literal["together", "apart"] | None = None
    """`apart` makes a row of each trained turn."""
    tools: list[dict[str, Any]] | None = Field(None, max_length=128)
    """Tools for rows of messages that bring none of their own."""


EvaluationRequest: type[Frozen] = create_model(
    "EvaluationRequest",
    __base__=Frozen,
    __doc__="Answers that the model writes to prompts of the validation file while it trains, graded.",
    grader=optional(AnyGrader, "Who scores an answer. Default, of reinforcement: the grader of `method`."),
    **{
        name: optional(constrained(info), info.description)
        for name, info in Generation.model_fields.items()
        if name != "grader"
    },
)


Metadata = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]


class CreateJob(Frozen):
    """A fine-tuning job: OpenAI's request, and our extensions below `metadata`."""

    model: str = Field(min_length=1, max_length=2048)
    """A registered base (`GET /v1/base_models`), or a `file://`, `s3://` or `hf://org/name@revision` URI."""
    training_file: Uri
    """Id of an uploaded file with purpose `fine-tune`, or where one is: `s3://bucket/prefix`, `file:///path`,
    `hf://datasets/org/name`, `https://host/path`, as far as the operator allows."""
    validation_file: Uri | None = None
    suffix: str | None = Field(None, pattern=NAME_PATTERN)
    """Part of the fine-tuned model's name: letters, digits, `.`, `_` and `-`, at most 64."""
    seed: int | None = Field(None, ge=0, le=2**31 - 1)
    """Default 0: the same request gives the same adapter."""
    method: Annotated[dict[str, Any] | None, MethodSchema()] = None
    """The objective; `GET /v1/objectives` lists all. Default: the one that the format of the file means."""
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
    evaluation: EvaluationRequest | None = None
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
class DataSet:
    """A data set that the request names, and how it is to be read."""

    file: str
    """Id or URI."""
    param: str
    """Path of the key that names it."""
    columns: Columns | None = None
    columns_param: str = "data.columns"
    documents: Documents | None = None
    documents_param: str = "data.documents"
    limit: int | None = None
    weight: float | None = None


@dataclass(frozen=True)
class Wanted:
    """A request in one dialect, checked by itself; what it needs from the database is not yet known."""

    body: CreateJob
    method: Method
    quantize: Literal["nf4"] | None
    objective: Asked
    training: dict[str, Any]
    """Values for fields of `Training`, without "auto"; and `learning_rate_multiplier`, if given."""
    evaluation: dict[str, Any]
    """Values for fields of `Generation`."""
    sources: tuple[DataSet, ...]
    """All that is trained on; the training file is the first."""
    validation: DataSet | None
    forgetting: DataSet | None
    template: Template | None
    written: Mapping[str, str]
    """Canonical path of a value -> the path under which the user wrote it."""


@dataclass(frozen=True)
class Files:
    """The data sets of a request, found and read."""

    training: DataFile
    mixture: tuple[DataFile, ...] = ()
    validation: DataFile | None = None
    forgetting: DataFile | None = None

    @property
    def sources(self) -> tuple[DataFile, ...]:
        """All that is trained on."""
        return (self.training, *self.mixture)


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
    asked = objectives.asked(body.method)
    values = _Merged()
    for where, part in (
        ("training", _given(body.training)),
        (f"{asked.where}.hyperparameters", asked.numbers),
        ("hyperparameters", _given(body.hyperparameters)),
    ):
        values.take(where, part)
    for name, value in _given(body.evaluation).items():
        values.put(f"evaluation.{name}", value, f"evaluation.{name}")
    method, quantize = _method_of(body, values)
    training = values.under("training")
    if training.get("learning_rate") is not None and training.get("learning_rate_multiplier") is not None:
        raise InvalidRequest(
            f"{values.written['training.learning_rate']} and "
            f"{values.written['training.learning_rate_multiplier']} are both given: give the rate, or "
            "a multiple of the default, not both",
            code="conflicting_parameters",
            param=values.written["training.learning_rate_multiplier"],
        )
    data = body.data or DataRequest()
    _check_weights(data)
    return Wanted(
        body=body,
        method=method,
        quantize=quantize,
        objective=asked,
        training=training,
        evaluation=values.under("evaluation"),
        sources=_sources_of(body, data),
        validation=_validation_of(body, data),
        forgetting=_forgetting_of(data),
        template=_template_of(data.template),
        written=values.written,
    )


def _given(part: Frozen | None) -> dict[str, Any]:
    """What a part of the request says; graders stay what they are."""
    if part is None:
        return {}
    return {name: value for name in part.model_fields_set if (value := getattr(part, name)) is not None}


def _sources_of(body: CreateJob, data: DataRequest) -> tuple[DataSet, ...]:
    training = DataSet(
        body.training_file,
        "training_file",
        _columns_of(data.columns, "data.columns"),
        documents=data.documents,
        limit=data.limit,
        weight=data.weight,
    )
    others = (
        DataSet(
            source.file,
            f"data.sources[{number}].file",
            _columns_of(source.columns, f"data.sources[{number}].columns"),
            f"data.sources[{number}].columns",
            source.documents,
            f"data.sources[{number}].documents",
            source.limit,
            source.weight,
        )
        for number, source in enumerate(data.sources or ())
    )
    return (training, *others)


def _validation_of(body: CreateJob, data: DataRequest) -> DataSet | None:
    if body.validation_file is None:
        if data.validation_columns is not None:
            raise InvalidRequest(
                "data.validation_columns is given, but no validation_file", param="data.validation_columns"
            )
        return None
    own = data.validation_columns is not None
    where = "data.validation_columns" if own else "data.columns"
    columns = _columns_of(data.validation_columns if own else data.columns, where)
    return DataSet(body.validation_file, "validation_file", columns, where, data.documents)


def _forgetting_of(data: DataRequest) -> DataSet | None:
    if data.forgetting_file is None:
        return None
    return DataSet(data.forgetting_file, "data.forgetting_file")


def _check_weights(data: DataRequest) -> None:
    """
    Raises:
        InvalidRequest: some sources have a weight and others have none.
    """
    weights = {
        "data.weight": data.weight,
        **{f"data.sources[{n}].weight": source.weight for n, source in enumerate(data.sources or ())},
    }
    missing = [path for path, weight in weights.items() if weight is None]
    if len(weights) == 1 and not missing:
        raise InvalidRequest(
            "data.weight is the training file's share beside data.sources, and there are none",
            param="data.weight",
        )
    if 0 < len(missing) < len(weights):
        raise InvalidRequest(
            f"{missing[0]} is missing: give every source a weight (the training file: data.weight), or none",
            param=missing[0],
        )


_COLUMN_SOURCES: dict[str, type[Frozen]] = {
    (info.alias or name): kind
    for kind in get_args(ColumnSource)
    if isinstance(kind, type) and issubclass(kind, Frozen)
    for name, info in list(kind.model_fields.items())[:1]
}
"""By the key that tells them apart, which is their first."""


def _columns_of(raw: Mapping[str, Any] | None, where: str) -> Columns | None:
    """
    Raises:
        InvalidRequest: it is none; `param` is the key of the format whose source is wrong.
    """
    if raw is None:
        return None
    for key, source in raw.items():
        path = f"{where}.{key}"
        if isinstance(source, str):
            try:
                steps_of(source)
            except ValueError as error:
                words = str(error).partition(": ")[2]
                raise InvalidRequest(f"{path}: {words}", code="bad_column_path", param=path) from None
        elif isinstance(source, dict):
            known = next((kind for name, kind in _COLUMN_SOURCES.items() if name in source), None)
            if known is None:
                raise InvalidRequest(
                    f"{path} must be a path into a row, or an object with one of the keys "
                    f"{', '.join(_COLUMN_SOURCES)}",
                    code="bad_column_path",
                    param=path,
                )
            check(known, source, path)
        else:
            raise InvalidRequest(f"{path} must be a path into a row", code="bad_column_path", param=path)
    return check(Columns, raw, where)


def _template_of(wanted: TemplateRequest | None) -> Template | None:
    if wanted is None:
        return None
    if (wanted.name is None) == (wanted.jinja is None):
        raise InvalidRequest(
            "data.template: give the name of a template, or one written out as jinja, and not both",
            param="data.template",
        )
    return templates.named(wanted.name) if wanted.name is not None else templates.inline(str(wanted.jinja))


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
    tools = list(check_tools(body.data.tools, "data.tools")) if body.data and body.data.tools else []
    if tools:
        raise InvalidRequest(
            "; ".join(str(problem) for problem in tools[:5]), code=tools[0].code, param=tools[0].path
        )


_OPENAI_PLACES = {"eval_interval": "training.eval_steps", "eval_samples": "evaluation.rows"}
_MAY_BE_AUTO = (*AUTO_FIELDS, "learning_rate_multiplier", *_OPENAI_PLACES)


class _Merged:
    """Values by their one canonical path, each with the path under which the user wrote it."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.written: dict[str, str] = {}

    def take(self, where: str, given: Mapping[str, Any]) -> None:
        for name, value in given.items():
            if value is None or (value == "auto" and name in _MAY_BE_AUTO):
                continue
            if name == "lora":
                if not value:
                    raise InvalidRequest(
                        f"{where}.lora is false, but this service trains adapters only; leave it out",
                        code="unsupported_parameter",
                        param=f"{where}.lora",
                    )
                self.put("adapter.kind", "lora", f"{where}.{name}")
            elif name in FLAT_ADAPTER:
                self.put(f"adapter.{FLAT_ADAPTER[name]}", value, f"{where}.{name}")
            elif name in _OPENAI_PLACES:
                self.put(_OPENAI_PLACES[name], value, f"{where}.{name}")
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
    files: Files,
    known: Known,
    shape: Any,
    sources: tuple[Source, ...] = (),
    teacher: Base | None = None,
    teacher_parameters: int = 0,
) -> Resolved:
    """The spec: every value concrete, and for the chosen ones a reason in words.

    Args:
        shape: the base's ModelShape, so that the method can refuse a base it cannot work on.
        sources: the adapters that the method's own `sources` name.
        teacher: the base that the objective's own `teacher` names, which has `teacher_parameters`.

    Raises:
        InvalidRequest: parts of the request do not go together; `param` is the key as the user wrote it.
    """
    body, given, written = wanted.body, dict(wanted.training), dict(wanted.written)
    objective = objectives.objective_for(wanted.objective, files.sources, shape)
    reasons = {
        name: f"{objective.kind}'s own {getattr(objective, name)}" for name in wanted.objective.automatic
    }
    data = _data_of(wanted, objective, files)
    multiplier = given.pop("learning_rate_multiplier", None)
    rate = own_rate(wanted.method, objective)
    if "n_epochs" not in given:
        given["n_epochs"] = auto_epochs(data.rows)
        reasons["n_epochs"] = f"{data.rows} rows: enough epochs for 100 examples, at most 25,000"
    if "batch_size" not in given:
        given["batch_size"] = auto_batch_size(data.rows)
        reasons["batch_size"] = (
            f"{data.rows} rows: a 64th of them, between 4 and 32, and no more than there are"
        )
    if "learning_rate" not in given:
        given["learning_rate"] = rate * (multiplier or 1.0)
        if multiplier is not None:
            written["training.learning_rate"] = written["training.learning_rate_multiplier"]
        scaled = f" times {objective.rate_scale:g} for {objective.kind}" if objective.rate_scale != 1 else ""
        kind, own = kind_of(type(wanted.method)), wanted.method.rate()
        reasons["learning_rate"] = f"{kind}'s own {own:g}{scaled} times {multiplier or 1.0:g}"
    context, taken = known.context_length, wanted.method.positions()
    room = MAX_SEQ_LEN if context is None else context - taken
    if objective.generates and "max_new_tokens" not in objective.model_fields_set:
        most = max(1, min(int(objective.model_dump()["max_new_tokens"]), room // 2))
        objective = objective.model_copy(update={"max_new_tokens": most})
        reasons["max_new_tokens"] = f"{most}: at most half of the base's context, the rest is for prompts"
    but = f", of which {kind_of(type(wanted.method))} takes {taken}" if taken else ""
    if room < LEAST_SEQ_LEN:
        raise InvalidRequest(
            f"the context of the base is {context}{but}, which leaves no room for a row: take at most "
            f"{(context or 0) // 2} virtual tokens",
            code="invalid_value",
            param="adapter",
        )
    if "max_seq_len" not in given:
        # Of what generates, the answer needs a place too.
        answers = int(getattr(objective, "max_new_tokens", 0)) if objective.generates else 0
        given["max_seq_len"] = min(MAX_SEQ_LEN, max(LEAST_SEQ_LEN, room - answers))
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
    if objective.generates and files.validation is not None:
        # There is no loss on prompts that have no answer.
        given.setdefault("select_by", "score")
    training = check(Training, given, "training", written)
    if objective.generates and training.select_by != "score" and files.validation is not None:
        raise InvalidRequest(
            f"training.select_by is {training.select_by!r}, but {objective.kind} measures no such thing on "
            "held-out prompts: take 'score', or leave it out",
            code="invalid_value",
            param="training.select_by",
        )
    _check_selection(training, wanted, files)
    spec = FineTuneSpec(
        name=name,
        base=base,
        method=wanted.method,
        objective=objective,
        data=data,
        sources=sources,
        training=training,
        evaluation=_evaluation_of(wanted, objective, files, shape),
        teacher=teacher,
        teacher_parameters=teacher_parameters,
        resources=body.resources or Resources(),
        seed=body.seed or 0,
    )
    methods.admit(spec.method, shape, case_of(spec, shape))
    answer = int(getattr(objective, "max_new_tokens", 0)) if objective.generates else 0
    if context is not None and answer and training.max_seq_len + answer > room:
        raise InvalidRequest(
            f"prompts of up to {training.max_seq_len} tokens and answers of up to {answer} are more than the "
            f"base's context of {context}{but}: set training.max_seq_len to {max(8, room - answer)}, or "
            "max_new_tokens lower",
            code="invalid_value",
            param=f"{wanted.objective.where}.hyperparameters.max_new_tokens",
        )
    try:
        objective.check(spec.method)
    except InvalidRequest as error:
        error.param = f"{wanted.objective.where}.hyperparameters.{error.param}"
        raise
    try:
        packing.admit(spec, shape)
    except InvalidRequest as error:
        error.param = written.get(str(error.param), error.param)
        raise
    return Resolved(spec, reasons)


def own_rate(method: Method, objective: Objective) -> float:
    """The default learning rate of this method for this objective: what the multiplier is a multiple of."""
    return method.rate() * objective.rate_scale


def _data_of(wanted: Wanted, objective: Objective, files: Files) -> Data:
    """
    Raises:
        InvalidRequest: the files do not go together, or not with the objective or the policy for long rows.
    """
    asked = wanted.body.data or DataRequest()
    for source, place in zip(files.sources[1:], wanted.sources[1:], strict=True):
        objectives.learns(objective, source, place.param)
    if files.validation is not None:
        objectives.learns(objective, files.validation, "validation_file")
    if files.forgetting is not None and files.forgetting.format not in objectives.text_formats():
        raise InvalidRequest(
            f"data.forgetting_file: {files.forgetting.id} has {files.forgetting.format} records; what the "
            f"base can do already is measured on {', '.join(objectives.text_formats())}",
            code="format_not_applicable",
            param="data.forgetting_file",
        )
    learned = [*files.sources, *filter(None, (files.validation,))]
    odd = [file for file in learned if file.format != "text"]
    if asked.too_long == "split" and odd:
        raise InvalidRequest(
            f"data.too_long is 'split', but {odd[0].id} has {odd[0].format} records: only plain text can be "
            "split without losing what belongs together. Take 'error', 'drop', 'left' or 'right'",
            code="invalid_value",
            param="data.too_long",
        )
    chosen = {name: getattr(asked, name) for name in ("train_on", "eos", "turns", "task_temperature")}
    return Data(
        training=files.training,
        mixture=files.mixture,
        validation=files.validation,
        forgetting=files.forgetting,
        too_long=asked.too_long or ("error" if odd else "split"),
        template=wanted.template,
        tools=template_tools(asked.tools),
        **{name: value for name, value in chosen.items() if value is not None},
    )


def _check_selection(training: Training, wanted: Wanted, files: Files) -> None:
    """
    Raises:
        InvalidRequest: an evaluation is to choose or to end something, and there is none.
    """
    default = Training.model_fields["select_by"].default
    asks = [
        *(["training.early_stopping_patience"] if training.early_stopping_patience is not None else []),
        *(["training.best_checkpoint"] if training.best_checkpoint else []),
        *(["training.select_by"] if training.select_by != default else []),
    ]
    if asks and files.validation is None:
        raise InvalidRequest(
            f"{asks[0]} needs evaluations on rows that are not trained on: give a validation_file",
            param=asks[0],
        )
    if training.select_by == "score" and not _scores(wanted):
        raise InvalidRequest(
            "training.select_by is 'score', and nothing scores: give evaluation.grader",
            param="training.select_by",
        )


def _scores(wanted: Wanted) -> bool:
    return "grader" in wanted.evaluation or "grader" in wanted.objective.values


def _evaluation_of(wanted: Wanted, objective: Objective, files: Files, shape: Any) -> Generation | None:
    """What is generated and graded on held-out rows: what the request asks for, or for an objective that has
    a grader of its own, that one on the validation file.

    Raises:
        InvalidRequest: there is nothing to ask, nobody to grade, or no text as an answer.
    """
    given = dict(wanted.evaluation)
    own = getattr(objective, "grader", None)
    if not given and (own is None or files.validation is None):
        return None
    written = wanted.written.get("evaluation.rows", "evaluation")
    param = "evaluation" if wanted.body.evaluation is not None else written
    if files.validation is None:
        raise InvalidRequest(
            f"{param} asks the model rows of the validation file: give a validation_file", param=param
        )
    if objective.task(shape.architecture) not in ("causal_lm", "seq2seq_lm") or objective.rows not in (
        "text",
        "pairs",
        "unpaired",
        "prompts",
    ):
        raise InvalidRequest(
            f"{param} grades texts, and a model that learns {objective.kind} writes none", param=param
        )
    given.setdefault("grader", own)
    if given["grader"] is None:
        words = "evaluation.grader is required: it says who scores the answers"
        raise InvalidRequest(words, param="evaluation.grader")
    if objective.generates:  # asked as it learns
        given = {**objective.model_dump(include={"max_new_tokens"}), **given}
    return check(Generation, {**given, "grader": given["grader"].model_dump(mode="json")}, "evaluation")


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
    rate = own_rate(spec.method, spec.objective)
    return {
        "n_epochs": spec.training.n_epochs,
        "batch_size": spec.training.batch_size,
        "learning_rate_multiplier": float(f"{spec.training.learning_rate / rate:.6g}"),
        "learning_rate": spec.training.learning_rate,
    }
