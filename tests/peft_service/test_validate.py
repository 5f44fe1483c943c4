"""Validation of whole files: everything is found, nothing crashes it, and memory stays small."""

import hashlib
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_service.containers.jsonl import MAX_LINE_BYTES, lines_of
from peft_service.errors import InvalidTrainingFile
from peft_service.validate import validate

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not beside the repository")
GOOD = b'{"prompt": "2+2=", "completion": "4"}\n'


def report_of(tmp_path: Path, content: bytes, **options):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    return validate(path, **options)


def found(report) -> list[tuple[int, str]]:
    return [(problem.line, problem.code) for problem in report.problems]


def test_a_good_file_is_measured(tmp_path):
    content = GOOD * 3 + b'{"prompt": "3+3=", "completion": "6"}'
    report = report_of(tmp_path, content)
    assert report.ok
    assert report.error() is None
    assert (report.format, report.rows, report.bytes) == ("prompt_completion", 4, len(content))
    assert report.sha256 == hashlib.sha256(content).hexdigest()
    assert report.statistics["duplicate_rows"] == 2
    assert report.statistics["characters"] == {"p50": 37, "p95": 37, "max": 37}
    assert [warning.code for warning in report.warnings] == ["duplicate_rows"]
    assert type(report).model_validate_json(report.model_dump_json()) == report


def test_every_bad_line_is_reported_with_its_place(tmp_path):
    lines = [
        GOOD,
        b"\n",
        b"{'prompt': 1}\n",
        b"[1, 2]\n",
        b'{"prompt": "\xff", "completion": "x"}\n',
        b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}\n',
        b'{"prompt": "a", "completion": "b", "lable": 1, "prompt": "c"}\n',
        b'{"prompt": "a", "completon": "b"}\n',
        b'{"prompt": "a", "completion": NaN}\n',
        b"\xef\xbb\xbf" + GOOD,
        b'{"prompts": "a"}\n',
        b" \r\n",
        GOOD,
    ]
    report = report_of(tmp_path, b"".join(lines))
    assert found(report) == [
        (2, "blank_line"),
        (3, "not_json"),
        (4, "not_an_object"),
        (5, "not_utf8"),
        (6, "mixed_formats"),
        (7, "duplicate_key"),
        (8, "unknown_key"),
        (8, "missing_key"),
        (9, "nan"),
        (10, "bom"),
        (11, "unknown_key"),
        (11, "missing_key"),
        (11, "missing_key"),
        (12, "blank_line"),
    ]
    assert report.rows == 2
    assert report.bad_lines == 11
    starts = [sum(map(len, lines[:index])) for index in range(len(lines))]
    for problem in report.problems:
        inside = problem.byte_offset - starts[problem.line - 1]
        assert 0 <= inside < len(lines[problem.line - 1])
        assert inside == 0 or problem.code in ("not_json", "not_utf8", "nan")
    assert report.problems[3].byte_offset == starts[4] + lines[4].index(b"\xff")
    assert 'did you mean "completion"?' in report.problems[6].hint

    error = report.error("training_file")
    assert isinstance(error, InvalidTrainingFile)
    assert error.status == 400
    body = json.loads(json.dumps(error.body()))
    assert body["error_count"] == len(body["errors"]) == 14
    assert body["param"] == "training_file"
    assert body["message"].startswith("The file has 14 problems in 11 lines. The first: line 2: ")


def test_all_problems_are_counted_and_only_so_many_listed(tmp_path):
    report = report_of(tmp_path, b"1\n" * 250 + GOOD, limit=100)
    assert (report.problem_count, len(report.problems), report.rows) == (250, 100, 1)
    assert report.complete


@pytest.mark.parametrize("content", [b"", b"\n", b"\n\r\n  \n"])
def test_a_file_without_rows_is_an_error(tmp_path, content):
    assert found(report_of(tmp_path, content)) == [(1, "no_rows")]


def test_a_byte_order_mark_at_the_start_and_blank_lines_at_the_end_only_warn(tmp_path):
    report = report_of(tmp_path, b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") * 2 + b"\n\n")
    assert report.ok
    assert report.rows == 2
    assert [warning.code for warning in report.warnings] == ["bom", "blank_line", "duplicate_rows"]


@pytest.mark.parametrize(
    ("head", "word"),
    [
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"PAR1", "Parquet"),
        (b"PK\x03\x04", "zip"),
        ('{"prompt"'.encode("utf-16"), "UTF-16"),
        (b'[{"prompt": "a", "completion": "b"}]', "array"),
        (b'{\n "prompt": "a"\n}', "indented"),
        (b"prompt,completion\na,b", "CSV"),
    ],
)
def test_a_foreign_file_is_recognised(tmp_path, head, word):
    assert word in report_of(tmp_path, head + b"\n").problems[0].hint


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.binary(max_size=30)
        | st.sampled_from(
            [GOOD, b"{", b'{"prompt":', b"\xef\xbb\xbf", b"\r", b"[" * 2000, b'"\\ud800"', b"\0"]
        ),
        max_size=8,
    ).map(b"\n".join)
)
def test_random_bytes_never_crash_it_and_what_it_says_can_be_stored(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "random.jsonl"
    path.write_bytes(content)
    report = validate(path)
    assert report.bytes == len(content)
    assert report.sha256 == hashlib.sha256(content).hexdigest()
    assert report.rows + report.bad_lines >= 1
    for problem in (*report.problems, *report.warnings):
        for text in (problem.path, problem.message, problem.hint, problem.excerpt):
            assert "\0" not in text
            assert text.encode().decode() == text


@settings(deadline=None)
@given(
    st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")), max_size=10),
    st.lists(st.integers(1, 9), min_size=1, max_size=60),
    st.booleans(),
)
def test_lines_are_the_same_however_the_file_is_cut_into_chunks(lines, sizes, ended):
    content = b"\n".join(lines) + (b"\n" if ended and lines else b"")
    chunks, start = [], 0
    for size in [*sizes, len(content)]:
        chunks.append(content[start : start + size])
        start += size
    expected = content.split(b"\n")
    if expected[-1] == b"":
        expected.pop()
    made = list(lines_of(chunks, longest=8))
    assert [line.size for line in made] == [len(line) for line in expected]
    assert [line.raw for line in made] == [line if len(line) <= 8 else None for line in expected]
    assert [line.number for line in made] == list(range(1, len(expected) + 1))
    assert all(content[line.byte_offset :].startswith(expected[line.number - 1]) for line in made)


def test_an_endless_line_is_one_problem_at_constant_memory(tmp_path):
    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        file.write(GOOD)
        for _ in range(64):
            file.write(b"a" * 1024**2)
        file.write(b"\n" + GOOD)
    tracemalloc.start()
    report = validate(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found(report) == [(2, "line_too_long")]
    assert report.rows == 2
    assert report.bytes == path.stat().st_size
    assert peak < 2.5 * MAX_LINE_BYTES


def test_a_file_of_nothing_but_bad_lines_ends_soon_and_is_still_hashed(tmp_path):
    content = b"1\n" * 100_500
    report = report_of(tmp_path, content)
    assert not report.complete
    assert report.problem_count == 100_000
    assert report.sha256 == hashlib.sha256(content).hexdigest()
    assert "more than 100000 problems" in str(report.error())


@needs_shared
def test_gsm8k_as_it_is_fails_and_the_report_says_what_to_do():
    report = validate(SHARED / "gsm8k" / "train.jsonl")
    assert report.format is None
    assert report.problem_count == 7473
    assert len(report.problems) == 100
    assert {problem.code for problem in report.problems} == {"unknown_format"}
    assert report.problems[0].hint == 'rename "question" to "prompt" and "answer" to "completion"'


@needs_shared
@pytest.mark.parametrize(
    ("file", "code", "word"),
    [
        ("self-instruct/seed_tasks.jsonl", "unknown_key", "known keys"),
        ("llamafactory/alpaca_en_demo.json", "not_json", "JSON array"),
        ("llamafactory/c4_demo.jsonl", "unknown_format", "plain text"),
        ("llamafactory/v1_sft_demo.jsonl", "unknown_key", "weight"),
        ("banking77/train.csv", "not_json", "CSV"),
        ("tau-bench/airline_trajectories.jsonl", "unknown_key", "task"),
    ],
)
def test_real_files_of_other_shapes_get_a_hint(file, code, word):
    report = validate(SHARED / file)
    assert not report.ok
    assert report.problems[0].code == code
    assert word in report.problems[0].hint


@needs_shared
def test_real_tool_conversations_are_good(tmp_path):
    tools = json.loads((SHARED / "tau-bench" / "airline_tools.json").read_text())
    lines = []
    for line in (SHARED / "tau-bench" / "airline_trajectories.jsonl").read_text().splitlines():
        messages = json.loads(line)["messages"]
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        lines.append(json.dumps({"messages": messages, "tools": tools}))
    report = report_of(tmp_path, "\n".join(lines).encode())
    assert [str(problem) for problem in report.problems] == []
    assert report.rows == 100
    assert set(report.statistics["roles"]) == {"system", "user", "assistant", "tool"}


def test_importing_it_loads_neither_torch_nor_transformers():
    code = (
        "import sys, peft_service.validate, peft_service.formats\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
