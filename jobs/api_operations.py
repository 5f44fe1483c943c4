"""Routes of operations on adapters: what there is, and starting one. It is a job like any other."""

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter
from pydantic import BaseModel, Field, field_validator
from starlette.requests import Request

from cluster.plan import operation_plan
from jobs import base_models, queue
from jobs.api_files import retry_count
from jobs.api_jobs import CapacityUnknown, Job, Raw, idempotency_key_of, job_of, seen_capacity
from jobs.body import check
from jobs.caller import AsCaller, Caller, json_request
from jobs.db import PRIORITY_HIGHEST, PRIORITY_LOWEST, PRIORITY_NORMAL, reading
from jobs.queue import NewJob
from jobs.request import Metadata
from peft_service import catalog
from peft_service.errors import InvalidRequest, NotFound, ObjectNotFound
from peft_service.operations import OPERATIONS, AnyOperation, Described, Operation
from peft_service.spec import NAME_PATTERN, OperationSpec, Source
from peft_service.variants import Frozen, kind_of

router = APIRouter()

OLD_TASK = {"task": "causal_lm", "labels": []}
"""Of adapters that were published before there were others."""


MOST = max(cast("type[Operation]", variant).takes[1] for variant in OPERATIONS)


class CreateOperation(Frozen):
    """An operation on published adapters."""

    operation: AnyOperation
    """What is done, by `kind`, and its own fields; `GET /v1/operations` lists both."""
    adapters: tuple[str, ...] = Field(min_length=1, max_length=MOST)
    """Ids, `name@version`, or `name` for its newest version."""
    name: str | None = Field(None, pattern=NAME_PATTERN)
    """Of the result in the catalog; its versions count up. Default: the first adapter's and the kind."""
    metadata: Metadata | None = None
    priority: int = Field(PRIORITY_NORMAL, ge=PRIORITY_LOWEST, le=PRIORITY_HIGHEST)

    @field_validator("name", mode="after")
    @classmethod
    def _no_path(cls, value: str | None) -> str | None:
        if value is not None and ".." in value:
            raise ValueError("must not contain '..'")
        return value


class Way(BaseModel):
    name: str
    exact: bool
    summary: str


class OperationObject(BaseModel):
    id: str
    object: Literal["operation"] = "operation"
    kind: str
    title: str
    summary: str
    exact: bool
    """Whether the result computes what the name says, whatever the adapters; else its error is measured."""
    ways: list[Way]
    """Of an operation that has several, each by itself."""
    adapters: dict[str, int]
    """How many it takes: `least` and `most`."""
    schema_: Annotated[dict[str, Any], Field(serialization_alias="schema")]
    """JSON schema of its fields, as the key `operation` of a request takes them."""


class OperationList(BaseModel):
    object: Literal["list"] = "list"
    data: list[OperationObject]
    has_more: Literal[False] = False


@router.get("/operations", tags=["adapters"])
def list_operations(caller: AsCaller) -> OperationList:
    """Everything that can be done to published adapters without training."""
    return OperationList(data=[_operation_of(cast("type[Operation]", variant)) for variant in OPERATIONS])


@router.post("/adapters/operations", tags=["adapters"], openapi_extra=json_request(CreateOperation))
def create_operation(caller: AsCaller, request: Request, raw: Raw) -> Job:
    """Start an operation on adapters; `GET /v1/fine_tuning/jobs/{id}` tells how it goes."""
    key = idempotency_key_of(request)
    body = check(CreateOperation, raw)
    spec, shape = _spec_of(caller, body)
    capacity = seen_capacity(caller)
    if capacity is None:
        raise CapacityUnknown("the training cluster has not reported any node yet: try again in a moment")
    new = NewJob(
        project_id=caller.project,
        spec=spec,
        request=raw,
        body_hash=hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest(),
        plan=operation_plan(spec, shape, capacity).model_dump(mode="json"),
        priority=body.priority,
        metadata=body.metadata or {},
        idempotency_key=key,
        retry_count=retry_count(request),
    )
    row = queue.submit(caller.engine, new)
    return job_of(row, queue.position(caller.engine, row))


def _spec_of(caller: Caller, body: CreateOperation) -> tuple[OperationSpec, Any]:
    """The spec and the base's shape.

    Raises:
        InvalidRequest: the operation cannot be done to these adapters; says why, and what can.
    """
    operation = body.operation
    least, most = operation.takes
    if not least <= len(body.adapters) <= most:
        raise InvalidRequest(
            f"{operation.kind} takes {least if least == most else f'{least} to {most}'} "
            f"adapter{'s' if most > 1 else ''}, and {len(body.adapters)} are given",
            code="invalid_value",
            param="adapters",
        )
    rows = [_found(caller, name, f"adapters[{number}]") for number, name in enumerate(body.adapters)]
    told = [_described(caller, row) for row in rows]
    operation.check([described for described, _ in told])
    for id in operation.also([described for described, _ in told]):
        rows.append(_found(caller, id, "adapters[0]"))
        told.append(_described(caller, rows[-1]))
    _of_one_base(rows)
    tasks = [task for _, task in told]
    if any(task != tasks[0] for task in tasks):
        raise InvalidRequest(
            f"{rows[0].reference} is for {_words(tasks[0])}, another for "
            f"{_words(next(task for task in tasks if task != tasks[0]))}: there is no model that is both",
            code="other_task",
            param="adapters",
        )
    try:
        base = base_models.measured(caller.engine, base_models.get(caller.engine, rows[0].base_id))
    except NotFound as error:
        raise InvalidRequest(error.message, code=error.code, param="adapters") from error
    if base.digest != rows[0].base_digest:
        raise InvalidRequest(
            f"the base {base.id} is registered with the digest {str(base.digest)[:12]}, "
            f"and {rows[0].reference} was trained on {str(rows[0].base_digest)[:12]}: "
            "they do not belong together",
            code="base_changed",
            param="adapters",
        )
    held = {described.record["spec"]["base"].get("quantize") for described, _ in told}
    shape = base.model_shape
    spec = OperationSpec(
        name=body.name or f"{rows[0].name[: 63 - len(operation.kind)].rstrip('._-')}-{operation.kind}",
        base=base.base.model_copy(
            update={"quantize": held.pop() if len(held) == 1 else None, "architecture": shape.architecture}
        ),
        method=operation.makes([described for described, _ in told]),
        sources=tuple(
            Source(reference=row.reference, id=row.id, key=row.location, digest=row.digest, method=row.method)
            for row in rows
        ),
        operation=operation,
        task=tasks[0]["task"],
        labels=tuple(tasks[0]["labels"]),
    )
    return spec, shape


def _found(caller: Caller, reference: str, param: str) -> catalog.Adapter:
    with reading(caller.engine) as conn:
        try:
            row = catalog.find(conn, caller.project, reference)
        except NotFound as error:
            raise InvalidRequest(error.message, code=error.code, param=param) from error
    if row.deleted_at is not None:
        raise InvalidRequest(
            f"the adapter {row.reference} has been deleted", code="adapter_deleted", param=param
        )
    return row


def _described(caller: Caller, row: catalog.Adapter) -> tuple[Described, dict[str, Any]]:
    """What an operation may ask about the adapter, and {task, labels}."""

    def read(name: str) -> dict[str, Any] | None:
        try:
            return cast("dict[str, Any]", json.loads(caller.store.get(f"{row.location}/{name}")))
        except ObjectNotFound:
            return None

    described = Described(row.reference, row.manifest["record"], read("adapter_config.json"))
    return described, read("task.json") or OLD_TASK


def _of_one_base(rows: Sequence[catalog.Adapter]) -> None:
    first = rows[0]
    for row in rows[1:]:
        if (row.base_id, row.base_digest) != (first.base_id, first.base_digest):
            raise InvalidRequest(
                f"{row.reference} is an adapter of {row.base_id} (digest {str(row.base_digest)[:12]}), and "
                f"{first.reference} of {first.base_id} (digest {str(first.base_digest)[:12]}): only "
                "adapters of one base have something in common",
                code="other_base",
                param="adapters",
            )


def _words(task: dict[str, Any]) -> str:
    labels = f" with the labels {', '.join(task['labels'][:5])}" if task["labels"] else ""
    return f"{str(task['task']).replace('_', ' ')}{labels}"


def _operation_of(variant: type[Operation]) -> OperationObject:
    least, most = variant.takes
    return OperationObject(
        id=kind_of(variant),
        kind=kind_of(variant),
        title=variant.title,
        summary=variant.summary,
        exact=variant.exact,
        ways=[Way(name=name, exact=exact, summary=text) for name, (exact, text) in variant.ways.items()],
        adapters={"least": least, "most": most},
        schema_=variant.model_json_schema(),
    )
