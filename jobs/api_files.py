"""Routes of files and chunked uploads: OpenAI's, with what was found out about a training file beside it."""

import tarfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import StreamingResponse

from jobs import files, imports
from jobs.body import Form, file_form, filename_of, json_body
from jobs.caller import AsCaller, form_request, json_request, services_of
from jobs.files import FileRow, UploadRow
from peft_service.errors import InvalidRequest, TooLarge
from peft_service.store import Store
from peft_service.variants import Frozen

router = APIRouter()

FILE_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")


class File(BaseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]
    expires_at: int | None = None
    status_details: str | None = None
    sha256: str
    format: str | None = None
    """Kind of record that was recognised, for purpose `fine-tune`; null: a job has to say what its columns
    mean (`data.columns`)."""
    container: str | None = None
    """What the file is made of: `jsonl`, `csv+gzip`, …"""
    columns: dict[str, int] | None = None
    """Names of the columns -> rows that have them."""
    rows: int | None = None
    statistics: dict[str, Any] | None = None
    warnings: list[str] = []


class FilePage(BaseModel):
    object: Literal["list"] = "list"
    data: list[File]
    has_more: bool
    first_id: str | None
    last_id: str | None


class DeletedFile(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class Upload(BaseModel):
    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: File | None = None


class UploadPart(BaseModel):
    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


class ExpiresAfter(Frozen):
    anchor: Literal["created_at"]
    seconds: int = Field(ge=files.EXPIRY_SECONDS[0], le=files.EXPIRY_SECONDS[1])


class ImportFile(Frozen):
    uri: str = Field(min_length=1, max_length=2048)
    """`s3://bucket/prefix-or-glob`, `file:///directory-or-glob`,
    `hf://datasets/org/name[:config][@revision][?split=train]` or `https://host/path`."""
    expires_after: ExpiresAfter | None = None


class CreateUpload(Frozen):
    bytes: int = Field(ge=1)
    filename: str = Field(min_length=1, max_length=255)
    mime_type: str = Field(min_length=1, max_length=255)
    purpose: str
    expires_after: ExpiresAfter | None = None


class CompleteUpload(Frozen):
    part_ids: list[str] = Field(min_length=1, max_length=10_000)
    md5: str | None = Field(None, pattern=r"^[0-9a-fA-F]{32}$")


def _upload_limit(request: Request) -> int:
    return services_of(request).settings.max_upload_bytes


def _incoming(request: Request) -> Path:
    return services_of(request).incoming


@router.post(
    "/files",
    tags=["files"],
    openapi_extra=form_request(
        "file",
        {
            "purpose": {"type": "string", "enum": list(files.PURPOSES)},
            "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
            "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2_592_000},
        },
        ("purpose",),
    ),
)
def create_file(
    caller: AsCaller, form: Annotated[Form, Depends(file_form("file", FILE_FIELDS, _upload_limit, _incoming))]
) -> File:
    """Upload a file. One for `fine-tune` is checked at once: bad lines are all listed in `error.errors`."""
    purpose = form.fields.get("purpose")
    if purpose is None:
        raise InvalidRequest("the form has no field 'purpose'", code="missing_parameter", param="purpose")
    files.check_purpose(purpose)
    seconds = form.fields.get("expires_after[seconds]")
    if seconds is not None and not (seconds.isascii() and seconds.isdigit() and len(seconds) < 10):
        raise InvalidRequest("expires_after[seconds] must be a whole number", param="expires_after[seconds]")
    expires_after = files.check_expiry(
        form.fields.get("expires_after[anchor]"), None if seconds is None else int(seconds)
    )
    row = files.add(
        caller.engine,
        caller.store,
        caller.project,
        form.path,
        filename=form.filename,
        purpose=purpose,
        size=form.bytes,
        sha256=form.sha256,
        expires_after=expires_after,
    )
    return file_of(row)


@router.post("/files/import", tags=["files"], openapi_extra=json_request(ImportFile))
def import_file(caller: AsCaller, wanted: Annotated[ImportFile, Depends(json_body(ImportFile))]) -> File:
    """Bring a data set from where it lies: `s3://`, `file://`, `hf://datasets/…` or `https://`. The same data
    is brought once; it is checked like an upload."""
    seconds = None if wanted.expires_after is None else float(wanted.expires_after.seconds)
    return file_of(imports.bring(caller, wanted.uri, expires_after=seconds, param="uri"))


@router.get("/files", tags=["files"])
def list_files(
    caller: AsCaller,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> FilePage:
    """Files of the project, newest first."""
    page = files.page(
        caller.engine, caller.project, after=after, limit=limit, ascending=order == "asc", purpose=purpose
    )
    data = [file_of(row) for row in page.items]
    return FilePage(
        data=data,
        has_more=page.has_more,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
    )


@router.get("/files/{file_id}", tags=["files"])
def retrieve_file(caller: AsCaller, file_id: str) -> File:
    """One file."""
    return file_of(files.get(caller.engine, caller.project, file_id))


@router.delete("/files/{file_id}", tags=["files"])
def delete_file(caller: AsCaller, file_id: str) -> DeletedFile:
    """Delete a file; 409 while a job that has not ended needs it."""
    files.remove(caller.engine, caller.store, caller.project, file_id)
    return DeletedFile(id=file_id)


@router.get(
    "/files/{file_id}/content",
    tags=["files"],
    response_class=StreamingResponse,
    responses={200: {"content": {"application/octet-stream": {}}}},
)
def file_content(caller: AsCaller, file_id: str) -> StreamingResponse:
    """The bytes of a file, as they were uploaded; of a data set of several files, a tar of them."""
    row = files.get(caller.engine, caller.project, file_id)
    if len(row.parts) > 1:
        return tar_of(caller.store, row)
    return streamed(caller.store, row.key, row.filename, row.bytes)


@router.post("/uploads", tags=["uploads"], openapi_extra=json_request(CreateUpload))
def create_upload(
    caller: AsCaller, wanted: Annotated[CreateUpload, Depends(json_body(CreateUpload))]
) -> Upload:
    """Begin an upload in parts; it stays open for an hour."""
    files.check_purpose(wanted.purpose)
    filename_of(wanted.filename)
    most = caller.settings.max_upload_bytes
    if wanted.bytes > most:
        raise TooLarge(f"bytes is {wanted.bytes}, but a file has at most {most} bytes", param="bytes")
    row = files.start_upload(
        caller.engine,
        caller.store,
        caller.project,
        filename=wanted.filename,
        mime_type=wanted.mime_type,
        purpose=wanted.purpose,
        size=wanted.bytes,
        file_expires_after=None if wanted.expires_after is None else float(wanted.expires_after.seconds),
    )
    return _upload_of(row)


@router.post("/uploads/{upload_id}/parts", tags=["uploads"], openapi_extra=form_request("data", {}, ()))
def create_part(
    caller: AsCaller,
    upload_id: str,
    form: Annotated[Form, Depends(file_form("data", (), lambda request: files.PART_BYTES, _incoming))],
) -> UploadPart:
    """Add a part of at most 64 MiB; parts may come in any order and at the same time."""
    part = files.add_part(
        caller.engine, caller.store, caller.project, upload_id, form.path, form.bytes, form.sha256
    )
    return UploadPart(id=part.id, created_at=int(part.created_at), upload_id=upload_id)


@router.post("/uploads/{upload_id}/complete", tags=["uploads"], openapi_extra=json_request(CompleteUpload))
def complete_upload(
    caller: AsCaller,
    request: Request,
    upload_id: str,
    wanted: Annotated[CompleteUpload, Depends(json_body(CompleteUpload))],
) -> Upload:
    """Join the parts, in the order of `part_ids`, into a file."""
    row, file = files.complete_upload(
        caller.engine,
        caller.store,
        caller.project,
        upload_id,
        wanted.part_ids,
        wanted.md5,
        directory=caller.incoming,
        again=retry_count(request) > 0,
    )
    return _upload_of(row, file)


@router.post("/uploads/{upload_id}/cancel", tags=["uploads"])
def cancel_upload(caller: AsCaller, request: Request, upload_id: str) -> Upload:
    """Give up an upload; its parts are deleted."""
    row = files.cancel_upload(
        caller.engine, caller.store, caller.project, upload_id, again=retry_count(request) > 0
    )
    return _upload_of(row)


def retry_count(request: Request) -> int:
    """How often the OpenAI client has sent this request before."""
    text = request.headers.get("x-stainless-retry-count", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0


def streamed(store: Store, key: str, filename: str, size: int | None = None) -> StreamingResponse:
    """An object of the store as a download. Its first chunk is read before the answer begins, while an error
    can still become an envelope."""
    return _download(iter(store.read(key)), filename, size)


def _download(chunks: Iterator[bytes], filename: str, size: int | None) -> StreamingResponse:
    first = next(chunks, b"")
    headers = {
        "content-disposition": f"attachment; filename*=UTF-8''{quote(filename, safe='')}",
        "x-content-type-options": "nosniff",
    }
    if size is not None:
        headers["content-length"] = str(size)
    body: Iterator[bytes] = chain((first,), chunks)
    return StreamingResponse(body, headers=headers, media_type="application/octet-stream")


def tar_of(store: Store, row: FileRow) -> StreamingResponse:
    """The files of a data set as one tar stream, none of them held in memory."""

    def header(name: str, size: int) -> bytes:
        info = tarfile.TarInfo(name)
        info.size, info.mtime = size, int(row.created_at)
        return info.tobuf(tarfile.PAX_FORMAT)

    heads = [header(part.name, part.bytes) for part in row.parts]
    padding = [-part.bytes % tarfile.BLOCKSIZE for part in row.parts]

    def blocks() -> Iterator[bytes]:
        for part, head, missing in zip(row.parts, heads, padding, strict=True):
            yield head
            yield from store.read(part.key)
            yield bytes(missing)
        yield bytes(2 * tarfile.BLOCKSIZE)

    size = sum(map(len, heads)) + sum(padding) + row.bytes + 2 * tarfile.BLOCKSIZE
    return _download(blocks(), f"{row.filename}.tar", size)


def file_of(row: FileRow) -> File:
    report = row.report or {}
    return File(
        id=row.id,
        bytes=row.bytes,
        created_at=int(row.created_at),
        filename=row.filename,
        purpose=row.purpose,
        status=row.status,
        expires_at=None if row.expires_at is None else int(row.expires_at),
        sha256=row.sha256,
        format=row.format,
        container=report.get("container"),
        columns=report.get("columns"),
        rows=row.rows,
        statistics=report.get("statistics"),
        warnings=report.get("warnings", []),
    )


def _upload_of(row: UploadRow, file: FileRow | None = None) -> Upload:
    return Upload(
        id=row.id,
        bytes=row.bytes,
        created_at=int(row.created_at),
        expires_at=int(row.expires_at),
        filename=row.filename,
        purpose=row.purpose,
        status=row.status,
        file=None if file is None else file_of(file),
    )
