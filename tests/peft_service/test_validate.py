"""Validation of whole files: everything is found, nothing crashes it, and memory stays small."""

import hashlib
import json
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_service.columns import Columns
from peft_service.containers.jsonl import MAX_LINE_BYTES, lines_of
from peft_service.errors import InvalidTrainingFile
from peft_service.leaks import found_secrets
from peft_service.validate import RowHashes, overlap, validate

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
    assert [warning.code for warning in report.warnings] == ["duplicate_rows", "few_rows"]
    assert (report.container, report.columns_seen) == ("jsonl", {"prompt": 4, "completion": 4})
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
    assert [warning.code for warning in report.warnings] == [
        "bom",
        "blank_line",
        "duplicate_rows",
        "few_rows",
    ]


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


def lines(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


CHAT = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}


def test_rows_of_no_known_format_are_a_warning_that_says_which_mapping_is_wanted(tmp_path):
    report = report_of(tmp_path, lines({"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}))
    assert report.ok
    assert (report.format, report.rows, report.statistics["duplicate_rows"]) == (None, 2, 0)
    assert report.columns_seen == {"question": 2, "answer": 2}
    warning = report.warnings[0]
    assert (warning.code, warning.line) == ("unknown_format", 1)
    assert warning.message.endswith('its keys are "question", "answer". The same in 1 more row.')
    assert 'mapping: {"prompt": "question", "completion": "answer"}' in warning.hint


def test_beside_rows_of_a_known_format_they_are_problems_wherever_they_are(tmp_path):
    strange = {"question": "a"}
    report = report_of(tmp_path, lines(strange, strange) + b"{\n" + lines(CHAT, strange, CHAT))
    assert found(report) == [
        (1, "unknown_format"),
        (2, "unknown_format"),
        (3, "not_json"),
        (5, "missing_key"),
    ]
    assert (report.rows, report.problem_count, report.bad_lines) == (2, 4, 4)
    assert report.statistics["duplicate_rows"] == 1


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        (CHAT, {"messages": CHAT["messages"][:1]}, "no_assistant"),
        (CHAT, {**CHAT, "label": True}, "mixed_formats"),
        (CHAT, {"prompt": "a", "completion": "b"}, "mixed_formats"),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a"}, "missing_key"),
        ({"prompt": "a"}, {"prompt": "a", "completion": "b"}, "mixed_formats"),
        ({"text": "a"}, {"text": "a", "label": "b"}, "mixed_formats"),
        ({"text": "a", "label": "b"}, {"text": "a"}, "missing_key"),
        ({"text": "a", "label": 0.5}, {"text": "a", "label": 1}, None),
        ({"text": "a", "label": 1}, {"text": "a", "label": 0.5}, "mixed_formats"),
        (
            {"prompt": "a", "completion": "b", "label": True},
            {"prompt": "a", "completion": "b"},
            "missing_key",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b"}, "missing_key"),
    ],
)
def test_the_first_row_says_what_the_others_must_be(tmp_path, first, second, code):
    report = report_of(tmp_path, lines(first, second))
    assert found(report) == ([(2, code)] if code else [])


def test_a_mixed_row_is_told_what_the_file_is_and_since_when(tmp_path):
    report = report_of(tmp_path, lines(CHAT, {"prompt": "a", "completion": "b"}))
    assert report.problems[0].message == "This row is prompt_completion, but the file is chat since line 1."


def test_with_a_mapping_rows_are_read_as_it_says_and_what_it_misses_is_a_problem(tmp_path):
    columns = Columns.model_validate({"prompt": "question", "completion": "answers[0]"})
    rows = [{"question": "a", "answers": ["b"]}, {"question": "a"}, {"qestion": "a", "answers": [""]}]
    report = report_of(tmp_path, lines(*rows, rows[0]), columns=columns)
    assert (report.format, report.rows) == ("prompt_completion", 2)
    assert [(p.line, p.path, p.code) for p in report.problems] == [
        (2, "completion", "column_not_found"),
        (3, "prompt", "column_not_found"),
    ]
    assert report.columns_seen == {"question": 3, "answers": 3, "qestion": 1}
    assert report.statistics["ignored_columns"] == {}
    nothing = Columns.model_validate({"x": "question"})
    assert [code for _, code in found(report_of(tmp_path, lines(rows[0]), columns=nothing))] == [
        "unknown_format"
    ]


def test_a_format_can_be_asked_for(tmp_path):
    content = lines(CHAT, {"messages": CHAT["messages"][:1]}, {"text": "a"})
    report = report_of(tmp_path, content, format="prompts")
    assert (report.format, report.rows) == ("prompts", 2)
    assert found(report) == [(3, "mixed_formats")]
    assert "the file is to be read as prompts" in report.problems[0].message
    assert found(report_of(tmp_path, lines({"x": 1}), format="chat")) == [(1, "unknown_format")]


def test_several_files_are_one_data_set_and_problems_name_their_file(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"prompt,completion\na,b\n")
    two.write_bytes(lines({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}, CHAT))
    report = validate([("a.csv", one), ("b.jsonl", two)])
    assert (report.format, report.rows, report.bytes) == ("prompt_completion", 2, 22 + two.stat().st_size)
    assert report.statistics["duplicate_rows"] == 1
    assert [(p.file, p.line, p.code) for p in report.problems] == [
        ("b.jsonl", 2, "empty_completion"),
        ("b.jsonl", 3, "mixed_formats"),
    ]
    assert str(report.problems[0]).startswith("b.jsonl, line 2, completion: ")
    assert 'but the data set is prompt_completion since line 2 of "a.csv"' in report.problems[1].message
    assert report.error().details["errors"][0]["file"] == "b.jsonl"
    again = validate([("a.csv", one), ("c.jsonl", two)])
    assert again.sha256 != report.sha256


def test_what_is_worth_a_look_is_counted_with_its_lines(tmp_path):
    trailing = {"messages": [*CHAT["messages"], {"role": "user", "content": "thanks"}]}
    report = report_of(tmp_path, lines(CHAT, trailing, {**trailing, "id": 3}))
    assert report.ok
    (warning,) = [warning for warning in report.warnings if warning.code == "trailing_messages"]
    assert (warning.line, warning.path) == (2, "messages[2]")
    assert warning.message == (
        "1 message after the last one that is trained: nobody reads them. The same in 1 more row."
    )
    assert report.statistics["warned"] == {"trailing_messages": {"count": 2, "lines": [2, 3]}}
    assert report.statistics["ignored_columns"] == {"id": 1}
    (warning,) = [warning for warning in report.warnings if warning.code == "ignored_columns"]
    assert warning.message.endswith('"id" (1).')
    # The id is read by nobody, so the two rows teach the same.
    assert report.statistics["duplicate_rows"] == 1


SECRETS = [
    ("AKIAIOSFODNN7EXAMPLE", "an AWS access key"),
    ("-----BEGIN RSA PRIVATE KEY-----", "a private key"),
    ("ghp_" + "a1" * 18, "a GitHub token"),
    ("xoxb-1234567890-abc", "a Slack token"),
    ("AIza" + "a" * 35, "a Google API key"),
    ("hf_" + "a" * 34, "a Hugging Face token"),
    ("sk-proj-" + "a" * 40, "an API key"),
    ("write to ada@example.org", "an e-mail address"),
    ("4111 1111 1111 1111", "the number of a payment card"),
    ("378282246310005", "the number of a payment card"),
]
HARMLESS = [
    *(
        "4111 1111 1111 1112",
        "1234567890123456",
        "3.1415926535897932",
        "AKIA",
        "sk-learn",
        "a@b",
        "@property",
    ),
    *("AKIAIOSFODNN7EXAMPLEX", "2024-01-31 12:00:00", "hf_hub_download", "mailto@", "41111111111111111111"),
]


@pytest.mark.parametrize(("text", "what"), SECRETS)
def test_secrets_and_personal_data_are_warned_of_without_showing_them(tmp_path, text, what):
    row = {"prompt": "a", "completion": f"it is {text}."}
    report = report_of(tmp_path, lines({"prompt": "a", "completion": "b"}, row))
    (warning,) = [one for one in report.warnings if one.code in ("secret", "personal_data")]
    assert (warning.line, warning.excerpt) == (2, "")
    assert what in warning.message
    assert text not in report.model_dump_json()


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_is_none(text):
    assert found_secrets(f"it is {text}.".encode()) == []


@settings(deadline=None)
@given(st.binary(max_size=200) | st.text("0123456789- @.AKIAxoxsk", max_size=200).map(str.encode))
def test_looking_for_secrets_never_raises(raw):
    found_secrets(raw)


def test_looking_for_secrets_in_a_hostile_row_ends_soon(tmp_path):
    started = time.monotonic()
    for text in (
        "a@" * 500_000,
        "a@b." * 250_000,
        "4111-" * 200_000,
        "-----BEGIN " * 100_000,
        "x" * 1_000_000,
    ):
        found_secrets(text.encode())
    assert time.monotonic() - started < 10


def test_classes_with_a_single_row_few_rows_and_one_endless_row_are_worth_a_look(tmp_path):
    rows = [{"text": f"text {index}", "label": "ab"[index % 2]} for index in range(20)]
    report = report_of(tmp_path, lines(*rows, {"text": "x" * 30_000, "label": "rare"}))
    assert [(warning.code, warning.line) for warning in report.warnings] == [
        ("rare_label", 0),
        ("length_skew", 21),
    ]
    assert report.statistics["label_counts"] == {"a": 10, "b": 10, "rare": 1}
    assert report.statistics["labels"] == ["a", "b", "rare"]
    assert [warning.code for warning in report_of(tmp_path, lines(*rows[:9])).warnings] == ["few_rows"]


def test_a_row_without_a_task_among_others_with_one_is_worth_a_look(tmp_path):
    rows = [{"text": "a", "label": "b", "task": "t"}, {"text": "c", "label": "d"}]
    report = report_of(tmp_path, lines(*rows))
    assert [(w.code, w.line) for w in report.warnings] == [("few_rows", 0), ("task_missing", 2)]
    assert report.statistics["tasks"] == ["t"]


def test_rows_of_the_validation_data_that_are_trained_on_are_found_in_any_container(tmp_path):
    train, valid = tmp_path / "train.csv", tmp_path / "valid.jsonl"
    train.write_bytes(b"completion,prompt,id\nb,a,1\nd,c,2\n")
    rows = [
        {"prompt": "x", "completion": "y"},
        {"prompt": "c", "completion": "d"},
        {"prompt": "c", "completion": ""},
    ]
    valid.write_bytes(lines(*rows, rows[1]))
    seen, asked = RowHashes(), RowHashes()
    validate(train, hashes=seen)
    validate([("v.jsonl", valid), ("w.jsonl", valid)], hashes=asked)
    assert (len(seen.hashes), len(asked.hashes)) == (2, 6)
    both = overlap(seen, asked)
    assert (both.rows, both.lines) == (4, (("v.jsonl", 2), ("v.jsonl", 4), ("w.jsonl", 2), ("w.jsonl", 4)))
    warning = both.warning()
    assert (warning.code, warning.file, warning.line) == ("train_validation_overlap", "v.jsonl", 2)
    assert overlap(seen, RowHashes()).warning() is None


def test_row_hashes_are_the_same_in_every_process(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines(CHAT, {"messages": [*CHAT["messages"], *CHAT["messages"]]}))
    code = (
        "import sys; from pathlib import Path; from peft_service.validate import RowHashes, validate\n"
        "found = RowHashes(); validate(Path(sys.argv[1]), hashes=found); print(found.hashes.tolist())"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(said) == 1


def test_hashes_of_rows_that_turn_out_to_be_bad_are_forgotten(tmp_path):
    hashes = RowHashes()
    report_of(tmp_path, lines({"x": 1}, {"x": 2}, CHAT), hashes=hashes)
    assert len(hashes.hashes) == len(hashes.lines) == 1
    assert hashes.place(0) == ("data.jsonl", 3)


@needs_shared
@pytest.mark.parametrize(
    ("file", "format", "rows", "warned"),
    [
        ("gsm8k/train.jsonl", None, 7473, {"unknown_format"}),
        ("llamafactory/identity.json", "instruction", 91, set()),
        ("llamafactory/alpaca_en_demo.json", "instruction", 999, {"duplicate_rows", "personal_data"}),
        ("llamafactory/alpaca_zh_demo.json", "instruction", 1000, {"duplicate_rows"}),
        ("llamafactory/glaive_toolcall_en_demo.json", "sharegpt", 300, {"duplicate_rows", "personal_data"}),
        ("llamafactory/dpo_en_demo.json", "preference", 300, {"duplicate_rows", "personal_data"}),
        ("llamafactory/kto_en_demo.json", "unpaired", 300, {"personal_data"}),
        ("llamafactory/c4_demo.jsonl", "text", 300, {"personal_data", "length_skew"}),
        ("llamafactory/v1_sft_demo.jsonl", "chat", 500, {"duplicate_rows", "personal_data"}),
        ("llamafactory/v1_dpo_demo.jsonl", "preference", 10, set()),
        ("llamafactory/reason_tool_use_demo_50.jsonl", "chat", 50, {"personal_data"}),
        ("e2e/valid.txt", "text", 4672, {"duplicate_rows"}),
        ("tinyshakespeare/input.txt", "text", 32777, {"blank_line", "duplicate_rows"}),
        ("banking77/train.csv", "text", 10003, {"ignored_columns"}),
        ("bfcl/BFCL_v4_simple_python.json", None, 400, {"unknown_format"}),
        ("bfcl/BFCL_v4_parallel.json", None, 200, {"unknown_format"}),
        ("bfcl/possible_answer/BFCL_v4_simple_python.json", None, 400, {"unknown_format"}),
        ("bfcl/possible_answer/BFCL_v4_parallel.json", None, 200, {"unknown_format"}),
        ("self-instruct/seed_tasks.jsonl", None, 175, {"unknown_format"}),
        ("anthropic-evals/interest-in-math.jsonl", None, 1000, {"unknown_format"}),
        ("kdconv/music_dev.json", None, 150, {"unknown_format"}),
        (
            "tau-bench/airline_trajectories.jsonl",
            "chat",
            100,
            {"trailing_messages", "ignored_columns", "personal_data"},
        ),
        ("tau-bench/airline_tools.json", None, 14, {"unknown_format"}),
    ],
)
def test_every_real_file_goes_in_as_it_is(file, format, rows, warned):
    report = validate(SHARED / file)
    assert [str(problem) for problem in report.problems] == []
    assert (report.format, report.rows) == (format, rows)
    assert {warning.code for warning in report.warnings} == warned


def test_importing_it_loads_neither_torch_nor_transformers():
    code = (
        "import sys, peft_service.validate, peft_service.formats\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
