"""What a data file is made of: bytes in, records out. One file a container; nothing else reads data files.

Files come from anyone, so this reads as a defence: bombs, truncated and foreign files all end in a record
that says what is wrong and where, in constant memory. What a record means is the business of `formats`.
"""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from peft_service.containers import columnar, json_array, jsonl, table, text
from peft_service.containers.compression import chunks_of
from peft_service.containers.record import Record, Unreadable, broken
from peft_service.containers.sniff import Container, container_of
from peft_service.containers.text import Documents
from peft_service.formats import Problem

__all__ = ["Container", "Documents", "Record", "container_of", "is_data", "parts_of", "records", "records_of"]

SUFFIXES = ("jsonl", "ndjson", "json", "csv", "tsv", "txt", "parquet", "arrow")
"""Of data files in folders, with .gz or .zst behind them or not."""
NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "package.json")
"""JSON files beside data that say something about it, as `datasets` writes them."""
MAX_UNPACKED_BYTES = 16 * 1024**3
"""Of Parquet or Arrow inside gzip or Zstandard, which has to be unpacked to a temporary file."""


def ignore(problem: Problem) -> None:
    """No warnings."""


def records(
    path: Path,
    name: str = "",
    warn: Callable[[Problem], None] = ignore,
    *,
    documents: Documents = "line",
) -> Iterator[Record]:
    """Every record of a data file, in order, whatever container it is; see `Record`.

    The container is found from the first bytes; `name`, what its owner calls the file, decides between csv,
    tsv, text and broken JSON. `documents`: what one record of plain text is. What does no harm goes to
    `warn`: a byte order mark at the start (`bom`), blank lines at the end of JSON Lines or anywhere in text
    and tables (`blank_line`), a header that looks like data (`no_header`).

    Never raises for what a file holds: what cannot be read is a record without a row. Memory: a chunk and a
    record (16 MiB), a few times over.
    """
    container = container_of(path, name)
    number = 0
    try:
        for record in _read(path, container, warn, documents):
            number = record.number
            if container.compression and record.byte_offset:
                # An offset in what was never a file helps nobody.
                problems = tuple(replace(problem, byte_offset=0) for problem in record.problems)
                record = record._replace(byte_offset=0, problems=problems)
            yield record
    except Unreadable as error:
        yield broken(number + 1, 0, error.problem)


def _read(
    path: Path, container: Container, warn: Callable[[Problem], None], documents: Documents
) -> Iterator[Record]:
    if container.kind == "unknown":
        message = f"The file is no data file that can be read; it looks like {container.looks_like}."
        raise Unreadable("unknown_container", message, container.hint)
    if container.kind == "parquet" or container.kind == "arrow":
        if not container.compression:
            return columnar.read(path, container.kind)
        return _unpacked(path, container)
    chunks = chunks_of(path, container.compression)
    if container.kind == "json_array":
        return json_array.read(chunks, warn)
    if container.kind == "text":
        return text.read(chunks, warn, documents)
    if container.kind == "jsonl":
        return jsonl.read(chunks, warn, container.hint)
    return table.read(chunks, container.delimiter, warn)


def _unpacked(path: Path, container: Container) -> Iterator[Record]:
    """Columnar files are read from their end, so inside a compression they need a file of their own."""
    with tempfile.NamedTemporaryFile(prefix="unpacked-") as file:
        size = 0
        for chunk in chunks_of(path, container.compression):
            size += len(chunk)
            if size > MAX_UNPACKED_BYTES:
                message = f"Unpacked, the file has more than {MAX_UNPACKED_BYTES // 1024**3} GiB."
                raise Unreadable("too_large", message, "upload it without compression around it")
            file.write(chunk)
        file.flush()
        assert container.kind in ("parquet", "arrow")
        yield from columnar.read(Path(file.name), container.kind)


def records_of(
    parts: Sequence[tuple[str, Path]],
    warn: Callable[[int, Problem], None] = lambda part, problem: None,
    *,
    documents: Documents = "line",
) -> Iterator[tuple[int, Record]]:
    """The records of a data set of several files, (name, path) each, in the order of their names.

    Yields the index of the part in `parts` with each record; numbers count in each part anew.
    """
    for index, (name, path) in sorted(enumerate(parts), key=lambda part: part[1][0]):

        def warn_of_part(problem: Problem, index: int = index) -> None:
            warn(index, problem)

        for record in records(path, name, warn_of_part, documents=documents):
            yield index, record


def is_data(name: str) -> bool:
    """Whether a file of this name, in a folder that is a data set, is meant to be read as data."""
    last = name.rpartition("/")[2].lower()
    for packed in (".gz", ".zst"):
        last = last.removesuffix(packed)
    hidden = any(piece.startswith((".", "_")) for piece in name.split("/"))
    return not hidden and last not in NOT_DATA and last.rpartition(".")[2] in SUFFIXES and "." in last


def parts_of(folder: Path) -> list[tuple[str, Path]]:
    """The data files below a folder, as (name below it, path), in name order; links are not followed."""
    found: Iterable[tuple[str, list[str], list[str]]] = os.walk(folder)
    parts = [
        (path.relative_to(folder).as_posix(), path)
        for directory, _, names in found
        for path in (Path(directory) / name for name in names)
        if path.is_file() and not path.is_symlink()
    ]
    return sorted(part for part in parts if is_data(part[0]))
