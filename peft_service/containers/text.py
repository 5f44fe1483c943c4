"""Plain text: `{"text": …}` for every line, paragraph or file, as continued pre-training reads it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Literal

from peft_service.containers.jsonl import Line, bom, line_too_long, lines_of, not_utf8
from peft_service.containers.record import BYTE_ORDER_MARK, MAX_RECORD_BYTES, Record, broken, too_long
from peft_service.formats import Problem

Documents = Literal["line", "paragraph", "file"]
"""What one document is: a line, lines up to a blank one, or all there is (at most 16 MiB)."""


def read(
    chunks: Iterable[bytes], warn: Callable[[Problem], None], documents: Documents = "line"
) -> Iterator[Record]:
    """The documents of a text file; a record's number is that of its first line.

    Line ends (LF or CR LF) between the lines of a document become LF; those at its ends are left out. Blank
    lines between documents are in none; where a line is a document, their number is a warning.
    """
    document = _Document()
    first_blank, blanks = 0, 0
    for line in lines_of(chunks):
        if line.number == 1 and line.raw is not None and line.raw.startswith(BYTE_ORDER_MARK):
            warn(bom())
            line = line._replace(raw=line.raw[len(BYTE_ORDER_MARK) :])
        blank = line.raw is not None and not line.raw.strip()
        if blank and (documents != "file" or not document.lines):
            first_blank, blanks = first_blank or line.number, blanks + 1
        else:
            document.add(line)
        if document.lines and (documents == "line" or (blank and documents == "paragraph")):
            yield document.record()
            document = _Document()
    if document.lines:
        yield document.record()
    if blanks and documents == "line":
        message = f"{blanks} blank line{' was' if blanks == 1 else 's were'} skipped."
        hint = 'are documents longer than a line? Then choose "paragraph" or "file"'
        warn(Problem("", "blank_line", message, hint, first_blank))


class _Document:
    """Lines of one document; of one that is too long, only the first."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.size = 0

    def add(self, line: Line) -> None:
        self.size += line.size + 1
        if not self.lines or self.size <= MAX_RECORD_BYTES:
            self.lines.append(line)
        else:
            del self.lines[1:]

    def record(self) -> Record:
        first = self.lines[0]
        for line in self.lines:
            problem = None
            if line.raw is None:
                problem = line_too_long(line, "cut it into several lines")
            else:
                try:
                    line.raw.decode()
                except UnicodeDecodeError as error:
                    problem = not_utf8(line, error)
            if problem:
                return Record(first.number, first.byte_offset, None, (problem,), (line.raw or b"")[:400])
        raw = b"\n".join((line.raw or b"").removesuffix(b"\r") for line in self.lines)
        if self.size > MAX_RECORD_BYTES + 1:
            problem = replace(too_long("document", self.size), hint="cut it into several documents")
            return broken(first.number, first.byte_offset, problem, raw[:400].decode(errors="replace"))
        if b"\0" in raw:
            problem = Problem("text", "nul_character", "The text holds the character U+0000.", "remove it")
            at = raw.decode().index("\0")
            return broken(first.number, first.byte_offset, problem, raw.decode(), at)
        raw = raw.rstrip(b"\r\n")
        return Record(first.number, first.byte_offset, {"text": raw.decode()}, (), raw)
