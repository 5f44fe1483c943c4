"""`{"prompt", "completion", "label"}`: an answer, and whether it is a good one (KTO).

`label` is true or false; LLaMA-Factory calls it `kto_tag`. What it judges can be written as

    prompt and completion      strings, or arrays of messages (TRL)
    messages or conversations  a conversation; its last message is the answer that is judged (LLaMA-Factory)
    instruction, input, output Alpaca's shape

Only that answer is learned from: earlier answers in a conversation were not judged. "true" and "false" in a
string, as a table in CSV has them, are taken as what they say.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal

from peft_service.formats import Example, Format, Problem, json_type
from peft_service.formats.conversation import (
    check_last,
    check_messages,
    check_targets,
    check_tools,
    doubts_about_tools,
    has_answer,
    role_of,
    template_messages,
    template_tools,
    within,
)
from peft_service.formats.instruction import asked, check_asked, check_output, plain_prompt
from peft_service.formats.prompt_completion import check_answered, trained_of
from peft_service.formats.sharegpt import check_system, system_of

TRUTHS = {"true": True, "false": False}


class Unpaired(Format):
    kind: Literal["unpaired"] = "unpaired"

    keys = (
        *("prompt", "completion", "messages", "conversations", "instruction", "input", "output", "system"),
        *("history", "tools", "label", "kto_tag", "task"),
    )
    rank = 30
    sample = '{"prompt": "2+2=", "completion": "4", "label": true}'
    dialects = (
        '{"prompt": [{"role": "user", "content": "2+2?"}], "completion": [{"role": "assistant", '
        '"content": "5"}], "label": false}',
        '{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}], '
        '"label": true}',
        '{"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}], '
        '"kto_tag": true}',
        '{"instruction": "Add.", "input": "2 and 2", "output": "5", "kto_tag": false}',
    )

    def detect(self, row: dict[str, Any]) -> bool:
        label = row.get("label")
        # A number is a mistake for a boolean; a word is a column of its own, that says what a row is about.
        judged = "label" in row and (
            not isinstance(label, str) or label.strip().lower() in (*TRUTHS, "0", "1")
        )
        return ("kto_tag" in row or judged) and _shape(row) != ""

    def fits(self, row: dict[str, Any]) -> bool:
        return _shape(row) != "" or "label" in row or "kto_tag" in row

    def check(self, row: dict[str, Any]) -> Iterator[Problem]:
        given = [key for key in ("label", "kto_tag") if key in row]
        if not given:
            said = 'The key "label" is missing.'
            yield Problem("label", "missing_key", said, "true if the answer is a good one, else false")
        for key in given:
            if _truth(row[key]) is None:
                said = f"{key} must be true or false, got {json_type(row[key])}."
                yield Problem(key, "label_not_boolean", said, "true if the answer is a good one, else false")
        if len(given) == 2 and row["label"] != row["kto_tag"]:
            yield Problem("kto_tag", "unexpected_key", "label says otherwise.", "keep one of them")
        shape = _shape(row) or "completion"
        if shape == "completion":
            yield from check_answered(row)
            yield from check_last(row.get("completion"), within("completion"))
        elif shape == "output":
            yield from check_asked(row)
            yield from check_output(row, "output")
        else:
            yield from check_tools(row.get("tools"))
            yield from check_system(row, row[shape])
            yield from check_messages(row[shape], shape)
            yield from check_last(row[shape], within(shape))
            last = row[shape][-1:] if isinstance(row[shape], list) else []
            if has_answer(last):
                yield from check_targets(last, shape, within(shape, len(row[shape]) - 1))

    def doubts(self, row: dict[str, Any]) -> Iterator[Problem]:
        yield from doubts_about_tools(row.get("tools"))

    def messages_or_text(self, row: dict[str, Any]) -> Example:
        desirable = _truth(row["label"] if "label" in row else row["kto_tag"])
        shape, task = _shape(row), row.get("task")
        if shape == "output":
            messages = (*asked(row), {"role": "assistant", "content": row["output"]})
            made = Example(messages=messages, prompt=plain_prompt(row), completion=row["output"])
            trained = [False] * (len(messages) - 1) + [True]
        elif shape == "completion" and isinstance(row["prompt"], str):
            made, trained = Example(prompt=row["prompt"], completion=row["completion"]), []
        elif shape == "completion":
            made = Example(messages=template_messages([*row["prompt"], *row["completion"]]))
            trained = trained_of(row)
        else:
            made = Example(messages=template_messages([*system_of(row), *row[shape]]))
            trained = [False] * (len(made.messages) - 1) + [True]
        tools = template_tools(row.get("tools")) if made.messages and shape != "output" else ()
        return replace(made, trained=tuple(trained), tools=tools, desirable=desirable, task=task)

    def roles(self, row: dict[str, Any]) -> Iterable[str]:
        return [role_of(message) for message in self.messages_or_text(row).messages]


def _shape(row: dict[str, Any]) -> str:
    """The column that has the answer; "" if none is there."""
    shapes = ("completion", "messages", "conversations", *(["output"] if "instruction" in row else []))
    return next((key for key in shapes if key in row), "")


def _truth(value: Any) -> bool | None:
    if isinstance(value, str):
        return TRUTHS.get(value.strip().lower())
    return value if isinstance(value, bool) else None
