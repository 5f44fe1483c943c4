"""Every format: finds its rows, names everything that is wrong, and never ends in a crash."""

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_service.formats import FORMATS, BadJSON, Example, detect, format_of, parse_json, typo_of
from peft_service.formats.conversation import MESSAGE_KEYS

CHAT, PAIR, INSTRUCTION = format_of("chat"), format_of("prompt_completion"), format_of("instruction")
SHAREGPT, PREFERENCE, UNPAIRED = format_of("sharegpt"), format_of("preference"), format_of("unpaired")
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
ASK, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
WORSE = {"role": "assistant", "content": "go away"}
HUMAN, GPT = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}
ADD = '{"name": "add", "arguments": {"a": 1}}'
SAMPLES = [
    (variant(), json.loads(line)) for variant in FORMATS for line in (variant.sample, *variant.dialects)
]


def codes(format: Any, row: dict[str, Any]) -> set[tuple[str, str]]:
    return {(problem.path, problem.code) for problem in format.problems(row)}


def doubts(format: Any, row: dict[str, Any]) -> set[tuple[str, str]]:
    assert format.problems(row) == []
    return {(problem.path, problem.code) for problem in format.doubts(row)}


def teaches(example: Example) -> bool:
    """Whether there is anything in it that some objective learns."""
    return bool(
        example.completion
        or any(example.trained)
        or example.label
        or example.labels is not None
        or example.value is not None
        or example.tags
        or example.answer
        or example.document
        or any(example.token_targets)
        or any(learned for _, learned in example.segments)
        or example.item
    )


@pytest.mark.parametrize(("format", "row"), SAMPLES)
def test_every_way_of_writing_a_format_is_good_detected_as_it_and_teaches_something(format, row):
    assert format.problems(row) == []
    assert detect(row) == format == format_of(format.kind)
    assert format.fits(row)
    assert list(format.doubts(row)) == []
    assert format.ignored(row) == []
    assert teaches(format.messages_or_text(row))
    assert len(list(format.roles(row))) >= len(format.messages_or_text(row).messages)


def test_no_two_formats_ask_for_a_row_at_the_same_time_unless_their_keys_cannot_meet():
    ranks: dict[int, list[str]] = {}
    for variant in FORMATS:
        ranks.setdefault(variant.rank, []).append(variant.model_fields["kind"].default)
    shared = [sorted(kinds) for kinds in ranks.values() if len(kinds) > 1]
    assert shared == [["segments", "token_classification", "tokens"]]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"messages": [ASK, ANSWER]}, "chat"),
        ({"messages": [ASK, ANSWER, ASK]}, "chat"),
        ({"messages": []}, "chat"),
        ({"messages": [{"role": "usr", "content": "x"}]}, "chat"),
        ({"messages": [HUMAN, GPT]}, "chat"),
        ({"messages": [ASK]}, "prompts"),
        ({"messages": [HUMAN]}, "prompts"),
        ({"messages": [{"role": "system", "content": "x"}, ASK], "answer": 1}, "prompts"),
        ({"messages": [{"message": "hi"}, {"message": "hello"}]}, None),
        ({"messages": ["hi", "hello"]}, None),
        ({"messages": "[]"}, None),
        ({"messages": [ASK, ANSWER], "label": True}, "unpaired"),
        ({"messages": [ASK, ANSWER], "label": 1}, "unpaired"),
        ({"messages": [ASK, ANSWER], "label": "greeting"}, "chat"),
        ({"messages": [ASK, ANSWER], "prompt": "hi", "chosen": [ANSWER], "rejected": [WORSE]}, "preference"),
        ({"prompt": "a"}, "prompts"),
        ({"prompt": "a", "answer": "b"}, "prompts"),
        ({"prompt": "a", "response": "b"}, None),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, None),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"completion": "b"}, "prompt_completion"),
        ({"prompt": "a", "completion": "b", "label": False}, "unpaired"),
        ({"prompt": "a", "completion": "b", "label": "False"}, "unpaired"),
        ({"prompt": "a", "chosen": "b"}, "preference"),
        ({"instruction": "a", "output": "b"}, "instruction"),
        ({"instruction": "a", "outputs": "b"}, "instruction"),
        ({"instruction": "a", "instances": []}, None),
        ({"instruction": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"text": "a"}, "text"),
        ({"text": "a", "category": "b"}, "text"),
        ({"text": "a", "label": "b"}, "classification"),
        ({"text": "a", "label": 1}, "classification"),
        ({"text": "a", "label": 1.0}, "regression"),
        ({"text": "a", "score": 1}, "regression"),
        ({"text": "a", "labels": []}, "multi_label"),
        ({"sentence1": "a", "sentence2": "b"}, None),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "tokens"),
        ({"tokens": ["a"], "tags": ["b"]}, "token_classification"),
        ({"question": "a", "answer": "b"}, None),
        ({"query": "a", "response": "b"}, None),
        ({}, None),
    ],
)
def test_what_a_row_is_is_told_from_its_keys(row, kind):
    found = detect(row)
    assert (found and found.kind) == kind


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
WORDS = sorted(
    {key for variant in FORMATS for key in variant.keys}
    | set(MESSAGE_KEYS)
    | {"from", "value", "function", "arguments", "id", "type", "text", "answer_start", "properties", "items"}
)
NEARLY_RIGHT = st.recursive(
    st.sampled_from(
        ["user", "assistant", "tool", "gpt", "function_call", "{}", "", "c1", 0, 1, None, True, 2.5]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=5),
    max_leaves=25,
)


def never_raises(row: dict[str, Any]) -> None:
    detect(row)
    for variant in FORMATS:
        format = variant()
        format.detect(row)
        format.fits(row)
        format.ignored(row)
        problems = format.problems(row)
        assert all(problem.code and problem.message for problem in problems)
        if not problems:
            list(format.doubts(row))
            example = format.messages_or_text(row)
            assert teaches(example)
            assert len(example.messages) == len(example.trained)
            assert len(example.token_ids) == len(example.token_targets)
            assert (example.rejected is not None) == (format.kind == "preference")
            roles = list(format.roles(row))
            assert roles[: len(example.messages)] == [message["role"] for message in example.messages]
            for message in example.messages:
                assert isinstance(message["content"], str)
                assert all(
                    isinstance(c["function"]["arguments"], dict) for c in message.get("tool_calls", ())
                )
            list(format.labels(row))


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=5), JSON | NEARLY_RIGHT, max_size=6))
def test_whatever_a_row_holds_checking_never_raises_and_a_good_row_gives_an_example(row):
    never_raises(row)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something could stand in a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, part in inside for found in places(part, (*path, key)))]


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    if isinstance(value, dict):
        return {**value, path[0]: put(value[path[0]], path[1:], new)}
    return [put(part, path[1:], new) if index == path[0] else part for index, part in enumerate(value)]


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_anything_in_any_place_of_any_good_row_never_raises(data):
    _, row = data.draw(st.sampled_from(SAMPLES))
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(places(row)[1:]))
        row = put(row, path, data.draw(JSON | NEARLY_RIGHT))
    never_raises(row)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ("hi", {("messages", "wrong_type")}),
        ([], {("messages", "empty_messages")}),
        (["hi"], {("messages[0]", "wrong_type")}),
        ([ASK], {("messages", "no_assistant")}),
        ([ASK, ANSWER, ASK], set()),
        ([ASK, {**ANSWER, "weight": 0}, ASK], {("messages", "nothing_to_learn")}),
        ([{**ASK, "wieght": None, "refusal": None, "annotations": []}, ANSWER], set()),
        ([ASK, {**ANSWER, "refusal": "no"}], {("messages[1].refusal", "unsupported_content")}),
        ([ASK, {**ANSWER, "loss_weight": 0.5}], {("messages[1].loss_weight", "weight_not_0_or_1")}),
        ([ASK, {**ANSWER, "weight": 1, "loss_weight": 0}], {("messages[1].loss_weight", "unexpected_key")}),
        ([{**ASK, "thinking": "hm"}, ANSWER], {("messages[0].thinking", "unexpected_key")}),
        (
            [ASK, {**ANSWER, "thinking": "hm", "reasoning_content": "hm"}],
            {("messages[1].thinking", "unexpected_key")},
        ),
        ([ASK, {"role": "assistant", "content": "", "thinking": "hm"}], set()),
        (
            [{**ASK, "content": [{"type": "text"}]}, ANSWER],
            {("messages[0].content[0]", "missing_content")},
        ),
        (
            [{**ASK, "content": [{"type": "tool_call", "value": ADD}]}, ANSWER],
            {("messages[0].content[0]", "unexpected_key")},
        ),
        (
            [ASK, {"role": "assistant", "content": [{"type": "tool_call", "value": "add(1)"}]}],
            {("messages[1].content[0].value", "arguments_not_json_string")},
        ),
        (
            [ASK, {"role": "function", "name": "add", "content": "3"}, ANSWER],
            {("messages[1].role", "tool_call_id_unknown")},
        ),
        ([{"from": "humane", "value": "x"}, GPT], {("messages[0].from", "unknown_role")}),
        ([{"from": "human"}, GPT], {("messages[0].value", "missing_content")}),
        ([HUMAN, {"from": "observation", "value": "3"}, GPT], {("messages[1].from", "tool_call_id_unknown")}),
        ([HUMAN, {**GPT, "value": " "}], {("messages[1].value", "empty_completion")}),
        (
            [HUMAN, {"from": "function_call", "value": "add(1)"}],
            {("messages[1].value", "arguments_not_json_string")},
        ),
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
            [ASK, {**ANSWER, "tool_calls": [{**CALL, "function": {"name": "add", "arguments": ["a"]}}]}],
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
        ({"prompt": "a", "completion": "b", "prompt_id": 1, "split": "x"}, set()),
        ({"prompt": "a", "completion": "b", "prompts": 1}, set()),
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
        ("user", "Add.\n2 2"),
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


def conversation(*messages: dict[str, Any], **more: Any) -> Example:
    row = {"messages": list(messages), **more}
    assert CHAT.problems(row) == []
    return CHAT.messages_or_text(row)


def test_every_way_of_calling_a_tool_reaches_the_template_as_one():
    function = {"name": "add", "arguments": {"a": 1}}
    given_id = conversation(
        ASK,
        {"role": "assistant", "content": None, "tool_calls": [{**CALL, "id": "call00001"}]},
        {"role": "tool", "tool_call_id": "call00001", "content": "3"},
        ANSWER,
    )
    calls = [
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]},
        {"role": "assistant", "content": None, "tool_calls": [function]},
        {"role": "assistant", "content": "", "function_call": {"name": "add", "arguments": '{"a": 1}'}},
        {"role": "assistant", "content": [{"type": "tool_call", "value": ADD}]},
        {"role": "assistant", "content": [{"type": "tool_call", "value": [function]}]},
        {"from": "function_call", "value": ADD},
        {"from": "tool_call", "value": f"[{ADD}]"},
    ]
    for call in calls:
        for result in ({"role": "tool", "content": "3"}, {"from": "observation", "value": "3"}):
            assert conversation(ASK, call, result, ANSWER).messages == given_id.messages
    named = conversation(ASK, calls[2], {"role": "function", "name": "add", "content": "3"}, ANSWER)
    assert named.messages[2] == {**given_id.messages[2], "name": "add"}


def test_results_without_an_id_answer_the_calls_before_them_in_order():
    two = {"from": "function_call", "value": f"[{ADD}, {ADD}]"}
    three = {"from": "observation", "value": "3"}
    example = conversation(HUMAN, two, three, {"from": "function_call", "value": ADD}, three, three, GPT)
    ids = [[call["id"] for call in message.get("tool_calls", ())] for message in example.messages]
    assert ids[1] == ["call00001", "call00002"]
    assert ids[3] == ["call00003"]
    answered = [message.get("tool_call_id") for message in example.messages if message["role"] == "tool"]
    assert answered == ["call00001", "call00003", None]


def test_reasoning_is_kept_apart_from_the_answer():
    parts = [{"type": "reasoning", "value": "A greeting."}, {"type": "text", "text": "hello"}]
    for answer in (
        {"role": "assistant", "content": parts},
        {**ANSWER, "reasoning_content": "A greeting."},
        {**ANSWER, "thinking": "A greeting."},
    ):
        assert conversation(ASK, answer).messages[1] == {**ANSWER, "reasoning_content": "A greeting."}


def test_loss_weights_are_weights_and_trailing_messages_are_read_by_nobody():
    example = conversation(
        {**ASK, "loss_weight": 0.0}, {**ANSWER, "loss_weight": 0.0}, ASK, {**ANSWER, "loss_weight": 1.0}, ASK
    )
    assert example.trained == (False, False, False, True, False)
    row = {"messages": [ASK, ANSWER, ASK, {**ANSWER, "weight": 0}]}
    assert doubts(CHAT, row) == {("messages[2]", "trailing_messages")}
    (doubt,) = CHAT.doubts(row)
    assert doubt.message == "2 messages after the last one that is trained: nobody reads them."


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([ASK, ASK, ANSWER], {("messages[1]", "consecutive_roles")}),
        ([ASK, ANSWER, ANSWER], {("messages[2]", "consecutive_roles")}),
        ([ASK, {"role": "system", "content": "x"}, ANSWER], {("messages[1]", "system_not_first")}),
        ([{"role": "developer", "content": "x"}, ASK, ANSWER], set()),
    ],
)
def test_what_some_templates_refuse_is_a_doubt(messages, expected):
    assert doubts(CHAT, {"messages": messages}) == expected


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        json.dumps([TOOL]),
        [TOOL["function"]],
        [{"type": "function", **TOOL["function"]}],
        [{"function": TOOL["function"]}],
        [{"name": "add", "parameters": {"type": "dict"}, "description": None}],
        [{"name": "add", "input_schema": {"type": "object"}}],
    ],
)
def test_tools_in_every_vocabulary_are_the_same_to_the_template(tools):
    assert conversation(ASK, ANSWER, tools=tools).tools == (TOOL,)
    assert conversation(ASK, ANSWER, functions=tools).tools == (TOOL,)
    assert conversation(ASK, ANSWER, tools="").tools == ()


@pytest.mark.parametrize(
    ("type", "expected"),
    [
        ("string", {"type": "string"}),
        ("str", {"type": "string"}),
        ("int, optional", {"type": "integer"}),
        ("Optional[float]", {"type": "number"}),
        ("List[str]", {"type": "array", "items": {"type": "string"}}),
        ("tuple", {"type": "array"}),
        ("any", {}),
        (["str", "null"], {"type": ["string", "null"]}),
        ("HashMap", {"type": "HashMap"}),
        ("Tuple[int, str]", {"type": "Tuple[int, str]"}),
    ],
)
def test_types_of_python_in_schemas_become_those_of_json_schema_where_that_is_certain(type, expected):
    schema = {
        "type": "object",
        "properties": {"a": {"type": type}, "type": {"type": "array", "items": {"type": type}}},
    }
    row = {"messages": [ASK, ANSWER], "tools": [{"name": "add", "parameters": schema}]}
    assert CHAT.problems(row) == []
    made = CHAT.messages_or_text(row).tools[0]["function"]["parameters"]
    assert made == {
        "type": "object",
        "properties": {"a": expected, "type": {"type": "array", "items": expected}},
    }
    known = type not in ("HashMap", "Tuple[int, str]")
    assert {doubt.code for doubt in CHAT.doubts(row)} == (set() if known else {"bad_tool_schema"})
    if known:
        jsonschema.Draft202012Validator.check_schema(made)


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ({}, {("tools", "wrong_type")}),
        ("[", {("tools", "bad_tools")}),
        ('[{"name": "a", "name": "b"}]', {("tools[0].name", "duplicate_key")}),
        (["add"], {("tools[0]", "wrong_type")}),
        ([{"type": "web_search"}], {("tools[0].type", "wrong_value"), ("tools[0].function", "wrong_type")}),
        ([{"name": ""}], {("tools[0].name", "wrong_type")}),
        ([{"name": "a", "paramters": {}}], {("tools[0].paramters", "unknown_key")}),
        ([{"name": "a", "parameters": []}], {("tools[0].parameters", "wrong_type")}),
        (
            [{"name": "a", "parameters": {}, "input_schema": {}}],
            {("tools[0].input_schema", "unexpected_key")},
        ),
        (
            [{"name": "a", "parameters": {"properties": ["x"]}}],
            {("tools[0].parameters.properties", "bad_tool_schema")},
        ),
        (
            [{"name": "a", "parameters": {"properties": {"x": {"type": 1}}}}],
            {("tools[0].parameters.properties.x.type", "bad_tool_schema")},
        ),
        (
            [{"name": "a", "parameters": {"properties": {"x": {"enum": "ab"}}}}],
            {("tools[0].parameters.properties.x.enum", "bad_tool_schema")},
        ),
    ],
)
def test_all_that_is_wrong_with_tools_is_named_at_its_place(tools, expected):
    assert codes(CHAT, {"messages": [ASK, ANSWER], "tools": tools}) == expected


def test_tools_and_functions_cannot_both_be_given():
    row = {"messages": [ASK, ANSWER], "tools": [TOOL], "functions": [TOOL]}
    assert codes(CHAT, row) == {("functions", "unexpected_key")}


def test_sharegpt_becomes_the_conversation_it_is():
    row = {
        "system": "Be brief.",
        "conversations": [
            HUMAN,
            {"from": "function_call", "value": ADD},
            {"from": "observation", "value": "3"},
            GPT,
        ],
        "tools": json.dumps([TOOL["function"]]),
    }
    assert doubts(SHAREGPT, row) == set()
    example = SHAREGPT.messages_or_text(row)
    assert [message["role"] for message in example.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert example.trained == (False, False, True, False, True)
    assert example.tools == (TOOL,)
    assert codes(SHAREGPT, {**row, "system": 1}) == {("system", "wrong_type")}
    twice = {**row, "conversations": [{"from": "system", "value": "x"}, HUMAN, GPT]}
    assert codes(SHAREGPT, twice) == {("system", "unexpected_key")}
    assert codes(SHAREGPT, {"conversations": [HUMAN]}) == {("conversations", "no_assistant")}
    assert codes(SHAREGPT, {"system": "x"}) == {("conversations", "missing_key")}


PAIRS = [
    ({"prompt": [ASK], "chosen": [ANSWER], "rejected": [WORSE]}, 1),
    ({"chosen": [ASK, ANSWER], "rejected": [ASK, WORSE]}, 1),
    ({"prompt": "hi", "chosen": [ASK, ANSWER], "rejected": [ASK, WORSE]}, 1),
    ({"prompt": [ASK], "chosen": [ASK, ANSWER], "rejected": [ASK, WORSE]}, 1),
    ({"prompt": [ASK], "chosen": ANSWER, "rejected": WORSE}, 1),
    ({"input": {"messages": [ASK]}, "preferred_output": [ANSWER], "non_preferred_output": [WORSE]}, 1),
    (
        {"input": {"messages": [ASK]}, "preferred_completion": [ANSWER], "non_preferred_completion": [WORSE]},
        1,
    ),
    ({"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "go away"}}, 1),
    ({"chosen_messages": [ASK, ANSWER], "rejected_messages": [ASK, WORSE]}, 1),
    ({"instruction": "hi", "input": "", "chosen": "hello", "rejected": "go away"}, 1),
]


@pytest.mark.parametrize(("row", "prompt"), PAIRS)
def test_every_way_of_writing_a_preference_is_the_same_pair(row, prompt):
    assert doubts(PREFERENCE, row) == set()
    example = PREFERENCE.messages_or_text(row)
    assert example.messages == (ASK, ANSWER)
    assert example.trained == (False, True)
    assert example.rejected.messages == (ASK, WORSE)
    assert example.rejected.trained == (False, True)
    assert list(PREFERENCE.roles(row)) == ["user", "assistant", "assistant"]


def test_without_a_prompt_two_texts_part_where_they_differ_but_never_behind_a_blank():
    row = {"chosen": "Q: 2+2? A: four", "rejected": "Q: 2+2? A: five"}
    example = PREFERENCE.messages_or_text(row)
    assert (example.prompt, example.completion, example.rejected.completion) == ("Q: 2+2? A: f", "our", "ive")
    row = {"chosen": "Q: 2+2? A: 4", "rejected": "Q: 2+2? A: 5"}
    example = PREFERENCE.messages_or_text(row)
    assert (example.prompt, example.completion, example.rejected.completion) == ("Q: 2+2? A:", " 4", " 5")
    row = {"chosen": "ab", "rejected": "abc"}
    example = PREFERENCE.messages_or_text(row)
    assert (example.prompt, example.completion, example.rejected.completion) == ("a", "b", "bc")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "chosen": "b"}, {("rejected", "missing_key")}),
        ({"prompt": "a", "rejected": "b"}, {("chosen", "missing_key")}),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, {("rejected", "chosen_equals_rejected")}),
        (
            {"prompt": [ASK], "chosen": [ANSWER], "rejected": [ANSWER]},
            {("rejected", "chosen_equals_rejected")},
        ),
        (
            {"instruction": "a", "chosen": "b", "rejected": "b"},
            {("rejected", "chosen_equals_rejected")},
        ),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, {("chosen", "empty_completion")}),
        ({"prompt": "a", "chosen": [ANSWER], "rejected": "b"}, {("rejected", "wrong_type")}),
        ({"prompt": "a", "chosen": [ANSWER], "rejected": [WORSE]}, {("prompt", "wrong_type")}),
        ({"prompt": [ASK], "chosen": "b", "rejected": "c"}, {("prompt", "wrong_type")}),
        ({"prompt": "a", "chosen": 1, "rejected": "b"}, {("chosen", "wrong_type")}),
        ({"chosen": [ANSWER], "rejected": [WORSE]}, {("rejected", "different_prompts")}),
        (
            {"chosen": [ASK, ANSWER], "rejected": [{**ASK, "content": "ho"}, ANSWER]},
            {
                ("rejected", "different_prompts"),
            },
        ),
        (
            {"chosen": [ASK, ASK, ANSWER], "rejected": [ASK, ANSWER]},
            {("chosen[1]", "different_prompts")},
        ),
        (
            {"prompt": [ASK], "chosen": [ASK, ANSWER], "rejected": [WORSE]},
            {("chosen[0]", "answer_not_assistant")},
        ),
        (
            {"prompt": [ASK], "chosen": [ANSWER, ASK], "rejected": [WORSE]},
            {("chosen[1].role", "last_not_assistant")},
        ),
        (
            {"prompt": [{**ASK, "role": "usr"}], "chosen": [ANSWER], "rejected": [{**WORSE, "content": 1}]},
            {("prompt[0].role", "unknown_role"), ("rejected[0].content", "wrong_type")},
        ),
        ({"prompt": [], "chosen": [ANSWER], "rejected": [WORSE]}, {("prompt", "empty_messages")}),
        (
            {"input": "a", "preferred_output": [ANSWER], "non_preferred_output": [WORSE]},
            {("input", "wrong_type")},
        ),
        (
            {
                "input": {"messages": [ASK], "tool": []},
                "preferred_output": [ANSWER],
                "non_preferred_output": [WORSE],
            },
            {("input.tool", "unknown_key")},
        ),
        (
            {
                "input": {"messages": [ASK], "tools": 1},
                "preferred_output": [ANSWER],
                "non_preferred_output": [WORSE],
            },
            {("input.tools", "wrong_type")},
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "tools": [TOOL]}, {("tools", "unexpected_key")}),
        (
            {"prompt": [ASK], "chosen": [{**ANSWER, "weight": 0}], "rejected": [WORSE]},
            {("chosen", "nothing_to_learn")},
        ),
    ],
)
def test_what_is_wrong_with_a_preference(row, expected):
    assert codes(PREFERENCE, row) == expected


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASK], "completion": [ANSWER], "label": False},
        {"messages": [ASK, ANSWER], "label": False},
        {"messages": [ASK, ANSWER], "label": "False"},
        {"conversations": [HUMAN, GPT], "kto_tag": False},
        {"instruction": "hi", "output": "hello", "kto_tag": False},
    ],
)
def test_every_way_of_writing_a_judged_answer_is_the_same(row):
    assert doubts(UNPAIRED, row) == set()
    example = UNPAIRED.messages_or_text(row)
    assert (example.messages, example.trained, example.desirable) == ((ASK, ANSWER), (False, True), False)


def test_only_the_judged_answer_is_learned_from():
    row = {"messages": [ASK, ANSWER, ASK, WORSE], "label": False}
    assert UNPAIRED.messages_or_text(row).trained == (False, False, False, True)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "completion": "b", "label": 1}, {("label", "label_not_boolean")}),
        ({"prompt": "a", "completion": "b", "label": None}, {("label", "label_not_boolean")}),
        ({"prompt": "a", "completion": "b"}, {("label", "missing_key")}),
        ({"prompt": "a", "label": True}, {("completion", "missing_key")}),
        (
            {"messages": [ASK], "label": True},
            {("messages[0].role", "last_not_assistant")},
        ),
        ({"messages": [ASK, ANSWER], "label": True, "kto_tag": False}, {("kto_tag", "unexpected_key")}),
        ({"instruction": "a", "output": "", "kto_tag": True}, {("output", "empty_completion")}),
        (
            {"prompt": [ASK], "completion": [ANSWER, ASK], "label": True},
            {("completion[1].role", "last_not_assistant")},
        ),
    ],
)
def test_what_is_wrong_with_a_judged_answer(row, expected):
    assert codes(UNPAIRED, row) == expected


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        ("text", {"text": " "}, {("text", "empty_text")}),
        ("text", {"text": ["a"]}, {("text", "wrong_type")}),
        ("text", {"text": "a", "lable": "b"}, {("lable", "unknown_key")}),
        ("text", {"text": "a", "images": ["a.png"]}, {("images", "unsupported_content")}),
        ("text", {"text": "a", "task": ""}, {("task", "wrong_type")}),
        ("segments", {"segments": []}, {("segments", "nothing_to_learn")}),
        (
            "segments",
            {"segments": [{"text": "a", "label": 1}]},
            {("segments[0].label", "label_not_boolean"), ("segments", "nothing_to_learn")},
        ),
        (
            "segments",
            {"segments": [{"text": "a", "label": True, "x": 1}]},
            {("segments[0].x", "unknown_key")},
        ),
        ("tokens", {"input_ids": []}, {("input_ids", "empty_text")}),
        ("tokens", {"input_ids": "1 2"}, {("input_ids", "wrong_type")}),
        ("tokens", {"input_ids": [1, True]}, {("input_ids[1]", "wrong_type")}),
        ("tokens", {"input_ids": [1, -1]}, {("input_ids[1]", "bad_token_id")}),
        ("tokens", {"input_ids": [1, 2**31]}, {("input_ids[1]", "bad_token_id")}),
        ("tokens", {"input_ids": [1]}, {("input_ids", "nothing_to_learn")}),
        ("tokens", {"input_ids": [1, 2], "labels": [1]}, {("labels", "length_mismatch")}),
        (
            "tokens",
            {"input_ids": [1, 2], "labels": [2, -100]},
            {("labels[0]", "label_not_its_token"), ("labels", "nothing_to_learn")},
        ),
        ("tokens", {"input_ids": [1, 2], "labels": [1, -100]}, {("labels", "nothing_to_learn")}),
        (
            "tokens",
            {"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]},
            {("attention_mask", "wrong_value")},
        ),
        (
            "tokens",
            {"input_ids": [1, 2, 3], "attention_mask": [1, 2, 1]},
            {("attention_mask[1]", "wrong_value")},
        ),
        (
            "tokens",
            {"input_ids": [1, 2, 3], "attention_mask": [0, 0, 0]},
            {("input_ids", "nothing_to_learn")},
        ),
        ("classification", {"text": "a", "label": 1.5}, {("label", "wrong_type")}),
        ("classification", {"text": "a", "label": ""}, {("label", "bad_label")}),
        ("classification", {"text": "a"}, {("label", "missing_key")}),
        ("classification", {"text": "a", "text_b": "b", "label": "c"}, {("text_b", "unexpected_key")}),
        ("classification", {"premise": "a", "label": "c"}, {("hypothesis", "missing_key")}),
        ("classification", {"text": "a", "text_pair": None, "label": "c"}, set()),
        ("multi_label", {"text": "a", "labels": "b"}, {("labels", "wrong_type")}),
        ("multi_label", {"text": "a", "labels": ["b", "b"]}, {("labels[1]", "label_twice")}),
        ("multi_label", {"text": "a", "labels": ["b", None]}, {("labels[1]", "wrong_type")}),
        ("regression", {"text": "a", "score": "4.5"}, set()),
        ("regression", {"text": "a", "label": "4.5"}, {("label", "wrong_type")}),
        ("regression", {"text": "a", "score": "nan"}, {("score", "wrong_type")}),
        ("regression", {"text": "a", "score": "good"}, {("score", "wrong_type")}),
        ("regression", {"text": "a", "score": 10**400}, {("score", "wrong_type")}),
        ("regression", {"text": "a", "score": True}, {("score", "wrong_type")}),
        ("regression", {"text": "a", "score": 1, "value": 2}, {("value", "unexpected_key")}),
        ("regression", {"text": "a"}, {("score", "missing_key")}),
        ("prompts", {"prompt": ""}, {("prompt", "missing_content")}),
        ("prompts", {"prompt": 1}, {("prompt", "wrong_type")}),
        ("prompts", {"answer": 1}, {("prompt", "missing_key")}),
        ("prompts", {"prompt": "a", "completon": "b"}, {("completon", "unknown_key")}),
        ("prompts", {"messages": [ANSWER]}, {("messages", "missing_content")}),
        ("prompts", {"prompt": "a", "tools": [TOOL]}, {("tools", "unexpected_key")}),
    ],
)
def test_what_is_wrong_with_a_row_of_the_other_formats(kind, row, expected):
    assert codes(format_of(kind), row) == expected


def test_what_the_other_formats_teach():
    def example(kind: str, row: dict[str, Any]) -> Example:
        assert format_of(kind).problems(row) == []
        return format_of(kind).messages_or_text(row)

    assert example("text", {"text": "a"}).document == "a"
    assert example("segments", {"segments": [{"text": "a", "label": True}]}).segments == (("a", True),)
    padded = example(
        "tokens",
        {"input_ids": [0, 7, 8, 9, 0], "labels": [-100, -100, 8, 9, -100], "attention_mask": [0, 1, 1, 1, 0]},
    )
    assert (padded.token_ids, padded.token_targets) == ((7, 8, 9), (False, True, True))
    assert example("tokens", {"input_ids": [7, 8]}).token_targets == (True, True)
    assert example("multi_label", {"text": "a", "labels": [1, "b"], "task": "t"}).labels == ("t/1", "t/b")
    assert example("multi_label", {"text": "a", "labels": []}).labels == ()
    assert example("regression", {"sentence1": "a", "sentence2": "b", "score": "-4.5"}) == Example(
        prompt="a", pair="b", value=-4.5
    )
    assert example("regression", {"text": "a", "label": 4}).value == 4.0
    item = {"prompt": "a", "answer": {"x": 1}}
    assert example("prompts", item) == Example(prompt="a", item=item)


def test_a_conversation_and_a_completion_can_be_read_as_prompts():
    prompts = format_of("prompts")
    for row, roles in (
        ({"messages": [ASK, ANSWER, ASK, ANSWER]}, ["user", "assistant", "user"]),
        ({"messages": [ASK, ANSWER, ASK]}, ["user", "assistant", "user"]),
        ({"prompt": [ASK], "completion": [ANSWER]}, ["user"]),
    ):
        assert prompts.fits(row)
        assert prompts.problems(row) == []
        example = prompts.messages_or_text(row)
        assert [message["role"] for message in example.messages] == list(prompts.roles(row)) == roles
        assert not any(example.trained)
        assert example.item == row
    assert prompts.messages_or_text({"prompt": "a", "completion": "b"}).prompt == "a"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("promt", "prompt"),
        ("Prompt", "prompt"),
        ("prompts", "prompt"),
        ("pormpt", "prompt"),
        ("completon", "completion"),
        ("prompt_id", ""),
        ("task_id", ""),
        ("tas", ""),
        ("x" * 70, ""),
    ],
)
def test_one_slip_of_the_finger_is_a_typo_and_more_is_another_word(word, expected):
    assert typo_of(word, ("prompt", "completion", "task")) == expected


def test_columns_that_nobody_reads_are_listed():
    assert PAIR.ignored({"prompt": "a", "completion": "b", "id": 1, "source": "x"}) == ["id", "source"]
    assert format_of("prompts").ignored({"prompt": "a", "id": 1}) == []
