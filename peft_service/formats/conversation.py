"""Messages and tools in every vocabulary in use: what is wrong with them, and what chat templates take.

A message is OpenAI's, `{"role", "content"}`, or ShareGPT's, `{"from", "value"}`. What is read, and as what:

    content              a string; an array of parts {"type": "text", "text" or "value"}, put together without
                         anything in between; null beside tool calls
    reasoning            parts {"type": "reasoning", …} and the keys reasoning_content and thinking: they
                         become `reasoning_content`
    tool calls           OpenAI's, whose arguments are an object or JSON of one in a string; the same without
                         an id or the wrapper; `function_call` (OpenAI until 2023); parts {"type":
                         "tool_call", "value": JSON of {"name", "arguments"}} (LLaMA-Factory); ShareGPT's
                         function_call, whose value is JSON of {"name", "arguments"} or of an array of them
    tool results         the roles tool and function; ShareGPT's observation
    weight, loss_weight  0 or 1: whether an assistant message is trained
    tools                an array, or JSON of one in a string, of {"type": "function", "function": …}, or of
                         the bare functions; a schema under `parameters` or, as Anthropic has it,
                         `input_schema`; types of Python (dict, str, "int, optional", List[str], …) become
                         those of JSON Schema

Calls without an id get one of nine letters and digits (Mistral's templates want it so), and the results that
follow them get those in order. Keys that are null say nothing. Two messages of one role in a row, and a
system message that is not the first, are allowed: whether a template takes them is the template's to say.
Messages after the last trained one are allowed too: nobody reads them.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from peft_service.formats import (
    BadJSON,
    Problem,
    did_you_mean,
    join,
    json_type,
    parse_json,
    shown,
    unknown_keys,
    wrong_type,
)

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MESSAGE_KEYS = (
    *("role", "content", "weight", "loss_weight", "name", "tool_calls", "tool_call_id", "function_call"),
    *("reasoning_content", "thinking"),
)
TURN_KEYS = ("from", "value", "weight", "loss_weight")
OTHER_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
}
SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt"), "assistant"),
    "system": "system",
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
    **dict.fromkeys(("observation", "tool", "function_response", "tool_response"), "tool"),
}
"""Who speaks in ShareGPT's `from` -> the role."""
PARTS = ("text", "reasoning", "tool_call")
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
TYPES_OF_PYTHON = {
    "dict": "object",
    **dict.fromkeys(("list", "tuple", "set"), "array"),
    "str": "string",
    "int": "integer",
    **dict.fromkeys(("float", "double"), "number"),
    "bool": "boolean",
    "none": "null",
}

Place = Callable[[int], str]
"""Index of a message -> where in the row it is."""


def within(path: str, start: int = 0) -> Place:
    """The places of messages that are the elements of the array at `path` from `start` on."""
    return lambda index: f"{path}[{start + index}]"


def threaded(parts: Sequence[tuple[list[Any], str]]) -> tuple[list[Any], Place]:
    """Arrays of messages put together, with the place of each message in the row."""
    messages = [message for part, _ in parts for message in part]
    places = [f"{path}[{index}]" for part, path in parts for index in range(len(part))]
    return messages, places.__getitem__


# -------------------------------------------------------------------------------- what is wrong with them


@dataclass(slots=True)
class _Calls:
    """The tool calls of a thread so far."""

    ids: dict[str, None] = field(default_factory=dict)
    without_id: bool = False

    @property
    def any(self) -> bool:
        return self.without_id or bool(self.ids)


def is_messages(value: Any) -> bool:
    """Whether it looks like an array of messages: what is wrong with it is wrong with messages."""
    if not isinstance(value, list):
        return False
    return not value or (
        isinstance(value[0], dict) and any(key in value[0] for key in ("role", "content", "from", "value"))
    )


def has_answer(messages: Any) -> bool:
    """Whether one of the messages is an assistant's."""
    return isinstance(messages, list) and any(
        isinstance(message, dict) and role_of(message) == "assistant" for message in messages
    )


def check_messages(messages: Any, path: str) -> Iterator[Problem]:
    """What is wrong with the array at `path`, with each message, and with the thread of calls."""
    if not isinstance(messages, list):
        yield wrong_type(path, "an array of messages", messages, '[{"role": …, "content": …}, …]')
        return
    if not messages:
        yield Problem(path, "empty_messages", "There are no messages.")
    yield from check_thread(messages, within(path))


def check_thread(messages: list[Any], place: Place) -> Iterator[Problem]:
    """What is wrong with each message, and with the thread of tool calls through them."""
    calls = _Calls()
    for index, message in enumerate(messages):
        here = place(index)
        if not isinstance(message, dict):
            yield wrong_type(here, "an object", message, '{"role": …, "content": …}')
        elif _is_turn(message):
            yield from _check_turn(message, here, calls)
        else:
            yield from _check_message(message, here, calls)


def check_targets(messages: Any, path: str, place: Place | None = None) -> Iterator[Problem]:
    """Whether there is something to learn in the messages at `path`."""
    place = place or within(path)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return
    assistants = [message for message in messages if role_of(message) == "assistant"]
    if messages and not assistants:
        yield Problem(path, "no_assistant", "No message has the role assistant: there is nothing to learn.")
    if assistants and all(_weight(message) == 0 for message in assistants):
        yield Problem(path, "nothing_to_learn", "Every assistant message has weight 0.", "give one weight 1")
    for index, message in enumerate(messages):
        if role_of(message) == "assistant" and _weight(message) != 0 and _is_empty(message):
            key = "value" if _is_turn(message) else "content"
            yield Problem(
                f"{place(index)}.{key}",
                "empty_completion",
                "The assistant says nothing here: there is nothing to learn.",
                'remove the message, or give it "weight": 0',
            )


def check_last(messages: Any, place: Place) -> Iterator[Problem]:
    """Whether the last of the messages is the assistant's, where that is the one that is judged."""
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
        return
    role = role_of(messages[-1])
    if role != "assistant":
        key = "from" if _is_turn(messages[-1]) else "role"
        yield Problem(
            f"{place(len(messages) - 1)}.{key}",
            "last_not_assistant",
            f"The last message has the role {shown(role)}, not assistant.",
            "end with the answer that is judged",
        )


def doubts_about(messages: list[dict[str, Any]], place: Place, trained: Sequence[bool]) -> Iterator[Problem]:
    """What is worth a look in messages without problems; `trained` has one for each."""
    roles = [role_of(message) for message in messages]
    for index in range(1, len(roles)):
        if roles[index] == roles[index - 1] and roles[index] in ("user", "assistant"):
            yield Problem(
                place(index),
                "consecutive_roles",
                f"Two {roles[index]} messages follow one another.",
                "some templates refuse that: join them if one does",
            )
            break
    for index in range(1, len(roles)):
        if roles[index] in ("system", "developer") and roles[index - 1] not in ("system", "developer"):
            message = "A system message is not at the beginning."
            yield Problem(place(index), "system_not_first", message, "some templates refuse that")
            break
    last = max((index for index, one in enumerate(trained) if one), default=len(messages) - 1)
    if behind := len(messages) - 1 - last:
        count = f"{behind} message{'s' if behind > 1 else ''}"
        message = f"{count} after the last one that is trained: nobody reads them."
        yield Problem(place(last + 1), "trailing_messages", message)


def role_of(message: Mapping[str, Any]) -> str:
    """The role of a message in any vocabulary; "" if it has none."""
    role = message.get("from") if _is_turn(message) else message.get("role")
    if not isinstance(role, str):
        return ""
    if _is_turn(message):
        role = SPEAKERS.get(role, role)
        return "assistant" if role == "function_call" else role
    return "tool" if role == "function" else role


def _is_turn(message: Mapping[str, Any]) -> bool:
    """Whether it is in ShareGPT's vocabulary."""
    return ("from" in message or "value" in message) and not ("role" in message or "content" in message)


def _weight(message: Mapping[str, Any]) -> Any:
    weight = message.get("weight")
    return message.get("loss_weight") if weight is None else weight


def _is_empty(message: Mapping[str, Any]) -> bool:
    """Whether an assistant message that may be wrong otherwise has no text, no reasoning and no calls."""
    if _is_turn(message):
        value = message.get("value")
        return isinstance(value, str) and not value.strip()
    content = message.get("content")
    said = [
        message.get("tool_calls"),
        message.get("function_call"),
        *map(message.get, ("reasoning_content", "thinking")),
    ]
    if any(not isinstance(one, str) or one.strip() for one in said if one):
        return False
    if isinstance(content, list):
        return bool(content) and not any(_text_of(part).strip() for part in content)
    return isinstance(content, str) and not content.strip()


def _text_of(part: Any) -> str:
    """The text of a part; of a part that is wrong anyway, something not empty."""
    text = part.get("text", part.get("value", "?")) if isinstance(part, dict) else part
    return text if isinstance(text, str) else "?"


def _check_turn(turn: dict[str, Any], path: str, calls: _Calls) -> Iterator[Problem]:
    speaker, value = turn.get("from"), turn.get("value")
    yield from unknown_keys(turn, TURN_KEYS, path)
    known = ", ".join(dict.fromkeys(SPEAKERS))
    if "from" not in turn:
        yield Problem(f"{path}.from", "missing_key", 'The key "from" is missing.', f"one of {known}")
    elif not isinstance(speaker, str):
        yield wrong_type(f"{path}.from", "a string", speaker)
    elif speaker not in SPEAKERS:
        hint = did_you_mean(speaker, SPEAKERS) or f"one of {known}"
        yield Problem(f"{path}.from", "unknown_role", f"Unknown speaker {shown(speaker)}.", hint)
    role = role_of(turn)
    if value is None:
        yield Problem(f"{path}.value", "missing_content", "The message has no value.")
    elif isinstance(speaker, str) and SPEAKERS.get(speaker) == "function_call":
        calls.without_id = True
        yield from _check_call_text(value, f"{path}.value")
    elif not isinstance(value, str):
        yield wrong_type(f"{path}.value", "a string", value)
    elif role == "tool" and not calls.any:
        message = "No earlier message calls a tool: this result answers nothing."
        yield Problem(f"{path}.from", "tool_call_id_unknown", message)
    yield from _check_weights(turn, path, role)


def _check_message(message: dict[str, Any], path: str, calls: _Calls) -> Iterator[Problem]:
    role, content = message.get("role"), message.get("content")
    refusal = message.get("refusal")
    if refusal is not None:
        said = "A refusal is a message of its own kind; only content can be trained on."
        yield Problem(f"{path}.refusal", "unsupported_content", said, "write it into content")
    # What OpenAI's client writes without being asked: nothing is lost with an empty one.
    known = (*MESSAGE_KEYS, "refusal", *(key for key in ("annotations",) if not message.get(key)))
    yield from unknown_keys(message, known, path)
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
        if role != "assistant" or not (message.get("tool_calls") or message.get("function_call")):
            hint = "only an assistant message with tool_calls may leave it out"
            yield Problem(f"{path}.content", "missing_content", "The message has no content.", hint)
    elif isinstance(content, list):
        yield from _check_parts(content, path, role, calls)
    elif not isinstance(content, str):
        yield wrong_type(f"{path}.content", "a string", content)
    yield from _check_weights(message, path, role)
    if not isinstance(message.get("name"), str | None):
        yield wrong_type(f"{path}.name", "a string", message["name"])
    yield from _check_reasoning(message, path)
    for key in ("tool_calls", "function_call"):
        if message.get(key) and role != "assistant":
            yield Problem(f"{path}.{key}", "unexpected_key", "Only assistant messages call tools.")
    if message.get("tool_calls"):
        yield from _check_calls(message["tool_calls"], f"{path}.tool_calls", calls)
    if message.get("function_call"):
        calls.without_id = True
        if message.get("tool_calls"):
            said = "The message has tool_calls and function_call."
            yield Problem(f"{path}.function_call", "unexpected_key", said, "keep tool_calls")
        yield from _check_function(message["function_call"], f"{path}.function_call")
    yield from _check_answered(message, path, calls)


def _check_weights(message: dict[str, Any], path: str, role: Any) -> Iterator[Problem]:
    given = [(key, message[key]) for key in ("weight", "loss_weight") if message.get(key) is not None]
    for key, weight in given:
        if isinstance(weight, bool) or weight not in (0, 1):
            seen = json_type(weight) if isinstance(weight, list | dict) else json.dumps(weight)[:60]
            yield Problem(f"{path}.{key}", "weight_not_0_or_1", f"{key} is {seen}; it must be 0 or 1.")
        elif weight == 1 and role != "assistant":
            yield Problem(f"{path}.{key}", "weight_not_allowed", "Only assistant messages can be trained.")
    if len(given) == 2 and given[0][1] != given[1][1]:
        yield Problem(f"{path}.loss_weight", "unexpected_key", "weight says otherwise.", "keep one of them")


def _check_reasoning(message: dict[str, Any], path: str) -> Iterator[Problem]:
    given = [key for key in ("reasoning_content", "thinking") if message.get(key) is not None]
    for key in given:
        if not isinstance(message[key], str):
            yield wrong_type(f"{path}.{key}", "a string", message[key])
        elif message[key] and message.get("role") != "assistant":
            yield Problem(f"{path}.{key}", "unexpected_key", "Only assistant messages have reasoning.")
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    in_parts = any(isinstance(part, dict) and part.get("type") == "reasoning" for part in parts)
    if len(given) + in_parts > 1:
        said = "The reasoning of the message is there twice."
        yield Problem(f"{path}.{given[-1]}", "unexpected_key", said, "keep one")


def _check_answered(message: dict[str, Any], path: str, calls: _Calls) -> Iterator[Problem]:
    role, call_id = message.get("role"), message.get("tool_call_id")
    here = f"{path}.tool_call_id"
    if call_id is None:
        if role == "tool" and not calls.without_id:
            hint = "the id of the call that this message answers"
            yield Problem(here, "missing_key", 'A tool message needs "tool_call_id".', hint)
        elif role == "function" and not calls.any:
            said = "No earlier message calls a function: this result answers nothing."
            yield Problem(f"{path}.role", "tool_call_id_unknown", said)
    elif not isinstance(call_id, str):
        yield wrong_type(here, "a string", call_id)
    elif role != "tool":
        yield Problem(here, "unexpected_key", "Only tool messages answer a call.")
    elif call_id not in calls.ids and not calls.without_id:
        yield Problem(
            here,
            "tool_call_id_unknown",
            f"No earlier message calls a tool with the id {shown(call_id)}.",
            did_you_mean(call_id, calls.ids),
        )


def _check_parts(parts: list[Any], path: str, role: Any, calls: _Calls) -> Iterator[Problem]:
    if not parts:
        yield Problem(
            f"{path}.content", "missing_content", "The content is an empty array.", "write a string"
        )
    for index, part in enumerate(parts):
        here = f"{path}.content[{index}]"
        if not isinstance(part, dict):
            yield wrong_type(here, 'an object {"type": "text", "text": …}', part)
            continue
        kind = part.get("type")
        if kind not in PARTS:
            said = f"A content part has the type {shown(kind)}; only text can be trained on."
            yield Problem(here, "unsupported_content", said)
            continue
        yield from unknown_keys(part, ("type", "text", "value"), here)
        given = [key for key in ("text", "value") if part.get(key) is not None]
        if len(given) != 1:
            said = "both text and value" if given else "neither text nor value"
            yield Problem(here, "missing_content", f"A content part has {said}.", "give one of them")
            continue
        if kind != "text" and role != "assistant":
            yield Problem(here, "unexpected_key", f"Only assistant messages have parts of the type {kind}.")
        if kind == "tool_call":
            calls.without_id = True
            yield from _check_call_text(part[given[0]], f"{here}.{given[0]}")
        elif not isinstance(part[given[0]], str):
            yield wrong_type(f"{here}.{given[0]}", "a string", part[given[0]])


def _check_call_text(value: Any, path: str) -> Iterator[Problem]:
    """A call, or several, as JSON in a string or as they are."""
    hint = '{"name": "add", "arguments": {"a": 1}}'
    if isinstance(value, str):
        try:
            value, problems = parse_json(value)
        except BadJSON as error:
            said = f"A call of a function is no JSON: {error.reason}"
            yield Problem(path, "arguments_not_json_string", said, hint)
            return
        for problem in problems:
            yield replace(problem, path=path)
        if problems:
            return
    several = value if isinstance(value, list) else [value]
    if not several:
        yield Problem(path, "missing_content", "There is no call.", hint)
    for call in several:
        yield from _check_function(call, path)


def _check_calls(calls: Any, path: str, seen: _Calls) -> Iterator[Problem]:
    if not isinstance(calls, list):
        yield wrong_type(path, "an array", calls)
        return
    for index, call in enumerate(calls):
        here = f"{path}[{index}]"
        if not isinstance(call, dict):
            yield wrong_type(here, "an object", call)
            continue
        call_id = call.get("id")
        if isinstance(call_id, str) and call_id:
            seen.ids[call_id] = None
        elif call_id is None:
            seen.without_id = True
        else:
            yield wrong_type(f"{here}.id", "a string that is not empty", call_id)
        if call.get("type", "function") not in ("function", None):
            yield Problem(f"{here}.type", "wrong_value", f'type is {shown(call["type"])}, not "function".')
        if "function" not in call and "name" in call:  # without the wrapper
            yield from _check_function({k: v for k, v in call.items() if k not in ("id", "type")}, here)
            continue
        yield from unknown_keys(call, ("id", "type", "function"), here)
        yield from _check_function(call.get("function"), f"{here}.function")


def _check_function(function: Any, path: str) -> Iterator[Problem]:
    if not isinstance(function, dict):
        yield wrong_type(path, 'an object {"name": …, "arguments": …}', function)
        return
    yield from unknown_keys(function, ("name", "arguments"), path)
    if not isinstance(function.get("name"), str) or not function["name"]:
        yield from _string_wanted(function, "name", path)
    yield from _check_arguments(function.get("arguments"), f"{path}.arguments")


def _check_arguments(arguments: Any, path: str) -> Iterator[Problem]:
    hint = 'write an object, or as OpenAI does, JSON of one in a string: "{\\"city\\": \\"Bern\\"}"'
    code = "arguments_not_json_string"
    if isinstance(arguments, dict):
        return
    if not isinstance(arguments, str):
        said = f"arguments must be an object, or JSON of one in a string, got {json_type(arguments)}."
        yield Problem(path, code, said, hint)
        return
    try:
        value, problems = parse_json(arguments)
    except BadJSON as error:
        yield Problem(path, code, f"arguments is a string, but not of JSON: {error.reason}", hint)
        return
    if not isinstance(value, dict):
        yield Problem(path, code, f"arguments holds {json_type(value)}, not an object.", hint)
    for problem in problems:
        yield replace(problem, path=path)


def _string_wanted(found: dict[str, Any], key: str, path: str) -> Iterator[Problem]:
    if key not in found:
        yield Problem(join(path, key), "missing_key", f"The key {shown(key)} is missing.")
    else:
        yield wrong_type(join(path, key), "a string that is not empty", found[key])


# -------------------------------------------------------------------------------- as chat templates take them


def template_messages(messages: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Good messages as chat templates take them: the convention of transformers, not of OpenAI's wire.

    Content is one string: `null` beside tool calls becomes "" (templates that add strings end at a null).
    The arguments of a call become an object: most templates write them with `tojson`, and would quote a
    string a second time.
    """
    made, waiting, number = list[dict[str, Any]](), list[str](), 0
    for message in messages:
        one = _from_turn(message) if _is_turn(message) else _from_message(message)
        if "tool_calls" in one:
            waiting = []
            for call in one["tool_calls"]:
                if not call["id"]:
                    number += 1
                    call["id"] = f"call{number:05d}"
                waiting.append(call["id"])
        elif one["role"] == "tool":
            if "tool_call_id" not in one and waiting:
                one["tool_call_id"] = waiting[0]
            if one.get("tool_call_id") in waiting:
                waiting.remove(one["tool_call_id"])
        made.append(one)
    return tuple(made)


def is_trained(message: Mapping[str, Any]) -> bool:
    return role_of(message) == "assistant" and _weight(message) != 0


def _from_turn(turn: dict[str, Any]) -> dict[str, Any]:
    if SPEAKERS[turn["from"]] == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls_in(turn["value"])}
    return {"role": role_of(turn), "content": turn["value"]}


def _from_message(message: dict[str, Any]) -> dict[str, Any]:
    content, calls = message.get("content"), list[dict[str, Any]]()
    reasoning = message.get("reasoning_content") or message.get("thinking") or ""
    if isinstance(content, list):
        texts: dict[str, list[str]] = {"text": [], "reasoning": []}
        for part in content:
            value = part["text"] if part.get("text") is not None else part["value"]
            if part["type"] == "tool_call":
                calls += _calls_in(value)
            else:
                texts[part["type"]].append(value)
        content = "".join(texts["text"])
        reasoning = "".join(texts["reasoning"]) or reasoning
    made: dict[str, Any] = {"role": role_of(message), "content": content or ""}
    if reasoning:
        made["reasoning_content"] = reasoning
    for key in ("name", "tool_call_id"):
        if message.get(key) is not None:
            made[key] = message[key]
    for call in message.get("tool_calls") or ():
        calls.append(_call(call.get("function") or call, call.get("id") or ""))
    if message.get("function_call"):
        calls.append(_call(message["function_call"]))
    if calls:
        made["tool_calls"] = calls
    return made


def _calls_in(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, str):
        value = parse_json(value)[0]
    return [_call(function) for function in (value if isinstance(value, list) else [value])]


def _call(function: dict[str, Any], call_id: str = "") -> dict[str, Any]:
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = parse_json(arguments)[0]
    return {"id": call_id, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


# -------------------------------------------------------------------------------------------------- tools


def check_tools(tools: Any, path: str = "tools") -> Iterator[Problem]:
    """What is wrong with tools in any of the vocabularies."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools, problems = parse_json(tools)
        except BadJSON as error:
            hint = "write the array itself, or JSON of it in a string"
            yield Problem(path, "bad_tools", f"{path} is a string, but not of JSON: {error.reason}", hint)
            return
        if problems:
            for problem in problems:
                inside = problem.path.startswith("[")
                yield replace(problem, path=path + problem.path if inside else join(path, problem.path))
            return
    if tools is None or isinstance(tools, str):
        return
    if not isinstance(tools, list):
        yield wrong_type(path, "an array", tools)
        return
    for index, tool in enumerate(tools):
        here = f"{path}[{index}]"
        if not isinstance(tool, dict):
            yield wrong_type(here, "an object", tool)
        elif "function" not in tool and "name" in tool and tool.get("type", "function") == "function":
            yield from _check_tool({key: tool[key] for key in tool if key != "type"}, here)
        else:
            yield from unknown_keys(tool, ("type", "function"), here)
            if tool.get("type", "function") != "function":
                said = f'type is {shown(tool.get("type"))}, not "function".'
                yield Problem(f"{here}.type", "wrong_value", said)
            if not isinstance(tool.get("function"), dict):
                yield wrong_type(f"{here}.function", "an object", tool.get("function"))
            else:
                yield from _check_tool(tool["function"], f"{here}.function")


def _check_tool(function: dict[str, Any], path: str) -> Iterator[Problem]:
    known = ("name", "description", "parameters", "input_schema", "strict", "return", "returns", "required")
    yield from unknown_keys(function, known, path)
    if not isinstance(function.get("name"), str) or not function["name"]:
        yield from _string_wanted(function, "name", path)
    if not isinstance(function.get("description"), str | None):
        yield wrong_type(f"{path}.description", "a string", function["description"])
    if function.get("parameters") is not None and function.get("input_schema") is not None:
        said = "The tool has parameters and input_schema."
        yield Problem(f"{path}.input_schema", "unexpected_key", said, "keep one of them")
    for key in ("parameters", "input_schema"):
        schema = function.get(key)
        if not isinstance(schema, dict | None):
            yield wrong_type(f"{path}.{key}", "an object (a JSON Schema)", schema)
        elif schema is not None:
            yield from (problem for problem, fatal in _schema_problems(schema, f"{path}.{key}") if fatal)


def doubts_about_tools(tools: Any, path: str = "tools") -> Iterator[Problem]:
    """What in the schemas of good tools is no JSON Schema, and was left as it is."""
    for index, tool in enumerate(_tools_in(tools)):
        here = f"{path}[{index}]"
        wrapper = tool.get("function")
        function, here = (tool, here) if wrapper is None else (wrapper, f"{here}.function")
        for key in ("parameters", "input_schema"):
            for problem, fatal in _schema_problems(function.get(key) or {}, f"{here}.{key}"):
                if not fatal:
                    yield problem


def _schema_problems(schema: dict[str, Any], path: str) -> Iterator[tuple[Problem, bool]]:
    """(problem, whether it is one for certain). A stack, not recursion: the depth is the sender's choice.

    What is looked at is what templates and callers rely on; it is no full check against the meta-schema.
    """
    waiting: list[tuple[Any, str]] = [(schema, path)]
    while waiting:
        item, here = waiting.pop()
        if isinstance(item, bool):  # a schema too: everything, or nothing
            continue
        if not isinstance(item, dict):
            said = f"A schema must be an object, got {json_type(item)}."
            yield Problem(here, "bad_tool_schema", said, "a JSON Schema"), here == path
            continue
        for type in item["type"] if isinstance(item.get("type"), list) else [item.get("type")]:
            if type is not None and not isinstance(type, str):
                said = f"type must be a string, got {json_type(type)}."
                yield Problem(f"{here}.type", "bad_tool_schema", said, f"one of {', '.join(TYPES)}"), True
            elif type is not None and type != "any" and _type_of(type) is None:
                said = f"{shown(type)} is no type of JSON Schema."
                yield Problem(f"{here}.type", "bad_tool_schema", said, f"one of {', '.join(TYPES)}"), False
        properties, required = item.get("properties"), item.get("required")
        if isinstance(properties, dict):
            inner = [(part, join(f"{here}.properties", key)) for key, part in properties.items()]
            waiting.extend(reversed(inner))
        elif properties is not None:
            said = f"properties must be an object, got {json_type(properties)}."
            yield Problem(f"{here}.properties", "bad_tool_schema", said, '{"city": {"type": "string"}}'), True
        if required is not None and not (
            isinstance(required, list) and all(isinstance(name, str) for name in required)
        ):
            said = "required must be an array of names."
            yield Problem(f"{here}.required", "bad_tool_schema", said), False
        if isinstance(item.get("enum"), str | int | float | dict):
            yield Problem(f"{here}.enum", "bad_tool_schema", "enum must be an array."), True
        if isinstance(item.get("items"), list):  # one schema for each place, until draft 2020-12
            waiting.extend((part, f"{here}.items[{index}]") for index, part in enumerate(item["items"]))
        elif item.get("items") is not None:
            waiting.append((item["items"], f"{here}.items"))


def template_tools(tools: Any) -> tuple[dict[str, Any], ...]:
    """Good tools as chat templates take them."""
    return tuple(map(_tool, _tools_in(tools)))


def _tools_in(tools: Any) -> list[dict[str, Any]]:
    if isinstance(tools, str):
        return list(parse_json(tools)[0]) if tools.strip() else []
    return list(tools or ())


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool.get("function") or {key: tool[key] for key in tool if key != "type"}
    made = {}
    for key, value in function.items():
        if key in ("parameters", "input_schema"):
            if value is not None:
                made["parameters"] = _schema(value)
        elif value is not None:
            made[key] = value
    return {"type": "function", "function": made}


def _schema(schema: Any) -> Any:
    """The schema with the types of JSON Schema, as far as they are certain. At most 64 levels deep."""
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    type = schema.get("type")
    if type == "any":
        del made["type"]
    elif isinstance(type, str) and (known := _type_of(type)) is not None:
        made["type"] = known[0]
        if known[1] is not None and "items" not in made:
            made["items"] = {"type": known[1]}
    elif isinstance(type, list):
        made["type"] = [(_type_of(one) or (one,))[0] if isinstance(one, str) else one for one in type]
    if isinstance(schema.get("properties"), dict):
        made["properties"] = {key: _schema(part) for key, part in schema["properties"].items()}
    if isinstance(schema.get("items"), list):
        made["items"] = [_schema(part) for part in schema["items"]]
    elif "items" in schema:
        made["items"] = _schema(schema["items"])
    return made


def _type_of(word: str) -> tuple[str, str | None] | None:
    """(type, type of its elements) of a type in JSON Schema's words or Python's; None: it is not certain."""
    if word in TYPES:
        return word, None
    plain = word.lower().removesuffix(", optional").strip()
    if plain.startswith("optional[") and plain.endswith("]"):
        plain = plain[9:-1]
    name, bracket, inner = plain.partition("[")
    known = TYPES_OF_PYTHON.get(name, name if name in TYPES else None)
    if known is None or not bracket:
        return None if known is None else (known, None)
    element = TYPES_OF_PYTHON.get(inner.removesuffix("]"))
    if known == "array" and inner.endswith("]") and element is not None and name != "tuple":
        return known, element
    return None
