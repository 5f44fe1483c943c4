"""Routes of fine-tuning jobs: OpenAI's objects exactly, and our extension fields beside them."""

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy import and_, func, literal_column, or_, select
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from cluster.dashboard import ClusterUnavailable
from cluster.plan import Capacity, Plan, make_plan
from jobs import base_models, files, imports, objectives, queue, readings
from jobs import request as requests
from jobs.api_files import retry_count
from jobs.api_graders import allowed_here
from jobs.base_models import BaseRow
from jobs.body import read_object
from jobs.caller import AsCaller, Caller, caller_with, json_request
from jobs.db import capacity as capacity_table
from jobs.db import in_order, reading, writing
from jobs.db import jobs as jobs_table
from jobs.queue import CheckpointRow, EventRow, JobRow, NewJob
from jobs.readings import Reading
from jobs.request import CreateJob, Files, Known, Resolved, Wanted
from peft_service import base_model, catalog, graders
from peft_service import preview as preview_of
from peft_service.batches import steps_of
from peft_service.errors import Conflict, InvalidRequest, NotFound, ObjectNotFound, PeftServiceError
from peft_service.methods import Method
from peft_service.spec import Base, DataFile, FineTuneSpec, Source
from peft_service.validate import Overlap

router = APIRouter()

Status = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
Raw = Annotated[dict[str, Any], Depends(read_object)]


class JobError(BaseModel):
    code: str
    message: str
    param: str | None = None


class JobHyperparameters(BaseModel):
    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float
    learning_rate: float


class JobMethod(BaseModel):
    """The objective: what one would send to get this job again, in the object of the name `type`."""

    model_config = ConfigDict(extra="allow")

    type: str
    """OpenAI's name (supervised, dpo, reinforcement) where it has one, else the kind of the objective."""


class QueuePlace(BaseModel):
    position: int
    """1 is next, over all projects."""


class Job(BaseModel):
    """OpenAI's fields first; from `name` on, ours."""

    model_config = ConfigDict(protected_namespaces=())

    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    id: str
    model: str
    created_at: int
    finished_at: int | None
    fine_tuned_model: str | None
    organization_id: str
    result_files: list[str]
    status: Status
    validation_file: str | None
    training_file: str
    hyperparameters: JobHyperparameters
    trained_tokens: int | None
    error: JobError | None
    user_provided_suffix: str | None
    seed: int
    estimated_finish: int | None
    integrations: list[Any]
    metadata: dict[str, str] | None
    method: JobMethod

    name: str
    """The adapter's name in the catalog."""
    started_at: int | None
    phase: str | None
    """What a running job does just now."""
    status_reason: str | None
    """Why it waits, in words."""
    queue: QueuePlace | None
    progress: dict[str, Any] | None
    plan: dict[str, Any] | None
    """What the cluster makes of it: workers, ZeRO stage, memory, and the arithmetic."""
    adapter: dict[str, Any]
    """The method with all its values; `id` and `version` once it is published."""
    base: dict[str, Any]
    training: dict[str, Any]
    """Every value that training uses, "auto" resolved; empty where nothing is trained."""
    objective: dict[str, Any] | None
    """What is minimised, with all its values; null where nothing is trained."""
    data: dict[str, Any] | None
    """What is trained on and how it is read."""
    evaluation: dict[str, Any] | None
    """Answers that are generated and graded while it trains."""
    operation: dict[str, Any] | None
    """What is done to `sources` instead of training, with all its values."""
    sources: list[dict[str, Any]]
    """Published adapters that it starts from."""
    resources: dict[str, Any]
    priority: int
    attempt: int


class JobPage(BaseModel):
    object: Literal["list"] = "list"
    data: list[Job]
    has_more: bool


class JobEvent(BaseModel):
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    id: str
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None


class JobEventPage(BaseModel):
    object: Literal["list"] = "list"
    data: list[JobEvent]
    has_more: bool


class Checkpoint(BaseModel):
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    id: str
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, Any]


class CheckpointPage(BaseModel):
    object: Literal["list"] = "list"
    data: list[Checkpoint]
    has_more: bool
    first_id: str | None
    last_id: str | None


class PreflightData(BaseModel):
    file: str
    rows: int
    format: str
    container: str | None
    bytes: int
    statistics: dict[str, Any]
    warnings: list[str]


class Preflight(BaseModel):
    """What a job would be. Nothing was started or registered; data from a URI is brought into the project."""

    object: Literal["preflight"] = "preflight"
    name: str
    base: dict[str, Any]
    adapter: dict[str, Any]
    method: JobMethod
    objective: dict[str, Any]
    evaluation: dict[str, Any] | None
    hyperparameters: JobHyperparameters
    training: dict[str, Any]
    resources: dict[str, Any]
    reasons: dict[str, str] = Field(description="For every value that was chosen, why this one.")
    training_file: PreflightData
    sources: list[PreflightData]
    """What is trained on beside the training file."""
    validation_file: PreflightData | None
    overlap: Overlap | None
    """Null without a validation file."""
    rows: int
    """That are trained on, each once an epoch where no weights are given."""
    steps: int
    """Optimizer steps of the whole run, if no row is dropped or split for its length."""
    plan: dict[str, Any] | None
    arithmetic: list[str]
    warnings: list[str]


# ------------------------------------------------------------------------------------------------- submit


class CapacityUnknown(PeftServiceError):
    """Nobody has seen the training cluster yet, or it has no nodes just now. Worth a retry."""

    status = 503
    default_code = "capacity_unknown"


@dataclass(frozen=True)
class Prepared:
    """A request that has been found good: all that submitting it needs."""

    wanted: Wanted
    resolved: Resolved
    base: BaseRow
    plan: Plan | None
    """None: the cluster has not reported any node yet."""
    sources: tuple[Reading, ...]
    """All that is trained on; the training file is the first."""
    validation: Reading | None = None
    forgetting: Reading | None = None
    teacher: BaseRow | None = None

    @property
    def readings(self) -> list[tuple[str, Reading]]:
        """Every data set, with the key that names it."""
        asked = (*self.wanted.sources, self.wanted.validation, self.wanted.forgetting)
        found = (*self.sources, self.validation, self.forgetting)
        named = zip(asked, found, strict=True)
        return [(one.param, read) for one, read in named if one is not None and read is not None]


@router.post("/fine_tuning/jobs", tags=["fine-tuning"], openapi_extra=json_request(CreateJob))
def create_job(caller: AsCaller, request: Request, raw: Raw) -> Job:
    """Submit a job. A request that the client repeats makes one job only."""
    idempotency_key = idempotency_key_of(request)
    prepared = prepare(caller, raw)
    body, spec = prepared.wanted.body, prepared.resolved.spec
    if prepared.plan is None:
        raise CapacityUnknown("the training cluster has not reported any node yet: try again in a moment")
    new = NewJob(
        project_id=caller.project,
        spec=spec,
        request=raw,
        body_hash=hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest(),
        plan=prepared.plan.model_dump(mode="json"),
        priority=body.priority,
        metadata=body.metadata or {},
        idempotency_key=idempotency_key,
        retry_count=retry_count(request),
    )
    with writing(caller.engine) as conn:
        # From here to the commit nobody can delete the files (`files.remove` takes the same lock).
        in_order(conn, caller.project)
        for param, found in prepared.readings:
            files.training_row(conn, caller.project, found.row.id, param)
        base_models.keep(conn, prepared.base)
        if prepared.teacher is not None:
            base_models.keep(conn, prepared.teacher)
        row = queue.submit(conn, new)
    return job_of(row, queue.position(caller.engine, row))


@router.post("/preflight", tags=["fine-tuning"], openapi_extra=json_request(CreateJob))
def preflight(caller: AsCaller, raw: Raw) -> Preflight:
    """The plan for this job and its arithmetic, every "auto" resolved; nothing is started."""
    prepared = prepare(caller, raw)
    spec, plan = prepared.resolved.spec, prepared.plan
    told = [_data(found) for _, found in prepared.readings]
    warnings = [f"{part.file}: {words}" for part in told for words in part.warnings]
    overlap = None
    if prepared.validation is not None:
        overlap = readings.overlap(caller, prepared.sources, prepared.validation)
        if (found := overlap.warning()) is not None:
            warnings.append(str(found))
    if plan is None:
        warnings.append("the training cluster has not reported any node yet, so there is no plan")
    if not prepared.base.info.get("has_chat_template") and spec.data.template is None:
        warnings.append(
            f"{spec.base.id} has no chat template: rows of messages need one (data.template), others do not"
        )
    return Preflight(
        name=spec.name,
        base={
            **spec.base.model_dump(mode="json"),
            **prepared.base.info,
            "parameters": prepared.base.shape["parameters"],
        },
        adapter=spec.method.model_dump(mode="json"),
        method=JobMethod(**objectives.told(spec.model_dump(mode="json"), requests.hyperparameters_of(spec))),
        objective=spec.objective.model_dump(mode="json"),
        evaluation=spec.evaluation and spec.evaluation.model_dump(mode="json"),
        hyperparameters=JobHyperparameters(**requests.hyperparameters_of(spec)),
        training=spec.training.model_dump(mode="json"),
        resources=spec.resources.model_dump(mode="json"),
        reasons=prepared.resolved.reasons,
        training_file=_data(prepared.sources[0]),
        sources=[_data(source) for source in prepared.sources[1:]],
        validation_file=None if prepared.validation is None else _data(prepared.validation),
        overlap=overlap,
        rows=spec.data.rows,
        steps=steps_of(spec.data.rows, spec.training),
        plan=None if plan is None else plan.model_dump(mode="json"),
        arithmetic=[] if plan is None else list(plan.arithmetic),
        warnings=warnings,
    )


def _sources(caller: Caller, method: Method, base: Base) -> tuple[Source, ...]:
    """The published adapters that a method starts from; they must be of the very base, and of its methods.

    Raises:
        InvalidRequest: one is not there, or is an adapter of another base, or of another size.
    """
    found, of = [], method.sources_of
    references: tuple[str, ...] = getattr(method, "sources", ())
    for number, reference in enumerate(references):
        param = f"adapter.sources[{number}]"
        with reading(caller.engine) as conn:
            try:
                row = catalog.find(conn, caller.project, reference)
            except NotFound as error:
                raise InvalidRequest(error.message, code=error.code, param=param) from error
        if row.deleted_at is not None:
            raise InvalidRequest(f"the adapter {reference} has been deleted", param=param)
        if (row.base_id, row.base_digest) != (base.id, base.digest):
            raise InvalidRequest(
                f"{reference} is an adapter of {row.base_id} (digest {str(row.base_digest)[:12]}), but the "
                f"job's base is {base.id} (digest {str(base.digest)[:12]})",
                code="other_base",
                param=param,
            )
        if of and row.method not in of:
            raise InvalidRequest(
                f"{reference} is a {row.method} adapter; this method starts from {' or '.join(of)}",
                code="method_not_applicable",
                param=param,
            )
        made = row.manifest["record"]["spec"]["method"]
        for name in method.as_sources:
            if made.get(name) != (mine := getattr(method, name)):
                raise InvalidRequest(
                    f"{reference} has {name} {made.get(name)}, and this job {mine}: set {name} to "
                    f"{made.get(name)}, or give sources with {mine}",
                    code="invalid_value",
                    param=f"adapter.{name}",
                )
        found.append(
            Source(reference=reference, id=row.id, key=row.location, digest=row.digest, method=row.method)
        )
    return tuple(found)


def prepare(caller: Caller, raw: dict[str, Any], *, planned: bool = True) -> Prepared:
    """Find the request good, or raise. Writes nothing but data that a URI names, and what was found out about
    rows.

    Args:
        planned: also find out whether and how the cluster can run it.

    Raises:
        InvalidRequest: among them UnknownBase and DoesNotFit; `param` names the key.
    """
    wanted = requests.read(raw)
    body = wanted.body
    sources = tuple(readings.find(caller, source) for source in wanted.sources)
    validation = None if wanted.validation is None else readings.find(caller, wanted.validation)
    forgetting = None if wanted.forgetting is None else readings.find(caller, wanted.forgetting)
    base = base_models.resolve(
        caller.engine,
        caller.settings.base_models_allow,
        body.model,
        body.base.uri if body.base else None,
        body.base.revision if body.base else None,
    )
    teacher = _teacher(caller, wanted, base)
    resolved = requests.resolve(
        wanted,
        Files(
            sources[0].data,
            tuple(source.data for source in sources[1:]),
            None if validation is None else validation.data,
            None if forgetting is None else forgetting.data,
        ),
        Known(base.base, base.info.get("context_length")),
        base.model_shape,
        _sources(caller, wanted.method, base.base),
        None if teacher is None else _as_shaped(teacher),
        0 if teacher is None else teacher.model_shape.parameters,
    )
    _check_graders(caller, resolved.spec, wanted, sources, validation)
    if planned and resolved.spec.data.template is not None and resolved.spec.data.template.name is None:
        _try_template(caller, resolved.spec, base, sources[0].data)
    capacity = seen_capacity(caller) if planned else None
    plan = None if capacity is None else make_plan(resolved.spec, base.model_shape, capacity)
    return Prepared(wanted, resolved, base, plan, sources, validation, forgetting, teacher)


def _try_template(caller: Caller, spec: FineTuneSpec, base: BaseRow, file: DataFile) -> None:
    """A template of the request's own renders the first row in a process with limits, before a worker does.

    Raises:
        InvalidRequest: it does not end, writes too much, or refuses the row.
    """
    tokenizer = base_model.fetch_tokenizer(spec.base, caller.settings.data_dir / "tokenizers")
    with imports.folder(caller) as folder:
        part = file.objects[0]
        caller.store.download(part.key, folder / "0")
        order = preview_of.Order(
            spec=spec,
            shape=base.model_shape,
            base=str(tokenizer),
            source=0,
            parts=((part.name, str(folder / "0")),),
            rows=1,
            statistics=False,
        )
        seen = preview_of.preview(order)
    for problem in [problem for row in seen["rows"] for problem in row["problems"]]:
        if problem["code"] in ("template_error", "masks_disagree", "not_a_prefix"):
            raise InvalidRequest(
                f"data.template.jinja does not fit the first row: {problem['message']}",
                code=problem["code"],
                param="data.template.jinja",
            )


def _teacher(caller: Caller, wanted: Wanted, base: BaseRow) -> BaseRow | None:
    """The base that the objective learns from.

    Raises:
        InvalidRequest: it is not there, or of another kind than the base.
    """
    if wanted.objective.teacher is None:
        return None
    param = f"{wanted.objective.where}.teacher"
    try:
        teacher = base_models.resolve(
            caller.engine, caller.settings.base_models_allow, wanted.objective.teacher
        )
    except InvalidRequest as error:
        raise InvalidRequest(f"{param}: {error.message}", code=error.code, param=param) from error
    if teacher.model_shape.architecture != base.model_shape.architecture:
        kinds = [row.model_shape.architecture.replace("_", "-") for row in (teacher, base)]
        raise InvalidRequest(
            f"{param}: {teacher.id} is an {kinds[0]} model and {base.id} an {kinds[1]} model: a teacher must "
            "have the base's tokenizer and be of its kind",
            code="teacher_not_applicable",
            param=param,
        )
    return teacher


def _as_shaped(row: BaseRow) -> Base:
    return row.base.model_copy(update={"architecture": row.model_shape.architecture})


def _check_graders(
    caller: Caller,
    spec: FineTuneSpec,
    wanted: Wanted,
    sources: Sequence[Reading],
    validation: Reading | None,
) -> None:
    """
    Raises:
        InvalidRequest: a grader can never work: it asks for columns that no row has, or for what the operator
            does not allow.
    """
    allowed = allowed_here(caller)
    own = getattr(spec.objective, "grader", None)
    if own is not None:
        graders.check(own, _columns(sources), allowed, f"{wanted.objective.where}.grader")
    if spec.evaluation is not None and "grader" in wanted.evaluation:
        read = [] if validation is None else [validation]
        graders.check(spec.evaluation.grader, _columns(read), allowed, "evaluation.grader")


def _columns(found: Sequence[Reading]) -> set[str] | None:
    """Keys that every row has which a grader may ask for; None: not known."""
    every: list[set[str]] = []
    for one in found:
        counts = one.report.get("columns")
        if one.data.columns is not None:
            every.append(set(one.data.columns.root))
        elif counts:
            every.append({name for name, count in counts.items() if count >= one.data.rows})
        else:
            return None
    return set.intersection(*every) if every else None


def seen_capacity(caller: Caller) -> Capacity | None:
    """The training cluster as the scheduler last saw it; None before that, or while it has no nodes."""
    with reading(caller.engine) as conn:
        snapshot = conn.scalar(select(capacity_table.c.snapshot))
    capacity = None if snapshot is None else Capacity.model_validate(snapshot)
    return capacity if capacity is not None and capacity.nodes else None


def _data(found: Reading) -> PreflightData:
    return PreflightData(
        file=found.row.id,
        rows=found.data.rows,
        format=found.data.format,
        container=found.report.get("container"),
        bytes=found.row.bytes,
        statistics=found.report.get("statistics", {}),
        warnings=found.report.get("warnings", []),
    )


def idempotency_key_of(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not re.match(r"^[\x21-\x7e]{1,255}$", key):
        raise InvalidRequest(
            "Idempotency-Key must be 1 to 255 visible ASCII characters", param="Idempotency-Key"
        )
    return key


# --------------------------------------------------------------------------------------- look at and move


@router.get(
    "/fine_tuning/jobs",
    tags=["fine-tuning"],
    openapi_extra={
        "parameters": [
            {
                "name": "metadata",
                "in": "query",
                "style": "deepObject",
                "explode": True,
                "schema": {"type": "object", "additionalProperties": {"type": "string"}},
                "description": "`metadata[key]=value`: jobs with these pairs; `metadata=null`: with none.",
            }
        ]
    },
)
def list_jobs(
    caller: Annotated[Caller, Depends(caller_with("metadata"))],
    request: Request,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> JobPage:
    """Jobs of the project, newest first."""
    page = queue.page(caller.engine, caller.project, after=after, limit=limit, metadata=_metadata(request))
    places = _positions(caller, page.items)
    return JobPage(data=[job_of(row, places.get(row.id)) for row in page.items], has_more=page.has_more)


@router.get("/fine_tuning/jobs/{job_id}", tags=["fine-tuning"])
def retrieve_job(caller: AsCaller, job_id: str) -> Job:
    """One job."""
    row = queue.get(caller.engine, caller.project, job_id)
    return job_of(row, queue.position(caller.engine, row))


@router.post("/fine_tuning/jobs/{job_id}/cancel", tags=["fine-tuning"])
def cancel_job(caller: AsCaller, request: Request, job_id: str) -> Job:
    """End a job at once."""
    return _moved(caller, request, job_id, "cancel")


@router.post("/fine_tuning/jobs/{job_id}/pause", tags=["fine-tuning"])
def pause_job(caller: AsCaller, request: Request, job_id: str) -> Job:
    """Keep a job where it is; a running one writes a checkpoint and stops."""
    return _moved(caller, request, job_id, "pause")


@router.post("/fine_tuning/jobs/{job_id}/resume", tags=["fine-tuning"])
def resume_job(caller: AsCaller, request: Request, job_id: str) -> Job:
    """Put a paused job back into the queue, at its old place."""
    return _moved(caller, request, job_id, "resume")


@router.get("/fine_tuning/jobs/{job_id}/events", tags=["fine-tuning"])
def list_events(
    caller: AsCaller, job_id: str, after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> JobEventPage:
    """What happened to a job, newest first."""
    page = queue.events(caller.engine, caller.project, job_id, after=after, limit=limit)
    return JobEventPage(data=[_event_of(row) for row in page.items], has_more=page.has_more)


@router.get("/fine_tuning/jobs/{job_id}/checkpoints", tags=["fine-tuning"])
def list_checkpoints(
    caller: AsCaller, job_id: str, after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 10
) -> CheckpointPage:
    """Checkpoints of a job, newest first."""
    job = queue.get(caller.engine, caller.project, job_id)
    page = queue.list_checkpoints(caller.engine, caller.project, job_id, after=after, limit=limit)
    model = job.fine_tuned_model or (
        f"ft:{catalog.slug_of(job.spec['base']['id'])}:{queue.project_name(caller.engine, caller.project)}"
        f":{job.name}:{catalog.id8_of(job.id)}"
    )
    data = [_checkpoint_of(model, row) for row in page.items]
    return CheckpointPage(
        data=data,
        has_more=page.has_more,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
    )


@router.get(
    "/fine_tuning/jobs/{job_id}/logs",
    tags=["fine-tuning"],
    response_class=PlainTextResponse,
    responses={200: {"content": {"text/plain": {}}}},
)
def job_logs(
    caller: AsCaller, job_id: str, attempt: Annotated[int | None, Query(ge=1, le=1_000_000)] = None
) -> Response:
    """The log of an attempt, default the newest; empty if it has written nothing yet."""
    job = queue.get(caller.engine, caller.project, job_id)
    wanted = job.attempt if attempt is None else attempt
    if attempt is not None and attempt > job.attempt:
        raise NotFound(f"job {job_id} has no attempt {attempt}, only {job.attempt} so far", param="attempt")
    if wanted == job.live_attempt and caller.launcher_logs is not None:
        with contextlib.suppress(ClusterUnavailable):
            return PlainTextResponse(caller.launcher_logs(f"ft-{job.id}-{wanted}"))
    chunks: Iterator[bytes] = iter(())
    if wanted:
        with contextlib.suppress(ObjectNotFound):
            chunks = caller.store.read(f"{caller.project}/runs/{job.id}/{wanted}/log.txt")
    return StreamingResponse(chunks, media_type="text/plain; charset=utf-8")


def _moved(caller: Caller, request: Request, job_id: str, verb: str) -> Job:
    move = {"cancel": queue.cancel, "pause": queue.pause, "resume": queue.resume}[verb]
    try:
        row = move(caller.engine, caller.project, job_id)
    except Conflict:
        row = queue.get(caller.engine, caller.project, job_id)
        # A client that repeats the request has lost the first answer, not the race.
        if not (retry_count(request) and row.state == queue.MOVES[verb].to):
            raise
    return job_of(row, queue.position(caller.engine, row))


def _metadata(request: Request) -> dict[str, str] | None:
    given: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name == "metadata":
            if value != "null":
                raise InvalidRequest(
                    "write metadata[key]=value, or metadata=null for jobs without any", param="metadata"
                )
            return {}
        if name.startswith("metadata["):
            given[name[len("metadata[") : -1]] = value
    return given or None


def _positions(caller: Caller, rows: Sequence[JobRow]) -> dict[str, int]:
    """`queue.position` of all queued jobs of a page, with two small queries for each priority among them."""
    # Written out in the SQL: see `queue._QUEUED`.
    queued = jobs_table.c.state == literal_column("'queued'")
    priority, seq = jobs_table.c.priority, jobs_table.c.seq
    places: dict[str, int] = {}
    waiting = [row for row in rows if row.state == "queued"]
    with reading(caller.engine) as conn:
        for level in {row.priority for row in waiting}:
            alike = {row.seq: row.id for row in waiting if row.priority == level}
            before = or_(priority > level, and_(priority == level, seq < min(alike)))
            ahead = conn.scalar(select(func.count()).select_from(jobs_table).where(queued, before))
            among = and_(priority == level, seq.between(min(alike), max(alike)))
            for place, number in enumerate(conn.scalars(select(seq).where(queued, among).order_by(seq)), 1):
                if number in alike:
                    places[alike[number]] = int(ahead or 0) + place
    return places


# ------------------------------------------------------------------------------------------------ answers


def job_of(row: JobRow, position: int | None) -> Job:
    """The job as OpenAI's clients read it."""
    spec, request = row.spec, row.request
    hyperparameters = _hyperparameters(spec)
    adapter = dict(spec["method"])
    if row.adapter_id is not None:
        adapter |= {"id": row.adapter_id, "version": row.adapter_version}
    data = spec.get("data") or {"training": {"id": ""}, "validation": None}
    validation = data["validation"]
    return Job(
        id=row.id,
        model=spec["base"]["id"],
        created_at=int(row.created_at),
        finished_at=_whole(row.finished_at),
        fine_tuned_model=row.fine_tuned_model,
        organization_id=row.project_id,
        result_files=row.result_files,
        status=row.state,
        validation_file=None if validation is None else validation["id"],
        training_file=data["training"]["id"],
        hyperparameters=hyperparameters,
        trained_tokens=row.trained_tokens,
        error=None if row.error is None else JobError(**row.error),
        user_provided_suffix=request.get("suffix"),
        seed=spec.get("seed", 0),
        estimated_finish=_estimated_finish(row),
        integrations=[],
        metadata=row.metadata or None,
        method=JobMethod(**_method_told(spec, hyperparameters)),
        name=row.name,
        started_at=_whole(row.started_at),
        phase=row.phase,
        status_reason=row.status_reason,
        queue=None if position is None else QueuePlace(position=position),
        progress=row.progress,
        plan=row.plan,
        adapter=adapter,
        base=spec["base"],
        training=spec.get("training") or {},
        objective=spec.get("objective"),
        data=spec.get("data"),
        evaluation=spec.get("evaluation"),
        operation=spec.get("operation"),
        sources=spec.get("sources", []),
        resources=spec["resources"],
        priority=row.priority,
        attempt=row.attempt,
    )


def _hyperparameters(spec: dict[str, Any]) -> JobHyperparameters:
    training = spec.get("training")
    if training is None:  # an operation trains nothing
        return JobHyperparameters(n_epochs=0, batch_size=0, learning_rate_multiplier=0, learning_rate=0)
    rate = _own_rate(spec) or training["learning_rate"]
    return JobHyperparameters(
        n_epochs=training["n_epochs"],
        batch_size=training["batch_size"],
        learning_rate_multiplier=float(f"{training['learning_rate'] / rate:.6g}"),
        learning_rate=training["learning_rate"],
    )


def _own_rate(spec: dict[str, Any]) -> float | None:
    """The default learning rate of a job's method and objective; None: another version of this service knew
    them, and this one does not."""
    try:
        read = FineTuneSpec.model_validate({**spec, "data": {"training": spec["data"]["training"]}})
    except ValidationError:
        return None
    return requests.own_rate(read.method, read.objective)


def _method_told(spec: dict[str, Any], hyperparameters: JobHyperparameters) -> dict[str, Any]:
    numbers = hyperparameters.model_dump()
    if "objective" not in spec:  # an operation trains nothing
        return {"type": "supervised", "supervised": {"hyperparameters": numbers}}
    return objectives.told(spec, numbers)


def _estimated_finish(row: JobRow) -> int | None:
    """When a running job will be done, if the rest goes as fast as so far."""
    seconds = (row.progress or {}).get("eta_seconds")
    return None if row.state != "running" or seconds is None else int(time.time() + seconds)


def _event_of(row: EventRow) -> JobEvent:
    return JobEvent(
        id=row.id,
        created_at=int(row.created_at),
        level=row.level,
        message=row.message,
        type=row.type,
        data=row.data,
    )


def _checkpoint_of(model: str, row: CheckpointRow) -> Checkpoint:
    return Checkpoint(
        id=row.id,
        created_at=int(row.created_at),
        fine_tuning_job_id=row.job_id,
        fine_tuned_model_checkpoint=f"{model}:ckpt-step-{row.step}",
        step_number=row.step,
        metrics={"step": row.step, **row.metrics},
    )


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)
