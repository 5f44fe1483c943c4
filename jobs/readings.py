"""A data set as a job reads it: its rows under the job's column mapping, or with other documents.

What a file is by itself was found out when it came. Under a mapping it is another data set, so it is checked
again, once: the result is kept beside the file and goes with it. Rows that cannot be trained on are refused
here, before anything waits for a worker.
"""

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from jobs import files, imports
from jobs.caller import Caller
from jobs.files import FileRow
from jobs.request import DataSet
from peft_service.columns import Columns
from peft_service.containers import Documents
from peft_service.errors import InvalidRequest, InvalidTrainingFile, ObjectNotFound
from peft_service.spec import DataFile
from peft_service.validate import Overlap, RowHashes, validate
from peft_service.validate import overlap as find_overlap

VERSION = 1
"""Of the meaning of a mapping: part of the key, so that no kept reading outlives a change of it."""
PLAIN_TEXT = "text"
"""The container whose documents can be cut in several ways."""


@dataclass(frozen=True)
class Reading:
    """A data set and how it is read."""

    row: FileRow
    data: DataFile
    """As a spec names it."""
    report: dict[str, Any]
    """`statistics`, `warnings`, `container`; see `files.report_of`."""


def find(caller: Caller, wanted: DataSet) -> Reading:
    """The data set that a request names, brought here if it is a URI, and checked under the mapping.

    Raises:
        InvalidRequest: no such file, or it cannot be trained on; `unknown_format`: it needs a mapping.
        InvalidTrainingFile: rows cannot be trained on under the mapping; every one with line and reason.
    """
    if imports.is_uri(wanted.file):
        row = imports.bring(caller, wanted.file, param=wanted.param)
    else:
        row = files.training_row(caller.engine, caller.project, wanted.file, wanted.param)
    data, report = row.data, row.report or {}
    documents = _documents(wanted, row)
    if wanted.columns is not None or documents != "line":
        read = _read(caller, row, wanted, documents)
        report = {**report, **read["report"]}
        statistics = report.get("statistics", {})
        data = data.model_copy(
            update={
                "format": read["format"] or "",
                "rows": read["rows"],
                "labels": tuple(statistics.get("labels", ())),
                "tasks": tuple(statistics.get("tasks", ())),
                "columns": wanted.columns,
                "documents": documents,
            }
        )
    if not data.format:
        raise _unknown(row, report, wanted)
    rows = data.rows if wanted.limit is None else min(data.rows, wanted.limit)
    data = data.model_copy(update={"limit": wanted.limit, "weight": wanted.weight, "rows": rows})
    return Reading(row, data, report)


def _documents(wanted: DataSet, row: FileRow) -> Documents:
    container = str((row.report or {}).get("container", ""))
    if wanted.documents is None or container.partition("+")[0] == PLAIN_TEXT:
        return wanted.documents or "line"
    if wanted.param == "validation_file":
        return "line"  # the key is that of the training file, which may be plain text where this one is not
    raise InvalidRequest(
        f"{wanted.documents_param} says what a document is in a plain text file, but {row.id} has rows of "
        "its own: leave it out",
        code="invalid_value",
        param=wanted.documents_param,
    )


def _read(caller: Caller, row: FileRow, wanted: DataSet, documents: Documents) -> dict[str, Any]:
    """What validation says of the file under the mapping, kept or new."""
    key = _key(row, wanted.columns, documents, "json")
    try:
        kept: dict[str, Any] = json.loads(caller.store.get(key))
        return kept
    except ObjectNotFound:
        pass
    with fetched(caller, row) as parts:
        report = validate(parts, columns=wanted.columns, documents=documents)
    error = report.error(wanted.param)
    if error is not None:
        raise InvalidTrainingFile(
            " ".join(f"{wanted.param}: {row.filename} under {wanted.columns_param}: {error.message}".split()),
            param=wanted.param,
            details=error.details,
        )
    made = {"format": report.format, "rows": report.rows, "report": files.report_of(report)}
    caller.store.put(key, json.dumps(made).encode())
    return made


def _key(row: FileRow, columns: Columns | None, documents: str, kind: str) -> str:
    """Where something is kept that was found out about a file under this mapping."""
    told = [VERSION, columns and columns.model_dump(mode="json"), documents]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
    return f"{files.readings_prefix(row)}{digest}.{kind}"


@contextmanager
def fetched(caller: Caller, row: FileRow) -> Iterator[Sequence[tuple[str, Path]]]:
    """The files of a data set on this machine, (name, path) each."""
    caller.incoming.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        parts = []
        for part in row.data.objects:
            file = stack.enter_context(NamedTemporaryFile(dir=caller.incoming, prefix="upload-"))
            caller.store.download(part.key, Path(file.name))
            parts.append((part.name, Path(file.name)))
        yield parts


def overlap(caller: Caller, sources: Sequence[Reading], validation: Reading) -> Overlap:
    """Rows of the validation data that are trained on too."""
    trained = RowHashes()
    for source in sources:
        trained.hashes.extend(_hashes(caller, source).hashes[: source.data.limit])
    return find_overlap(trained, _hashes(caller, validation))


def _hashes(caller: Caller, found: Reading) -> RowHashes:
    """What each row of a data set teaches, kept or new."""
    data = found.data
    key = _key(found.row, data.columns, data.documents, "hashes")
    try:
        head, _, body = caller.store.get(key).partition(b"\n")
    except ObjectNotFound:
        made = RowHashes()
        with fetched(caller, found.row) as parts:
            validate(parts, columns=data.columns, documents=data.documents, hashes=made)
        head = json.dumps([len(made.hashes), made.starts]).encode()
        caller.store.put(key, b"\n".join((head, made.hashes.tobytes() + made.lines.tobytes())))
        return made
    rows, starts = json.loads(head)
    values = array("Q", body)
    return RowHashes(values[:rows], values[rows:], [(name, start) for name, start in starts])


def _unknown(row: FileRow, report: dict[str, Any], wanted: DataSet) -> InvalidRequest:
    columns = list(report.get("columns") or {})
    shown = ", ".join(columns[:20]) + (", …" if len(columns) > 20 else "")
    return InvalidRequest(
        f"{wanted.param}: {row.id} ({row.filename}) has rows with the columns {shown or 'none'}, which are "
        f"of no known format. {wanted.columns_param} says which of them mean what: {report.get('mapping')}",
        code="unknown_format",
        param=wanted.param,
        details={"columns": columns[:100]},
    )
