"""Data sets from beside uploads: brought into the store once, checked like an upload, named by a file's id.

A job may name a URI where it names a file: `s3://bucket/prefix-or-glob`, `file:///dir-or-glob`,
`hf://datasets/org/name[:config]@revision[?split=train]`, `https://host/path`. What such a place holds may
change; so its files are copied, and the id is made of the project, the URI and what the place says of its
files (ETags, sizes, a revision): the same data is brought once, other data is another file.

What a place may be is the operator's to say (PEFT_SERVICE_DATA_ALLOW, PEFT_SERVICE_DATA_HOSTS): this service
reads it with its own rights, not with those of who asks. It never reads its own store this way, which holds
the data of other projects.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError

from jobs import files, https
from jobs.caller import Caller
from jobs.db import files as files_table
from jobs.db import in_order, reading, writing
from jobs.files import FileRow
from peft_service import sources
from peft_service.errors import (
    InvalidRequest,
    NotPermitted,
    ObjectNotFound,
    StoreDenied,
    TooLarge,
)
from peft_service.sources import WILD
from peft_service.spec import DataPart

SCHEMES = ("s3://", "file://", "hf://", "https://")
PREFIX = "import-"
"""Of the folders where files wait on this machine."""


def is_uri(text: str) -> bool:
    """Whether this names a place, and not the id of a file."""
    return "://" in text


def bring(
    caller: Caller, uri: str, *, expires_after: float | None = None, param: str = "training_file"
) -> FileRow:
    """The data set at `uri` as a file of the project; copied unless it is there already.

    Args:
        expires_after: seconds from now; of one that is there already, its own expiry stays.

    Raises:
        InvalidRequest: no such scheme, nothing there, a name that could leave a folder.
        InvalidTrainingFile: lines that cannot be trained on, of all files; nothing is kept.
        NotPermitted: the operator does not allow this place.
        TooLarge: more bytes than PEFT_SERVICE_MAX_SOURCE_BYTES.
        StoreUnavailable, https.SourceUnavailable: the place does not answer; worth a retry.
    """
    if not uri.startswith(SCHEMES):
        raise InvalidRequest(
            f"{param}: {uri[:200]!r} is no place that data can be brought from; those begin with "
            + ", ".join(SCHEMES),
            code="unknown_source",
            param=param,
        )
    with _errors(param):
        if uri.startswith("https://"):
            return _from_web(caller, uri, expires_after, param)
        return _from_source(caller, uri, expires_after, param)


# ------------------------------------------------------------------------------------------------- places


@dataclass(frozen=True)
class _Found:
    """What a place says that it holds."""

    uri: str
    items: tuple[tuple[str, int | None, str], ...]
    """(name, bytes, version) of every file, in their order."""

    def id(self, project: str, generation: int) -> str:
        told = json.dumps([project, self.uri, self.items, generation], separators=(",", ":"))
        return f"file-{hashlib.sha256(told.encode()).hexdigest()[:24]}"


def _from_web(caller: Caller, uri: str, expires_after: float | None, param: str) -> FileRow:
    most, hosts = caller.settings.max_source_bytes, caller.settings.data_hosts
    with https.opened(uri, hosts, most=most, param=param) as (head, chunks):
        name = head.name or "data"
        if head.version:
            there = _there(caller, _Found(uri, ((name, head.bytes, head.version),)))
            if isinstance(there, FileRow):
                return there
        with folder(caller) as directory:
            path, digest = directory / "0", hashlib.sha256()
            with path.open("wb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
            # A server that tells no version may still have sent what was brought before.
            version = head.version or digest.hexdigest()
            found = _Found(uri, ((name, head.bytes if head.version else None, version),))
            return _kept(caller, found, [path], expires_after)


def _from_source(caller: Caller, uri: str, expires_after: float | None, param: str) -> FileRow:
    _check_place(caller, uri, param)
    directories = [Path(entry) for entry in caller.settings.data_allow if entry.startswith("/")]
    items = sources.list_source(uri, directories)
    size, most = sum(item.size for item in items), caller.settings.max_source_bytes
    if size > most:
        raise TooLarge(
            f"{uri[:200]} has {size:,} bytes in {len(items)} files; {most:,} are the most "
            "(PEFT_SERVICE_MAX_SOURCE_BYTES)",
            param=param,
        )
    found = _Found(uri, tuple((item.name, item.size, item.version) for item in items))
    there = _there(caller, found)
    if isinstance(there, FileRow):
        return there
    with folder(caller) as directory:
        paths = []
        for number, item in enumerate(items):
            paths.append(directory / str(number))
            sources.download(item, paths[-1], directories)
        return _kept(caller, found, paths, expires_after)


def _check_place(caller: Caller, uri: str, param: str) -> None:
    """
    Raises:
        NotPermitted: not below what the operator lists, or the service's own store.
    """
    scheme, _, rest = uri.partition("://")
    listed = [entry for entry in caller.settings.data_allow if entry.startswith(f"{scheme}://")]
    if listed and not any(_below(uri, entry) for entry in listed):
        raise NotPermitted(
            f"{param}: data may not be brought from {uri[:200]!r}; allowed are {', '.join(listed)}",
            code="source_not_allowed",
            param=param,
        )
    mine = caller.store.url
    if mine.startswith("file://"):
        mine = Path(os.path.realpath(unquote(mine.removeprefix("file://")))).as_uri()
    wild = WILD.search(rest)
    folder, begin = rest, ""
    if wild:
        folder, _, begin = rest[: wild.start()].rpartition("/")
    if scheme == "file":
        folder = Path(os.path.realpath(unquote(folder) or "/")).as_uri().removeprefix("file://")
    theirs = f"{scheme}://{folder.rstrip('/')}"
    around = mine.startswith(f"{theirs}/{begin}") if wild else _below(mine, theirs)
    if around or _below(f"{theirs}/{begin}" if wild else theirs, mine):
        raise NotPermitted(
            f"{param}: {uri[:200]!r} is in the store of this service, where a file is named by its id",
            code="source_not_allowed",
            param=param,
        )


def _below(uri: str, prefix: str) -> bool:
    """Whether `uri` is `prefix` or lies under it."""
    return uri.startswith(prefix) and (
        prefix.endswith("/") or len(uri) == len(prefix) or uri[len(prefix)] in "/@:?"
    )


@contextmanager
def _errors(param: str) -> Iterator[None]:
    """What a place's own store says becomes the answer to a request that named it."""
    try:
        yield
    except (StoreDenied, ObjectNotFound) as error:
        raise InvalidRequest(f"{param}: {error.message}", code="source_not_readable", param=param) from error
    except InvalidRequest as error:
        if error.param == param:
            raise
        raise type(error)(error.message, code=error.code, param=param, details=error.details) from error


# --------------------------------------------------------------------------------------------- into the store


def _there(caller: Caller, found: _Found) -> FileRow | str:
    """The file that this was brought as, or the id that it is to have.

    A file that was deleted or has expired keeps its id for ever, since jobs may name it: the next one gets
    another.
    """
    generation = 0
    while True:
        id = found.id(caller.project, generation)
        with reading(caller.engine) as conn:
            row = conn.execute(select(files_table).where(files_table.c.id == id)).one_or_none()
        if row is None:
            return id
        there = FileRow(**row._mapping)
        if there.deleted_at is None and (there.expires_at is None or there.expires_at > time.time()):
            return there
        generation += 1


def _kept(caller: Caller, found: _Found, paths: Sequence[Path], expires_after: float | None) -> FileRow:
    """Check the files, store them, then their row.

    Two requests may bring the same data at once: they write the same bytes to the same keys, and the row of
    the first is the answer to both. So what was stored is never removed on the way.
    """
    names = [name for name, _, _ in found.items]
    report = files.check_training_file(list(zip(names, paths, strict=True)), _readable(found.uri))
    there = _there(caller, found)
    if isinstance(there, FileRow):
        return there
    files.sweep(caller.engine, caller.store, caller.project)
    prefix, parts = f"{caller.project}/files/{there}", list[DataPart]()
    for number, (name, path) in enumerate(zip(names, paths, strict=True)):
        key = f"{prefix}/{number}-{_plain(name)}"
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        caller.store.put_file(key, path)
        parts.append(DataPart(name=name, key=key, sha256=digest, bytes=path.stat().st_size))
    one = parts[0] if len(parts) == 1 else None
    sums = "".join(f"{part.sha256}\n" for part in parts)
    now = time.time()
    values = {
        "id": there,
        "project_id": caller.project,
        "filename": _readable(found.uri) if one is None else Path(names[0]).name[:255],
        "purpose": "fine-tune",
        "bytes": sum(part.bytes for part in parts),
        "sha256": one.sha256 if one else hashlib.sha256(sums.encode()).hexdigest(),
        "key": one.key if one else prefix,
        "created_at": now,
        "expires_at": None if expires_after is None else now + expires_after,
        "status": "processed",
        "format": report.format,
        "rows": report.rows,
        "report": {
            **files.report_of(report),
            "parts": [part.model_dump() for part in parts],
            "source": {
                "uri": found.uri,
                "files": [
                    {"name": name, "bytes": size, "version": version} for name, size, version in found.items
                ],
            },
        },
    }
    try:
        with writing(caller.engine) as conn:
            in_order(conn, caller.project)
            conn.execute(insert(files_table).values(**values))
    except IntegrityError:
        pass  # another request was faster
    return files.get(caller.engine, caller.project, there)


def _readable(uri: str) -> str:
    """A file name for what a URI names."""
    rest = unquote(uri.partition("://")[2].partition("?")[0].partition("@")[0]).rstrip("/")
    parts = [part for part in rest.split("/") if part and not re.search(r"[*?[]", part)]
    return _plain("-".join(parts[-2:])) or "data"


def _plain(name: str) -> str:
    """A name as one segment of a key."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name.strip("/"))[-120:].strip(".") or "data"


@contextmanager
def folder(caller: Caller) -> Iterator[Path]:
    """Where files wait on this machine. Not the system's /tmp, which may be memory."""
    caller.incoming.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(dir=caller.incoming, prefix=PREFIX))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
