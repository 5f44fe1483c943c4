"""Parquet and Arrow (IPC file or stream), read by a child process: a file that kills its reader is a report.

How values become JSON: numbers, text, booleans and null as they are; lists to arrays, structs and maps (with
text keys) to objects; binary to the text that it is in UTF-8; decimals to numbers; dates, times and
timestamps to text as Arrow writes them (`2024-01-31 12:00:00.000`, with a Z where the type has a time zone),
durations to their integer, dictionary-encoded values to what they stand for. NaN and infinity are problems,
as is every value that would change on the way: bytes that are no text, decimals with more digits than a
number keeps.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from peft_service.containers.jsonl import lines_of
from peft_service.containers.record import CHUNK_BYTES, MAX_RECORD_BYTES, Record, Unreadable, broken
from peft_service.formats import BadJSON, Problem, clean, parse_json

CHILD = Path(__file__).with_name("columnar_child.py")
STALLED_SECONDS = 60.0
"""A child that has written nothing for so long, while it was waited for, is ended."""
_PASSED_ON = (
    "PATH",
    "PYTHONPATH",
    "PYTHONHOME",
    "LD_LIBRARY_PATH",
    "HOME",
    "TMPDIR",
    "LANG",
    "LC_ALL",
    "TZDIR",
)


def read(path: Path, kind: Literal["parquet", "arrow"], stalled: float = STALLED_SECONDS) -> Iterator[Record]:
    """The rows of a Parquet or Arrow file; a record's number is the row's, from 1.

    Raises:
        Unreadable: the file is broken, or its reader crashed, hung or took too much memory; `truncated`,
            `too_large`, `unsupported_type` and others where that is known. The rows before have been yielded.
    """
    # Credentials are not for a process that a file may take over; threads and arenas would cost memory.
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    environment |= {"ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    # -P: the folder of this file has modules whose names could hide others.
    command = [sys.executable, "-P", str(CHILD), kind, str(path)]
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    number, ended = 0, False
    try:
        for line in lines_of(_output(child, stalled), longest=MAX_RECORD_BYTES + 1):
            raw = line.raw or b""
            mark, raw = raw[:1], raw[1:]
            if mark == b"r":
                number += 1
                yield _record(number, raw)
            elif mark == b"p":
                number += 1
                yield broken(number, 0, _problem(raw))
            elif mark == b"q":
                error = Unreadable("", "")
                error.problem = _problem(raw)
                raise error
            else:
                ended = mark == b"e"
                break
        if not ended:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(10)
            raise _died(child.poll())
    finally:
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        if child.stdout:
            child.stdout.close()
        child.wait()


def _output(child: subprocess.Popen[bytes], stalled: float) -> Iterator[bytes]:
    assert child.stdout is not None
    descriptor = child.stdout.fileno()
    output = select.poll()
    output.register(descriptor, select.POLLIN)
    while True:
        if not output.poll(stalled * 1000):
            raise Unreadable(
                "unreadable_container",
                f"Reading the file gave nothing for {stalled:.0f} s, and was ended.",
                "write it again, with smaller row groups",
            )
        chunk = os.read(descriptor, CHUNK_BYTES)
        if not chunk:
            return
        yield chunk


def _record(number: int, raw: bytes) -> Record:
    try:
        text = raw.decode()
        row, problems = parse_json(text)
    except UnicodeDecodeError:
        return broken(number, 0, Problem("", "not_utf8", "A value is not UTF-8.", "write the column as text"))
    except BadJSON as error:
        return broken(number, 0, Problem("", error.code, error.message, error.hint))
    if not isinstance(row, dict):
        return broken(number, 0, Problem("", "unreadable_container", "The row could not be read."))
    if problems:
        found = broken(number, 0, problems[0], text[:400])
        return found._replace(problems=tuple(found.placed(problem) for problem in problems))
    return Record(number, 0, row, (), raw)


def _problem(raw: bytes) -> Problem:
    """What the child said, as far as it can be trusted to say something."""
    try:
        path, code, message, hint = (clean(str(part))[:500] for part in json.loads(raw))
    except ValueError:
        return Problem("", "unreadable_container", "The file could not be read.")
    return Problem(path, code, message, hint)


def _died(code: int | None) -> Unreadable:
    try:
        name = signal.Signals(-(code or 0)).name
    except ValueError:
        name = f"status {code}"
    return Unreadable(
        "unreadable_container",
        f"The process that read the file ended with {name}: the file is broken, or needs too much memory.",
        "write it again, with smaller row groups",
    )
