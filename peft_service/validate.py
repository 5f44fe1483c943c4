"""Validate a data file: every bad line with its place, reason and hint, at constant memory, without torch.

Files come from anyone, so this reads as a defence: a line of a gigabyte, a million broken lines, NULs,
nesting bombs and foreign file types all end in a report.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft_service.containers.jsonl import BYTE_ORDER_MARK, CHUNK_BYTES, lines_of, parse_line, placed
from peft_service.errors import InvalidTrainingFile
from peft_service.formats import (
    FORMATS,
    Format,
    Problem,
    clean,
    detect,
    did_you_mean,
)
from peft_service.variants import Frozen

MAX_PROBLEMS_COUNTED = 100_000
"""After so many, the rest of the file is only hashed: a file of line feeds must not keep a replica busy."""
MAX_LABELS = 10_000
"""Classes of a classification, and tasks of a multi-task file."""


class Report(Frozen):
    """What validation found. `problem_count == 0` is the only thing that makes a file usable."""

    format: str | None
    """`kind` of the Format of the first row that could be recognised."""
    rows: int
    """Good rows."""
    problems: tuple[Problem, ...]
    """The first of them, in file order."""
    problem_count: int
    bad_lines: int
    complete: bool
    """False: checking ended after 100,000 problems; the counts are a floor."""
    warnings: tuple[Problem, ...] = ()
    """Worth a look; the file is usable all the same."""
    bytes: int
    sha256: str
    statistics: dict[str, Any]
    """Of the good rows: `roles`, `characters` (p50, p95, max of a line), `duplicate_rows`; `labels` and
    `tasks`, sorted, where the rows have some."""

    @property
    def ok(self) -> bool:
        return self.problem_count == 0

    def error(self, param: str = "file") -> InvalidTrainingFile | None:
        """The error to raise for this file, or None if it is good."""
        if self.ok:
            return None
        more = "" if self.complete else "more than "
        return listed(self.problems, self.problem_count, param, more, self.bad_lines)


def listed(
    problems: Iterable[Problem], count: int, param: str, more: str = "", lines: int | None = None
) -> InvalidTrainingFile:
    """One error for many problems: a summary with the first, and all that are listed under `errors`."""
    shown = list(problems)
    what = f"{more}{count} problem{'s' if count != 1 else ''}"
    where = "" if lines is None else f" in {lines} line{'s' if lines != 1 else ''}"
    errors = [
        {
            "line": problem.line,
            "byte_offset": problem.byte_offset,
            "path": problem.path,
            "code": problem.code,
            "message": problem.message,
            "hint": problem.hint,
            "excerpt": problem.excerpt,
        }
        for problem in shown
    ]
    return InvalidTrainingFile(
        f"The file has {what}{where}. The first: {shown[0]}",
        param=param,
        details={"errors": errors, "error_count": count},
    )


def validate(path: Path, *, limit: int = 100) -> Report:
    """Read the file once and report on every line; `limit` problems are listed, all are counted.

    Memory: a chunk and a line (16 MiB), plus 12 bytes a row for the statistics.

    A byte order mark at the start (Azure's guide asks for one) and blank lines at the end do no harm: they
    are warnings. Anywhere else both are problems.
    """
    sha256, size = hashlib.sha256(), 0

    def chunks() -> Iterator[bytes]:
        nonlocal size
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                sha256.update(chunk)
                size += len(chunk)
                yield chunk

    problems: list[Problem] = []
    warnings: list[Problem] = []
    format: Format | None = None
    first_line, count, bad_lines, complete = 0, 0, 0, True
    blanks: list[Problem] = []
    blank_count = 0
    roles, hashes, characters = Counter[str](), array("q"), array("I")
    labels, tasks = set[str](), set[str]()
    reading = chunks()
    foreign = ""

    for line in lines_of(reading):
        if line.number == 1:
            foreign = _foreign_file(line.raw[:64]) if line.raw else ""
            if line.raw and line.raw.startswith(BYTE_ORDER_MARK):
                warnings.append(Problem("", "bom", "The file begins with a byte order mark.", "", 1))
        if line.raw is not None and not line.raw.strip():
            # Whether it is a problem is known when something follows.
            blank_count += 1
            if len(blanks) < limit:
                hint = "remove it: every line is one JSON object"
                blanks.append(placed(line, Problem("", "blank_line", "The line is blank.", hint)))
        else:
            if blank_count:
                problems += blanks[: limit - len(problems)]
                count, bad_lines = count + blank_count, bad_lines + blank_count
                blanks, blank_count = [], 0
            row, found = parse_line(line)
            if row is not None:
                claimed = format if format is not None and format.detect(row) else detect(row)
                if format is None and claimed is not None:
                    format, first_line = claimed, line.number
                found = [placed(line, problem) for problem in _check(row, format, claimed, first_line)]
                if not found and len(labels) > MAX_LABELS:
                    message = f"The file has more than {MAX_LABELS:,} labels."
                    found = [placed(line, Problem("label", "too_many_labels", message))]
                if not found:
                    assert format is not None
                    assert line.raw is not None
                    roles.update(format.roles(row))
                    labels.update(format.labels(row))
                    tasks.update([row["task"]] if "task" in row else [])
                    hashes.append(hash(line.raw.removeprefix(BYTE_ORDER_MARK).strip()))
                    characters.append(len(line.raw.decode()))
            if found:
                if foreign and found[0].code in ("not_json", "not_utf8", "not_an_object", "line_too_long"):
                    found[0] = replace(found[0], hint=foreign)
                count, bad_lines = count + len(found), bad_lines + 1
                problems += found[: max(0, limit - len(problems))]
        if count + blank_count >= MAX_PROBLEMS_COUNTED:
            complete = False
            break
    for _ in reading:
        pass

    if not complete and blank_count:
        problems += blanks[: limit - len(problems)]
        count, bad_lines = count + blank_count, bad_lines + blank_count
    elif blank_count and (hashes or count):
        message = f"The file ends with {blank_count} blank line{'s' if blank_count != 1 else ''}."
        warnings.append(replace(blanks[0], message=message))
    if not hashes and not count:
        what = "The file is empty." if size == 0 else "The file has no rows, only blank lines."
        problems, count, bad_lines = [Problem("", "no_rows", what, _samples(), 1)], 1, 1
    duplicates = _duplicates(hashes)
    if duplicates:
        message = f"{duplicates} row{' is an exact copy' if duplicates == 1 else 's are exact copies'}."
        warnings.append(Problem("", "duplicate_rows", message, "a copied row weighs more in training"))
    return Report(
        format=format.kind if format else None,
        rows=len(hashes),
        problems=tuple(problems),
        problem_count=count,
        bad_lines=bad_lines,
        complete=complete,
        warnings=tuple(warnings),
        bytes=size,
        sha256=sha256.hexdigest(),
        statistics={
            "roles": dict(sorted(roles.items())),
            "characters": _quantiles(characters),
            "duplicate_rows": duplicates,
            **({"labels": sorted(labels)} if labels else {}),
            **({"tasks": sorted(tasks)} if tasks else {}),
        },
    )


def _check(
    row: dict[str, Any], format: Format | None, claimed: Format | None, first_line: int
) -> list[Problem]:
    """Problems of a row in a file of `format`; `claimed` is what the row itself looks like."""
    if format is None:
        return [_unknown_format(row)]
    if claimed is not None and claimed.kind != format.kind:
        message = f"This row is {claimed.kind}, but the file is {format.kind} since line {first_line}."
        return [Problem("", "mixed_formats", message, "put each format into a file of its own")]
    return format.problems(row)


def _unknown_format(row: dict[str, Any]) -> Problem:
    keys = ", ".join(f'"{clean(key[:40])}"' for key in list(row)[:8]) or "none"
    message = f"The row is of no known format; its keys are {keys}{', …' if len(row) > 8 else ''}."
    for names, hint in _FOREIGN_KEYS:
        if all(name in row for name in names):
            return Problem("", "unknown_format", message, hint)
    known = [key for variant in FORMATS for key in variant.keys]
    for key in list(row)[:8]:
        if meant := did_you_mean(key, known):
            return Problem("", "unknown_format", message, f'"{clean(key[:40])}": {meant}')
    return Problem("", "unknown_format", message, _samples())


def _samples() -> str:
    return "a line looks like " + " or ".join(variant.sample for variant in FORMATS)


_RENAME = 'rename "{}" to "prompt" and "{}" to "completion"'
_FOREIGN_KEYS = (
    (("question", "answer"), _RENAME.format("question", "answer")),
    (("query", "response"), _RENAME.format("query", "response")),
    (("input", "output"), 'rename "input" to "prompt" and "output" to "completion", or add "instruction"'),
    (
        ("conversations",),
        'this is ShareGPT\'s shape: rename "conversations" to "messages", "from" to "role" (human: user, '
        'gpt: assistant) and "value" to "content"',
    ),
    (("chosen", "rejected"), "preference pairs are not supported; keep the chosen answer as the completion"),
    (("preferred_output",), "preference pairs are not supported; keep the preferred answer as messages"),
    (("text",), 'for plain text write {"prompt": "", "completion": the text}'),
)


def _foreign_file(head: bytes) -> str:
    """What a file that is no JSONL probably is, from its first bytes."""
    for magic, hint in (
        (b"\x1f\x8b", "the file is gzip: decompress it first"),
        (b"\x28\xb5\x2f\xfd", "the file is Zstandard: decompress it first"),
        (b"PK\x03\x04", "the file is a zip archive: extract the JSONL file and upload that"),
        (b"PAR1", "the file is Parquet: write it as JSONL first"),
        (b"ARROW1", "the file is Arrow: write it as JSONL first"),
        (b"\xff\xfe", "the file is UTF-16: save it as UTF-8"),
        (b"\xfe\xff", "the file is UTF-16: save it as UTF-8"),
    ):
        if head.startswith(magic):
            return hint
    text = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    if text.startswith(b"["):
        return "the file looks like one JSON array: write each element on one line, without the brackets"
    if text in (b"{", b"{\r"):
        return "the file looks like indented JSON: write each object on one line"
    if text and not text.startswith((b"{", b'"')) and (b"," in text or b"\t" in text):
        return "the file looks like a table (CSV): write each row as a JSON object on one line"
    return ""


def _quantiles(values: Any) -> dict[str, int]:
    if not values:
        return {"p50": 0, "p95": 0, "max": 0}
    import numpy as np

    p50, p95, most = np.quantile(
        np.frombuffer(values, dtype=values.typecode), [0.5, 0.95, 1.0], method="lower"
    )
    return {"p50": int(p50), "p95": int(p95), "max": int(most)}


def _duplicates(hashes: Any) -> int:
    """Rows that are copies, by sorting 64-bit hashes: a set of integers takes ten times the memory."""
    if len(hashes) < 100_000:
        return len(hashes) - len(set(hashes))
    import numpy as np

    return len(hashes) - len(np.unique(np.frombuffer(hashes, dtype=np.int64)))
