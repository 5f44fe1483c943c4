"""Column mapping: a data file of any shape, read as one of a known format, without rewriting it.

A mapping names, for every key of the format, where it comes from:

    {"prompt": "question", "completion": "answer"}                       columns
    {"instruction": "instruction", "output": "instances[0].output"}      paths into a row
    {"messages": "question[0]", "tools": "function"}                     of any type
    {"prompt": {"text": "Question: {question}\\nAnswer:"}, …}             a text with columns in it
    {"label": {"value": "spam"}, …}                                      the same for every row
    {"prompt": {"split": "text", "on": "||", "part": 0}, …}              a piece of a column
    {"messages": {"json": "messages"}}                                   JSON in a string, as in tables
    {"messages": {"messages": "dialog", "role": "who", "content": "said", "roles": {"bot": "assistant"}}}
    {"conversation": "turns[*].text"}                                    texts: user and assistant in turn

A path is names with dots between them, `[0]` for an element of an array (`[-1]` the last), `[*]` for all of
them, and `["odd.name"]` for a name with dots, brackets, braces, quotes or question marks. A path that ends
with `?` may lead nowhere: then the key is left out. Columns that a mapping does not name are left out too.
"""

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, RootModel, model_validator

from peft_service.formats import BadJSON, Problem, did_you_mean, json_type, parse_json, shown
from peft_service.variants import Frozen

MAX_COLUMNS = 64
MAX_TEXT_CHARACTERS = 16 * 1024**2
"""Of a text that a template makes, so that a short request cannot make long rows."""


def _checked_path(path: str) -> str:
    steps_of(path)
    return path


def _checked_template(template: str) -> str:
    pieces_of(template)
    return template


Path = Annotated[str, Field(min_length=1, max_length=500), AfterValidator(_checked_path)]
"""Into a row; see the module."""


class Value(Frozen):
    """The same for every row."""

    value: Any


class Text(Frozen):
    """A text with paths in braces. What is no string goes in as JSON; `{{` and `}}` are braces."""

    text: Annotated[str, Field(max_length=100_000), AfterValidator(_checked_template)]


class Split(Frozen):
    """One of the pieces that a column is cut into. A negative part counts from the end."""

    split: Path
    on: str = Field(min_length=1, max_length=100)
    part: int


class Json(Frozen):
    """What the JSON in a string says."""

    json_: Path = Field(alias="json")

    model_config = ConfigDict(frozen=True, extra="forbid", serialize_by_alias=True)


class Messages(Frozen):
    """Messages whose keys or roles have other names; their other keys are left out."""

    messages: Path
    role: str = "role"
    """The key in each message that says who speaks."""
    content: str = "content"
    roles: dict[str, str] = Field(default_factory=dict)
    """A name of a speaker -> the role; those that are not here stay as they are."""


Source = Path | Value | Text | Split | Json | Messages


class Columns(RootModel[Annotated[dict[str, Source], Field(min_length=1, max_length=MAX_COLUMNS)]]):
    """Key of a format -> where it comes from."""

    model_config = ConfigDict(frozen=True)

    @model_validator(mode="after")
    def _one_conversation(self) -> "Columns":
        if {"conversation", "messages"} <= set(self.root):
            raise ValueError("conversation makes messages too: give one of them")
        return self


class _Nowhere(Exception):
    """A path does not lead anywhere in this row."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.hint = code, message, hint


def mapped(row: dict[str, Any], columns: Columns) -> tuple[dict[str, Any], list[Problem]]:
    """The row as the mapping says, and what went wrong: the codes column_not_found and bad_column_path.

    A key without a source in this row is left out, so whoever checks the row says what that means for the
    format.
    """
    made: dict[str, Any] = {}
    problems: list[Problem] = []
    for key, source in columns.root.items():
        try:
            if key == "conversation":
                made["messages"] = _conversation(_read(row, source))
            else:
                made[key] = _read(row, source)
        except _Nowhere as error:
            if not (isinstance(source, str) and source.endswith("?") and error.code == "column_not_found"):
                problems.append(Problem(key, error.code, error.message, error.hint))
    return made, problems


def _read(row: dict[str, Any], source: Any) -> Any:
    if isinstance(source, str):
        return _follow(row, source)
    if isinstance(source, Value):
        return source.value
    if isinstance(source, Text):
        return _filled(row, source.text)
    if isinstance(source, Split):
        pieces = _string(_follow(row, source.split), source.split).split(source.on)
        if not -len(pieces) <= source.part < len(pieces):
            count = f"{len(pieces)} part{'s' if len(pieces) > 1 else ''} between {shown(source.on)}"
            message = f"{shown(source.split)} has {count}; there is no part {source.part}."
            raise _Nowhere("column_not_found", message)
        return pieces[source.part]
    if isinstance(source, Json):
        return _parsed(_string(_follow(row, source.json_), source.json_), source.json_)
    return _renamed(_follow(row, source.messages), source)


def _filled(row: dict[str, Any], template: str) -> str:
    parts, size = [], 0
    for text, path in pieces_of(template):
        value = "" if path is None else _follow(row, path)
        parts += [text, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)]
        size += len(parts[-1]) + len(text)
        if size > MAX_TEXT_CHARACTERS:
            message = f"The text would have more than {MAX_TEXT_CHARACTERS:,} characters."
            raise _Nowhere("bad_column_path", message)
    return "".join(parts)


def _parsed(text: str, path: str) -> Any:
    try:
        value, problems = parse_json(text)
    except BadJSON as error:
        raise _Nowhere("bad_column_path", f"{shown(path)} is not JSON: {error.reason}") from None
    if problems:
        raise _Nowhere("bad_column_path", f"{shown(path)}: {problems[0]}")
    return value


def _renamed(messages: Any, source: Messages) -> list[Any]:
    if not isinstance(messages, list):
        message = f"{shown(source.messages)} is {json_type(messages)}, not an array of messages."
        raise _Nowhere("bad_column_path", message)
    made: list[Any] = []
    for message in messages:
        if not isinstance(message, dict):
            made.append(message)  # the format says what is wrong with it
            continue
        one = {}
        for key, name in (("role", source.role), ("content", source.content)):
            if name not in message:
                said = f"A message has no key {shown(name)}."
                raise _Nowhere("column_not_found", said, did_you_mean(name, list(message)))
            one[key] = message[name]
        if isinstance(one["role"], str):
            one["role"] = source.roles.get(one["role"], one["role"])
        made.append(one)
    return made


def _conversation(texts: Any) -> list[dict[str, Any]]:
    """Texts as messages: the first is the user's, the second the assistant's, and so on."""
    if not isinstance(texts, list):
        message = f"A conversation is an array of texts, got {json_type(texts)}."
        raise _Nowhere("bad_column_path", message, 'for example "turns[*].text"')
    return [
        {"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(texts)
    ]


def _string(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise _Nowhere("bad_column_path", f"{shown(path)} is {json_type(value)}, not a string.")
    return value


def _follow(row: dict[str, Any], path: str) -> Any:
    return _value_at(row, steps_of(path), path)


def _value_at(value: Any, steps: tuple[str | int | None, ...], path: str) -> Any:
    for index, step in enumerate(steps):
        if isinstance(step, str):
            if not isinstance(value, dict):
                message = f"{shown(path)} goes to {shown(step)} in {json_type(value)}."
                raise _Nowhere("bad_column_path", message, _hint(value))
            if step not in value:
                if index == 0:
                    names = list(value)
                    known = ", ".join(shown(name, 40) for name in names[:8]) + (
                        ", …" if len(names) > 8 else ""
                    )
                    hint = did_you_mean(step, names) or (
                        f"its columns are {known}" if names else "it has none"
                    )
                    raise _Nowhere("column_not_found", f"The row has no column {shown(step)}.", hint)
                message = f"{shown(path)}: there is no {shown(step)}."
                raise _Nowhere("column_not_found", message, did_you_mean(step, list(value)))
            value = value[step]
        elif not isinstance(value, list):
            message = f"{shown(path)} goes to an element of {json_type(value)}."
            raise _Nowhere("bad_column_path", message, _hint(value))
        elif step is None:
            return [_value_at(part, steps[index + 1 :], path) for part in value]
        elif not -len(value) <= step < len(value):
            message = f"{shown(path)}: there is no element {step} in an array of {len(value)}."
            raise _Nowhere("column_not_found", message)
        else:
            value = value[step]
    return value


def _hint(value: Any) -> str:
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        return 'is it JSON in a string? {"json": path} reads it'
    return "[0] takes an element of it, [*] all" if isinstance(value, list) else ""


_STEP = re.compile(r'\.?([^\s.\[\]"{}?][^.\[\]"{}?]*)|\[(-?\d{1,9})\]|\[(\*)\]|\[("(?:[^"\\]|\\.)*")\]')


@lru_cache(1024)
def steps_of(path: str) -> tuple[str | int | None, ...]:
    """A path's steps: a name, an index, or None for all elements.

    Raises:
        ValueError: it is no path; says where.
    """
    steps: list[str | int | None] = []
    rest = path.removesuffix("?")
    at = 0
    while at < len(rest):
        found = _STEP.match(rest, at)
        dotted = found is not None and found.group().startswith(".")
        if found is None or (found.group(1) is not None and dotted != (at > 0)):
            raise ValueError(
                f"bad_column_path: {shown(path)} is no path: it cannot be read from character {at + 1} on; "
                'a path looks like question, meta.text, turns[0].value, turns[*].value or ["odd.name"]'
            )
        name, number, every, quoted = found.groups()
        try:
            steps.append(name or (int(number) if number else None if every else str(json.loads(quoted))))
        except ValueError:
            raise ValueError(
                f"bad_column_path: {shown(path)}: {shown(quoted)} is no name in quotes"
            ) from None
        at = found.end()
    if not steps:
        raise ValueError(f"bad_column_path: {shown(path)} is empty")
    return tuple(steps)


@lru_cache(256)
def pieces_of(template: str) -> tuple[tuple[str, str | None], ...]:
    """A template's pieces: (text, the path behind it, or None at the end).

    Raises:
        ValueError: a brace is left over, or there is no path between two of them.
    """
    return tuple(_pieces(template))


def _pieces(template: str) -> Iterator[tuple[str, str | None]]:
    text, at = "", 0
    while at < len(template):
        char = template[at]
        if template[at : at + 2] in ("{{", "}}"):
            text, at = text + char, at + 2
        elif char == "{":
            end = template.find("}", at)
            if end < 0:
                raise ValueError(
                    f"bad_column_path: the brace at character {at + 1} of the text is not closed"
                )
            steps_of(template[at + 1 : end])
            yield text, template[at + 1 : end]
            text, at = "", end + 1
        elif char == "}":
            raise ValueError(
                f"bad_column_path: a closing brace at character {at + 1} of the text; "
                "braces that are text are written twice: }}"
            )
        else:
            end = min(
                (found for found in (template.find("{", at), template.find("}", at)) if found >= 0),
                default=-1,
            )
            end = len(template) if end < 0 else end
            text, at = text + template[at:end], end
    yield text, None
