"""Routes that show what a job would make of its rows: text, tokens, and which of them are learned."""

import threading
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from jobs import api_jobs, imports
from jobs import preview as shown
from jobs.body import check, read_object
from jobs.caller import AsCaller, Caller, json_request
from jobs.request import CreateJob
from peft_service import base_model, preview
from peft_service.errors import InvalidRequest, RateLimited
from peft_service.spec import DataFile, FineTuneSpec
from peft_service.variants import Frozen

router = APIRouter()

AT_ONCE = 2
"""Previews of one replica: each is a process that may take 2 GiB of memory."""
PATIENCE_SECONDS = 30
_places = threading.BoundedSemaphore(AT_ONCE)

Line = Annotated[int, Field(ge=1)]
Raw = Annotated[dict[str, Any], Depends(read_object)]


class PreviewOptions(Frozen):
    """Which rows to look at."""

    rows: (
        Annotated[list[Line], Field(min_length=1, max_length=preview.MAX_ROWS)]
        | Annotated[int, Field(ge=1, le=preview.MAX_ROWS)]
    ) = 3
    """Their lines (of every file, in a data set of several), or how many from the beginning."""
    statistics: bool = False
    """Also tokenise all rows (20,000 at most): lengths, the share that is learned, what is cut, packing."""
    source: int = Field(0, ge=0)
    """Which data set: 0 is `training_file`, then those of `data.sources` in their order."""


class PreviewRequest(CreateJob):
    """A job's request, and which of its rows to look at."""

    preview: PreviewOptions | None = None


class Token(BaseModel):
    id: int
    text: str
    start: int
    """Of its characters in the sequence's text."""
    end: int
    trained: bool
    special: bool = False
    tag: str | None = None


class Counts(BaseModel):
    tokens: int
    trained: int


class Sequence(BaseModel):
    row: int
    """Which row of training this is, of those that the line became: 0, unless it was split."""
    name: Literal["", "chosen", "rejected"]
    text: str
    """What its tokens hold, as the template wrote it."""
    before: int
    """Characters before that: cut, or in another row."""
    after: int
    tokens: list[Token]
    tokens_left_out: int
    """Not listed here, so that an answer stays readable; they are trained on all the same."""
    counts: Counts
    label: Any = None


class PreviewProblem(BaseModel):
    line: int
    path: str
    code: str
    message: str
    hint: str
    excerpt: str


class PreviewRow(BaseModel):
    line: int
    file: str | None
    """Of a data set of several files."""
    happened: dict[str, int]
    """`dropped`, `truncated`, `split`, `merged_boundaries`, …: as in the statistics."""
    lost_tokens: int
    problems: list[PreviewProblem]
    """Why it cannot be trained on."""
    sequences: list[Sequence]


class Preview(BaseModel):
    object: Literal["preview"] = "preview"
    rows: list[PreviewRow]
    statistics: dict[str, Any] | None
    warnings: list[str]


@router.post(
    "/preview",
    tags=["fine-tuning"],
    openapi_extra=json_request(PreviewRequest),
    response_model=Preview,
    responses={200: {"content": {"text/html": {}}}},
)
def create_preview(caller: AsCaller, request: Request, raw: Raw) -> Response:
    """What this job would make of some rows, exactly as training will; nothing is started. As a page for
    people with `Accept: text/html`."""
    options, job = _split(raw)
    spec, shape = _resolved(caller, job)
    if options.source >= len(spec.data.sources):
        raise InvalidRequest(
            f"preview.source is {options.source}, but the job has {len(spec.data.sources)} data sets, from 0",
            param="preview.source",
        )
    file = spec.data.sources[options.source]
    if not _places.acquire(timeout=PATIENCE_SECONDS):
        raise RateLimited("other previews are being made: try again in a moment", code="preview_busy")
    try:
        found = _looked(caller, spec, shape, file, options)
    finally:
        _places.release()
    if "text/html" in request.headers.get("accept", ""):
        title = f"{file.name or file.id} with {spec.base.id}"
        headers = {"content-security-policy": shown.CONTENT_SECURITY, "x-content-type-options": "nosniff"}
        return HTMLResponse(shown.page(found, title), headers=headers)
    return JSONResponse(found)


def _split(raw: dict[str, Any]) -> tuple[PreviewOptions, dict[str, Any]]:
    job = dict(raw)
    options = job.pop("preview", None)
    if options is not None and not isinstance(options, dict):
        raise InvalidRequest("preview must be an object", param="preview")
    return check(PreviewOptions, options or {}, "preview"), job


def _resolved(caller: Caller, job: dict[str, Any]) -> tuple[FineTuneSpec, base_model.ModelShape]:
    prepared = api_jobs.prepare(caller, job, planned=False)
    return prepared.resolved.spec, prepared.base.model_shape


def _looked(
    caller: Caller,
    spec: FineTuneSpec,
    shape: base_model.ModelShape,
    file: DataFile,
    options: PreviewOptions,
) -> dict[str, Any]:
    base = base_model.fetch_tokenizer(spec.base, caller.settings.data_dir / "tokenizers")
    with imports.folder(caller) as folder:
        parts = []
        # The first rows are in the first file, and a data set may be large.
        objects = file.objects if options.statistics or isinstance(options.rows, list) else file.objects[:1]
        for number, part in enumerate(objects):
            path = folder / str(number)
            caller.store.download(part.key, path)
            parts.append((part.name, str(path)))
        return preview.preview(
            preview.Order(
                spec=spec,
                shape=shape,
                base=str(base),
                source=options.source,
                parts=tuple(parts),
                rows=options.rows if isinstance(options.rows, int) else tuple(options.rows),
                statistics=options.statistics,
            )
        )
