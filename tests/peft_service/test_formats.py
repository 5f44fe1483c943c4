"""Every format: finds its rows, names everything that is wrong, and never ends in a crash."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_service.formats import FORMATS, BadJSON, detect, format_of, parse_json

CHAT, PAIR, INSTRUCTION = format_of("chat"), format_of("prompt_completion"), format_of("instruction")
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
ASK, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def codes(format: Any, row: dict[str, Any]) -> set[tuple[str, str]]:
    return {(problem.path, problem.code) for problem in format.problems(row)}


@pytest.mark.parametrize("variant", FORMATS, ids=lambda v: v.model_fields["kind"].default)
def test_a_formats_own_sample_is_good_detected_and_teaches_something(variant):
    format, row = variant(), json.loads(variant.sample)
    assert format.problems(row) == []
    assert detect(row) == format == format_of(format.kind)
    example = format.messages_or_text(row)
    assert example.completion or any(example.trained) or example.label or example.tags or example.answer
    assert set(row) <= set(variant.keys)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
WORDS = [
    "messages",
    "role",
    "content",
    "weight",
    "name",
    "tool_calls",
    "tool_call_id",
    "function",
    "arguments",
]
WORDS += [
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "system",
    "history",
    "tools",
    "id",
    "type",
]
NEARLY_RIGHT = st.recursive(
    st.sampled_from(["user", "assistant", "tool", "function", "{}", "", "c1", 0, 1, None, True, 2.5]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=5),
    max_leaves=25,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=5), JSON | NEARLY_RIGHT, max_size=6))
def test_whatever_a_row_holds_checking_never_raises_and_a_good_row_gives_an_example(row):
    for variant in FORMATS:
        format = variant()
        problems = format.problems(row)
        assert all(problem.code and problem.message for problem in problems)
        if not problems:
            example = format.messages_or_text(row)
            taught = (example.completion, any(example.trained), example.label, example.tags, example.answer)
            assert any(taught)
            assert len(example.messages) == len(example.trained)
            assert list(format.roles(row)) in ([], [message["role"] for message in example.messages])


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ("hi", {("messages", "wrong_type")}),
        ([], {("messages", "empty_messages")}),
        (["hi"], {("messages[0]", "wrong_type")}),
        ([ASK], {("messages", "no_assistant")}),
        ([ASK, ANSWER, ASK], {("messages[2].role", "last_not_assistant")}),
        ([{**ASK, "role": "human"}, ANSWER], {("messages[0].role", "unknown_role")}),
        ([{**ASK, "role": ["user"]}, ANSWER], {("messages[0].role", "wrong_type")}),
        ([{"content": "x"}, ANSWER], {("messages[0].role", "missing_key")}),
        ([{"role": "user"}, ANSWER], {("messages[0].content", "missing_content")}),
        ([{"role": "user", "content": 3}, ANSWER], {("messages[0].content", "wrong_type")}),
        ([ASK, {"role": "assistant", "content": None}], {("messages[1].content", "missing_content")}),
        ([ASK, {"role": "assistant", "content": " \n"}], {("messages[1].content", "empty_completion")}),
        ([ASK, {**ANSWER, "weight": 2}], {("messages[1].weight", "weight_not_0_or_1")}),
        ([ASK, {**ANSWER, "weight": True}], {("messages[1].weight", "weight_not_0_or_1")}),
        ([ASK, {**ANSWER, "weight": "1"}], {("messages[1].weight", "weight_not_0_or_1")}),
        ([ASK, {**ANSWER, "weight": 0}], {("messages", "nothing_to_learn")}),
        ([{**ASK, "weight": 1}, ANSWER], {("messages[0].weight", "weight_not_allowed")}),
        ([{**ASK, "contents": 1}, ANSWER], {("messages[0].contents", "unknown_key")}),
        ([{**ASK, "name": 1}, ANSWER], {("messages[0].name", "wrong_type")}),
        (
            [{**ASK, "content": [{"type": "image_url"}]}, ANSWER],
            {("messages[0].content[0]", "unsupported_content")},
        ),
        (
            [ASK, {"role": "tool", "content": "3", "tool_call_id": "c1"}, ANSWER],
            {("messages[1].tool_call_id", "tool_call_id_unknown")},
        ),
        ([ASK, {"role": "tool", "content": "3"}, ANSWER], {("messages[1].tool_call_id", "missing_key")}),
        (
            [ASK, {**ANSWER, "tool_calls": [{**CALL, "function": {"name": "add", "arguments": {"a": 1}}}]}],
            {("messages[1].tool_calls[0].function.arguments", "arguments_not_json_string")},
        ),
        (
            [ASK, {**ANSWER, "tool_calls": [{**CALL, "function": {"name": "add", "arguments": "{a: 1}"}}]}],
            {("messages[1].tool_calls[0].function.arguments", "arguments_not_json_string")},
        ),
        ([{**ASK, "tool_calls": [CALL]}, ANSWER], {("messages[0].tool_calls", "unexpected_key")}),
        (
            [{"role": "usr", "content": None}, {**ANSWER, "weight": 7}, {"role": "user", "content": "x"}],
            {
                ("messages[0].role", "unknown_role"),
                ("messages[0].content", "missing_content"),
                ("messages[1].weight", "weight_not_0_or_1"),
                ("messages[2].role", "last_not_assistant"),
            },
        ),
    ],
)
def test_all_that_is_wrong_with_a_conversation_is_named_at_its_place(messages, expected):
    assert codes(CHAT, {"messages": messages}) == expected


def test_a_tool_conversation_is_good_and_its_arguments_reach_the_template_as_an_object():
    row = {
        "messages": [
            {
                "role": "developer",
                "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": " brief."}],
            },
            ASK,
            {"role": "assistant", "content": None, "tool_calls": [CALL], "name": None, "weight": 0},
            {"role": "tool", "content": "3", "tool_call_id": "c1"},
            {**ANSWER, "weight": 1},
        ],
        "tools": [TOOL],
        "parallel_tool_calls": False,
    }
    assert CHAT.problems(row) == []
    example = CHAT.messages_or_text(row)
    assert example.trained == (False, False, False, False, True)
    assert example.messages[0]["content"] == "Be brief."
    assert example.messages[2]["content"] == ""
    assert example.messages[2]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert example.tools == (TOOL,)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a"}, {("completion", "missing_key")}),
        ({"promt": "a", "completion": "b"}, {("prompt", "missing_key"), ("promt", "unknown_key")}),
        ({"prompt": 1, "completion": "b"}, {("prompt", "wrong_type")}),
        ({"prompt": "a", "completion": " "}, {("completion", "empty_completion")}),
        ({"prompt": "a", "completion": [ANSWER]}, {("completion", "wrong_type")}),
        ({"prompt": [ASK], "completion": []}, {("completion", "empty_completion")}),
        ({"prompt": [ASK], "completion": [ASK]}, {("completion", "no_assistant")}),
        ({"prompt": [{"role": "user"}], "completion": [ANSWER]}, {("prompt[0].content", "missing_content")}),
        (
            {"prompt": [ASK], "completion": [{**ASK, "role": "bot"}, ANSWER]},
            {("completion[0].role", "unknown_role")},
        ),
        ({"prompt": "a", "completion": "b", "tools": [TOOL]}, {("tools", "unexpected_key")}),
    ],
)
def test_what_is_wrong_with_a_prompt_and_its_completion(row, expected):
    assert codes(PAIR, row) == expected


def test_only_the_completion_of_message_lists_is_trained_and_it_may_answer_a_call_of_the_prompt():
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    row = {
        "prompt": [ASK, ANSWER, ASK, call],
        "completion": [{"role": "tool", "content": "3", "tool_call_id": "c1"}, ANSWER],
    }
    assert PAIR.problems(row) == []
    assert PAIR.messages_or_text(row).trained == (False,) * 5 + (True,)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "a"}, {("output", "missing_key")}),
        ({"instruction": "a", "output": ""}, {("output", "empty_completion")}),
        ({"instruction": "", "output": "b"}, {("instruction", "missing_content")}),
        ({"instruction": "", "input": "x", "output": "b"}, set()),
        ({"instruction": "a", "input": 1, "output": "b"}, {("input", "wrong_type")}),
        ({"instruction": "a", "output": "b", "history": ["x"]}, {("history[0]", "wrong_type")}),
        (
            {"instruction": "a", "output": "b", "history": [["x", ""]]},
            {("history[0][1]", "empty_completion")},
        ),
        ({"instruction": "a", "outputs": "b"}, {("output", "missing_key"), ("outputs", "unknown_key")}),
    ],
)
def test_what_is_wrong_with_an_instruction(row, expected):
    assert codes(INSTRUCTION, row) == expected


def test_an_instruction_is_both_a_conversation_and_a_plain_prompt():
    row = {
        "instruction": "Add.",
        "input": "2 2",
        "output": "4",
        "system": "Brief.",
        "history": [["Hi", "Hello"]],
    }
    example = INSTRUCTION.messages_or_text(row)
    assert [(m["role"], m["content"]) for m in example.messages] == [
        ("system", "Brief."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Add.\n\n2 2"),
        ("assistant", "4"),
    ]
    assert example.trained == (False, False, True, False, True)
    assert example.completion == "4"
    assert example.prompt == (
        "Brief.\n\n### Instruction:\nHi\n\n### Response:\nHello\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n2 2\n\n### Response:\n"
    )


def test_an_unknown_key_is_answered_with_the_one_that_was_meant():
    (problem,) = CHAT.problems({"messages": [ASK, {**ANSWER, "wieght": 0}]})
    assert problem.hint == 'did you mean "weight"?'


def test_a_row_with_thousands_of_problems_lists_a_hundred_and_says_so():
    problems = CHAT.problems({"messages": [{"role": "x"}] * 50_000})
    assert len(problems) == 101
    assert problems[-1].code == "too_many_problems"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('{"a": NaN}', "nan"),
        ('{"a": -Infinity}', "nan"),
        ('{"a": 1e999}', "nan"),
        ('{"a": 1' + "0" * 5000 + "}", "not_json"),
        ("{'a': 1}", "not_json"),
        ('{"a": 1,}', "not_json"),
        ('{"a": "\n"}', "not_json"),
        ("", "not_json"),
        ("[" * 100_000, "too_deep"),
    ],
)
def test_what_is_not_strict_json_is_refused(text, code):
    with pytest.raises(BadJSON) as caught:
        parse_json(text)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": {"b": 1, "b": 2}}', [("a.b", "duplicate_key")]),
        ('{"a": ["x\\u0000"]}', [("a[0]", "nul_character")]),
        ('{"a": "\\ud83d"}', [("a", "lone_surrogate")]),
        ('{"\\ud83d": 1}', [('["\ufffd"]', "lone_surrogate")]),
        ('{"a": "\\ud83d\\ude00"}', []),
        ('{"a": "\\\\ud83d"}', []),
        ('{"a": ' + "[" * 63 + "]" * 63 + "}", []),
    ],
)
def test_what_json_allows_and_a_data_file_does_not(text, expected):
    assert [(problem.path, problem.code) for problem in parse_json(text)[1]] == expected


def test_nesting_is_bounded_well_below_what_ends_a_renderer():
    _, problems = parse_json('{"a": ' + "[" * 200 + "]" * 200 + "}")
    assert [problem.code for problem in problems] == ["too_deep"]
