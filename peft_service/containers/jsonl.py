"""JSON Lines: one object a line, cut from chunks without ever holding more than the longest line allowed."""

from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from peft_service.containers.record import (
    BYTE_ORDER_MARK,
    CHUNK_BYTES,
    MAX_RECORD_BYTES,
    Record,
    excerpt,
)
from peft_service.formats import BadJSON, Problem, json_type, parse_json

MAX_LINE_BYTES = MAX_RECORD_BYTES
MAX_BLANKS_HELD = 100_000
"""Blank lines in a row of which it is left open whether they are the file's end."""

__all__ = ["BYTE_ORDER_MARK", "CHUNK_BYTES", "MAX_LINE_BYTES", "Line", "lines_of", "parse_line", "placed"]


class Line(NamedTuple):
    number: int
    """Counts from 1."""
    byte_offset: int
    raw: bytes | None
    """Without its line feed. None: longer than MAX_LINE_BYTES, and never held in memory."""
    size: int


def lines_of(chunks: Iterable[bytes], longest: int = MAX_LINE_BYTES) -> Iterator[Line]:
    """Cut chunks into lines. Holds one chunk and at most `longest` bytes, however long a line is."""
    number, offset, held, size = 1, 0, list[bytes](), 0
    for chunk in chunks:
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            size += end - start
            raw = b"".join([*held, chunk[start:end]]) if size <= longest else None
            yield Line(number, offset, raw, size)
            number, offset, held, size = number + 1, offset + size + 1, [], 0
            start = end + 1
        size += len(chunk) - start
        held = [*held, chunk[start:]] if size <= longest else []
    if size:
        yield Line(number, offset, b"".join(held) if size <= longest else None, size)


def parse_line(line: Line) -> tuple[dict[str, Any] | None, list[Problem]]:
    """The object on a line, or None; with what is wrong with it as JSON, whatever the format."""
    if line.raw is None:
        return None, [line_too_long(line, "one JSON object a line, each ended by a line feed")]
    raw = line.raw
    if raw.startswith(BYTE_ORDER_MARK):
        if line.number > 1:
            message = "The line begins with a byte order mark."
            hint = "were files with byte order marks joined? Remove the bytes EF BB BF"
            return None, [placed(line, Problem("", "bom", message, hint))]
        raw = raw[3:]
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        return None, [not_utf8(line, error)]
    try:
        row, problems = parse_json(text)
    except BadJSON as error:
        found = placed(line, Problem("", error.code, error.message, error.hint), error.position, text)
        return None, [replace(found, byte_offset=line.byte_offset + len(text[: error.position].encode()))]
    if not isinstance(row, dict):
        message = f"Expected a JSON object on every line, got {json_type(row)}."
        return None, [placed(line, Problem("", "not_an_object", message))]
    return (None if problems else row), [placed(line, problem) for problem in problems]


def read(chunks: Iterable[bytes], warn: Callable[[Problem], None], foreign: str = "") -> Iterator[Record]:
    """The records of JSON Lines. `foreign`: the hint where a line is no JSON.

    A byte order mark at the start (Azure's guide asks for one) and blank lines at the end do no harm: they
    are warnings. Anywhere else both are problems.
    """
    blanks = array("Q")  # their offsets
    last = 0  # the line of the last of them
    for line in lines_of(chunks):
        raw = line.raw if line.raw is not None else b""
        if line.number == 1 and raw.startswith(BYTE_ORDER_MARK):
            warn(bom())
            raw = raw[3:]
        blank = line.raw is not None and not raw.strip()
        if blank:
            # Whether it is a problem is known when something follows.
            blanks.append(line.byte_offset)
            last = line.number
        if blanks and (not blank or len(blanks) == MAX_BLANKS_HELD):
            for number, offset in enumerate(blanks, last - len(blanks) + 1):
                found = replace(_BLANK, line=number, byte_offset=offset)
                yield Record(number, offset, None, (found,), b"")
            blanks = array("Q")
        if blank:
            continue
        row, problems = parse_line(line)
        if problems and foreign and problems[0].code in _FOREIGN_CODES:
            problems[0] = replace(problems[0], hint=foreign)
        yield Record(line.number, line.byte_offset, row, tuple(problems), raw)
    if blanks:
        count = len(blanks)
        message = f"The file ends with {count} blank line{'s' if count != 1 else ''}."
        warn(replace(_BLANK, message=message, line=last - count + 1, byte_offset=blanks[0]))


_BLANK = Problem("", "blank_line", "The line is blank.", "remove it: every line is one JSON object")
_FOREIGN_CODES = ("not_json", "not_utf8", "not_an_object", "line_too_long")


def bom() -> Problem:
    return Problem("", "bom", "The file begins with a byte order mark.", "", 1)


def line_too_long(line: Line, hint: str) -> Problem:
    size = f"{line.size / 1024**2:.0f} MiB"
    message = f"The line is {size} long; {MAX_LINE_BYTES // 1024**2} MiB is the most."
    return placed(line, Problem("", "line_too_long", message, hint))


def not_utf8(line: Line, error: UnicodeDecodeError) -> Problem:
    """The problem of a line that is not UTF-8, placed at its first bad byte."""
    message = f"Not UTF-8: byte 0x{error.object[error.start]:02x} at byte {error.start + 1} of the line."
    found = placed(line, Problem("", "not_utf8", message, "save the file as UTF-8"))
    return replace(found, byte_offset=line.byte_offset + error.start)


def placed(line: Line, problem: Problem, position: int = 0, text: str = "") -> Problem:
    """The problem with its place; the excerpt is some 80 characters around the one at `position`."""
    if not text:
        text = (line.raw or b"")[:400].decode(errors="replace")
    shown = excerpt(text, position)
    return replace(problem, line=line.number, byte_offset=line.byte_offset, excerpt=shown)
