"""Routes of what there is to train on and what came out: models, bases, adapters, methods."""

import hashlib
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection, select

from jobs import base_models, objectives
from jobs.api_files import streamed
from jobs.base_models import BaseRow
from jobs.body import json_body
from jobs.caller import AsCaller, Caller, json_request
from jobs.db import jobs, reading, writing
from jobs.request import defaults_of, methods_by_kind
from peft_service import catalog, methods
from peft_service.catalog import Adapter as AdapterRow
from peft_service.errors import InvalidRequest, NotFound, NotPermitted, ObjectNotFound
from peft_service.methods import Capabilities
from peft_service.methods import Method as MethodVariant
from peft_service.objectives import Objective
from peft_service.variants import Frozen

router = APIRouter()

MANIFEST = "manifest.json"
PRESIGNED_SECONDS = 3600
Limit = Annotated[int, Query(ge=1, le=100)]


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]
    has_more: Literal[False] = False


class DeletedModel(BaseModel):
    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


class BaseModelObject(BaseModel):
    id: str
    object: Literal["base_model"] = "base_model"
    uri: str
    revision: str | None
    digest: str | None
    created_at: int
    architecture: str | None
    parameters: int
    bytes: int
    """Of the weights as stored."""
    dtype: str
    context_length: int | None
    has_chat_template: bool
    license: str | None
    shape: dict[str, Any]


class BaseModelPage(BaseModel):
    object: Literal["list"] = "list"
    data: list[BaseModelObject]
    has_more: bool


class RegisterBase(Frozen):
    id: str = Field(min_length=1, max_length=128, pattern=base_models.ID_PATTERN)
    """The name that jobs give as `model`, for example `Qwen/Qwen3-0.6B`."""
    uri: str = Field(min_length=1, max_length=2048)
    """Where its safetensors are: `file:///dir`, `s3://bucket/prefix` or `hf://org/name@revision`."""
    revision: str | None = Field(None, min_length=1, max_length=256)


class Adapter(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    id: str
    object: Literal["adapter"] = "adapter"
    name: str
    version: int
    reference: str
    """`name@version`"""
    model: str | None
    """Its name among `/v1/models`."""
    base: str
    base_digest: str | None
    method: str
    job: str
    url: str
    """Where it lies in the object store."""
    digest: str
    metrics: dict[str, Any]
    bytes: int
    created_at: int


class AdapterDetails(Adapter):
    manifest: dict[str, Any]
    """Files with sha256, and the lineage: base, data, spec, seed, software."""


class AdapterPage(BaseModel):
    object: Literal["list"] = "list"
    data: list[Adapter]
    has_more: bool


class DeletedAdapter(BaseModel):
    id: str
    object: Literal["adapter"] = "adapter"
    deleted: Literal[True] = True


class AdapterFile(BaseModel):
    object: Literal["adapter.file"] = "adapter.file"
    path: str
    bytes: int
    sha256: str


class AdapterFileList(BaseModel):
    object: Literal["list"] = "list"
    data: list[AdapterFile]
    has_more: Literal[False] = False


class Presigned(BaseModel):
    object: Literal["presigned_url"] = "presigned_url"
    url: str
    expires_at: int


class MethodObject(BaseModel):
    id: str
    object: Literal["method"] = "method"
    kind: str
    title: str
    family: str
    summary: str
    paper: str
    formula: str
    use_when: str
    limits: str
    aliases: dict[str, dict[str, Any]]
    """Other names that `adapter.kind` takes, and the fields that they set."""
    capabilities: Capabilities
    """Where it works; under `why` the reason for each limit, and what works instead."""
    sources_of: list[str]
    """Kinds of the published adapters that it starts from, named in `sources`; empty: it needs none."""
    needs_tasks: bool
    """Every row of its training file names a task."""
    learning_rate: float
    """Its own default, which `learning_rate_multiplier` scales."""
    defaults: dict[str, Any]
    schema_: dict[str, Any] = Field(serialization_alias="schema")
    """JSON schema of its fields, as the key `adapter` of a request takes them."""


class MethodList(BaseModel):
    object: Literal["list"] = "list"
    data: list[MethodObject]
    has_more: Literal[False] = False


class ObjectiveObject(BaseModel):
    id: str
    object: Literal["objective"] = "objective"
    kind: str
    names: list[str]
    """What `method.type` may be to mean it, in any spelling; OpenAI's name first where it has one."""
    aliases: dict[str, dict[str, Any]]
    """Those of them that set fields, and the fields."""
    summary: str
    formula: str
    paper: str
    measure: str
    """What is better after training than before, on rows that were not trained on."""
    rows: str
    """What a row must be."""
    formats: list[str]
    """Of the files that it learns from."""
    default_for: list[str]
    """Those of them that mean it where a request names no objective."""
    rate_scale: float
    """What the method's own learning rate is multiplied with by default."""
    packs: bool
    """Whether `training.packing` is possible."""
    defaults: dict[str, Any]
    schema_: dict[str, Any] = Field(serialization_alias="schema")
    """JSON schema of the object beside `method.type`."""


class ObjectiveList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ObjectiveObject]
    has_more: Literal[False] = False


# ------------------------------------------------------------------------------------------------- models


@router.get("/models", tags=["models"])
def list_models(caller: AsCaller) -> ModelList:
    """Every base, and every fine-tuned model of the project."""
    with reading(caller.engine) as conn:
        bases = [_base_as_model(row) for row in base_models.page(conn).items]
        tuned = [_adapter_as_model(conn, row) for row in _all_adapters(conn, caller.project)]
    return ModelList(data=[*tuned, *bases])


@router.get("/models/{model:path}", tags=["models"])
def retrieve_model(caller: AsCaller, model: str) -> Model:
    """A base or a fine-tuned model, by its id."""
    with reading(caller.engine) as conn:
        if model.startswith("ft:"):
            return _adapter_as_model(conn, _fine_tuned(conn, caller.project, model))
        return _base_as_model(base_models.get(conn, model))


@router.delete("/models/{model:path}", tags=["models"])
def delete_model(caller: AsCaller, model: str) -> DeletedModel:
    """Delete a fine-tuned model and its files. Its version is never given again."""
    with reading(caller.engine) as conn:
        if not model.startswith("ft:"):
            base_models.get(conn, model)
            raise NotPermitted(
                f"{model} is a base model, shared by all projects: it cannot be deleted here", param="model"
            )
        row = _fine_tuned(conn, caller.project, model)
    _delete(caller, row)
    return DeletedModel(id=model)


def _base_as_model(row: BaseRow) -> Model:
    return Model(id=row.id, created=int(row.created_at), owned_by="base")


def _adapter_as_model(conn: Connection, row: AdapterRow) -> Model:
    return Model(id=_model_of(conn, row) or row.id, created=int(row.created_at), owned_by=row.project_id)


def _fine_tuned(conn: Connection, project: str, model: str) -> AdapterRow:
    missing = NotFound(
        f"no model {model[:200]!r} in this project; GET /v1/models lists them",
        code="model_not_found",
        param="model",
    )
    try:
        row = catalog.find(conn, project, model)
    except NotFound:
        raise missing from None
    # The catalog finds by the id at the end; here the whole name has to be right.
    if _model_of(conn, row) != model:
        raise missing
    return row


def _model_of(conn: Connection, row: AdapterRow) -> str | None:
    model = row.manifest.get("record", {}).get("model")
    if model is not None:
        return str(model)
    return conn.scalar(select(jobs.c.fine_tuned_model).where(jobs.c.id == row.job_id))


def _all_adapters(conn: Connection, project: str) -> Iterator[AdapterRow]:
    after = None
    while True:
        rows, more = catalog.page(conn, project, after=after, limit=1000)
        yield from rows
        if not more:
            return
        after = rows[-1].id


# ------------------------------------------------------------------------------------------------- bases


@router.get("/base_models", tags=["models"])
def list_base_models(caller: AsCaller, after: str | None = None, limit: Limit = 100) -> BaseModelPage:
    """The bases that jobs may name, newest first."""
    page = base_models.page(caller.engine, after=after, limit=limit)
    return BaseModelPage(data=[_base_of(row) for row in page.items], has_more=page.has_more)


@router.post("/base_models", tags=["models"], openapi_extra=json_request(RegisterBase))
def register_base_model(
    caller: AsCaller, wanted: Annotated[RegisterBase, Depends(json_body(RegisterBase))]
) -> BaseModelObject:
    """Make a base available under an id: its config and safetensors headers are read and checked."""
    row = base_models.register(
        caller.engine, caller.settings.base_models_allow, wanted.id, wanted.uri, wanted.revision
    )
    return _base_of(row)


@router.get("/base_models/{id:path}", tags=["models"])
def retrieve_base_model(caller: AsCaller, id: str) -> BaseModelObject:
    """One base."""
    return _base_of(base_models.get(caller.engine, id))


def _base_of(row: BaseRow) -> BaseModelObject:
    return BaseModelObject(
        id=row.id,
        uri=row.uri,
        revision=row.revision,
        digest=row.digest,
        created_at=int(row.created_at),
        architecture=row.info.get("architecture"),
        parameters=row.shape["parameters"],
        bytes=row.shape["bytes"],
        dtype=row.shape["dtype"],
        context_length=row.info.get("context_length"),
        has_chat_template=bool(row.info.get("has_chat_template")),
        license=row.info.get("license"),
        shape={name: row.shape[name] for name in ("layers", "hidden", "vocab", "tied")},
    )


# ------------------------------------------------------------------------------------------------ adapters


@router.get("/adapters", tags=["adapters"])
def list_adapters(
    caller: AsCaller,
    after: str | None = None,
    limit: Limit = 20,
    name: str | None = None,
    base: str | None = None,
    method: str | None = None,
    job: str | None = None,
) -> AdapterPage:
    """Published adapters of the project, newest first."""
    with reading(caller.engine) as conn:
        rows, more = catalog.page(
            conn, caller.project, after=after, limit=limit, name=name, base=base, method=method, job=job
        )
        return AdapterPage(data=[Adapter(**_facts(caller, conn, row)) for row in rows], has_more=more)


@router.get("/adapters/{adapter}", tags=["adapters"])
def retrieve_adapter(caller: AsCaller, adapter: str) -> AdapterDetails:
    """One adapter: by id, by `name@version`, by `name` (its newest version), or by its model name."""
    with reading(caller.engine) as conn:
        row = _found(conn, caller.project, adapter)
        return AdapterDetails(**_facts(caller, conn, row), manifest=row.manifest)


@router.delete("/adapters/{adapter}", tags=["adapters"])
def delete_adapter(caller: AsCaller, adapter: str) -> DeletedAdapter:
    """Delete one version and its files; without a version, only if the name has just one."""
    with reading(caller.engine) as conn:
        row = _found(conn, caller.project, adapter)
        if adapter == row.name and len(catalog.versions(conn, caller.project, row.name)) > 1:
            raise InvalidRequest(
                f"{adapter} has several versions: say which one, as in {row.reference}", param="adapter"
            )
    _delete(caller, row)
    return DeletedAdapter(id=row.id)


@router.get("/adapters/{adapter}/versions", tags=["adapters"])
def list_versions(caller: AsCaller, adapter: str) -> AdapterPage:
    """Every version of the adapter's name, newest first."""
    with reading(caller.engine) as conn:
        row = _found(conn, caller.project, adapter)
        rows = catalog.versions(conn, caller.project, row.name)
        return AdapterPage(data=[Adapter(**_facts(caller, conn, each)) for each in rows], has_more=False)


@router.get("/adapters/{adapter}/files", tags=["adapters"])
def list_adapter_files(caller: AsCaller, adapter: str) -> AdapterFileList:
    """The adapter's files with their checksums, the manifest too."""
    with reading(caller.engine) as conn:
        row = _found(conn, caller.project, adapter)
    return AdapterFileList(data=list(_files(caller, row).values()))


@router.get(
    "/adapters/{adapter}/files/{path:path}",
    tags=["adapters"],
    response_model=Presigned,
    responses={200: {"content": {"application/octet-stream": {}}}},
)
def adapter_file(caller: AsCaller, adapter: str, path: str, presign: bool = False) -> Any:
    """The bytes of one file; with `presign=true`, a URL of the object store that gives them for an hour."""
    with reading(caller.engine) as conn:
        row = _found(conn, caller.project, adapter)
    file = _files(caller, row).get(path)
    if file is None:
        raise NotFound(
            f"adapter {row.reference} has no file {path[:200]!r}", code="file_not_found", param="path"
        )
    key = f"{row.location}/{path}"
    filename = path.rsplit("/", 1)[-1]
    if not presign:
        return streamed(caller.store, key, filename, file.bytes)
    url = caller.store.presign(key, PRESIGNED_SECONDS, filename)
    if url is None:
        raise InvalidRequest(
            "this service's store has no URLs of its own: leave presign out and read the file here",
            code="presign_unsupported",
            param="presign",
        )
    return Presigned(url=url, expires_at=int(time.time()) + PRESIGNED_SECONDS)


def _found(conn: Connection, project: str, reference: str) -> AdapterRow:
    row = (
        _fine_tuned(conn, project, reference)
        if reference.startswith("ft:")
        else catalog.find(conn, project, reference)
    )
    if row.deleted_at is not None:
        raise NotFound(f"adapter {row.reference} was deleted", code="adapter_deleted", param="adapter")
    return row


def _facts(caller: Caller, conn: Connection, row: AdapterRow) -> dict[str, Any]:
    return {
        "id": row.id,
        "name": row.name,
        "version": row.version,
        "reference": row.reference,
        "model": _model_of(conn, row),
        "base": row.base_id,
        "base_digest": row.base_digest,
        "method": row.method,
        "job": row.job_id,
        "url": f"{caller.store.url.rstrip('/')}/{row.location}",
        "digest": row.digest,
        "metrics": row.metrics,
        "bytes": row.bytes,
        "created_at": int(row.created_at),
    }


def _files(caller: Caller, row: AdapterRow) -> dict[str, AdapterFile]:
    """By path. The manifest lists all but itself, so its own checksum is taken here."""
    listed = {
        file["path"]: AdapterFile(path=file["path"], bytes=file["size"], sha256=file["sha256"])
        for file in row.manifest["files"]
    }
    try:
        manifest = caller.store.get(f"{row.location}/{MANIFEST}")
    except ObjectNotFound:
        raise NotFound(
            f"the files of adapter {row.reference} are gone from the store", code="content_gone"
        ) from None
    digest = hashlib.sha256(manifest).hexdigest()
    listed[MANIFEST] = AdapterFile(path=MANIFEST, bytes=len(manifest), sha256=digest)
    return listed


def _delete(caller: Caller, row: AdapterRow) -> None:
    # The manifest first: without it the rest is no adapter, also for a catalog rebuilt from the store.
    caller.store.delete(f"{row.location}/{MANIFEST}")
    with writing(caller.engine) as conn:
        catalog.delete(conn, caller.project, row.id, time.time())
    for info in list(caller.store.list(f"{row.location}/")):
        caller.store.delete(info.key)


# ------------------------------------------------------------------------------------------------- methods


@router.get("/methods", tags=["methods"])
def list_methods(caller: AsCaller) -> MethodList:
    """Every fine-tuning method this service has."""
    return MethodList(data=[_method_of(kind, method) for kind, method in sorted(methods_by_kind().items())])


@router.get("/methods/{kind}", tags=["methods"])
def retrieve_method(caller: AsCaller, kind: str) -> MethodObject:
    """One method, by its kind or any of its other names."""
    variants = methods_by_kind()
    named = methods.names().get(methods.spelled(kind))
    if named is None:
        raise NotFound(
            f"no method {kind[:60]!r}; there are {', '.join(sorted(variants))}",
            code="method_not_found",
            param="kind",
        )
    return _method_of(named[0], variants[named[0]])


def _method_of(kind: str, method: type[MethodVariant]) -> MethodObject:
    return MethodObject(
        id=kind,
        kind=kind,
        title=method.title,
        family=method.family,
        summary=method.summary,
        paper=method.paper,
        formula=method.formula,
        use_when=method.use_when,
        limits=method.limits,
        aliases={name: dict(preset) for name, preset in method.aliases.items()},
        capabilities=method.can,
        sources_of=list(method.sources_of),
        needs_tasks=method.needs_tasks,
        learning_rate=method.learning_rate,
        defaults=defaults_of(method),
        schema_=method.model_json_schema(),
    )


@router.get("/objectives", tags=["methods"])
def list_objectives(caller: AsCaller) -> ObjectiveList:
    """Every objective that a job can have: what `method.type` may be."""
    return ObjectiveList(
        data=[_objective_of(kind, variant) for kind, variant in objectives.objectives().items()]
    )


def _objective_of(kind: str, variant: type[Objective]) -> ObjectiveObject:
    named = [named.name for named in objectives.names().values() if named.kind == kind]
    return ObjectiveObject(
        id=kind,
        kind=kind,
        names=sorted(named, key=lambda name: (name not in objectives.OPENAI, name != kind, name)),
        aliases={name: dict(preset) for name, preset in variant.aliases.items() if preset},
        summary=variant.summary,
        formula=variant.formula,
        paper=variant.paper,
        measure=variant.measure,
        rows=variant.rows,
        formats=list(variant.formats),
        default_for=list(variant.default_for),
        rate_scale=variant.rate_scale,
        packs=variant.packs,
        defaults=defaults_of(variant),
        schema_=objectives.request_model(kind).model_json_schema(),
    )
