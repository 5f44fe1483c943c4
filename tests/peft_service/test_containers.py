"""Containers: the same rows from each of them, every problem at its place, and nothing hangs a reader."""

import csv
import gzip
import hashlib
import io
import json
import os
import random
import resource
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from peft_service import containers
from peft_service.containers import columnar, container_of, is_data, parts_of, records, records_of, table
from peft_service.containers.record import MAX_RECORD_BYTES
from peft_service.formats import Problem

MiB = 1024**2
SHARED = Path(__file__).parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not beside the repository")

ROWS: list[dict[str, Any]] = [
    {"prompt": "2+2=", "completion": "4"},
    {"prompt": 'quotes " and \\ and , ; | and tabs\t', "completion": "two\nlines\r\nor three"},
    {"prompt": "日本語 ü 🎈", "completion": " blanks around "},
    {"prompt": '[{"a": 1}, {', "completion": "}]"},
    {"prompt": "long " * 5000, "completion": "end"},
]
# What only some containers can hold: tables have strings alone, and text has one column.
NESTED: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}], "n": 1.5},
    {"messages": [], "n": -3.0},
]


# ------------------------------------------------------------------------------------------------------
# Writers: by other programs than ours


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def array(rows: list[dict[str, Any]], indent: int | None = None) -> bytes:
    return json.dumps(rows, indent=indent).encode()


def rows_to_table(rows: list[dict[str, Any]], delimiter: str = ",", **options: Any) -> bytes:
    made = io.StringIO(newline="")
    writer = csv.DictWriter(made, list(rows[0]), delimiter=delimiter, **options)
    writer.writeheader()
    writer.writerows(rows)
    return made.getvalue().encode()


def parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    made = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), made, **options)
    return made.getvalue()


def arrow(rows: list[dict[str, Any]], new: Callable[..., Any] = pa.ipc.new_stream, size: int = 2) -> bytes:
    made, whole = io.BytesIO(), pa.Table.from_pylist(rows)
    with new(made, whole.schema) as writer:
        writer.write_table(whole, max_chunksize=size)
    return made.getvalue()


def joined_gzip(content: bytes) -> bytes:
    """As `cat a.gz b.gz` makes it, with the zeros that tapes add."""
    half = len(content) // 2
    return gzip.compress(content[:half]) + gzip.compress(content[half:]) + b"\0" * 100


def framed_zstd(content: bytes) -> bytes:
    """Several frames, and one of those that readers have to skip."""
    skipped = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
    half = len(content) // 2
    compressed = [zstandard.compress(part) for part in (content[:half], content[half:])]
    return skipped + skipped.join(compressed) + skipped


MADE: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "data.jsonl": jsonl,
    "crlf.jsonl": lambda rows: jsonl(rows).replace(b"}\n", b"}\r\n"),
    "no-last-newline.jsonl": lambda rows: jsonl(rows)[:-1],
    "mark.jsonl": lambda rows: b"\xef\xbb\xbf" + jsonl(rows),
    "jsonl.of-another-suffix": jsonl,
    "jsonl.txt": jsonl,
    "jsonl.csv": jsonl,
    "jsonl.json": jsonl,
    "compact.json": array,
    "mark.json": lambda rows: b"\xef\xbb\xbf" + array(rows),
    "indented.json": lambda rows: array(rows, 2),
    "tabs.json": lambda rows: json.dumps(rows, indent="\t").replace("\n", "\r\n").encode(),
    "a-line-each.json": lambda rows: b"[" + b",\n".join(map(jsonl, [[row] for row in rows])) + b"]\n\n",
    "array.of-another-suffix": array,
    "array.txt": lambda rows: array(rows, 2),
    "data.csv": rows_to_table,
    "mark.csv": lambda rows: b"\xef\xbb\xbf" + rows_to_table(rows),
    "lf.csv": lambda rows: rows_to_table(rows, lineterminator="\n"),
    "quoted.csv": lambda rows: rows_to_table(rows, quoting=csv.QUOTE_ALL),
    "semicolon.csv": lambda rows: rows_to_table(rows, ";"),
    "bar.csv": lambda rows: rows_to_table(rows, "|"),
    "data.tsv": lambda rows: rows_to_table(rows, "\t"),
    "tab.csv": lambda rows: rows_to_table(rows, "\t"),
    "comma.tsv": rows_to_table,
    "table.of-another-suffix": rows_to_table,
    "data.parquet": parquet,
    "groups.parquet": lambda rows: parquet(rows, row_group_size=2),
    "plain.parquet": lambda rows: parquet(rows, use_dictionary=False, compression="none"),
    "zstd.parquet": lambda rows: parquet(rows, compression="zstd", data_page_version="2.0"),
    "parquet.of-another-suffix": parquet,
    "stream.arrow": arrow,
    "file.arrow": lambda rows: arrow(rows, pa.ipc.new_file),
    "feather.arrow": lambda rows: _feather(rows),
}
NAMES = {
    **MADE,
    **{f"{name}.gz": lambda rows, make=make: gzip.compress(make(rows)) for name, make in MADE.items()},
    **{f"{name}.zst": lambda rows, make=make: zstandard.compress(make(rows)) for name, make in MADE.items()},
    "joined.jsonl.gz": lambda rows: joined_gzip(jsonl(rows)),
    "framed.json.zst": lambda rows: framed_zstd(array(rows)),
    "no suffix": lambda rows: gzip.compress(jsonl(rows)),
}
COLUMNAR = ("parquet", "arrow")
MAP = pa.map_(pa.string(), pa.int8())


def strings_only(name: str) -> bool:
    """Whether it is a table: those have no numbers and no lists."""
    return (any(f".{word}" in name for word in ("csv", "tsv")) and "jsonl" not in name) or name.startswith(
        "table"
    )


def _feather(rows: list[dict[str, Any]]) -> bytes:
    from pyarrow import feather

    made = io.BytesIO()
    feather.write_feather(pa.Table.from_pylist(rows), made, compression="zstd")
    return made.getvalue()


def read(folder: Path, content: bytes, name: str = "data.jsonl", **options: Any) -> list[containers.Record]:
    path = folder / "content"
    path.write_bytes(content)
    return list(records(path, name, **options))


def rows_of(found: list[containers.Record]) -> list[dict[str, Any] | None]:
    return [record.row for record in found]


def problems_of(found: list[containers.Record]) -> list[tuple[int, str]]:
    return [(problem.line, problem.code) for record in found for problem in record.problems]


# ------------------------------------------------------------------------------------------------------
# What goes in is what comes out


@pytest.mark.parametrize("name", NAMES)
def test_the_same_rows_come_out_of_every_container(name: str, tmp_path: Path) -> None:
    warnings: list[Problem] = []
    found = read(tmp_path, NAMES[name](ROWS), name, warn=warnings.append)
    assert [record.problems for record in found] == [()] * len(ROWS)
    assert rows_of(found) == ROWS
    assert [warning.code for warning in warnings] == (["bom"] if name.startswith("mark") else [])
    assert all(record.raw and b"\xef\xbb\xbf" not in record.raw for record in found)


@pytest.mark.parametrize("name", [name for name in NAMES if not strings_only(name)])
def test_nested_rows_come_out_of_every_container_that_can_hold_them(name: str, tmp_path: Path) -> None:
    assert rows_of(read(tmp_path, NAMES[name](NESTED), name)) == NESTED


def test_a_container_is_known_by_its_bytes_and_its_name_only_breaks_ties(tmp_path: Path) -> None:
    path = tmp_path / "x"

    def kind(content: bytes, name: str) -> str:
        path.write_bytes(content)
        return container_of(path, name).kind

    for name in ("data.jsonl", "data.csv", "data.txt", "data.parquet", "data", ""):
        assert kind(jsonl(ROWS), name) == "jsonl"
        assert kind(array(ROWS), name) == "json_array"
        assert kind(parquet(ROWS), name) == "parquet"
        assert kind(arrow(ROWS), name) == "arrow"
        assert kind(b'{"text": "' + b"x" * MiB, name) == "jsonl"
    prose = b"It was, in short, the best.\nAnd, it was said, the worst.\n"
    assert [kind(prose, name) for name in ("a.txt", "a.csv", "a.jsonl", "a")] == [
        "text",
        "csv",
        "jsonl",
        "text",
    ]
    uneven = b"text,label\na,b\nc\n"
    assert [kind(uneven, name) for name in ("a.txt", "a.csv", "a.tsv", "a")] == ["text", "csv", "csv", "text"]
    even = b"text,label\na,b\nc,d\n"
    assert [kind(even, name) for name in ("a.txt", "a.csv", "a.tsv", "a")] == ["text", "csv", "csv", "csv"]
    lyrics = b"[Verse 1]\nla la\n"
    assert [kind(lyrics, name) for name in ("a.txt", "a", "a.json")] == ["text", "text", "json_array"]
    assert kind(b"text\none column\n", "a.csv") == "csv"
    assert kind(b"{% for x in y %}\n", "a.txt") == "text"


# ------------------------------------------------------------------------------------------------------
# Where a record is


@pytest.mark.parametrize(
    "name", ["data.jsonl", "crlf.jsonl", "compact.json", "indented.json", "tabs.json", "mark.json"]
)
def test_the_byte_offset_is_where_the_record_begins(name: str, tmp_path: Path) -> None:
    content = NAMES[name](ROWS)
    decoder = json.JSONDecoder()
    for record in read(tmp_path, content, name):
        text = content[record.byte_offset :].decode()
        assert decoder.raw_decode(text)[0] == record.row
    numbers = [record.number for record in read(tmp_path, content, name)]
    assert numbers == list(range(1, len(ROWS) + 1))


def test_a_record_of_a_table_is_at_the_line_where_it_begins(tmp_path: Path) -> None:
    content = b'a,b\n1,"x\ny\nz"\n\n2,w\r\n"3",\n'
    found = read(tmp_path, content, "x.csv")
    assert [(record.number, record.byte_offset) for record in found] == [(2, 4), (6, 15), (7, 20)]
    assert rows_of(found) == [{"a": "1", "b": "x\ny\nz"}, {"a": "2", "b": "w"}, {"a": "3", "b": ""}]
    assert found[0].raw == b'{"a":"1","b":"x\\ny\\nz"}'


@pytest.mark.parametrize("name", ["data.jsonl.gz", "compact.json.zst", "data.csv.gz", "data.parquet"])
def test_there_are_no_offsets_in_what_was_never_a_file(name: str, tmp_path: Path) -> None:
    assert {record.byte_offset for record in read(tmp_path, NAMES[name](ROWS), name)} == {0}


# ------------------------------------------------------------------------------------------------------
# Text


def test_a_document_of_text_is_a_line_a_paragraph_or_the_file(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf one\r\ntwo\n\n  \nthree\nfour"
    warnings: list[Problem] = []
    lines = read(tmp_path, content, "x.txt", warn=warnings.append)
    assert [(r.number, r.row) for r in lines] == [
        (1, {"text": " one"}), (2, {"text": "two"}), (5, {"text": "three"}), (6, {"text": "four"}),
    ]  # fmt: skip
    assert [(w.code, w.line) for w in warnings] == [("bom", 1), ("blank_line", 3)]
    assert "2 blank lines were" in warnings[1].message
    paragraphs = read(tmp_path, content, "x.txt", documents="paragraph")
    assert [(r.number, r.row) for r in paragraphs] == [
        (1, {"text": " one\ntwo"}),
        (5, {"text": "three\nfour"}),
    ]
    whole = read(tmp_path, content, "x.txt", documents="file")
    assert [(r.number, r.row) for r in whole] == [(1, {"text": " one\ntwo\n\n  \nthree\nfour"})]


def test_bad_text_is_reported_at_its_line(tmp_path: Path) -> None:
    content = b"good\n\xff\xfe bad\ngood\nnu\0l\n" + b"x" * (MAX_RECORD_BYTES + 1) + b"\ngood\n"
    found = read(tmp_path, content, "x.txt")
    assert problems_of(found) == [(2, "not_utf8"), (4, "nul_character"), (5, "line_too_long")]
    assert sum(record.row == {"text": "good"} for record in found) == 3
    assert problems_of(read(tmp_path, (b"line" * 999 + b"\n") * 5000, "x.txt", documents="file")) == [
        (1, "record_too_long")
    ]


# ------------------------------------------------------------------------------------------------------
# JSON Lines: as `test_validate.py` has it, here only what the records themselves say


def test_blank_lines_are_problems_only_where_something_follows(tmp_path: Path) -> None:
    warnings: list[Problem] = []
    found = read(tmp_path, b'\n{"a": 1}\n \n\t\n{"a": 2}\n\n\n', warn=warnings.append)
    assert [(r.number, r.byte_offset, r.row) for r in found] == [
        (1, 0, None), (2, 1, {"a": 1}), (3, 10, None), (4, 12, None), (5, 14, {"a": 2}),
    ]  # fmt: skip
    assert problems_of(found) == [(1, "blank_line"), (3, "blank_line"), (4, "blank_line")]
    assert [(w.code, w.line, w.byte_offset) for w in warnings] == [("blank_line", 6, 23)]
    assert "2 blank lines" in warnings[0].message
    assert read(tmp_path, b"\n\n\n") == []


def test_a_file_of_line_feeds_is_not_read_to_its_end_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n" * 300_000)
    found = records(path)
    assert next(found).problems[0].code == "blank_line"
    assert sum(1 for _ in found) >= 199_999


# ------------------------------------------------------------------------------------------------------
# JSON arrays


GOOD = '{"a": 1}'


@pytest.mark.parametrize(
    ("content", "numbers", "expected"),
    [
        ("[]", [], []),
        (" [ ]\n", [], []),
        ("[", [], [(1, "truncated")]),
        ("[%s", [1], [(2, "truncated")]),
        ("[%s,", [1], [(2, "truncated")]),
        ('[%s, {"a": 2, "b": "x', [1], [(2, "truncated")]),
        ('[%s, {"a": 2, "b": [1, ', [1], [(2, "truncated")]),
        ("[%s,]", [1], [(2, "not_json")]),
        ("[%s,, %s]", [1, 3], [(2, "not_json")]),
        ("[%s %s]", [1, 2], [(2, "not_json")]),
        ("[%s; %s]", [1, 2], [(2, "not_json")]),
        ("[%s]]", [1], [(2, "trailing_data")]),
        ("[%s]\n[%s]", [1], [(2, "trailing_data")]),
        ('[1, "x", null, [2], %s]', [5], [(n, "not_an_object") for n in (1, 2, 3, 4)]),
        ('[%s, {"a": NaN}, %s]', [1, 3], [(2, "nan")]),
        ('[%s, {"a": 1e999}, %s]', [1, 3], [(2, "nan")]),
        ('[%s, {"a": 1, "a": 2}, %s]', [1, 3], [(2, "duplicate_key")]),
        ('[%s, {"a": "\\u0000"}, %s]', [1, 3], [(2, "nul_character")]),
        ('[%s, {"a": "\\ud800"}, %s]', [1, 3], [(2, "lone_surrogate")]),
        ("[%s, {'a': 2}, %s]", [1, 3], [(2, "not_json")]),
        ('[%s, {"a": 2, %s, %s]', [1, 3, 4], [(2, "not_json")]),  # a brace is missing
        ('[%s, {"a": "x}, %s, %s]', [1, 3], [(2, "not_json")]),  # a quote: it takes the next one along
        ('[%s, {"a": "x\n"}, %s]', [1, 3], [(2, "not_json")]),
        ('[%s, {"a": [{"b": 1}, {"b": 2}, {"b": tru}]}, %s]', [1, 3], [(2, "not_json")]),
        ('[{"a": tru}, %s]', [2], [(1, "not_json")]),  # the key is known from the broken one itself
        ('[%s, {"a": tru}]', [1], [(2, "not_json")]),
        ('[%s, {"a": ' + "9" * 5000 + "}, %s]", [1, 3], [(2, "not_json")]),
        ('[%s, {"a": ' + "[" * 100 + "]" * 100 + "}, %s]", [1, 3], [(2, "too_deep")]),
        ('[%s, {"a": ' + "[" * 100_000 + "]" * 100_000 + "}, %s]", [1, 3], [(2, "too_deep")]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("chunk", [1, 7, MiB])
def test_a_broken_array_is_reported_and_read_on(
    content: str, numbers: list[int], expected: list[tuple[int, str]], chunk: int
) -> None:
    if chunk == 1 and len(content) > 1000:
        pytest.skip("a character at a time takes too long")
    data = content.replace("%s", GOOD).encode()
    pieces = (data[start : start + chunk] for start in range(0, len(data), chunk))
    found = list(containers.json_array.read(pieces, lambda problem: None))
    assert problems_of(found) == expected
    assert [record.number for record in found if record.row is not None] == numbers
    assert all(record.row == {"a": 1} for record in found if record.row is not None)


def test_a_broken_element_is_at_its_byte_and_line(tmp_path: Path) -> None:
    content = b'[\n  {"a": "\xc3\xbc"},\n  {\n    "a": tru\n  },\n  {"a": "\xff"}\n]\n'
    found = read(tmp_path, content, "x.json")
    (first, second) = (problem for record in found for problem in record.problems)
    assert content[first.byte_offset :].startswith(b"tru")
    assert "character 10 of line 4" in first.message
    assert content[second.byte_offset :].startswith(b"\xff")
    assert "line 6 of the file" in second.message
    assert "tru" in first.excerpt


def test_an_element_that_is_too_long_is_reported_in_constant_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.write(b'[{"a": 1}, {"a": "')
        for _ in range(100):
            file.write(b"x" * MiB)
        file.write(b'"}, {"a": 1}]')
    tracemalloc.start()
    found = list(records(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert problems_of(found) == [(2, "record_too_long")]
    assert [record.number for record in found] == [1, 2, 3]
    assert peak < 8 * MAX_RECORD_BYTES


# ------------------------------------------------------------------------------------------------------
# Tables


@pytest.mark.parametrize(
    ("content", "rows", "expected"),
    [
        (b"a,b\n1,2\n3\n4,5,6\n7,8\n", 2, [(3, "uneven_columns"), (4, "uneven_columns")]),
        (b"a,b,a\n1,2,3\n1,2\n", 0, [(1, "duplicate_column"), (3, "uneven_columns")]),
        (b"a,,c\n1,2,3\n", 0, [(1, "empty_column_name")]),
        (b"a,b\n1,\x002\n3,4\n", 1, [(2, "nul_character")]),
        (b"a,b\n1,\xe9\n3,4\n", 1, [(2, "not_utf8")]),
        (b"\xe9,b\n1,2\n", 0, [(1, "not_utf8")]),
        (b'a,b\n1,"x"y\n3,4\n', 1, [(2, "broken_quotes")]),
        (b'a,b\n1,"x\n3,4\n5,6\n', 2, [(2, "broken_quotes")]),  # never closed: the lines behind are read
        (b'a,b\n1,"x\n3,4\n5,"y"\n7,8\n', 3, [(2, "broken_quotes")]),
        (b"a,b\r1,2\r3,4\r", 0, [(1, "broken_quotes")]),
        (b"a,b\n" + b"x" * (MAX_RECORD_BYTES + 1) + b",2\n3,4\n", 1, [(2, "line_too_long")]),
        (b"a,b\n1,2\n", 1, []),
        (b"a,b\n", 0, []),
        (b'a\nx\n"y, z"\n', 2, []),
    ],
)  # fmt: skip
def test_a_broken_table_is_reported_line_by_line(
    content: bytes, rows: int, expected: list[tuple[int, str]], tmp_path: Path
) -> None:
    found = read(tmp_path, content, "x.csv")
    assert problems_of(found) == expected
    assert sum(record.row is not None for record in found) == rows


def test_a_field_that_is_too_long_is_reported_and_what_is_lost_is_said(tmp_path: Path) -> None:
    line = b"x" * 99 + b"\n"
    content = b'a,b\n1,"' + line * (MAX_RECORD_BYTES // 100 + 10) + b'"\n3,4\n'
    found = read(tmp_path, content, "x.csv")
    (first, *_) = (problem for record in found for problem in record.problems)
    assert (first.line, first.code) == (2, "broken_quotes")
    assert "lines 2 to" in first.message
    assert "are not read" in first.message
    longest = b"a,b\n1," + b"y" * (8 * MiB) + b"\n"  # far above what Python's own reader takes
    assert len(read(tmp_path, longest, "x.csv")[0].row["b"]) == 8 * MiB  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "documents"), [("x.csv", "line"), ("x.txt", "paragraph"), ("x.txt", "file")]
)
def test_a_record_of_very_many_lines_takes_constant_memory(name: str, documents: Any, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b'a,b\n1,"' + b"x\n" * 200_000 + b'"\n')
    tracemalloc.start()
    count = sum(record.row is not None for record in records(path, name, documents=documents))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 1
    assert peak < 16 * MiB  # a Python object for each line would be 40


def test_a_table_without_a_header_is_suspected(tmp_path: Path) -> None:
    warnings: list[Problem] = []
    read(tmp_path, b"what is it,3\nwho is it,4\n", "x.csv", warn=warnings.append)
    assert [warning.code for warning in warnings] == ["no_header"]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("line", [b'a","x\n', b'"""""\n', b'"\n', b'""""\n', b'x,"y\n', b'a"",",b\n'])
def test_a_file_of_stray_quotes_takes_linear_time(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b"a,b\n" + line * 200_000)
    for count, _ in enumerate(records(path)):
        if count > 2_000:
            break


# ------------------------------------------------------------------------------------------------------
# Compression


BLANKS = b" " * (64 * MiB)


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
@pytest.mark.parametrize(
    ("begin", "name"), [(b'{"a": "', "x.jsonl"), (b'[{"a": 1}, ', "x.json"), (b"a,b\n", "x.csv")]
)
def test_a_bomb_is_a_problem_and_takes_constant_memory(
    compress: Callable[[bytes], bytes], begin: bytes, name: str, tmp_path: Path
) -> None:
    path = tmp_path / "bomb"
    path.write_bytes(compress(begin) + 6 * compress(BLANKS))
    assert path.stat().st_size < MiB / 2
    tracemalloc.start()
    found = list(records(path, name))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found[-1].problems[-1].code == "too_large"
    assert peak < 10 * MAX_RECORD_BYTES


def test_compressed_twice_is_once_too_often(tmp_path: Path) -> None:
    found = read(tmp_path, gzip.compress(zstandard.compress(jsonl(ROWS))))
    assert problems_of(found) == [(1, "unknown_container")]
    assert "decompress it once" in found[0].problems[0].hint


def test_a_window_that_takes_too_much_memory_is_refused(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, format=zstandard.FORMAT_ZSTD1)
    deflate = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    content = deflate.compress(jsonl(ROWS)) + deflate.flush()
    assert problems_of(read(tmp_path, content)) == [(1, "unreadable_container")]


# ------------------------------------------------------------------------------------------------------
# Columns


def test_values_of_columns_become_json_or_a_problem_and_nothing_in_between(tmp_path: Path) -> None:
    import datetime
    from decimal import Decimal

    utc = datetime.UTC
    columns = {
        "f16": pa.array([1.5], pa.float16()),
        "f32": pa.array([0.25], pa.float32()),
        "u64": pa.array([2**64 - 1], pa.uint64()),
        "none": pa.array([None], pa.null()),
        "dictionary": pa.array(["x"]).dictionary_encode(),
        "decimal": pa.array([Decimal("12.50")]),
        "whole": pa.array([Decimal("12345678901234567890")], pa.decimal128(20, 0)),
        "binary": pa.array([b"\xc3\xbc"]),
        "fixed": pa.array([b"ab"], pa.binary(2)),
        "large": pa.array(["x"], pa.large_string()),
        "date": pa.array([datetime.date(2024, 1, 31)]),
        "ns": pa.array([1], pa.timestamp("ns")),
        "zone": pa.array(
            [datetime.datetime(2024, 1, 31, 12, tzinfo=utc)], pa.timestamp("ms", "Europe/Paris")
        ),
        "time": pa.array([datetime.time(1, 2, 3)]),
        "map": pa.array([[("k", 1.5), ("l", None)]], pa.map_(pa.string(), pa.float64())),
        "list": pa.array([[{"t": datetime.datetime(2024, 1, 31), "x": [b"a"]}, None]]),
        "fixed_list": pa.array([[1, 2]], pa.list_(pa.int8(), 2)),
        "large_list": pa.array([[["x"]]], pa.large_list(pa.large_list(pa.string()))),
    }
    expected = {
        "f16": 1.5, "f32": 0.25, "u64": 2**64 - 1, "none": None, "dictionary": "x", "decimal": 12.5,
        "whole": 12345678901234567890, "binary": "ü", "fixed": "ab", "large": "x", "date": "2024-01-31",
        "ns": "1970-01-01 00:00:00.000000001", "zone": "2024-01-31 13:00:00.000+0100",
        "time": "01:02:03.000000",
        "map": {"k": 1.5, "l": None}, "list": [{"t": "2024-01-31 00:00:00.000000", "x": ["a"]}, None],
        "fixed_list": [1, 2], "large_list": [["x"]],
    }  # fmt: skip
    data = pa.table(columns)
    made = io.BytesIO()
    pq.write_table(data, made)
    from_parquet = read(tmp_path, made.getvalue())
    made = io.BytesIO()
    with pa.ipc.new_stream(made, data.schema) as writer:
        writer.write_table(data)
    from_arrow = read(tmp_path, made.getvalue())
    for found in (from_parquet, from_arrow):
        assert [record.problems for record in found] == [()]
        assert found[0].row == expected


@pytest.mark.parametrize(
    ("values", "code", "path"),
    [
        (pa.array([1.0, float("nan"), 2.0]), "nan", "x"),
        (pa.array([1.0, float("inf"), 2.0]), "nan", "x"),
        (pa.array([[{"y": 1.0}], [{"y": 1.0}, {"y": float("nan")}], []]), "nan", "x[1].y"),
        (pa.array([b"a", b"\xff", b"b"]), "not_utf8", "x"),
        (pa.array(["a", "nul\0", "b"]), "nul_character", "x"),
        (pa.array([None, "long" * (5 * MiB), "b"]), "record_too_long", ""),
        (pa.array([[("k", 1)], [("k", 1), ("k", 2)], []], MAP), "duplicate_key", "x"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", COLUMNAR)
def test_a_bad_value_is_a_problem_of_its_row_alone(
    values: Any, code: str, path: str, kind: str, tmp_path: Path
) -> None:
    data, made = pa.table({"x": values}), io.BytesIO()
    if kind == "parquet":
        pq.write_table(data, made)
    else:
        with pa.ipc.new_file(made, data.schema) as writer:
            writer.write_table(data)
    found = read(tmp_path, made.getvalue())
    assert [record.row is None for record in found] == [False, True, False]
    assert [(p.line, p.code, p.path) for r in found for p in r.problems] == [(2, code, path)]


@pytest.mark.parametrize(
    ("columns", "names", "code"),
    [
        ([pa.array([1]), pa.array([2])], ["a", "a"], "duplicate_column"),
        ([pa.array([1])], [""], "empty_column_name"),
        ([pa.array([[(1, 2)]], pa.map_(pa.int8(), pa.int8()))], ["a"], "unsupported_type"),
        ([pa.array([(1, 2, 3)], pa.month_day_nano_interval())], ["a"], "unsupported_type"),
    ],
)  # fmt: skip
def test_columns_that_cannot_become_keys_or_values_are_refused(
    columns: list[Any], names: list[str], code: str, tmp_path: Path
) -> None:
    data, made = pa.table(columns, names=names), io.BytesIO()
    with pa.ipc.new_stream(made, data.schema) as writer:
        writer.write_table(data)
    assert problems_of(read(tmp_path, made.getvalue())) == [(1, code)]


def test_a_decimal_that_no_number_is_is_a_problem(tmp_path: Path) -> None:
    from decimal import Decimal

    found = read(tmp_path, parquet([{"x": Decimal("0.1234567890123456789012345")}]))
    assert problems_of(found) == [(1, "unsupported_type")]


def test_a_small_file_that_becomes_huge_ends_in_a_problem(tmp_path: Path) -> None:
    long = pa.DictionaryArray.from_arrays(pa.array([0] * 4000, pa.int32()), pa.array(["x" * MiB]))
    data, made = pa.table({"x": pa.ListArray.from_arrays([0, 4000], long)}), io.BytesIO()
    with pa.ipc.new_stream(made, data.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(data)
    assert len(made.getvalue()) < MiB
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    found = read(tmp_path, made.getvalue())
    assert found[-1].problems[0].code in ("too_large", "unreadable_container", "unsupported_type")
    assert all(record.row is None for record in found)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < max(before, 2.5 * MiB)  # KiB: 2.5 GiB


CHILDREN = {
    "crash": ("import os; print('r{\"a\": 1}', flush=True); os.kill(os.getpid(), 11)", "SIGSEGV"),
    "hang": ("import time; print('r{\"a\": 1}', flush=True); time.sleep(1000)", "nothing for 2 s"),
    "exit": ("print('r{\"a\": 1}', flush=True)", "status 0"),
    "garbage": ("print('r{\"a\": 1}'); print('qgarbage')", "could not be read"),
    "memory": (
        "import sys; sys.path.insert(0, {folder!r}); import columnar_child; columnar_child.limit(0);"
        "print('r{{\"a\": 1}}', flush=True); x = bytearray(3 * 1024**3)",
        "status 1",
    ),
}


@pytest.mark.parametrize("what", CHILDREN)
def test_a_reader_that_dies_is_a_report_after_the_rows_it_gave(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, said = CHILDREN[what]
    if "{folder" in program:
        program = program.format(folder=str(columnar.CHILD.parent))
    (tmp_path / "child.py").write_text(program)
    monkeypatch.setattr(columnar, "CHILD", tmp_path / "child.py")
    path = tmp_path / "x.parquet"
    path.write_bytes(parquet(ROWS))
    found, error = [], None
    try:
        for record in columnar.read(path, "parquet", stalled=2.0):
            found.append(record)
    except containers.Unreadable as unreadable:
        error = unreadable.problem
    assert [record.row for record in found] == [{"a": 1}]
    assert error is not None
    assert error.code == "unreadable_container"
    assert said in error.message


def test_a_reader_ends_with_who_asked_and_knows_no_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import json, os, time;"
        "print('r' + json.dumps({'pid': os.getpid(), 'env': list(os.environ)}), flush=True); time.sleep(1000)"
    )
    (tmp_path / "child.py").write_text(program)
    monkeypatch.setattr(columnar, "CHILD", tmp_path / "child.py")
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "PEFT_SERVICE_DATABASE_URL"):
        monkeypatch.setenv(name, "secret")
    reading = columnar.read(tmp_path / "x", "parquet")
    row = next(reading).row
    assert row is not None
    assert not {"AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "PEFT_SERVICE_DATABASE_URL"} & set(row["env"])
    reading.close()  # type: ignore[attr-defined] - a generator
    with pytest.raises(ProcessLookupError):
        os.kill(row["pid"], 0)


# ------------------------------------------------------------------------------------------------------
# What nothing fits


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"PK\x03\x04" + bytes(100), "zip"),
        ('{"a": 1}\n'.encode("utf-16"), "UTF-16"),
        ('{"a": 1}\n'.encode("utf-16-le"), "UTF-16"),
        ('{"a": 1}\n'.encode("utf-16-be"), "UTF-16"),
        (b"\x80\x04\x95\x10\0\0\0\0\0\0\0}q\0.", "pickle"),
        (b"<!DOCTYPE html><html><body>Sign in", "HTML"),
        (b"\n  <html>", "HTML"),
        (b"<?xml version='1.0'?>", "XML"),
        ((64).to_bytes(8, "little") + b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "safetens"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        (b"%PDF-1.7", "PDF"),
        (b"SQLite format 3\0", "SQLite"),
        (bytes(range(256)) * 4, "binary"),
        (b"x" * 257 + b"ustar" + b"\0" * 300, "tar"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["data.jsonl", "data.txt", "data"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_what_is_no_data_file_is_said(
    content: bytes, word: str, name: str, pack: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    found = read(tmp_path, pack(content), name)
    assert problems_of(found) == [(1, "unknown_container")]
    assert word in found[0].problems[0].message
    assert found[0].problems[0].hint


def test_every_magic_number_has_a_hint(tmp_path: Path) -> None:
    from peft_service.containers import sniff

    for magic, looks_like, hint in sniff._MAGICS:
        (found,) = read(tmp_path, magic + b"\x01\x02 rest")
        assert looks_like in found.problems[0].message
        assert found.problems[0].hint == hint != ""


# ------------------------------------------------------------------------------------------------------
# Files that end too early, or have nothing


@pytest.mark.parametrize(
    "name",
    [
        "compact.json",
        "indented.json",
        "data.jsonl.gz",
        "data.csv.zst",
        "data.txt.gz",
        "data.parquet",
        "stream.arrow",
        "file.arrow",
        "compact.json.gz",
        "data.parquet.zst",
    ],
)
def test_a_file_that_ends_too_early_gives_what_it_has_and_a_problem(name: str, tmp_path: Path) -> None:
    make = NAMES.get(name) or (
        lambda rows: gzip.compress("".join(row["text"] + "\n" for row in rows).encode())
    )
    rows = ROWS[:2] * 3 if "txt" not in name else [{"text": f"line {number}"} for number in range(6)]
    content = make(rows)
    # A child process for each cut takes a third of a second.
    cuts = 12 if any(kind in name for kind in COLUMNAR) else 200
    for cut in sorted({1 + number * (len(content) - 2) // cuts for number in range(cuts + 1)}):
        found = read(tmp_path, content[:cut], name)
        if cut < 10 and not found[-1].problems:
            continue  # too little to be known by
        got = [record.row for record in found if record.row is not None]
        whole_lines = got == rows[: len(got)] or (
            name.startswith(("data.csv", "data.txt")) and got[:-1] == rows[: len(got) - 1]
        )
        assert whole_lines, (cut, got)
        assert found[-1].problems, (cut, found)


def test_a_stream_that_is_cut_between_batches_is_known_by_its_missing_end(tmp_path: Path) -> None:
    found = read(tmp_path, arrow(ROWS)[:-8])
    assert rows_of(found) == [*ROWS, None]
    assert problems_of(found) == [(len(ROWS) + 1, "truncated")]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.txt", "x.parquet", "x"])
def test_an_empty_file_has_no_records(name: str, pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    assert read(tmp_path, pack(b""), name) == []


@pytest.mark.parametrize("name", ["data.parquet", "stream.arrow", "file.arrow"])
def test_columns_without_rows_have_no_records(name: str, tmp_path: Path) -> None:
    empty, made = pa.Table.from_pylist(ROWS).slice(0, 0), io.BytesIO()
    if name == "data.parquet":
        pq.write_table(empty, made)
    else:
        with (pa.ipc.new_file if "file" in name else pa.ipc.new_stream)(made, empty.schema) as writer:
            writer.write_table(empty)
    assert read(tmp_path, made.getvalue(), name) == []


# ------------------------------------------------------------------------------------------------------
# Fuzzing


def is_a_report(path: Path, name: str) -> None:
    for record in records(path, name, lambda problem: None):
        assert (record.row is None) == bool(record.problems)
        assert record.number >= 1
        if record.row is not None:
            json.dumps(record.row, allow_nan=False, ensure_ascii=False).encode()
        for problem in record.problems:
            assert problem.code
            assert problem.message
            for text in (problem.message, problem.hint, problem.excerpt, problem.path):
                text.encode()
                assert "\0" not in text


@given(
    content=st.binary(max_size=300),
    name=st.sampled_from(["x.jsonl", "x.json", "x.csv", "x.tsv", "x.txt", "x"]),
)
@example(content=b"[" * 5000, name="x.json")
@example(content=b'[{"a":' * 5000, name="x.json")
@example(content=b"\xff\xff\xff\xff", name="x")
@example(content=b"\x1f\x8b", name="x")
@example(content=b"\x50\x2a\x4d\x18", name="x")
@example(content=b"PAR1PAR1", name="x")
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bytes_end_in_a_report(content: bytes, name: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    is_a_report(path, name)


TOKENS = [
    b"[",
    b"]",
    b"{",
    b"}",
    b'"',
    b"\\",
    b",",
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b" ",
    b"1e999",
    b"NaN",
    b"\\ud800",
]


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Some small changes: bytes overwritten, inserted, removed, parts doubled, the end cut off."""
    kinds = st.sampled_from(["set", "insert", "delete", "double", "cut"])
    changes = draw(
        st.lists(
            st.tuples(kinds, st.floats(0, 1), st.sampled_from(TOKENS), st.integers(1, 40)),
            min_size=1,
            max_size=6,
        )
    )

    def change(content: bytes) -> bytes:
        for kind, share, token, size in changes:
            at = int(share * len(content))
            if kind == "set":
                content = content[:at] + token + content[at + len(token) :]
            elif kind == "insert":
                content = content[:at] + token + content[at:]
            elif kind == "delete":
                content = content[:at] + content[at + size :]
            elif kind == "double":
                content = content[: at + size] + content[at:]
            else:
                content = content[:at]
        return content

    return change


@given(
    name=st.sampled_from(
        [name for name in NAMES if not any(kind in name for kind in (*COLUMNAR, "feather"))]
    ),
    change=mutations(),
)
@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_ends_in_a_report(name: str, change: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(change(NAMES[name](ROWS[:4] + NESTED if not strings_only(name) else ROWS[:4])))
    is_a_report(path, name)


@given(
    name=st.sampled_from([name for name in MADE if any(kind in name for kind in COLUMNAR)]),
    change=mutations(),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_columns_end_in_a_report(name: str, change: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(change(NAMES[name](ROWS[:4])))
    is_a_report(path, name)


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(
    rows=st.lists(st.dictionaries(TEXT, VALUES, max_size=4), max_size=5),
    indent=st.sampled_from([None, 0, 1, "\t"]),
    chunk=st.integers(1, 50),
)
@settings(max_examples=300, deadline=None)
def test_any_array_is_what_python_reads_however_it_is_cut_into_chunks(
    rows: list[dict[str, Any]], indent: Any, chunk: int
) -> None:
    data = json.dumps(rows, indent=indent, ensure_ascii=False).encode()
    pieces = (data[start : start + chunk] for start in range(0, len(data), chunk))
    found = list(containers.json_array.read(pieces, lambda problem: None))
    assert [record.row for record in found] == json.loads(data)


@given(
    rows=st.lists(st.lists(TEXT, min_size=2, max_size=2), max_size=6),
    delimiter=st.sampled_from(table.DELIMITERS),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    ending=st.sampled_from(["\n", "\r\n"]),
    chunk=st.integers(1, 50),
)
@settings(max_examples=300, deadline=None)
def test_any_table_is_what_was_written(
    rows: list[list[str]], delimiter: str, quoting: Any, ending: str, chunk: int
) -> None:
    made = io.StringIO(newline="")
    writer = csv.writer(made, delimiter=delimiter, quoting=quoting, lineterminator=ending)
    writer.writerows([["a", "b"], *rows])
    data = made.getvalue().encode()
    pieces = (data[start : start + chunk] for start in range(0, len(data), chunk))
    if quoting == csv.QUOTE_MINIMAL and any("\r" in text for row in rows for text in row):
        return  # Python's writer does not quote it, and then it is part of a line's end
    found = list(table.read(pieces, delimiter, lambda problem: None))
    assert [record.row for record in found] == [{"a": one, "b": other} for one, other in rows]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "piece", ["{", "[", '{"a":', '{"a":[', '{"a":"', ',{"a":1', '{"a":1,', "1,", '"', '{"a":1}']
)
def test_an_array_of_attacks_takes_linear_time(piece: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('[{"a": 1}, ' + piece * (2 * MiB // len(piece)))
    for count, _ in enumerate(records(path, "x.json")):
        if count > 2_000:
            break


# ------------------------------------------------------------------------------------------------------
# Memory


READER = """
import resource, sys
from pathlib import Path
from peft_service.containers import records
count = sum(record.row is not None for record in records(Path(sys.argv[1])))
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def synthetic(path: Path, size: int) -> int:
    """Write rows of 1 KB that do not compress well, `size` bytes of them; how many there are."""
    generator, words = random.Random(0), [hashlib.sha256(bytes([n])).hexdigest()[:9] for n in range(250)]
    array_of = ".json" in path.suffixes
    begin, between, end = ("[\n  ", ",\n  ", "\n]") if array_of else ("", "\n", "\n")
    compress = zlib.compressobj(1, wbits=31) if path.suffix == ".gz" else None
    count, made = 0, 0
    with path.open("wb") as file:

        def write(text: str) -> int:
            data = text.encode()
            file.write(compress.compress(data) if compress else data)
            return len(data)

        write(begin)
        while made < size:
            texts = [" ".join(generator.choices(words, k=100)) for _ in range(1000)]
            block = between.join(json.dumps({"prompt": text[:30], "completion": text}) for text in texts)
            made += write((between if count else "") + block)
            count += len(texts)
        write(end)
        file.write(compress.flush() if compress else b"")
    return count


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.json", "x.json.gz"])
@pytest.mark.parametrize("megabytes", [20, pytest.param(200, marks=pytest.mark.long)])
def test_a_large_file_takes_no_more_memory_than_a_small_one(
    name: str, megabytes: int, tmp_path: Path
) -> None:
    peaks = []
    for size in (4, megabytes):
        path = tmp_path / name
        count = synthetic(path, size * 1000**2)
        command = [sys.executable, "-c", READER, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows, peak = map(int, done.stdout.split())
        assert rows == count
        peaks.append(peak)
    assert peaks[1] < peaks[0] + 12, peaks  # MiB


# ------------------------------------------------------------------------------------------------------
# Folders


def test_a_folder_is_its_data_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".cache").mkdir()
    for name, rows in (
        ("b/2.jsonl", ROWS[:1]),
        ("a.parquet", ROWS[1:3]),
        ("b/10.csv.gz", ROWS[3:4]),
        (".cache/x.json", ROWS),
    ):
        (tmp_path / name).write_bytes(
            NAMES["data." + name.split(".", 1)[1]](rows) if "cache" not in name else array(rows)
        )
    for name in ("README.md", "dataset_info.json", "state.json", "_SUCCESS", "run.py", ".hidden.jsonl"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "link.jsonl").symlink_to("/etc/passwd")
    parts = parts_of(tmp_path)
    assert [name for name, _ in parts] == ["a.parquet", "b/10.csv.gz", "b/2.jsonl"]
    found = list(records_of(parts))
    assert [(part, record.number, record.row) for part, record in found] == [
        (0, 1, ROWS[1]), (0, 2, ROWS[2]), (1, 2, ROWS[3]), (2, 1, ROWS[0]),
    ]  # fmt: skip
    backwards = list(records_of(parts[::-1]))
    assert [record.row for _, record in backwards] == [record.row for _, record in found]
    assert [part for part, _ in backwards] == [2, 2, 1, 0]


def test_warnings_say_which_part_they_are_of(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x\n\ny\n")
    (tmp_path / "b").write_bytes(b"\xef\xbb\xbf" + jsonl(ROWS))
    warnings: list[tuple[int, str]] = []
    parts = [("b.jsonl", tmp_path / "b"), ("a.txt", tmp_path / "a")]
    list(records_of(parts, lambda part, problem: warnings.append((part, problem.code))))
    assert warnings == [(1, "blank_line"), (0, "bom")]


def test_which_names_are_data() -> None:
    for name in ("a.jsonl", "a/b.JSON.gz", "x.parquet", "y.arrow.zst", "z.txt", "train-00000-of-00001.csv"):
        assert is_data(name), name
    for name in (
        "a.py",
        "a.pkl",
        "README.md",
        ".a.jsonl",
        "_x/a.jsonl",
        "a/state.json",
        "jsonl",
        "a.jsonl.zip",
        "",
    ):
        assert not is_data(name), name


# ------------------------------------------------------------------------------------------------------
# Real files


@needs_shared
def test_all_real_files_have_the_rows_that_their_manifest_says() -> None:
    manifest = json.loads((SHARED / "MANIFEST.json").read_text())
    assert len(manifest) == 26
    for entry in manifest:
        warnings: list[Problem] = []
        found = list(records(SHARED / entry["file"], warn=warnings.append))
        rows, problems = sum(record.row is not None for record in found), problems_of(found)
        if entry["file"] == "llamafactory/dataset_info.json":  # one indented object: no data set
            assert rows == 0
            assert "indented JSON" in found[0].problems[0].hint
            continue
        assert problems == [], entry["file"]
        # The manifest counts lines, and no rows of the two files of a tokenizer.
        blank = sum(int(warning.message.split()[0]) for warning in warnings if warning.code == "blank_line")
        expected = {"tokenizer-gpt2/vocab.json": 1, "tokenizer-gpt2/merges.txt": 50_001}.get(
            entry["file"], entry["rows"]
        )
        assert rows + blank == expected, entry["file"]
        assert (blank > 0) == (entry["file"] == "tinyshakespeare/input.txt")


def test_importing_it_loads_no_reader_of_columns() -> None:
    code = (
        "import sys, peft_service.containers;"
        "assert not {'pyarrow', 'zstandard', 'torch', 'numpy', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
