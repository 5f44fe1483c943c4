"""JSON Lines: one object a line, cut from chunks without ever holding more than the longest line allowed."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from peft_service.formats import BadJSON, Problem, clean, json_type, parse_json

MAX_LINE_BYTES = 16 * 1024**2
CHUNK_BYTES = 1024**2
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


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
        size = f"{line.size / 1024**2:.0f} MiB"
        message = f"The line is {size} long; {MAX_LINE_BYTES // 1024**2} MiB is the most."
        hint = "one JSON object a line, each ended by a line feed"
        return None, [placed(line, Problem("", "line_too_long", message, hint))]
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
        message = f"Not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line."
        found = placed(line, Problem("", "not_utf8", message, "save the file as UTF-8"))
        return None, [replace(found, byte_offset=line.byte_offset + error.start)]
    try:
        row, problems = parse_json(text)
    except BadJSON as error:
        found = placed(line, Problem("", error.code, error.message, error.hint), error.position, text)
        return None, [replace(found, byte_offset=line.byte_offset + len(text[: error.position].encode()))]
    if not isinstance(row, dict):
        message = f"Expected a JSON object on every line, got {json_type(row)}."
        return None, [placed(line, Problem("", "not_an_object", message))]
    return (None if problems else row), [placed(line, problem) for problem in problems]


def placed(line: Line, problem: Problem, position: int = 0, text: str = "") -> Problem:
    """The problem with its place; the excerpt is some 80 characters around the one at `position`."""
    if not text:
        text = (line.raw or b"")[:400].decode(errors="replace")
    start = max(0, position - 40)
    excerpt = clean(text[start : start + 80])
    excerpt = ("…" if start else "") + excerpt + ("…" if len(text) > start + 80 else "")
    return replace(problem, line=line.number, byte_offset=line.byte_offset, excerpt=excerpt)
