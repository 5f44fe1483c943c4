"""Validate a data set: every bad row with its place, reason and hint, at constant memory, without torch.

Files come from anyone, so this reads as a defence: a line of a gigabyte, a million broken lines, NULs,
nesting bombs and foreign file types all end in a report.
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from peft_service.columns import Columns, mapped
from peft_service.containers import Documents, Record, container_of, records
from peft_service.errors import InvalidTrainingFile
from peft_service.formats import FORMATS, Format, Problem, detect, did_you_mean, format_of, shown
from peft_service.leaks import found_secrets
from peft_service.variants import Frozen

MAX_PROBLEMS_COUNTED = 100_000
"""After so many, the rest of the data is only hashed: a file of line feeds must not keep a replica busy."""
MAX_LABELS = 10_000
"""Classes of a classification, and tasks of a multi-task file."""
MAX_COLUMN_NAMES = 1000
"""Names of columns that are counted."""
LINES_LISTED = 100
FEW_ROWS = 10
"""OpenAI's least."""
SKEW = 20
"""The longest row is so many times as long as the median: training waits for it, and it may be a mistake."""
SKEWED_CHARACTERS = 20_000
"""Shorter rows are no trouble, however much longer than the others they are."""
CHUNK_BYTES = 1024**2


class Report(Frozen):
    """What validation found. `problem_count == 0` is the only thing that makes a data set usable."""

    format: str | None
    """`kind` of the Format of the first row that could be recognised; None: none could. Then the data set
    needs a column mapping, and `rows` are all that could be read."""
    rows: int
    """Good rows."""
    problems: tuple[Problem, ...]
    """The first of them, in file order."""
    problem_count: int
    bad_lines: int
    """Rows, or lines, that have problems."""
    complete: bool
    """False: checking ended after 100,000 problems; the counts are a floor."""
    warnings: tuple[Problem, ...] = ()
    """Worth a look; the data set is usable all the same."""
    bytes: int
    sha256: str
    """Of the file; of a data set of several, the hash of their names and hashes."""
    statistics: dict[str, Any]
    """Of the good rows: `roles`, `characters` (p50, p95, max of a row), `duplicate_rows`, `ignored_columns`
    (column -> rows that have it), `warned` (code of a warning about rows -> `count`, and the first 100
    `lines`); `labels` and `tasks`, sorted, and `label_counts`, where the rows have some."""
    container: str = ""
    """What the (first) file is made of: `jsonl`, `csv+gzip`, …"""
    columns_seen: dict[str, int] = Field(default_factory=dict)
    """Names of the columns, before a mapping -> rows that have them; the first 1000."""

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
            **({"file": problem.file} if problem.file else {}),
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


Parts = Sequence[tuple[str, Path]]
"""Files of a data set with their names, in order."""


@dataclass(frozen=True, slots=True)
class RowHashes:
    """What each good row of a data set teaches, as 64 bits that are the same in every process.

    Memory: 16 bytes a row.
    """

    hashes: "array[int]" = field(default_factory=lambda: array("Q"))
    lines: "array[int]" = field(default_factory=lambda: array("Q"))
    starts: list[tuple[str, int]] = field(default_factory=list)
    """Name of each file, and the place of its first row."""

    def clear(self) -> None:
        """Forget all rows so far."""
        del self.hashes[:], self.lines[:]
        self.starts[:] = [(name, 0) for name, _ in self.starts]

    def place(self, index: int) -> tuple[str, int]:
        """File and line of a row."""
        name = next(name for name, start in reversed(self.starts) if start <= index)
        return name, self.lines[index]


class Overlap(Frozen):
    """Rows of a validation set that are in the training set too."""

    rows: int
    lines: tuple[tuple[str, int], ...]
    """File and line of the first 100 in the validation set."""

    def warning(self) -> Problem | None:
        if not self.rows:
            return None
        file, line = self.lines[0]
        many = (
            f"{self.rows} rows of the validation data are"
            if self.rows > 1
            else "A row of the validation data is"
        )
        return Problem(
            "",
            "train_validation_overlap",
            f"{many} in the training data too, word for word.",
            "remove them from one: what was trained on measures nothing",
            line=line,
            file=file,
        )


def overlap(training: RowHashes, validation: RowHashes) -> Overlap:
    """Which rows of the validation set teach exactly what a row of the training set teaches."""
    import numpy as np

    known = np.frombuffer(training.hashes, dtype=np.uint64)
    asked = np.frombuffer(validation.hashes, dtype=np.uint64)
    found = np.flatnonzero(np.isin(asked, known))
    return Overlap(
        rows=len(found), lines=tuple(validation.place(int(index)) for index in found[:LINES_LISTED])
    )


def validate(
    data: Path | Parts,
    name: str = "",
    columns: Columns | None = None,
    format: str | None = None,
    *,
    limit: int = 100,
    documents: Documents = "line",
    hashes: RowHashes | None = None,
) -> Report:
    """Read a data set once and report on every row; `limit` problems are listed, all are counted.

    `name` is what the owner of a single file calls it. With `columns`, rows are mapped first; with `format`,
    they are read as that one, instead of as what the first of them looks like. `hashes` is filled for
    `overlap`.

    Rows of no known format are no problem as long as all are: a job can map their columns. With a mapping, or
    beside rows of a known format, they are.

    Memory: a chunk and a row (16 MiB), plus 12 bytes a row for the statistics.
    """
    parts = ((name or data.name, data),) if isinstance(data, Path) else tuple(data)
    check = _Check(columns, format_of(format) if format else None, limit, hashes, several=len(parts) > 1)
    for part, path in parts:
        check.file(part)
        for record in records(path, part, check.warn, documents=documents):
            check.record(record)
            if not check.complete:
                break
        if not check.complete:
            break
    sizes, digests = zip(*(_digest(path) for _, path in parts), strict=True) if parts else ((), ())
    whole = "".join(f"{digest} {part}\n" for digest, (part, _) in zip(digests, parts, strict=True))
    return check.report(
        bytes=sum(sizes),
        sha256=digests[0] if len(digests) == 1 else hashlib.sha256(whole.encode()).hexdigest(),
        container=_container(*parts[0]) if parts else "",
    )


def _digest(path: Path) -> tuple[int, str]:
    sha256, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            sha256.update(chunk)
            size += len(chunk)
    return size, sha256.hexdigest()


def _container(name: str, path: Path) -> str:
    found = container_of(path, name)
    return found.kind + (f"+{found.compression}" if found.compression else "")


_NONE = Problem("", "", "")


@dataclass(slots=True)
class _Doubt:
    """A warning about rows: the first of them, and how many."""

    first: Problem
    count: int = 0
    lines: list[Any] = field(default_factory=list)


class _Check:
    """What has been found so far."""

    def __init__(
        self,
        columns: Columns | None,
        format: Format | None,
        limit: int,
        hashes: RowHashes | None,
        several: bool,
    ) -> None:
        self.mapping, self.format, self.limit, self.several = columns, format, limit, several
        self.asked = format is not None
        self.out = hashes
        self.part, self.parts = "", list[str]()
        self.since = ""
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []
        self.count, self.bad, self.complete = 0, 0, True
        self.unknown: list[Problem] = []
        """Rows of no known format, as long as there is no other."""
        self.unknown_count = 0
        self.hashes, self.characters = array("Q"), array("I")
        self.longest = 0, _NONE
        self.columns, self.ignored = Counter[str](), Counter[str]()
        self.roles, self.labels, self.tasks = Counter[str](), Counter[str](), set[str]()
        self.without_task: Problem | None = None
        self.doubts: dict[str, _Doubt] = {}

    def file(self, name: str) -> None:
        self.part = name if self.several else ""
        self.parts.append(name)
        if self.out is not None:
            self.out.starts.append((name, len(self.out.hashes)))

    def warn(self, problem: Problem) -> None:
        self.warnings.append(replace(problem, file=self.part))

    def record(self, record: Record) -> None:
        found = list(record.problems)
        row = record.row
        if row is not None:
            for key in row:
                if key in self.columns or len(self.columns) < MAX_COLUMN_NAMES:
                    self.columns[key] += 1
            if self.mapping is not None:
                row, missing = mapped(row, self.mapping)
                found += map(record.placed, missing)
        if row is not None and not found:
            found = [record.placed(problem) for problem in self._problems(row, record)]
            if found and found[0].code == "unknown_format" and self._may_be_mapped():
                self.unknown_count += 1
                if len(self.unknown) < self.limit:
                    self.unknown += [replace(problem, file=self.part) for problem in found]
                self._measure(row, record)
                found = []
            elif not found:
                self._good(row, record)
        if found:
            self._bad(found)

    def _may_be_mapped(self) -> bool:
        return self.format is None and self.mapping is None

    def _bad(self, found: list[Problem], rows: int = 1, count: int | None = None) -> None:
        self.count += len(found) if count is None else count
        self.bad += rows
        room = max(0, self.limit - len(self.problems))
        self.problems += [replace(problem, file=self.part) for problem in found[:room]]
        self.complete = self.count < MAX_PROBLEMS_COUNTED

    def _problems(self, row: dict[str, Any], record: Record) -> list[Problem]:
        """What is wrong with a row that could be read."""
        claimed = detect(row)
        if self.format is None:
            if claimed is None:
                return [_unknown_format(row)]
            self.format = claimed
            where = f"line {record.number}"
            self.since = f"the file is {claimed.kind} since {where}"
            if self.several:
                self.since = f"the data set is {claimed.kind} since {where} of {shown(self.part)}"
            if self.unknown_count:  # then those were problems
                self._unknown_are_bad()
        format = self.format
        fits = format.fits(row)
        other = claimed is not None and claimed.kind != format.kind
        # A row that claims a format of more telling keys is of that one, though it may have this one's keys.
        if other and not (fits and (self.asked or (claimed is not None and claimed.rank > format.rank))):
            assert claimed is not None
            since = self.since or f"the file is to be read as {format.kind}"
            message = f"This row is {claimed.kind}, but {since}."
            return [Problem("", "mixed_formats", message, "put each format into a file of its own")]
        if claimed is None and not fits and self.asked:
            return [_unknown_format(row)]
        found = format.problems(row)
        if not found and max(len(self.labels), len(self.tasks)) > MAX_LABELS:
            message = f"The file has more than {MAX_LABELS:,} labels."
            found = [Problem("label", "too_many_labels", message)]
        return found

    def _unknown_are_bad(self) -> None:
        """Rows of no known format turn out to be in a data set of one."""
        self.problems = sorted([*self.problems, *self.unknown], key=self._place)[: self.limit]
        self._bad([], self.unknown_count, self.unknown_count)
        self.unknown, self.unknown_count = [], 0
        self.hashes, self.characters = array("Q"), array("I")
        self.longest = 0, _NONE
        if self.out is not None:
            self.out.clear()

    def _place(self, problem: Problem) -> tuple[int, int]:
        return self.parts.index(problem.file or self.parts[0]), problem.line

    def _good(self, row: dict[str, Any], record: Record) -> None:
        format = self.format
        assert format is not None
        self._measure(row, record)
        self.roles.update(format.roles(row))
        self.labels.update(set(format.labels(row)))
        if "task" in row:
            self.tasks.add(row["task"])
        elif self.without_task is None:
            said = "This row has no task, but others have one."
            hint = "in multi-task training every row has one"
            self.without_task = self._placed(record, Problem("task", "task_missing", said, hint))
        if self.mapping is None:
            for key in format.ignored(row):
                if key in self.ignored or len(self.ignored) < MAX_COLUMN_NAMES:
                    self.ignored[key] += 1
        for code, doubts in _by_code(format.doubts(row)):
            self._doubt(code, record, doubts)
        for code, what in found_secrets(record.raw):
            message = f"The row seems to hold {what}."
            hint = "what is trained on can be said again: remove it, or put a placeholder there"
            self._doubt(f"{code}:{what}", record, Problem("", code, message, hint), shows=False)

    def _measure(self, row: dict[str, Any], record: Record) -> None:
        hashed = _hash(row, self.format)
        self.hashes.append(hashed)
        if self.out is not None:
            self.out.hashes.append(hashed)
            self.out.lines.append(record.number)
        length = len(record.raw.decode(errors="replace"))
        self.characters.append(length)
        if length > self.longest[0]:
            said = f"The longest row has {length:,} characters"
            self.longest = length, self._placed(record, Problem("", "length_skew", said))

    def _doubt(self, key: str, record: Record, problem: Problem, shows: bool = True) -> None:
        if key not in self.doubts:
            placed = self._placed(record, problem)
            self.doubts[key] = _Doubt(placed if shows else replace(placed, excerpt=""))
        doubt = self.doubts[key]
        doubt.count += 1
        if len(doubt.lines) < LINES_LISTED:
            doubt.lines.append(f"{self.part}:{record.number}" if self.part else record.number)

    def _placed(self, record: Record, problem: Problem) -> Problem:
        return replace(record.placed(problem), file=self.part)

    # ---------------------------------------------------------------------------------------- at the end

    def report(self, *, bytes: int, sha256: str, container: str) -> Report:
        rows = len(self.hashes)
        if not rows and not self.count:
            blank = any(warning.code == "blank_line" for warning in self.warnings)
            self.warnings = [warning for warning in self.warnings if warning.code != "blank_line"]
            what = f"The {'data set' if self.several else 'file'} has no rows"
            message = (
                "The file is empty." if not bytes else f"{what}, only blank lines." if blank else f"{what}."
            )
            self._bad([Problem("", "no_rows", message, _samples(), 1)])
        duplicates = _duplicates(self.hashes)
        self.warnings += self._about_all(duplicates)
        named = {doubt.first.code for doubt in self.doubts.values()}
        return Report(
            format=self.format.kind if self.format else None,
            rows=rows,
            problems=tuple(self.problems),
            problem_count=self.count,
            bad_lines=self.bad,
            complete=self.complete,
            warnings=tuple(self.warnings),
            bytes=bytes,
            sha256=sha256,
            statistics={
                "roles": dict(sorted(self.roles.items())),
                "characters": _quantiles(self.characters),
                "duplicate_rows": duplicates,
                "ignored_columns": dict(self.ignored),
                "warned": {
                    code: {
                        "count": sum(
                            doubt.count for doubt in self.doubts.values() if doubt.first.code == code
                        ),
                        "lines": [
                            line
                            for doubt in self.doubts.values()
                            if doubt.first.code == code
                            for line in doubt.lines
                        ][:LINES_LISTED],
                    }
                    for code in sorted(named)
                },
                **({"labels": sorted(self.labels)} if self.labels else {}),
                **({"label_counts": dict(sorted(self.labels.items()))} if self.labels else {}),
                **({"tasks": sorted(self.tasks)} if self.tasks else {}),
            },
            container=container,
            columns_seen=dict(self.columns),
        )

    def _about_all(self, duplicates: int) -> Iterator[Problem]:
        """Warnings that take all rows to be known."""
        rows = len(self.hashes)
        if self.unknown_count:
            first = self.unknown[0]
            yield replace(first, message=f"{first.message}{_more(self.unknown_count, 'row')}")
        for doubt in self.doubts.values():
            yield replace(doubt.first, message=f"{doubt.first.message}{_more(doubt.count, 'row')}")
        if self.ignored:
            names = ", ".join(f"{shown(name, 40)} ({count})" for name, count in self.ignored.most_common(8))
            message = f"Columns that nobody reads, with the rows that have them: {names}"
            hint = f'a column mapping can give one a meaning: {{"…": {shown(next(iter(self.ignored)), 40)}}}'
            yield Problem("", "ignored_columns", message + (", …" if len(self.ignored) > 8 else "."), hint)
        if duplicates:
            message = f"{duplicates} row{' is an exact copy' if duplicates == 1 else 's are exact copies'}."
            yield Problem("", "duplicate_rows", message, "a copied row weighs more in training")
        if 0 < rows < FEW_ROWS and not self.count:
            message = f"There {'is 1 row' if rows == 1 else f'are {rows} rows'}."
            yield Problem(
                "", "few_rows", message, f"{FEW_ROWS} are hardly enough to learn from, hundreds are better"
            )
        rare = [label for label, count in self.labels.items() if count < 2]
        if rare and rows >= FEW_ROWS:
            names = ", ".join(shown(label, 40) for label in sorted(rare)[:8])
            message = f"{len(rare)} of {len(self.labels)} labels are in a single row: {names}"
            hint = "give each a few rows, or take it out"
            yield Problem("label", "rare_label", message + (", …" if len(rare) > 8 else "."), hint)
        if self.tasks and self.without_task is not None:
            yield self.without_task
        median = _quantiles(self.characters)["p50"]
        if self.longest[0] >= max(SKEW * median, SKEWED_CHARACTERS):
            problem = self.longest[1]
            message = f"{problem.message}, the one in the middle {median:,}."
            yield replace(problem, message=message, hint="is it several rows in one?")


def _by_code(problems: Iterable[Problem]) -> list[tuple[str, Problem]]:
    """The first of each code."""
    found: dict[str, Problem] = {}
    for problem in problems:
        found.setdefault(problem.code, problem)
    return list(found.items())


def _more(count: int, what: str) -> str:
    more = count - 1
    return f" The same in {more:,} more {what}{'s' if more > 1 else ''}." if more else ""


def _hash(row: dict[str, Any], format: Format | None) -> int:
    """64 bits of what the row teaches: of the columns that are read, in no order."""
    taught = row
    if format is not None and not format.keeps_columns:
        taught = {key: row[key] for key in format.keys if key in row}
    text = json.dumps(taught, sort_keys=True, separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _unknown_format(row: dict[str, Any]) -> Problem:
    keys = ", ".join(shown(key, 40) for key in list(row)[:8]) or "none"
    message = f"The row is of no known format; its keys are {keys}{', …' if len(row) > 8 else ''}."
    for names, hint in _FOREIGN_KEYS:
        if all(name in row for name in names):
            return Problem("", "unknown_format", message, hint)
    known = list(dict.fromkeys(key for variant in FORMATS for key in variant.keys))
    for key in list(row)[:8]:
        if key not in known and (meant := did_you_mean(key, known)):
            return Problem("", "unknown_format", message, f"{shown(key)}: {meant}")
    return Problem("", "unknown_format", message, _map("…", "…"))


def _map(prompt: str, completion: str) -> str:
    return (
        "say what its columns are with a column mapping: "
        f'{{"prompt": "{prompt}", "completion": "{completion}"}}'
    )


def _samples() -> str:
    return "a line looks like " + " or ".join(
        format_of(kind).sample for kind in ("chat", "prompt_completion", "text")
    )


_FOREIGN_KEYS = (
    (("question", "answer"), _map("question", "answer")),
    (("query", "response"), _map("query", "response")),
    (("prompt", "response"), _map("prompt", "response")),
    (("instruction", "response"), 'map the columns: {"instruction": "instruction", "output": "response"}'),
    (("instruction",), 'an instruction needs an output: map the column that has it: {"output": "…", …}'),
    (("input", "output"), _map("input", "output")),
    (("prompt", "completions"), "judged steps are not supported; a row has one completion"),
    (("query", "pos"), "pairs for embedding models are not supported"),
    (
        ("messages",),
        'is "messages" JSON in a string? {"messages": {"json": "messages"}} reads it; an array of texts is '
        '{"conversation": "messages[*]"}',
    ),
    (("conversations",), 'ShareGPT has an array of {"from", "value"} there'),
)


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

    return len(hashes) - len(np.unique(np.frombuffer(hashes, dtype=np.uint64)))
