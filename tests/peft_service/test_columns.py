"""Column mapping: real files of foreign shapes become rows of known formats; what does not fit is said."""

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from peft_service.columns import Columns, mapped, pieces_of, steps_of
from peft_service.formats import detect

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not beside the repository")
ROW = {
    "question": "2+2?",
    "turns": [{"who": "human", "text": "hi"}, {"who": "bot", "text": "hello"}],
    "meta": {"odd.name": 1, "two words": "x"},
    "raw": '[{"role": "user", "content": "hi"}]',
    "line": "name : Aria || a place",
    "none": None,
}


def read(**columns):
    return mapped(ROW, Columns.model_validate(columns))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("question", "2+2?"),
        ("turns[0].text", "hi"),
        ("turns[-1].text", "hello"),
        ("turns[*].text", ["hi", "hello"]),
        ('meta["odd.name"]', 1),
        ('["meta"]["odd.name"]', 1),
        ("meta.two words", "x"),
        ("none", None),
        ({"value": {"a": [1]}}, {"a": [1]}),
        ({"value": None}, None),
        ({"text": "Q: {question}\n{{A}}: {turns[0]}"}, 'Q: 2+2?\n{A}: {"who": "human", "text": "hi"}'),
        ({"text": "no braces"}, "no braces"),
        ({"split": "line", "on": " || ", "part": 1}, "a place"),
        ({"split": "line", "on": " || ", "part": -2}, "name : Aria"),
        ({"json": "raw"}, [{"role": "user", "content": "hi"}]),
        (
            {
                "messages": "turns",
                "role": "who",
                "content": "text",
                "roles": {"human": "user", "bot": "assistant"},
            },
            [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
        ),
    ],
)
def test_a_source_gives_its_value(source, expected):
    assert read(x=source) == ({"x": expected}, [])


@pytest.mark.parametrize(
    ("source", "code", "hint"),
    [
        ("qestion", "column_not_found", 'did you mean "question"?'),
        ("zzz", "column_not_found", 'its columns are "question", "turns", "meta", "raw", "line", "none"'),
        ("turns[2].text", "column_not_found", ""),
        ("turns[*].txt", "column_not_found", 'did you mean "text"?'),
        ("turns.text", "bad_column_path", "[0] takes an element of it, [*] all"),
        ("question[0]", "bad_column_path", ""),
        ("raw[0].content", "bad_column_path", 'is it JSON in a string? {"json": path} reads it'),
        ("none.x", "bad_column_path", ""),
        ("none.x?", "bad_column_path", ""),
        ({"split": "line", "on": " || ", "part": 2}, "column_not_found", ""),
        ({"split": "turns", "on": " || ", "part": 0}, "bad_column_path", ""),
        ({"json": "question"}, "bad_column_path", ""),
        ({"text": "{qestion}"}, "column_not_found", 'did you mean "question"?'),
        ({"messages": "turns", "role": "whom"}, "column_not_found", 'did you mean "who"?'),
        ({"messages": "question"}, "bad_column_path", ""),
    ],
)
def test_a_source_that_leads_nowhere_in_a_row_is_a_problem_of_that_key(source, code, hint):
    row, problems = read(x=source, y="question")
    assert row == {"y": "2+2?"}
    (problem,) = problems
    assert (problem.path, problem.code, problem.hint) == ("x", code, hint)
    assert problem.message


def test_a_path_with_a_question_mark_may_lead_nowhere():
    assert read(x="system?", y="turns[7].text?", z="question?") == ({"z": "2+2?"}, [])


def test_a_conversation_is_texts_in_turn_and_one_that_ends_with_the_user_says_so():
    row, problems = read(conversation="turns[*].text")
    assert problems == []
    assert [(m["role"], m["content"]) for m in row["messages"]] == [("user", "hi"), ("assistant", "hello")]
    odd, _ = mapped({"t": ["a", "b", "c"]}, Columns.model_validate({"conversation": "t"}))
    format = detect(odd)
    assert format.problems(odd) == []
    assert [doubt.code for doubt in format.doubts(odd)] == ["trailing_messages"]
    assert read(conversation="question")[1][0].code == "bad_column_path"


@pytest.mark.parametrize(
    ("columns", "word"),
    [
        ({}, "at least 1"),
        ({"x": ""}, "at least 1"),
        ({"x": "a..b"}, "character 2"),
        ({"x": ".a"}, "character 1"),
        ({"x": "a["}, "character 2"),
        ({"x": "a[b]"}, "character 2"),
        ({"x": "?"}, "empty"),
        ({"x": 3}, "string"),
        ({"x": {"text": "{question"}}, "not closed"),
        ({"x": {"text": "a } b"}}, "closing brace"),
        ({"x": {"text": "{}"}}, "empty"),
        ({"x": {"values": 1}}, "extra"),
        ({"x": {"split": "a", "on": "", "part": 0}}, "at least 1"),
        ({"conversation": "a", "messages": "b"}, "one of them"),
        ({str(index): "a" for index in range(65)}, "at most 64"),
    ],
)
def test_a_mapping_that_is_none_is_refused_with_a_reason(columns, word):
    with pytest.raises(ValidationError, match=word):
        Columns.model_validate(columns)


def test_a_mapping_survives_being_written_down():
    columns = Columns.model_validate(
        {
            "a": "x[0].y",
            "b": {"value": 1},
            "c": {"text": "{x}"},
            "d": {"split": "x", "on": ",", "part": 0},
            "e": {"json": "x"},
            "f": {"messages": "x", "roles": {"bot": "assistant"}},
        }
    )
    assert Columns.model_validate_json(columns.model_dump_json()) == columns
    assert Columns.model_validate(columns.model_dump(mode="json")) == columns


def test_a_template_cannot_make_a_row_of_any_size():
    columns = Columns.model_validate({"x": {"text": "{a}" * 20_000}})
    _, problems = mapped({"a": "b" * 10_000}, columns)
    assert [problem.code for problem in problems] == ["bad_column_path"]


@settings(deadline=None)
@given(st.text(max_size=30) | st.text("ab.[]*?{}\"'01-", max_size=30))
def test_any_text_is_a_path_or_refused(text):
    for read_it in (steps_of, pieces_of):
        said = refused(read_it, text)
        assert said is None or "bad_column_path" in said


def refused(read_it, text: str) -> str | None:
    try:
        read_it(text)
    except ValueError as error:
        return str(error)
    return None


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=10,
)
SOURCES = st.sampled_from(
    [
        "a",
        "a.b",
        "a[0]",
        "a[*].b",
        "b[-1].c?",
        {"text": "{a} {b.c}"},
        {"split": "a", "on": ",", "part": 1},
        {"json": "a"},
        {"messages": "a", "role": "b", "content": "c"},
    ]
)


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3),
    st.dictionaries(st.sampled_from(["prompt", "conversation", "x"]), SOURCES, min_size=1, max_size=3),
)
def test_whatever_a_row_holds_mapping_it_never_raises(row, columns):
    made, problems = mapped(row, Columns.model_validate(columns))
    assert all(problem.code in ("column_not_found", "bad_column_path") for problem in problems)
    json.dumps(made)


def rows_of(name: str):
    text = (SHARED / name).read_text()
    if name.endswith(".csv"):
        return list(csv.DictReader(text.splitlines()))
    if name.endswith(".txt"):
        return [{"text": line} for line in text.splitlines()]
    if text.startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines()]


@needs_shared
@pytest.mark.parametrize(
    ("file", "columns", "format", "rows"),
    [
        ("gsm8k/train.jsonl", {"prompt": "question", "completion": "answer"}, "prompt_completion", 7473),
        ("banking77/train.csv", {"text": "text", "label": "category"}, "classification", 10003),
        (
            "anthropic-evals/interest-in-math.jsonl",
            {
                "prompt": "question",
                "chosen": "answer_matching_behavior",
                "rejected": "answer_not_matching_behavior",
            },
            "preference",
            1000,
        ),
        (
            "bfcl/BFCL_v4_simple_python.json",
            {"messages": "question[0]", "tools": "function"},
            "prompts",
            400,
        ),
        ("bfcl/BFCL_v4_parallel.json", {"messages": "question[0]", "tools": "function"}, "prompts", 200),
        (
            "bfcl/possible_answer/BFCL_v4_parallel.json",
            {"prompt": "id", "completion": {"text": "{ground_truth}"}},
            "prompt_completion",
            200,
        ),
        (
            "self-instruct/seed_tasks.jsonl",
            {"instruction": "instruction", "input": "instances[0].input", "output": "instances[0].output"},
            "instruction",
            175,
        ),
        ("kdconv/music_dev.json", {"conversation": "messages[*].message"}, "chat", 150),
        (
            "e2e/valid.txt",
            {
                "prompt": {"split": "text", "on": "||", "part": 0},
                "completion": {"split": "text", "on": "||", "part": 1},
            },
            "prompt_completion",
            4672,
        ),
        ("tau-bench/airline_tools.json", {"text": {"text": "{function}"}}, "text", 14),
    ],
)
def test_real_files_of_foreign_shapes_go_in_whole(file, columns, format, rows):
    mapping = Columns.model_validate(columns)
    found = []
    for row in rows_of(file):
        made, problems = mapped(row, mapping)
        assert problems == []
        claimed = detect(made)
        assert claimed is not None
        assert claimed.problems(made) == []
        assert list(claimed.doubts(made)) == []
        claimed.messages_or_text(made)
        found.append(claimed.kind)
    assert found == [format] * rows
