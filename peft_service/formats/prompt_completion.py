"""`{"prompt", "completion"}`: two strings, or two lists of messages (TRL's conversational form).

Two strings are plain text: no chat template is put around them. Only the completion is trained; in lists of
messages, the assistant messages of the completion.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

from peft_service.formats import Example, Format, Problem, json_type, wrong_type
from peft_service.formats.conversation import (
    check_targets,
    check_thread,
    check_tools,
    doubts_about,
    doubts_about_tools,
    is_trained,
    role_of,
    template_messages,
    template_tools,
    threaded,
)


class PromptCompletion(Format):
    kind: Literal["prompt_completion"] = "prompt_completion"

    keys = ("prompt", "completion", "tools", "task")
    rank = 70
    sample = '{"prompt": "2+2=", "completion": "4"}'
    dialects = (
        '{"prompt": [{"role": "user", "content": "2+2?"}], "completion": [{"role": "assistant", '
        '"content": "4"}]}',
    )
    siblings = ("label",)

    def detect(self, row: dict[str, Any]) -> bool:
        return "completion" in row

    def fits(self, row: dict[str, Any]) -> bool:
        return "completion" in row or "prompt" in row

    def check(self, row: dict[str, Any]) -> Iterator[Problem]:
        yield from check_answered(row)

    def doubts(self, row: dict[str, Any]) -> Iterator[Problem]:
        yield from doubts_about_tools(row.get("tools"))
        if isinstance(row["prompt"], list):
            messages, place = threaded([(row["prompt"], "prompt"), (row["completion"], "completion")])
            yield from doubts_about(messages, place, trained_of(row))

    def messages_or_text(self, row: dict[str, Any]) -> Example:
        if isinstance(row["prompt"], str):
            return Example(prompt=row["prompt"], completion=row["completion"], task=row.get("task"))
        return Example(
            messages=template_messages([*row["prompt"], *row["completion"]]),
            trained=tuple(trained_of(row)),
            tools=template_tools(row.get("tools")),
            task=row.get("task"),
        )

    def roles(self, row: dict[str, Any]) -> Iterable[str]:
        if isinstance(row["prompt"], str):
            return ()
        return [role_of(message) for message in [*row["prompt"], *row["completion"]]]


def trained_of(row: dict[str, Any]) -> list[bool]:
    """For each message of prompt and completion, whether it is trained."""
    return [False] * len(row["prompt"]) + list(map(is_trained, row["completion"]))


def check_answered(row: dict[str, Any]) -> Iterator[Problem]:
    """What is wrong with prompt and completion, strings or messages."""
    for key in ("prompt", "completion"):
        if key not in row:
            yield Problem(key, "missing_key", f'The key "{key}" is missing.')
        elif not isinstance(row[key], str | list):
            yield wrong_type(key, "a string or an array of messages", row[key])
    prompt, completion = row.get("prompt"), row.get("completion")
    if (isinstance(prompt, str) and isinstance(completion, list)) or (
        isinstance(prompt, list) and isinstance(completion, str)
    ):
        yield Problem(
            "completion",
            "wrong_type",
            f"prompt is {json_type(prompt)}, but completion is {json_type(completion)}.",
            "make both strings, or both arrays of messages",
        )
        return
    if isinstance(completion, str) and not completion.strip():
        yield Problem("completion", "empty_completion", "The completion is empty.")
    if isinstance(prompt, str) and row.get("tools"):
        yield Problem("tools", "unexpected_key", "Tools need messages: here the prompt is a string.")
    if isinstance(prompt, list):
        yield from check_tools(row.get("tools"))
    if isinstance(prompt, list) and isinstance(completion, list):
        # One thread: an answer in the completion may refer to a call in the prompt.
        yield from check_thread(*threaded([(prompt, "prompt"), (completion, "completion")]))
        if not completion:
            yield Problem("completion", "empty_completion", "The completion has no messages.")
        yield from check_targets(completion, "completion")
