"""Conversations, in the shape of OpenAI's fine-tuning files: `{"messages": [{"role", "content"}, …]}`.

Every assistant message is trained unless its `weight` is 0. `tools` go to the chat template; tool calls are
trained like words, tool results never are. `conversation.py` has all ways of writing messages and tools,
among them OpenAI's `functions` of 2023 and LLaMA-Factory's content parts and `loss_weight`.

Messages behind the last trained one (a user's thanks at the end of a recorded dialogue) are no error: nothing
is learned from them and nobody reads them, which is a warning with their count. Without any trained message
there is nothing to learn, which is an error; a file of messages without a single answer is `prompts`.
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


class Chat(Format):
    kind: Literal["chat"] = "chat"

    keys = ("messages", "tools", "functions", "parallel_tool_calls", "task")
    rank = 75
    sample = '{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}'
    dialects = (
        '{"messages": [{"role": "user", "content": [{"type": "text", "value": "hi"}], "loss_weight": 0.0}, '
        '{"role": "assistant", "content": [{"type": "text", "value": "Hello"}], "loss_weight": 1.0}]}',
        '{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": null, '
        '"function_call": {"name": "add", "arguments": "{\\"a\\": 2, \\"b\\": 2}"}}, {"role": "function", '
        '"name": "add", "content": "4"}, {"role": "assistant", "content": "4"}], "functions": [{"name": '
        '"add", "parameters": {"type": "object", "properties": {}}}]}',
        '{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": [{"type": '
        '"reasoning", "value": "A sum."}, {"type": "tool_call", "value": "{\\"name\\": \\"add\\", '
        '\\"arguments\\": {\\"a\\": 2}}"}]}, {"role": "tool", "content": "4"}, {"role": "assistant", '
        '"content": "4"}], "tools": "[{\\"name\\": \\"add\\", \\"parameters\\": {\\"type\\": \\"dict\\"}}]"}',
    )
    siblings = ("label",)

    def detect(self, row: dict[str, Any]) -> bool:
        messages = row.get("messages")
        if not is_messages(messages):
            return False
        # Only what asks: prompts. Anything else that is wrong is wrong as a conversation.
        roles = {role_of(message) for message in messages or () if isinstance(message, dict)}
        return "assistant" in roles or not roles or not roles <= ASKING

    def fits(self, row: dict[str, Any]) -> bool:
        return "messages" in row

    def check(self, row: dict[str, Any]) -> Iterator[Problem]:
        yield from check_tools(row.get("tools"))
        yield from check_tools(row.get("functions"), "functions")
        if row.get("tools") and row.get("functions"):
            yield Problem("functions", "unexpected_key", "The row has tools and functions.", "keep tools")
        if not isinstance(row.get("parallel_tool_calls"), bool | None):
            yield wrong_type("parallel_tool_calls", "a boolean", row["parallel_tool_calls"])
        if "messages" not in row:
            yield Problem("messages", "missing_key", 'The key "messages" is missing.')
            return
        yield from check_messages(row["messages"], "messages")
        yield from check_targets(row["messages"], "messages")

    def doubts(self, row: dict[str, Any]) -> Iterator[Problem]:
        yield from doubts_about_tools(row.get("tools") or row.get("functions"))
        yield from doubts_about(row["messages"], within("messages"), list(map(is_trained, row["messages"])))

    def messages_or_text(self, row: dict[str, Any]) -> Example:
        return Example(
            messages=template_messages(row["messages"]),
            trained=tuple(map(is_trained, row["messages"])),
            tools=template_tools(row.get("tools") or row.get("functions")),
            task=row.get("task"),
        )

    def roles(self, row: dict[str, Any]) -> Iterable[str]:
        return [role_of(message) for message in row["messages"]]


ASKING = frozenset({"system", "developer", "user", "tool"})
"""Roles of messages that ask for an answer."""
