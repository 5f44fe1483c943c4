"""The corpus of broken files: what each is about, what is asked of it, and the exact report it must get.

`broken/NNN-name.<ext>` is a file as somebody could upload it, `broken/NNN-name.expected.json` says what it is
about and what `validate` must say. Files of text are written by hand; files that no editor can write are made
here.

python -m tests.peft_service.corpus --write     make binary files that are missing; write every report anew

Read every report that changed before you commit it: `git diff` shows what a user would be told.
"""

import gzip
import io
import json
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft_service.columns import Columns
from peft_service.formats import Problem
from peft_service.validate import Report, validate

FOLDER = Path(__file__).with_name("broken")
LISTED = 12
"""Problems in an expected report."""
GOOD = b'{"prompt": "2+2=", "completion": "4"}\n'
MIB = 1024**2


def packed(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def zipped() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr(zipfile.ZipInfo("data.jsonl"), GOOD)
    return made.getvalue()


def bomb() -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(b" " * 300 * MIB)


def parquet(**columns: Any) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    made = io.BytesIO()
    pq.write_table(pa.table(columns), made)
    return made.getvalue()


def arrow_stream(**columns: Any) -> bytes:
    import pyarrow as pa

    made = io.BytesIO()
    table = pa.table(columns)
    with pa.ipc.new_stream(made, table.schema) as stream:
        stream.write_table(table)
    return made.getvalue()


def with_nan() -> bytes:
    return parquet(text=["a", "b", None], score=[0.5, float("nan"), 1.0])


def with_bytes() -> bytes:
    return parquet(text=["a", "b"], image=[b"\xff\xd8\xff\xe0", b"fine"])


def with_intervals() -> bytes:
    import pyarrow as pa

    return arrow_stream(text=["a"], since=pa.array([(1, 2, 3)], type=pa.month_day_nano_interval()))


def labels() -> bytes:
    rows = (json.dumps({"text": "a", "label": index}) for index in range(10_003))
    return packed("\n".join(rows).encode())


BINARY: dict[str, tuple[str, Callable[[], bytes]]] = {
    "201-gzip-cut-off.jsonl.gz": ("the upload ended early", lambda: packed(GOOD * 3)[:-12]),
    "202-gzip-broken.jsonl.gz": ("bytes were changed on the way", lambda: packed(GOOD)[:10] + b"\xff" * 30),
    "203-gzip-twice.jsonl.gz": ("compressed two times", lambda: packed(packed(GOOD))),
    "204-bomb.jsonl.zst": ("a few kilobytes that become 300 MiB", bomb),
    "205-line-too-long.jsonl.gz": (
        "a line of 17 MiB between good ones",
        lambda: packed(GOOD + b'{"prompt": "' + b"a" * 17 * MIB + b'"}\n' + GOOD),
    ),
    "206-element-too-long.json.gz": (
        "an element of 17 MiB between good ones",
        lambda: packed(b"[" + GOOD + b', {"prompt": "' + b"a" * 17 * MIB + b'"}, ' + GOOD + b"]"),
    ),
    "207-too-many-labels.jsonl.gz": ("every row has a class of its own", labels),
    "208-too-many-columns.csv.gz": (
        "a table that lies on its side",
        lambda: packed(",".join(f"c{index}" for index in range(10_001)).encode() + b"\n1,2\n"),
    ),
    "209-zip.jsonl": ("an archive, whatever its name says", zipped),
    "210-pickle.jsonl": ("pickles run code when they are read", lambda: pickle.dumps([{"a": 1}], protocol=4)),
    "211-cut-off.parquet": ("the upload ended early", lambda: parquet(text=["a", "b"])[:-40]),
    "212-nan.parquet": ("a NaN, and a text that is null", with_nan),
    "213-bytes.parquet": ("a column of images", with_bytes),
    "214-cut-off.arrow": ("the upload ended early", lambda: arrow_stream(text=["a", "b"] * 50)[:-60]),
    "216-intervals.arrow": ("a type that JSON has nothing for", with_intervals),
    "215-no-rows.parquet": ("columns, but no rows", lambda: parquet(text=[])),
}


def files() -> list[Path]:
    return sorted(path for path in FOLDER.iterdir() if path.name[:1].isdigit() and not is_expected(path))


def is_expected(path: Path) -> bool:
    return path.name.endswith(".expected.json")


def expected_of(path: Path) -> Path:
    return FOLDER / (path.name.split(".")[0] + ".expected.json")


def report_on(path: Path, asked: dict[str, Any]) -> Report:
    columns = Columns.model_validate(asked["columns"]) if "columns" in asked else None
    return validate(path, path.name, columns, asked.get("format"), limit=asked.get("limit", LISTED))


def told(report: Report) -> dict[str, Any]:
    """All of a report that a user sees and that is the same on every machine, without what is empty."""
    statistics = {
        key: value
        for key, value in report.statistics.items()
        if value and not (key in ("labels", "label_counts") and len(value) > 20)
    }
    return {
        "format": report.format,
        "container": report.container,
        "rows": report.rows,
        "problem_count": report.problem_count,
        "bad_lines": report.bad_lines,
        **({} if report.complete else {"complete": False}),
        "problems": [shown(problem) for problem in report.problems],
        "warnings": [shown(problem) for problem in report.warnings],
        "statistics": statistics if report.rows else {},
    }


def shown(problem: Problem) -> dict[str, Any]:
    keys = ("line", "byte_offset", "path", "code", "message", "hint", "excerpt")
    return {key: getattr(problem, key) for key in keys if getattr(problem, key)}


def write() -> None:
    for name, (about, make) in BINARY.items():
        path = FOLDER / name
        if not path.exists():
            path.write_bytes(make())
            expected_of(path).write_text(json.dumps({"about": about}))
    for path in files():
        known = json.loads(expected_of(path).read_text())
        made = {"about": known["about"]}
        if "asked" in known:
            made["asked"] = known["asked"]
        made["report"] = told(report_on(path, known.get("asked", {})))
        expected_of(path).write_text(json.dumps(made, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    write()
