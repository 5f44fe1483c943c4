"""What every container yields: a record with its place, its row or its problems, and its bytes."""

import json
from dataclasses import replace
from typing import Any, NamedTuple

from peft_service.formats import Problem, clean

MAX_RECORD_BYTES = 16 * 1024**2
"""Of a line, an element, a document, a row: longer ones are reported and never held in memory."""
CHUNK_BYTES = 1024**2
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
EXCERPT = 80
"""Characters."""


class Record(NamedTuple):
    """One record of a data file."""

    number: int
    """Counts from 1: the line where it begins, in files of lines; else its index."""
    byte_offset: int
    """Of its first byte, in files that are neither compressed nor columnar; else 0."""
    row: dict[str, Any] | None
    """None: it could not be read, `problems` say why."""
    problems: tuple[Problem, ...]
    raw: bytes
    """The line, or the row as compact JSON: what copies are found by, and excerpts are cut from."""

    def placed(self, problem: Problem) -> Problem:
        """A problem of this record's row, with its place in the file and an excerpt."""
        shown = excerpt(self.raw[:400].decode(errors="replace"))
        return replace(problem, line=self.number, byte_offset=self.byte_offset, excerpt=shown)


def broken(number: int, offset: int, problem: Problem, text: str = "", position: int = 0) -> Record:
    """The record that could not be read; the excerpt is cut from `text` around `position`."""
    found = replace(problem, line=number, byte_offset=offset, excerpt=excerpt(text, position))
    return Record(number, offset, None, (found,), text[:400].encode(errors="replace"))


def excerpt(text: str, position: int = 0) -> str:
    """Some 80 characters around the one at `position`, printable everywhere."""
    start = max(0, position - EXCERPT // 2)
    cut = clean(text[start : start + EXCERPT])
    return ("…" if start else "") + cut + ("…" if len(text) > start + EXCERPT else "")


def compact(row: dict[str, Any]) -> bytes:
    """The row as JSON without blanks, its keys in their order."""
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def too_long(what: str, size: int) -> Problem:
    """The problem of a record of `size` bytes, or more."""
    limit = MAX_RECORD_BYTES // 1024**2
    message = f"The {what} is {size / 1024**2:.0f} MiB long or longer; {limit} MiB is the most."
    return Problem("", "record_too_long", message, "cut it into several records")


class Unreadable(Exception):
    """The bytes end here: what could be read has been, and `problem` says why there is no more."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.problem = Problem("", code, message, hint)
