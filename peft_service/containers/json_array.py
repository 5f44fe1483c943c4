"""A JSON array of objects, read element by element: never whole in memory, however it is indented.

A broken element is reported with its place, and reading goes on at the next object that begins with a key
that elements of this file begin with. What is nested inside an element rarely does, so little is taken for a
row that is none.
"""

import codecs
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from peft_service.containers.jsonl import bom
from peft_service.containers.record import (
    MAX_RECORD_BYTES,
    Record,
    Unreadable,
    broken,
    compact,
    too_long,
)
from peft_service.formats import BadJSON, Problem, json_type, parse_json

MAX_FIRST_KEYS = 16
"""Different first keys of elements that are remembered, of at most 256 characters."""
KEPT = 4096
"""Characters kept while looking for the next element: more than its first key can take."""
NEAR_THE_END = 12
"""Characters: an error so near to the end of what was read may be gone once more is read (`tru`, `\\u00`)."""

# Only where an element ends is asked, so numbers need not be made: one may have a million digits.
_ENDS = json.JSONDecoder(parse_int=len, parse_float=len)
_BLANKS = re.compile(r"[ \t\r\n]*")
_FIRST_KEY = re.compile(r'\{[ \t\r\n]*"([^"\\]{0,256})"')


class _End(NamedTuple):
    """How reading an element ended."""

    at: int
    """Where it ended, or where its error is."""
    error: str = ""
    code: str = "not_json"


class _Window:
    """The part of the file that is held, as text; counts the bytes and lines before it."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        # Bytes that are not UTF-8 become lone surrogates, which UTF-8 itself cannot give.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text = ""
        self.at = 0
        self.ended = False
        self.failed: Unreadable | None = None
        self._counted = self._bytes = self._lines = 0

    def more(self, least: int = 1) -> bool:
        """Read at least that many characters, if the file has them; False at its end."""
        pieces, size = [self.text[self.at :]], 0
        self._count()
        self.at = self._counted = 0
        while size < least and not self.ended:
            try:
                chunk = next(self._chunks, b"")
            except Unreadable as error:
                self.failed, chunk = error, b""
            self.ended = not chunk
            pieces.append(self._decoder.decode(chunk, final=self.ended))
            size += len(pieces[-1])
        self.text = "".join(pieces)
        return size > 0

    def peek(self) -> str:
        """The next character that is no blank; empty at the end."""
        while True:
            blanks = _BLANKS.match(self.text, self.at)
            assert blanks is not None  # nothing at all matches, too
            self.at = blanks.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def place(self) -> tuple[int, int]:
        """The byte offset and the line, from 1, of the character at `at`."""
        self._count()
        return self._bytes, self._lines + 1

    def _count(self) -> None:
        if self.at > self._counted:
            passed = self.text[self._counted : self.at]
            self._bytes += len(passed.encode(errors="surrogateescape"))
            self._lines += passed.count("\n")
            self._counted = self.at


def read(chunks: Iterable[bytes], warn: Callable[[Problem], None]) -> Iterator[Record]:
    """The records of a JSON array; a record's number is the index of its element, from 1.

    Memory: a chunk and an element (16 MiB), a few times over.
    """
    window, number = _Window(chunks), 0
    keys: set[str] = set()
    while len(window.text) < 3 and window.more():
        pass
    if window.text.startswith("\ufeff"):
        warn(bom())
        window.at = 1
    if (found := window.peek()) != "[":
        if window.failed:
            raise window.failed
        message = f"Not JSON: an array begins with [, found {found!r}."
        yield _problem(1, 0, 1, "not_json", message, window.text, window.at)
        return
    window.at += 1
    separated = True
    while True:
        found = window.peek()
        offset, line = window.place()
        if found == "":
            if window.failed:
                raise window.failed
            yield _problem(
                number + 1, offset, line, "truncated", "The array has no end: ] is missing.", "", 0
            )
            return
        if found == "]":
            if separated and number:
                message = "Not JSON: the array ends with a comma."
                yield _problem(number + 1, offset, line, "not_json", message, window.text, window.at)
            window.at += 1
            break
        number += 1
        if not separated:
            message = f"Not JSON: a comma is missing before this element, found {found!r}."
            yield _problem(number, offset, line, "not_json", message, window.text, window.at)
            number -= found not in '{["'
            if found not in '{["':
                window.at += 1
                if not _to_next(window, keys):
                    break
                separated = True
                continue
        if found == ",":
            message = "Not JSON: there is no element before this comma."
            yield _problem(number, offset, line, "not_json", message, window.text, window.at)
            window.at += 1
            continue
        end = _end_of_element(window)
        start = window.at
        if not end.error:
            text = window.text[start : end.at]
            window.at = end.at
            record = _record(number, offset, line, text)
            if record.row and len(keys) < MAX_FIRST_KEYS:
                key = next(iter(record.row))
                keys |= {key} if len(key) <= 256 else set()
            yield record
            if window.peek() == ",":
                window.at += 1
                separated = True
            else:
                separated = False
        else:
            if not keys and (first := _FIRST_KEY.match(window.text, start)):
                keys.add(first.group(1))
            if end.code == "record_too_long":
                problem = too_long("element", len(window.text) - start)
                yield broken(number, offset, problem, window.text[start : start + 400])
            elif end.code == "truncated" and window.failed:
                raise window.failed
            else:
                skipped = window.text.count("\n", start, end.at)
                column = end.at - window.text.rfind("\n", 0, end.at)
                message = f"{end.error}, at character {column} of line {line + skipped} of the file."
                before = window.text[start : end.at].encode(errors="surrogateescape")
                yield _problem(number, offset + len(before), line, end.code, message, window.text, end.at)
            window.at = max(end.at, start + 1)
            if not _to_next(window, keys):
                break
            separated = True
    if (found := window.peek()) != "":
        offset, line = window.place()
        message = f"Something follows the end of the array, at line {line} of the file: {found!r}."
        text, position = window.text, window.at
        yield _problem(number + 1, offset, line, "trailing_data", message, text, position)
        while window.more(1):
            window.at = len(window.text)
    if window.failed:
        raise window.failed


def _record(number: int, offset: int, line: int, text: str) -> Record:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00
        at = len(text[: error.start].encode())
        message = f"Not UTF-8: byte 0x{byte:02x} at byte {at + 1} of the element (line {line} of the file)."
        problem = Problem("", "not_utf8", message, "save the file as UTF-8")
        return broken(number, offset + at, problem, text, error.start)
    try:
        row, problems = parse_json(text)
    except BadJSON as error:
        at = offset + len(text[: error.position].encode())
        problem = Problem("", error.code, error.message, error.hint)
        return broken(number, at, problem, text, error.position)
    if len(text) > MAX_RECORD_BYTES // 4 and len(text.encode()) > MAX_RECORD_BYTES:
        return broken(number, offset, too_long("element", len(text.encode())), text[:400])
    if not isinstance(row, dict):
        message = f"Expected an array of JSON objects, got {json_type(row)} in it."
        return broken(number, offset, Problem("", "not_an_object", message), text[:400])
    if problems:
        found = broken(number, offset, problems[0], text[:400])
        rest = tuple(found.placed(problem) for problem in problems)
        return found._replace(problems=rest)
    return Record(number, offset, row, (), compact(row))


def _end_of_element(window: _Window) -> _End:
    """Where the element at `window.at` ends; reads on until it does, or is too long."""
    while True:
        text, start = window.text, window.at
        try:
            _, end = _ENDS.raw_decode(text, start)
        except RecursionError:
            # Every level took a character at least: looking from one character on would read all again.
            return _End(start + sys.getrecursionlimit() // 2, "Nested too deeply", "too_deep")
        except json.JSONDecodeError as error:
            unfinished = error.msg.startswith("Unterminated") or error.pos >= len(text) - NEAR_THE_END
            if not unfinished:
                return _End(error.pos, f"Not JSON: {error.msg}")
            if window.ended:
                if error.msg.startswith("Unterminated") or error.pos >= len(text.rstrip()):
                    return _End(len(text), "The file ends inside an element", "truncated")
                return _End(error.pos, f"Not JSON: {error.msg}")
        else:
            # A number may go on in the next chunk.
            if end < len(text) or window.ended:
                return _End(end)
        held = len(text) - start
        if held > MAX_RECORD_BYTES:
            return _End(len(text), "Too long", "record_too_long")
        window.more(held)


def _to_next(window: _Window, keys: set[str]) -> bool:
    """Go on to the next object that looks like an element; False: there is none, the file has been read."""
    names = "|".join(re.escape(json.dumps(key, ensure_ascii=False)) for key in sorted(keys))
    pattern = re.compile(r"\{[ \t\r\n]*" + (f"(?:{names})" if names else '"'))
    while True:
        if found := pattern.search(window.text, window.at):
            window.at = found.start()
            return True
        if window.ended:
            window.at = len(window.text)
            return False
        window.at = max(window.at, len(window.text) - KEPT)
        window.more()


def _problem(
    number: int, offset: int, line: int, code: str, message: str, text: str, position: int
) -> Record:
    hint = _HINTS.get(code, "")
    start = max(0, position - 200)
    return broken(
        number, offset, Problem("", code, message, hint), text[start : position + 200], position - start
    )


_HINTS: dict[str, Any] = {
    "truncated": "was the file cut while it was written or sent?",
    "trailing_data": "one array is one file: remove what follows, or write JSON Lines",
}
