"""CSV and TSV: a header, then records whose values are strings, as spreadsheets write them (RFC 4180).

Quotes may hold delimiters, doubled quotes and line ends. The delimiter is one of , tab ; | and found from the
first lines. A record's number is the line where it begins.
"""

import csv
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from peft_service.containers.jsonl import Line, bom, line_too_long, lines_of
from peft_service.containers.record import (
    BYTE_ORDER_MARK,
    MAX_RECORD_BYTES,
    Record,
    broken,
    compact,
    too_long,
)
from peft_service.formats import Problem, shown

DELIMITERS = ",\t;|"
MAX_COLUMNS = 10_000
MAX_LINES_REREAD = 100
"""Lines behind a quote that is never closed which are read again as lines of their own."""
MAX_BYTES_REREAD = 64 * 1024
SNIFFED_RECORDS = 50

# Python's own limit of 128 KiB a field holds for the whole process; records are limited here.
csv.field_size_limit(MAX_RECORD_BYTES + 2)


class _TooLong(Exception):
    def __init__(self, line: Line | None = None) -> None:
        self.line = line


class _Taken:
    """The lines of one record. Of a record of many only the first are held: 16 MiB may be as many lines."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.count = self.size = self.last = 0
        self.problem: Problem | None = None

    def add(self, line: Line, raw: bytes) -> None:
        self.count, self.size, self.last = self.count + 1, self.size + len(raw) + 1, line.number
        if self.count <= MAX_LINES_REREAD:
            self.lines.append(line)
        if self.problem is None and not (raw.isascii() and b"\0" not in raw):
            self.problem = _of_bytes(raw, line.number)

    def text(self) -> str:
        return b"\n".join(line.raw or b"" for line in self.lines[:5])[:400].decode(errors="replace")


class _Lines:
    """Lines as csv's reader takes them; remembers those of the record that is being read."""

    def __init__(self, lines: Iterable[Line]) -> None:
        self._lines = iter(lines)
        self._again: deque[Line] = deque()
        self._taken = _Taken()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines)
        raw = line.raw
        if raw is None:
            raise _TooLong(line)
        self._taken.add(line, raw)
        if self._taken.size > MAX_RECORD_BYTES + 1:
            raise _TooLong
        # Bytes that are not UTF-8 become lone surrogates, which UTF-8 itself cannot give.
        return raw.decode(errors="surrogateescape") + "\n"

    def record(self) -> _Taken:
        """The lines of the record that has been read, or could not be."""
        taken, self._taken = self._taken, _Taken()
        return taken

    def reread(self, lines: list[Line]) -> None:
        self._again.extendleft(reversed(lines))


def read(chunks: Iterable[bytes], delimiter: str, warn: Callable[[Problem], None]) -> Iterator[Record]:
    """The records of a table. One whose header is wrong has no good rows: only its problems are yielded."""
    lines = _Lines(_without_mark(lines_of(chunks), warn))
    header: list[str] | None = None
    usable = True
    first_blank, blanks = 0, 0
    for taken, fields, problem in _records(lines, delimiter):
        number, offset = taken.lines[0].number, taken.lines[0].byte_offset
        if problem is not None:
            yield broken(number, offset, problem, taken.text())
            continue
        if not fields:
            first_blank, blanks = first_blank or number, blanks + 1
            continue
        problems = [taken.problem] if taken.problem else []
        if header is None:
            header = [name.strip() for name in fields]
            problems += _of_header(header, delimiter)
            usable = not problems
            if _looks_like_data(header):
                message = f"The first line is read as the header, but looks like data: {shown(header[0])}."
                warn(
                    Problem(
                        "", "no_header", message, "put a line with the names of the columns before it", number
                    )
                )
        elif not problems and len(fields) != len(header):
            message = (
                f"The row has {len(fields)} value{'s' if len(fields) != 1 else ''}, "
                f"the header has {len(header)} (delimiter {_name(delimiter)})."
            )
            hint = 'put values that hold the delimiter, quotes or line ends into "quotes"'
            problems.append(Problem("", "uneven_columns", message, hint))
        elif not problems and usable:
            row = dict(zip(header, fields, strict=True))
            yield Record(number, offset, row, (), compact(row))
            continue
        if problems:
            record = broken(number, offset, problems[0], taken.text())
            placed = tuple(record.placed(problem) for problem in problems)
            yield record._replace(problems=placed)
    if blanks:
        message = f"{blanks} blank line{' was' if blanks == 1 else 's were'} skipped."
        warn(Problem("", "blank_line", message, "", first_blank))


def _without_mark(lines: Iterable[Line], warn: Callable[[Problem], None]) -> Iterator[Line]:
    for line in lines:
        if line.number == 1 and line.raw is not None and line.raw.startswith(BYTE_ORDER_MARK):
            warn(bom())
            line = line._replace(raw=line.raw[len(BYTE_ORDER_MARK) :])
        yield line


def _records(lines: _Lines, delimiter: str) -> Iterator[tuple[_Taken, list[str], Problem | None]]:
    """(lines, fields, None) of a record, or (lines, [], problem)."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except _TooLong as error:
            taken = lines.record()
            if error.line is None and taken.count == 1:
                yield taken, [], too_long("record", taken.size)
            elif error.line is None:
                yield taken, [], _unclosed(taken, "the record is too long", lost=True)
            else:
                if taken.count:
                    yield taken, [], _unclosed(taken, "a line that is too long follows", lost=True)
                taken = _Taken()
                taken.add(error.line, b"")
                yield taken, [], line_too_long(error.line, "are the line ends LF or CR LF?")
        except csv.Error as error:
            taken = lines.record()
            # Re-reading is what keeps a stray quote from taking the rows behind it along; that it is limited
            # is what keeps a file of stray quotes from being read a million times.
            lost = taken.count > MAX_LINES_REREAD or taken.size > MAX_BYTES_REREAD
            if taken.count == 1:
                message = f"Broken quotes: {_reason(str(error))}."
                hint = 'a quote inside quotes is written twice: "say ""yes"""'
                yield taken, [], Problem("", "broken_quotes", message, hint)
            else:
                if not lost:
                    lines.reread(taken.lines[1:])
                why = "the file ends" if "end of data" in str(error) else "text follows a quote"
                yield taken, [], _unclosed(taken, why, lost)
        else:
            yield lines.record(), fields[:MAX_COLUMNS], None
            continue
        reader = csv.reader(lines, delimiter=delimiter, strict=True)


def _unclosed(taken: _Taken, why: str, lost: bool) -> Problem:
    first, last = taken.lines[0].number, taken.last
    rest = f"; lines {first} to {last} are not read" if lost else ""
    message = f"A quote that is opened here is not closed as it should be by line {last}: {why}{rest}."
    return Problem("", "broken_quotes", message, 'close it, or write it twice inside "quotes"')


def _reason(said: str) -> str:
    if "new-line" in said:
        return "a carriage return stands alone; save the file with LF or CR LF as line ends"
    if "expected after" in said:
        return "text follows a closing quote"
    return "a quote is opened and never closed" if "end of data" in said else said


def _of_bytes(raw: bytes, number: int) -> Problem | None:
    if b"\0" in raw:
        return Problem("", "nul_character", "The row holds the character U+0000.", "remove it")
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        byte = f"0x{raw[error.start]:02x} at byte {error.start + 1} of line {number}"
        return Problem(
            "", "not_utf8", f"Not UTF-8: byte {byte}.", "save the file as UTF-8 (in Excel: CSV UTF-8)"
        )
    return None


def _of_header(header: list[str], delimiter: str) -> Iterator[Problem]:
    seen: set[str] = set()
    for place, name in enumerate(header, 1):
        if not name:
            message = f"Column {place} of the header has no name."
            yield Problem("", "empty_column_name", message, "every column needs a name; remove what has none")
        elif name in seen:
            message = f"The header has the column {shown(name)} twice."
            yield Problem("", "duplicate_column", message, "rename one of them")
        seen.add(name)
        if place > 100:
            break
    if len(header) >= MAX_COLUMNS:
        message = f"The header has {MAX_COLUMNS:,} columns or more."
        yield Problem("", "too_many_columns", message, f"is {_name(delimiter)} the delimiter?")


def _looks_like_data(header: list[str]) -> bool:
    return any(len(name) > 100 or re.fullmatch(r"[-+]?[0-9]+([.,][0-9]+)?", name) for name in header)


def _name(delimiter: str) -> str:
    return {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}[delimiter]


def sniff(head: str, whole: bool, preferred: str = ",") -> tuple[str, bool]:
    """The delimiter of a table whose first characters are `head`, and whether it certainly is a table.

    Certain: names as a header has them (commas of prose have blanks behind them), and as many values in every
    row, of which there is at least one.
    `whole`: there is no more than the head. `preferred` breaks ties.
    """
    best, delimiter, certain = (0.0, 0, False), preferred, False
    for candidate in sorted(DELIMITERS, key=lambda one: one != preferred):
        rows: list[list[str]] = []
        try:
            for row in csv.reader(head.splitlines(keepends=True), delimiter=candidate, strict=True):
                rows.append(row)
                if len(rows) > SNIFFED_RECORDS:
                    break
        except csv.Error:
            pass
        else:
            rows = rows[: None if whole or len(rows) > SNIFFED_RECORDS else -1] or rows
        rows = [row for row in rows if row]
        if not rows or len(rows[0]) < 2:
            continue
        even = sum(len(row) == len(rows[0]) for row in rows) / len(rows)
        score = (even, len(rows[0]), candidate == preferred)
        if score > best:
            best, delimiter = score, candidate
            names = rows[0]
            certain = (
                even == 1
                and len(rows) > 1
                and len(set(names)) == len(names)
                and all(re.fullmatch(r"[^\W\d][\w .()/-]{0,63}", name) for name in names)
            )
    return delimiter, certain
