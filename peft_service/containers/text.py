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
    document: _Document | None = None
    first_blank, blanks = 0, 0
    for line in lines_of(chunks):
        if line.number == 1 and line.raw is not None and line.raw.startswith(BYTE_ORDER_MARK):
            warn(bom())
            line = line._replace(raw=line.raw[len(BYTE_ORDER_MARK) :])
        blank = line.raw is not None and not line.raw.strip()
        if blank and (documents != "file" or document is None):
            first_blank, blanks = first_blank or line.number, blanks + 1
        else:
            document = document or _Document(line)
            document.add(line)
        if document is not None and (documents == "line" or (blank and documents == "paragraph")):
            yield document.record()
            document = None
    if document is not None:
        yield document.record()
    if blanks and documents == "line":
        message = f"{blanks} blank line{' was' if blanks == 1 else 's were'} skipped."
        hint = 'are documents longer than a line? Then choose "paragraph" or "file"'
        warn(Problem("", "blank_line", message, hint, first_blank))


class _Document:
    """One document, whose lines are added as they come; of one too long, only the beginning is kept."""

    def __init__(self, first: Line) -> None:
        self.first = first
        self.size = 0
        self._text = bytearray()
        self._problem: Problem | None = None

    def add(self, line: Line) -> None:
        self.size += line.size + 1
        if line.raw is None:
            self._problem = self._problem or line_too_long(line, "cut it into several lines")
        elif self.size <= MAX_RECORD_BYTES + 1:
            if self._problem is None and not line.raw.isascii():
                try:
                    line.raw.decode()
                except UnicodeDecodeError as error:
                    self._problem = not_utf8(line, error)
            self._text += line.raw.removesuffix(b"\r") + b"\n"

    def record(self) -> Record:
        number, offset = self.first.number, self.first.byte_offset
        raw = bytes(self._text).rstrip(b"\r\n")
        if self._problem is not None:
            return Record(number, offset, None, (self._problem,), raw[:400])
        if self.size > MAX_RECORD_BYTES + 1:
            problem = replace(too_long("document", self.size), hint="cut it into several documents")
            return broken(number, offset, problem, raw[:400].decode(errors="replace"))
        if b"\0" in raw:
            problem = Problem("text", "nul_character", "The text holds the character U+0000.", "remove it")
            text = raw.decode()
            return broken(number, offset, problem, text, text.index("\0"))
        return Record(number, offset, {"text": raw.decode()}, (), raw)
