"""`{"conversations": [{"from", "value"}, …], "system"?, "tools"?}`: ShareGPT's shape.

Speakers are human or user; gpt, assistant, model, bot or chatgpt; system; function_call, whose value is JSON
of {"name", "arguments"} or of several in an array; and observation or tool, what came back. Every message of
the assistant and every call is trained, as in `chat`. `system` goes in front; `tools` is an array, or JSON of
one in a string ("" and "[]" are none). Messages of OpenAI's kind under `conversations` are read too.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

from peft_service.formats import Example, Format, Problem, wrong_type
from peft_service.formats.conversation import (
    check_messages,
    check_targets,
    check_tools,
    doubts_about,
    doubts_about_tools,
    is_messages,
    is_trained,
    role_of,
    template_messages,
    template_tools,
    within,
)


class ShareGPT(Format):
    kind: Literal["sharegpt"] = "sharegpt"

    keys = ("conversations", "system", "tools", "task")
    rank = 50
    sample = '{"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}'
    dialects = (
        '{"conversations": [{"from": "human", "value": "2+2?"}, {"from": "function_call", "value": '
        '"{\\"name\\": \\"add\\", \\"arguments\\": {\\"a\\": 2, \\"b\\": 2}}"}, {"from": "observation", '
        '"value": "4"}, {"from": "gpt", "value": "4"}], "system": "Be brief.", "tools": "[{\\"name\\": '
        '\\"add\\", \\"parameters\\": {}}]"}',
        '{"conversations": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}',
    )
    siblings = ("label", "kto_tag", "chosen", "rejected")

    def detect(self, row: dict[str, Any]) -> bool:
        return is_messages(row.get("conversations"))

    def fits(self, row: dict[str, Any]) -> bool:
        return "conversations" in row

    def check(self, row: dict[str, Any]) -> Iterator[Problem]:
        yield from check_tools(row.get("tools"))
        yield from check_system(row, row.get("conversations"))
        if "conversations" not in row:
            yield Problem("conversations", "missing_key", 'The key "conversations" is missing.')
            return
        yield from check_messages(row["conversations"], "conversations")
        yield from check_targets(row["conversations"], "conversations")

    def doubts(self, row: dict[str, Any]) -> Iterator[Problem]:
        messages = row["conversations"]
        yield from doubts_about_tools(row.get("tools"))
        yield from doubts_about(messages, within("conversations"), list(map(is_trained, messages)))

    def messages_or_text(self, row: dict[str, Any]) -> Example:
        messages = [*system_of(row), *row["conversations"]]
        return Example(
            messages=template_messages(messages),
            trained=tuple(map(is_trained, messages)),
            tools=template_tools(row.get("tools")),
            task=row.get("task"),
        )

    def roles(self, row: dict[str, Any]) -> Iterable[str]:
        return [role_of(message) for message in [*system_of(row), *row["conversations"]]]


def check_system(row: dict[str, Any], messages: Any) -> Iterator[Problem]:
    """What is wrong with `system` beside these messages."""
    if not isinstance(row.get("system"), str | None):
        yield wrong_type("system", "a string", row["system"])
    first = messages[0] if isinstance(messages, list) and messages else None
    if row.get("system") and isinstance(first, dict) and role_of(first) == "system":
        said = "The conversation begins with a system message of its own."
        yield Problem("system", "unexpected_key", said, "keep one of them")


def system_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []
