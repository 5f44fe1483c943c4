"""`{"prompt" or "messages", …}` without an answer: the model answers itself, graders judge (reinforcement).

`prompt` is a string or an array of messages; `messages` is OpenAI's name for the latter. Every other column
is kept for the graders (`item` in OpenAI's templates). A conversation or a row of prompt and completion can
be read as this too: the prompt is all before the last answer, which only graders see.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

from peft_service.formats import Example, Format, Problem, wrong_type
from peft_service.formats.conversation import (
    check_messages,
    check_tools,
    doubts_about_tools,
    has_answer,
    is_messages,
    role_of,
    template_messages,
    template_tools,
)

ANSWERS = ("completion", "completions", "response", "responses", "output", "chosen", "rejected")
"""Columns that make a row something else: they hold what would be learned."""


class Prompts(Format):
    kind: Literal["prompts"] = "prompts"

    keys = ("prompt", "messages", "tools", "parallel_tool_calls", "task")
    rank = 80
    sample = '{"prompt": "2+2=", "answer": "4"}'
    dialects = (
        '{"messages": [{"role": "user", "content": "2+2?"}], "reference_answer": "4"}',
        '{"prompt": [{"role": "user", "content": "2+2?"}], "solution": "4"}',
    )
    siblings = ("completion", "chosen", "rejected", "label")
    keeps_columns = True

    def detect(self, row: dict[str, Any]) -> bool:
        if any(key in row for key in ANSWERS):
            return False
        return "prompt" in row or (is_messages(row.get("messages")) and not has_answer(row["messages"]))

    def fits(self, row: dict[str, Any]) -> bool:
        return "prompt" in row or "messages" in row

    def check(self, row: dict[str, Any]) -> Iterator[Problem]:
        key = _key(row)
        if key not in row:
            yield Problem("prompt", "missing_key", 'The row has neither "prompt" nor "messages".')
            return
        prompt = row[key]
        yield from check_tools(row.get("tools"))
        if not isinstance(row.get("parallel_tool_calls"), bool | None):
            yield wrong_type("parallel_tool_calls", "a boolean", row["parallel_tool_calls"])
        if isinstance(prompt, str) and key == "prompt":
            if not prompt.strip():
                yield Problem(key, "missing_content", "The prompt is empty.")
            if row.get("tools"):
                yield Problem("tools", "unexpected_key", "Tools need messages: here the prompt is a string.")
        elif isinstance(prompt, list) or key == "messages":
            yield from check_messages(prompt, key)
            if isinstance(prompt, list) and prompt and not _asking(prompt):
                yield Problem(key, "missing_content", "Nothing is asked: there are only answers.")
        else:
            yield wrong_type(key, "a string or an array of messages", prompt)

    def doubts(self, row: dict[str, Any]) -> Iterator[Problem]:
        yield from doubts_about_tools(row.get("tools"))

    def messages_or_text(self, row: dict[str, Any]) -> Example:
        prompt = row[_key(row)]
        if isinstance(prompt, str):
            return Example(prompt=prompt, item=row, task=row.get("task"))
        messages = template_messages(_asking(prompt))
        return Example(
            messages=messages,
            trained=(False,) * len(messages),
            tools=template_tools(row.get("tools")),
            item=row,
            task=row.get("task"),
        )

    def roles(self, row: dict[str, Any]) -> Iterable[str]:
        prompt = row[_key(row)]
        return [] if isinstance(prompt, str) else [role_of(message) for message in _asking(prompt)]


def _key(row: dict[str, Any]) -> str:
    return "messages" if "messages" in row and "prompt" not in row else "prompt"


def _asking(messages: list[Any]) -> list[Any]:
    """The messages before the answer at their end, if they end with one."""
    end = len(messages)
    while end and isinstance(messages[end - 1], dict) and role_of(messages[end - 1]) == "assistant":
        end -= 1
    return messages[:end]
