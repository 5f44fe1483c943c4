"""`{"prompt", "completion"}`: two strings, or two lists of messages (TRL's conversational form).

Two strings are plain text: no chat template is put around them. Only the completion is trained; in lists of
messages, the assistant messages of the completion.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal

from peft_service.formats import Example, Format, Problem, json_type, unknown_keys, wrong_type
from peft_service.formats.chat import check_messages, check_targets, check_tools, is_trained, template_message


class PromptCompletion(Format):
    kind: Literal["prompt_completion"] = "prompt_completion"

    keys = ("prompt", "completion", "tools", "task")
    sample = '{"prompt": "2+2=", "completion": "4"}'

    def detect(self, row: dict[str, Any]) -> bool:
        return "prompt" in row or "completion" in row

    def check(self, row: dict[str, Any]) -> Iterator[Problem]:
        yield from unknown_keys(row, self.keys)
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
            for problem in check_messages([*prompt, *completion], "\0"):
                yield replace(problem, path=_place(problem.path, len(prompt)))
            if not completion:
                yield Problem("completion", "empty_completion", "The completion has no messages.")
            yield from check_targets(completion, "completion")

    def messages_or_text(self, row: dict[str, Any]) -> Example:
        if isinstance(row["prompt"], str):
            return Example(prompt=row["prompt"], completion=row["completion"], task=row.get("task"))
        return Example(
            messages=tuple(map(template_message, [*row["prompt"], *row["completion"]])),
            trained=(False,) * len(row["prompt"]) + tuple(map(is_trained, row["completion"])),
            tools=tuple(row.get("tools") or ()),
            task=row.get("task"),
        )

    def roles(self, row: dict[str, Any]) -> Iterable[str]:
        if isinstance(row["prompt"], str):
            return ()
        return [message["role"] for message in [*row["prompt"], *row["completion"]]]


def _place(path: str, prompt_messages: int) -> str:
    """`path` of a message in prompt and completion put together, as the path where the user wrote it."""
    head, bracket, rest = path.removeprefix("\0[").partition("]")
    if not bracket:
        return "prompt"
    index = int(head)
    if index < prompt_messages:
        return f"prompt[{index}]{rest}"
    return f"completion[{index - prompt_messages}]{rest}"
