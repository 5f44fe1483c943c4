"""Conversations, in the shape of OpenAI's fine-tuning files: `{"messages": [{"role", "content"}, …]}`.

Every assistant message is trained unless its `weight` is 0. `tools` go to the chat template; tool calls are
trained like words, tool results never are.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal

from peft_service.formats import (
    BadJSON,
    Example,
    Format,
    Problem,
    did_you_mean,
    join,
    json_type,
    parse_json,
    shown,
    unknown_keys,
    wrong_type,
)

ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGE_KEYS = ("role", "content", "weight", "name", "tool_calls", "tool_call_id")
OTHER_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
}


class Chat(Format):
    kind: Literal["chat"] = "chat"

    keys = ("messages", "tools", "parallel_tool_calls", "task")
    sample = '{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}'

    def detect(self, row: dict[str, Any]) -> bool:
        return "messages" in row

    def check(self, row: dict[str, Any]) -> Iterator[Problem]:
        yield from unknown_keys(row, self.keys)
        yield from check_tools(row.get("tools"))
        if not isinstance(row.get("parallel_tool_calls"), bool | None):
            yield wrong_type("parallel_tool_calls", "a boolean", row["parallel_tool_calls"])
        if "messages" not in row:
            yield Problem("messages", "missing_key", 'The key "messages" is missing.')
            return
        yield from check_messages(row["messages"], "messages")
        yield from check_targets(row["messages"], "messages")

    def messages_or_text(self, row: dict[str, Any]) -> Example:
        return Example(
            messages=tuple(map(template_message, row["messages"])),
            trained=tuple(map(is_trained, row["messages"])),
            tools=tuple(row.get("tools") or ()),
            task=row.get("task"),
        )

    def roles(self, row: dict[str, Any]) -> Iterable[str]:
        return [message["role"] for message in row["messages"]]


def is_trained(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant" and message.get("weight") != 0


def template_message(message: dict[str, Any]) -> dict[str, Any]:
    """A message as chat templates take it: the convention of transformers, not of OpenAI's wire.

    Content is one string: `null` beside tool calls becomes "" (templates that add strings end at a null).
    The arguments of a call become an object: most templates write them with `tojson`, and would quote a
    string a second time.
    """
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    made = {"role": message["role"], "content": content or ""}
    for key in ("name", "tool_call_id"):
        if message.get(key) is not None:
            made[key] = message[key]
    if message.get("tool_calls"):
        made["tool_calls"] = [
            {
                "id": call["id"],
                "type": "function",
                "function": {
                    "name": call["function"]["name"],
                    "arguments": parse_json(call["function"]["arguments"])[0],
                },
            }
            for call in message["tool_calls"]
        ]
    return made


def check_messages(messages: Any, path: str) -> Iterator[Problem]:
    """What is wrong with each message by itself, and with the thread of tool calls through them."""
    if not isinstance(messages, list):
        yield wrong_type(path, "an array of messages", messages, '[{"role": …, "content": …}, …]')
        return
    if not messages:
        yield Problem(path, "empty_messages", "There are no messages.")
    call_ids: dict[str, None] = {}
    for index, message in enumerate(messages):
        here = f"{path}[{index}]"
        if not isinstance(message, dict):
            yield wrong_type(here, "an object", message, '{"role": …, "content": …}')
            continue
        yield from _check_message(message, here, call_ids)
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            if isinstance(call, dict) and isinstance(call.get("id"), str):
                call_ids[call["id"]] = None


def check_targets(messages: Any, path: str) -> Iterator[Problem]:
    """Whether there is something to learn, and the row ends with it."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return
    assistants = [message for message in messages if message.get("role") == "assistant"]
    if messages and not assistants:
        yield Problem(path, "no_assistant", "No message has the role assistant: there is nothing to learn.")
    elif messages and messages[-1].get("role") != "assistant":
        yield Problem(
            f"{path}[{len(messages) - 1}].role",
            "last_not_assistant",
            f"The last message has the role {shown(messages[-1].get('role'))}, not assistant.",
            "end the row with the answer that is to be learned",
        )
    if assistants and all(message.get("weight") == 0 for message in assistants):
        yield Problem(path, "nothing_to_learn", "Every assistant message has weight 0.", "give one weight 1")
    for index, message in enumerate(messages):
        content = message.get("content")
        if (
            message.get("role") == "assistant"
            and message.get("weight") != 0
            and not message.get("tool_calls")
        ):
            texts = [content] if isinstance(content, str) else content if isinstance(content, list) else None
            if texts is not None and not any(_text_of(text).strip() for text in texts):
                yield Problem(
                    f"{path}[{index}].content",
                    "empty_completion",
                    "The assistant says nothing here: there is nothing to learn.",
                    'remove the message, or give it "weight": 0',
                )


def _text_of(part: Any) -> str:
    """The text of a part; of a part that is wrong anyway, something not empty."""
    text = part.get("text", "?") if isinstance(part, dict) else part
    return text if isinstance(text, str) else "?"


def _check_message(message: dict[str, Any], path: str, call_ids: dict[str, None]) -> Iterator[Problem]:
    role, content, weight = message.get("role"), message.get("content"), message.get("weight")
    yield from unknown_keys(message, MESSAGE_KEYS, path)
    if "role" not in message:
        hint = f"one of {', '.join(ROLES)}"
        yield Problem(f"{path}.role", "missing_key", 'The key "role" is missing.', hint)
    elif not isinstance(role, str):
        yield wrong_type(f"{path}.role", "a string", role)
    elif role not in ROLES:
        meant = f'did you mean "{OTHER_NAMES[role]}"?' if role in OTHER_NAMES else did_you_mean(role, ROLES)
        hint = meant or f"one of {', '.join(ROLES)}"
        yield Problem(f"{path}.role", "unknown_role", f"Unknown role {shown(role)}.", hint)
    if content is None:
        if role != "assistant" or not message.get("tool_calls"):
            hint = "only an assistant message with tool_calls may leave it out"
            yield Problem(f"{path}.content", "missing_content", "The message has no content.", hint)
    elif isinstance(content, list):
        yield from _check_parts(content, f"{path}.content")
    elif not isinstance(content, str):
        yield wrong_type(f"{path}.content", "a string", content)
    if weight is not None:
        if isinstance(weight, bool) or weight not in (0, 1):
            seen = shown(weight) if isinstance(weight, str | int | float) else json_type(weight)
            said = f"weight is {seen}; it must be 0 or 1."
            yield Problem(f"{path}.weight", "weight_not_0_or_1", said)
        elif weight == 1 and role != "assistant":
            yield Problem(f"{path}.weight", "weight_not_allowed", "Only assistant messages can be trained.")
    if not isinstance(message.get("name"), str | None):
        yield wrong_type(f"{path}.name", "a string", message["name"])
    if message.get("tool_calls"):
        if role != "assistant":
            yield Problem(f"{path}.tool_calls", "unexpected_key", "Only assistant messages call tools.")
        yield from _check_calls(message["tool_calls"], f"{path}.tool_calls")
    yield from _check_call_id(message, path, call_ids)


def _check_call_id(message: dict[str, Any], path: str, call_ids: dict[str, None]) -> Iterator[Problem]:
    path, role, call_id = f"{path}.tool_call_id", message.get("role"), message.get("tool_call_id")
    if call_id is None:
        if role == "tool":
            hint = "the id of the call that this message answers"
            yield Problem(path, "missing_key", 'A tool message needs "tool_call_id".', hint)
    elif not isinstance(call_id, str):
        yield wrong_type(path, "a string", call_id)
    elif role != "tool":
        yield Problem(path, "unexpected_key", "Only tool messages answer a call.")
    elif call_id not in call_ids:
        yield Problem(
            path,
            "tool_call_id_unknown",
            f"No earlier message calls a tool with the id {shown(call_id)}.",
            did_you_mean(call_id, call_ids),
        )


def _check_parts(parts: list[Any], path: str) -> Iterator[Problem]:
    if not parts:
        yield Problem(path, "missing_content", "The content is an empty array.", "write a string")
    for index, part in enumerate(parts):
        here = f"{path}[{index}]"
        if not isinstance(part, dict):
            yield wrong_type(here, 'an object {"type": "text", "text": …}', part)
        elif part.get("type") != "text":
            yield Problem(
                here,
                "unsupported_content",
                f"A content part has the type {shown(part.get('type'))}; only text can be trained on.",
            )
        else:
            yield from unknown_keys(part, ("type", "text"), here)
            if not isinstance(part.get("text"), str):
                yield wrong_type(f"{here}.text", "a string", part.get("text"))


def _check_calls(calls: Any, path: str) -> Iterator[Problem]:
    if not isinstance(calls, list):
        yield wrong_type(path, "an array", calls)
        return
    for index, call in enumerate(calls):
        here = f"{path}[{index}]"
        if not isinstance(call, dict):
            yield wrong_type(here, "an object", call)
            continue
        yield from unknown_keys(call, ("id", "type", "function"), here)
        if not isinstance(call.get("id"), str):
            yield from _string_wanted(call, "id", here)
        if call.get("type", "function") != "function":
            yield Problem(f"{here}.type", "wrong_value", f'type is {shown(call["type"])}, not "function".')
        function = call.get("function")
        if not isinstance(function, dict):
            yield wrong_type(f"{here}.function", 'an object {"name": …, "arguments": …}', function)
            continue
        yield from unknown_keys(function, ("name", "arguments"), f"{here}.function")
        if not isinstance(function.get("name"), str) or not function["name"]:
            yield from _string_wanted(function, "name", f"{here}.function")
        yield from _check_arguments(function.get("arguments"), f"{here}.function.arguments")


def _check_arguments(arguments: Any, path: str) -> Iterator[Problem]:
    hint = 'write them as OpenAI does, an object inside a string: "{\\"city\\": \\"Bern\\"}"'
    code = "arguments_not_json_string"
    if not isinstance(arguments, str):
        yield Problem(path, code, f"arguments must be JSON in a string, got {json_type(arguments)}.", hint)
        return
    try:
        value, problems = parse_json(arguments)
    except BadJSON as error:
        yield Problem(path, code, f"arguments is a string, but not of JSON: {error.message}", hint)
        return
    if not isinstance(value, dict):
        yield Problem(path, code, f"arguments holds {json_type(value)}, not an object.", hint)
    for problem in problems:
        yield replace(problem, path=path)


def check_tools(tools: Any) -> Iterator[Problem]:
    if tools is None:
        return
    if not isinstance(tools, list):
        yield wrong_type("tools", "an array", tools)
        return
    for index, tool in enumerate(tools):
        here = f"tools[{index}]"
        if not isinstance(tool, dict):
            yield wrong_type(here, "an object", tool)
            continue
        yield from unknown_keys(tool, ("type", "function"), here)
        if tool.get("type") != "function":
            yield Problem(
                f"{here}.type", "wrong_value", f'type is {shown(tool.get("type"))}, not "function".'
            )
        function = tool.get("function")
        if not isinstance(function, dict):
            yield wrong_type(f"{here}.function", "an object", function)
            continue
        at = f"{here}.function"
        yield from unknown_keys(function, ("name", "description", "parameters", "strict"), at)
        if not isinstance(function.get("name"), str) or not function["name"]:
            yield from _string_wanted(function, "name", at)
        if not isinstance(function.get("description"), str | None):
            yield wrong_type(f"{at}.description", "a string", function["description"])
        if not isinstance(function.get("parameters"), dict | None):
            yield wrong_type(f"{at}.parameters", "an object (a JSON Schema)", function["parameters"])


def _string_wanted(found: dict[str, Any], key: str, path: str) -> Iterator[Problem]:
    if key not in found:
        yield Problem(join(path, key), "missing_key", f"The key {shown(key)} is missing.")
    else:
        yield wrong_type(join(path, key), "a string that is not empty", found[key])
