"""Files and chunked uploads: rows in SQL, bytes in the store.

The bytes are written before the row and removed after it, so a row never names bytes that are not there. What
a process killed in between leaves is an object that no row names.
"""

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    String,
    and_,
    cast,
    delete,
    exists,
    func,
    insert,
    or_,
    select,
    update,
)

from jobs.db import TERMINAL, Source, in_order, jobs, reading, upload_parts, uploads, writing
from jobs.db import files as files_table
from jobs.queue import Page, new_id
from peft_service.errors import (
    Conflict,
    InvalidRequest,
    InvalidTrainingFile,
    NotFound,
    ObjectNotFound,
    TooLarge,
)
from peft_service.run import tokenised_key
from peft_service.spec import DataFile, DataPart
from peft_service.store import Store
from peft_service.validate import Report, validate

PURPOSES = ("fine-tune", "assistants", "batch", "vision", "user_data", "evals")
"""What OpenAI's clients may upload for. Only `fine-tune` is read here; the others are kept as they are."""
RESULTS = "fine-tune-results"
UPLOAD_SECONDS = 3600
PART_BYTES = 64 << 20
EXPIRY_SECONDS = (3600, 2_592_000)
SWEEP = 20
"""Expired rows cleaned away by one request, so that none has to do it all."""


@dataclass(frozen=True)
class FileRow:
    seq: int
    id: str
    project_id: str
    filename: str
    purpose: str
    bytes: int
    sha256: str
    key: str
    created_at: float
    expires_at: float | None
    status: Literal["uploaded", "processed", "error"]
    format: str | None
    rows: int | None
    report: dict[str, Any] | None
    deleted_at: float | None

    @property
    def data(self) -> DataFile:
        """As a spec names it; only for a validated training file."""
        statistics = (self.report or {}).get("statistics", {})
        return DataFile(
            id=self.id,
            key=self.key,
            sha256=self.sha256,
            rows=self.rows or 0,
            format=self.format or "",
            labels=tuple(statistics.get("labels", ())),
            tasks=tuple(statistics.get("tasks", ())),
            name=self.filename,
            parts=self.parts,
        )

    @property
    def parts(self) -> tuple[DataPart, ...]:
        """Its objects, if it was brought from elsewhere (`jobs.imports`); an upload is the one at `key`."""
        return tuple(DataPart(**part) for part in (self.report or {}).get("parts", ()))


@dataclass(frozen=True)
class UploadRow:
    seq: int
    id: str
    project_id: str
    filename: str
    mime_type: str
    purpose: str
    bytes: int
    status: Literal["pending", "completed", "cancelled", "expired"]
    created_at: float
    expires_at: float
    file_expires_after: float | None
    file_id: str | None


@dataclass(frozen=True)
class PartRow:
    id: str
    upload_id: str
    bytes: int
    key: str
    created_at: float


# --------------------------------------------------------------------------------------------------- files


def check_purpose(purpose: str) -> str:
    if purpose not in PURPOSES:
        raise InvalidRequest(
            f"purpose {purpose[:60]!r} is not one of {', '.join(PURPOSES)}",
            code="invalid_purpose",
            param="purpose",
        )
    return purpose


def check_expiry(anchor: str | None, seconds: int | None) -> float | None:
    """Seconds after creation at which a file expires; None: never."""
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidRequest("expires_after.anchor must be 'created_at'", param="expires_after.anchor")
    if seconds is None or not EXPIRY_SECONDS[0] <= seconds <= EXPIRY_SECONDS[1]:
        raise InvalidRequest(
            f"expires_after.seconds must be between {EXPIRY_SECONDS[0]} and {EXPIRY_SECONDS[1]}",
            param="expires_after.seconds",
        )
    return float(seconds)


def check_training_file(parts: Sequence[tuple[str, Path]], filename: str) -> Report:
    """What is in a data set of these files, (name, path) each. One of no known format is good too: a job says
    which of its columns mean what.

    Raises:
        InvalidTrainingFile: its lines cannot be trained on; every one with line, path, reason and hint.
    """
    report = validate(parts)
    error = report.error()
    if error is None:
        return report
    raise InvalidTrainingFile(
        " ".join(f"{filename}: {error.message}".split()),
        param=error.param,
        details={**error.details, "statistics": report.statistics},
    )


def report_of(report: Report) -> dict[str, Any]:
    """What is kept of a report, in the row of its file."""
    return {
        "statistics": report.statistics,
        "warnings": [str(found) for found in report.warnings],
        "container": report.container,
        "columns": report.columns_seen,
        "mapping": next((found.hint for found in report.warnings if found.code == "unknown_format"), None),
    }


def add(
    source: Source,
    store: Store,
    project: str,
    path: Path,
    *,
    filename: str,
    purpose: str,
    size: int,
    sha256: str,
    expires_after: float | None,
    also: Callable[[Connection, str], None] = lambda conn, file: None,
) -> FileRow:
    """Check the file at `path`, store its bytes, then its row; `also` joins the row's transaction.

    Raises:
        InvalidTrainingFile: purpose `fine-tune` and a line that cannot be trained on. Nothing is stored.
    """
    report = check_training_file([(filename, path)], filename) if purpose == "fine-tune" else None
    sweep(source, store, project)
    file = new_id("file-")
    key = f"{project}/files/{file}"
    store.put_file(key, path)
    now = time.time()
    try:
        with writing(source) as conn:
            in_order(conn, project)
            conn.execute(
                insert(files_table).values(
                    id=file,
                    project_id=project,
                    filename=filename,
                    purpose=purpose,
                    bytes=size,
                    sha256=sha256,
                    key=key,
                    created_at=now,
                    expires_at=None if expires_after is None else now + expires_after,
                    status="processed",
                    format=report and report.format,
                    rows=report and report.rows,
                    report=report and report_of(report),
                )
            )
            also(conn, file)
    except BaseException:
        store.delete(key)
        raise
    return get(source, project, file)


def get(source: Source, project: str, file: str) -> FileRow:
    """
    Raises:
        NotFound: no such file in this project, or it was deleted, or it has expired.
    """
    with reading(source) as conn:
        row = conn.execute(
            select(files_table).where(_visible(project), files_table.c.id == file)
        ).one_or_none()
    if row is None:
        raise NotFound(f"no file {file!r} in this project", code="file_not_found", param="file_id")
    return FileRow(**row._mapping)


def page(
    source: Source, project: str, *, after: str | None, limit: int, ascending: bool, purpose: str | None
) -> Page[FileRow]:
    """
    Raises:
        NotFound: `after` is no file of this project.
    """
    with reading(source) as conn:
        query = select(files_table).where(_visible(project))
        if purpose is not None:
            query = query.where(files_table.c.purpose == purpose)
        if after is not None:
            # Not `get`: a client that deletes what it lists asks for the page after a deleted file.
            seq = conn.scalar(
                select(files_table.c.seq).where(
                    files_table.c.id == after, files_table.c.project_id == project
                )
            )
            if seq is None:
                raise NotFound(f"`after` is {after!r}, which is no file of this project", param="after")
            query = query.where(files_table.c.seq > seq if ascending else files_table.c.seq < seq)
        order = files_table.c.seq.asc() if ascending else files_table.c.seq.desc()
        rows = conn.execute(query.order_by(order).limit(limit + 1)).all()
    return Page([FileRow(**row._mapping) for row in rows[:limit]], len(rows) > limit)


def remove(source: Source, store: Store, project: str, file: str) -> None:
    """Delete a file.

    Raises:
        NotFound: no such file in this project.
        Conflict: a job that has not ended needs it.
    """
    with writing(source) as conn:
        # The same lock as at submit: a job cannot take the file between the look and the deletion.
        in_order(conn, project)
        row = get(conn, project, file)
        user = conn.scalar(select(jobs.c.id).where(jobs.c.project_id == project, _uses(file)).limit(1))
        if user is not None:
            raise Conflict(
                f"file {file} is in use by job {user}, which has not ended: cancel the job or wait for it",
                code="file_in_use",
                param="file_id",
            )
        conn.execute(update(files_table).where(files_table.c.id == file).values(deleted_at=time.time()))
    _forget(source, store, row)


def training_row(source: Source, project: str, file: str, param: str) -> FileRow:
    """A file that a job may read.

    Raises:
        NotFound, InvalidRequest: it is not there, or not for fine-tuning; `param` is the key of the request.
    """
    try:
        row = get(source, project, file)
    except NotFound:
        raise InvalidRequest(
            f"{param}: no file {file!r} in this project; upload it with purpose 'fine-tune' first",
            code="file_not_found",
            param=param,
        ) from None
    if row.purpose != "fine-tune":
        raise InvalidRequest(
            f"{param}: file {file} has purpose {row.purpose!r}; upload it with purpose 'fine-tune'",
            code="invalid_training_file",
            param=param,
        )
    if row.status != "processed" or not row.rows:
        raise InvalidRequest(
            f"{param}: file {file} has status {row.status!r} and cannot be trained on",
            code="invalid_training_file",
            param=param,
        )
    return row


def sweep(source: Source, store: Store, project: str) -> None:
    """Remove some of the project's expired files and uploads for good."""
    now = time.time()
    with reading(source) as conn:
        expired = conn.execute(
            select(files_table)
            .where(
                files_table.c.project_id == project,
                files_table.c.deleted_at.is_(None),
                files_table.c.expires_at <= now,
                ~exists().where(jobs.c.project_id == project, _uses(files_table.c.id)),
            )
            .limit(SWEEP)
        ).all()
        abandoned = conn.execute(
            select(uploads.c.id)
            .where(
                uploads.c.project_id == project, uploads.c.status == "pending", uploads.c.expires_at <= now
            )
            .limit(SWEEP)
        ).all()
    for row in expired:
        with writing(source) as conn:
            in_order(conn, project)
            gone = conn.execute(
                update(files_table)
                .where(
                    files_table.c.id == row.id,
                    ~exists().where(jobs.c.project_id == project, _uses(files_table.c.id)),
                )
                .values(deleted_at=now)
            )
        if gone.rowcount:
            _forget(source, store, FileRow(**row._mapping))
    for (upload,) in abandoned:
        if _end_upload(source, upload, "expired"):
            _forget_parts(source, store, project, upload)


def _visible(project: str) -> ColumnElement[bool]:
    return and_(
        files_table.c.project_id == project,
        files_table.c.deleted_at.is_(None),
        or_(files_table.c.expires_at.is_(None), files_table.c.expires_at > time.time()),
    )


def _uses(file: Any) -> ColumnElement[bool]:
    """Whether a job, not yet ended, needs this file."""
    # A spec names its files in several places, and an id is nothing else anywhere.
    return and_(jobs.c.state.not_in(TERMINAL), cast(jobs.c.spec["data"], String).contains(file))


def readings_prefix(row: FileRow) -> str:
    """Where `jobs.readings` keeps what it has found out about a file."""
    return f"{row.project_id}/files/{row.id}.reading-"


def _forget(source: Source, store: Store, row: FileRow) -> None:
    """Remove the bytes of a file whose row is deleted, and all that was made of them."""
    for key in [part.key for part in row.parts] or [row.key]:
        # A result file may name an object of a run or an adapter.
        if key.startswith(f"{row.project_id}/files/"):
            store.delete(key)
    prefixes = [readings_prefix(row)]
    with reading(source) as conn:
        alike = conn.scalar(
            select(func.count())
            .select_from(files_table)
            .where(
                files_table.c.project_id == row.project_id,
                files_table.c.sha256 == row.sha256,
                files_table.c.deleted_at.is_(None),
            )
        )
    if not alike:
        prefixes.append(tokenised_key(row.project_id, row.sha256))
    for prefix in prefixes:
        for info in list(store.list(prefix)):
            store.delete(info.key)


# ------------------------------------------------------------------------------------------------- uploads


def start_upload(
    source: Source,
    store: Store,
    project: str,
    *,
    filename: str,
    mime_type: str,
    purpose: str,
    size: int,
    file_expires_after: float | None,
) -> UploadRow:
    """A chunked upload, open for an hour."""
    sweep(source, store, project)
    upload, now = new_id("upload_"), time.time()
    with writing(source) as conn:
        conn.execute(
            insert(uploads).values(
                id=upload,
                project_id=project,
                filename=filename,
                mime_type=mime_type,
                purpose=purpose,
                bytes=size,
                status="pending",
                created_at=now,
                expires_at=now + UPLOAD_SECONDS,
                file_expires_after=file_expires_after,
            )
        )
    return get_upload(source, project, upload)


def get_upload(source: Source, project: str, upload: str) -> UploadRow:
    """
    Raises:
        NotFound: no such upload in this project.
    """
    with reading(source) as conn:
        row = conn.execute(
            select(uploads).where(uploads.c.id == upload, uploads.c.project_id == project)
        ).one_or_none()
    if row is None:
        raise NotFound(f"no upload {upload!r} in this project", code="upload_not_found", param="upload_id")
    return _upload(row)


def add_part(
    source: Source, store: Store, project: str, upload: str, path: Path, size: int, sha256: str
) -> PartRow:
    """
    Raises:
        NotFound: no such upload.
        Conflict: it is no longer pending.
        TooLarge: far more bytes than the upload announced (a retried part may be there twice).
    """
    row = _pending(get_upload(source, project, upload))
    with reading(source) as conn:
        there = conn.scalar(
            select(func.coalesce(func.sum(upload_parts.c.bytes), 0)).where(upload_parts.c.upload_id == upload)
        )
    if int(there or 0) + size > 2 * row.bytes + PART_BYTES:
        raise TooLarge(f"upload {upload} announced {row.bytes} bytes; its parts have far more", param="data")
    part = new_id("part_")
    key = f"{project}/uploads/{upload}/{part}"
    store.put_file(key, path)
    try:
        with writing(source) as conn:
            # Locks the row: a part is never added to an upload that has just been completed or cancelled.
            held = conn.execute(
                update(uploads)
                .where(uploads.c.id == upload, uploads.c.status == "pending")
                .values(status="pending")
            )
            if not held.rowcount:
                raise _not_pending(get_upload(conn, project, upload))
            now = time.time()
            conn.execute(
                insert(upload_parts).values(
                    id=part, upload_id=upload, bytes=size, sha256=sha256, key=key, created_at=now
                )
            )
    except BaseException:
        store.delete(key)
        raise
    return PartRow(part, upload, size, key, now)


def complete_upload(
    source: Source,
    store: Store,
    project: str,
    upload: str,
    part_ids: Sequence[str],
    md5: str | None,
    *,
    directory: Path,
    again: bool,
) -> tuple[UploadRow, FileRow]:
    """Join the parts in this order into a file.

    Args:
        directory: where the joined file waits on this machine.
        again: the client says that it repeats a request; then what is completed already is the answer.

    Raises:
        NotFound: no such upload.
        Conflict: it is no longer pending.
        InvalidRequest: the parts are not its own, or do not make the announced bytes or md5.
        InvalidTrainingFile: see `add`; the upload stays pending.
    """
    row = get_upload(source, project, upload)
    try:
        if row.status == "pending":
            file = _joined_file(source, store, row, part_ids, md5, directory)
            _forget_parts(source, store, project, upload)
            return get_upload(source, project, upload), file
    except (InvalidRequest, ObjectNotFound, Conflict):
        # Also what is seen when another request has just been faster and taken the parts away.
        row = get_upload(source, project, upload)
        if row.status == "pending":
            raise
    if again and row.status == "completed" and row.file_id is not None:
        return row, get(source, project, row.file_id)
    raise _not_pending(row)


def _joined_file(
    source: Source, store: Store, row: UploadRow, part_ids: Sequence[str], md5: str | None, directory: Path
) -> FileRow:
    parts = _ordered(source, row, part_ids)

    def close(conn: Connection, file: str) -> None:
        done = conn.execute(
            update(uploads)
            .where(uploads.c.id == row.id, uploads.c.status == "pending")
            .values(status="completed", file_id=file)
        )
        if not done.rowcount:
            raise _not_pending(get_upload(conn, row.project_id, row.id))

    with _joined(store, parts, directory) as (path, sha256, found_md5):
        if md5 is not None and md5.lower() != found_md5:
            raise InvalidRequest(
                f"md5 of the {len(parts)} parts is {found_md5}, not {md5[:40]}: "
                "a part was damaged or is in the wrong place",
                code="checksum_mismatch",
                param="md5",
            )
        return add(
            source,
            store,
            row.project_id,
            path,
            filename=row.filename,
            purpose=row.purpose,
            size=row.bytes,
            sha256=sha256,
            expires_after=row.file_expires_after,
            also=close,
        )


def cancel_upload(source: Source, store: Store, project: str, upload: str, *, again: bool) -> UploadRow:
    """
    Raises:
        NotFound: no such upload.
        Conflict: it is no longer pending.
    """
    row = get_upload(source, project, upload)
    if not (again and row.status == "cancelled"):
        _pending(row)
        if not _end_upload(source, upload, "cancelled"):
            raise _not_pending(get_upload(source, project, upload))
        _forget_parts(source, store, project, upload)
    return get_upload(source, project, upload)


def _upload(row: Row[Any]) -> UploadRow:
    values = {field.name: getattr(row, field.name) for field in fields(UploadRow)}
    if values["status"] == "pending" and values["expires_at"] <= time.time():
        values["status"] = "expired"
    return UploadRow(**values)


def _pending(row: UploadRow) -> UploadRow:
    if row.status != "pending":
        raise _not_pending(row)
    return row


def _not_pending(row: UploadRow) -> Conflict:
    return Conflict(
        f"upload {row.id} is {row.status}, and only a pending one can be changed: start a new upload",
        code="upload_not_pending",
        param="upload_id",
    )


def _ordered(source: Source, row: UploadRow, part_ids: Sequence[str]) -> list[PartRow]:
    if len(set(part_ids)) != len(part_ids):
        raise InvalidRequest("part_ids names a part twice", param="part_ids")
    with reading(source) as conn:
        there = {
            part.id: PartRow(part.id, part.upload_id, part.bytes, part.key, part.created_at)
            for part in conn.execute(select(upload_parts).where(upload_parts.c.upload_id == row.id))
        }
    unknown = [part for part in part_ids if part not in there]
    if unknown:
        raise InvalidRequest(f"part_ids: {unknown[0][:60]!r} is no part of upload {row.id}", param="part_ids")
    parts = [there[part] for part in part_ids]
    total = sum(part.bytes for part in parts)
    if total != row.bytes:
        raise InvalidRequest(
            f"the {len(parts)} parts have {total} bytes, but the upload announced {row.bytes}",
            code="size_mismatch",
            param="part_ids",
        )
    return parts


@contextmanager
def _joined(store: Store, parts: Sequence[PartRow], directory: Path) -> Iterator[tuple[Path, str, str]]:
    """(the joined file, sha256, md5), streamed."""
    directory.mkdir(parents=True, exist_ok=True)
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with tempfile.NamedTemporaryFile(dir=directory, prefix="upload-") as target:
        for part in parts:
            for chunk in store.read(part.key):
                sha256.update(chunk)
                md5.update(chunk)
                target.write(chunk)
        target.flush()
        yield Path(target.name), sha256.hexdigest(), md5.hexdigest()


def _end_upload(source: Source, upload: str, status: str) -> bool:
    with writing(source) as conn:
        done = conn.execute(
            update(uploads).where(uploads.c.id == upload, uploads.c.status == "pending").values(status=status)
        )
        return bool(done.rowcount)


def _forget_parts(source: Source, store: Store, project: str, upload: str) -> None:
    for info in list(store.list(f"{project}/uploads/{upload}/")):
        store.delete(info.key)
    with writing(source) as conn:
        conn.execute(delete(upload_parts).where(upload_parts.c.upload_id == upload))
