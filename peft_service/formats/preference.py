"""`{"prompt", "chosen", "rejected"}`: two answers to one prompt, of which the first is the better one.

    TRL            prompt a string, chosen and rejected strings; or all three arrays of messages. Without a
                   prompt, or where both conversations begin with it, it is what they have in common at the
                   beginning (of strings: characters, but no blank at the end)
    OpenAI         {"input": {"messages", "tools"?}, "preferred_output": [message], "non_preferred_output":
                   [message]}, also with _completion in place of _output; answers of several messages too
    ShareGPT       {"conversations", "chosen": {"from", "value"}, "rejected": {…}}, with `system` and `tools`
    LLaMA-Factory  {"instruction", "input"?, "chosen", "rejected"}, strings; {"chosen_messages",
                   "rejected_messages"}, whole conversations

Only the answers are learned from: what is behind the prompt, and of that the assistant's messages whose
weight is not 0.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from peft_service.formats import Example, Format, Problem, join, json_type, unknown_keys, wrong_type
from peft_service.formats.conversation import (
    check_last,
    check_messages,
    check_targets,
    check_thread,
    check_tools,
    doubts_about_tools,
    is_trained,
    role_of,
    template_messages,
    template_tools,
    threaded,
    within,
)
from peft_service.formats.instruction import asked, check_asked, check_output, plain_prompt
from peft_service.formats.sharegpt import check_system, system_of

SIDES = (
    ("chosen", "rejected"),
    ("chosen_messages", "rejected_messages"),
    ("preferred_output", "non_preferred_output"),
    ("preferred_completion", "non_preferred_completion"),
)
"""Names of the better and the worse answer."""


@dataclass(frozen=True, slots=True)
class _Pair:
    """A row, however it is written. Text is strings, a conversation is lists."""

    names: tuple[str, str]
    prompt: Any
    """None: what both answers begin with."""
    prompt_path: str
    chosen: Any
    rejected: Any
    tools: Any
    tools_path: str = "tools"

    @property
    def sides(self) -> tuple[tuple[str, Any], tuple[str, Any]]:
        return (self.names[0], self.chosen), (self.names[1], self.rejected)


class Preference(Format):
    kind: Literal["preference"] = "preference"

    keys = (
        *(key for pair in SIDES for key in pair),
        *("prompt", "input", "conversations", "instruction", "system", "history", "tools", "task"),
    )
    rank = 10
    sample = '{"prompt": "2+2=", "chosen": "4", "rejected": "5"}'
    dialects = (
        '{"chosen": "Q: 2+2? A: four", "rejected": "Q: 2+2? A: five"}',
        '{"prompt": [{"role": "user", "content": "2+2?"}], "chosen": [{"role": "assistant", "content": '
        '"4"}], "rejected": [{"role": "assistant", "content": "5"}]}',
        '{"chosen": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}], '
        '"rejected": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5"}]}',
        '{"input": {"messages": [{"role": "user", "content": "2+2?"}], "tools": [], '
        '"parallel_tool_calls": true}, "preferred_output": [{"role": "assistant", "content": "4"}], '
        '"non_preferred_output": [{"role": "assistant", "content": "5"}]}',
        '{"input": {"messages": [{"role": "user", "content": "2+2?"}]}, "preferred_completion": [{"role": '
        '"assistant", "content": "4"}], "non_preferred_completion": [{"role": "assistant", "content": "5"}]}',
        '{"conversations": [{"from": "human", "value": "2+2?"}], "chosen": {"from": "gpt", "value": "4"}, '
        '"rejected": {"from": "gpt", "value": "5"}}',
        '{"instruction": "Add.", "input": "2 and 2", "chosen": "4", "rejected": "5"}',
        '{"chosen_messages": [{"role": "user", "content": "2+2?", "loss_weight": 0.0}, {"role": "assistant", '
        '"content": "4", "loss_weight": 1.0}], "rejected_messages": [{"role": "user", "content": "2+2?", '
        '"loss_weight": 0.0}, {"role": "assistant", "content": "5", "loss_weight": 1.0}]}',
    )

    def detect(self, row: dict[str, Any]) -> bool:
        return any(one in row or other in row for one, other in SIDES)

    def fits(self, row: dict[str, Any]) -> bool:
        return self.detect(row) or "prompt" in row or isinstance(row.get("input"), dict)

    def check(self, row: dict[str, Any]) -> Iterator[Problem]:
        names = _names(row)
        missing = [name for name in names if name not in row]
        for name in missing:
            yield Problem(name, "missing_key", f'The key "{name}" is missing.')
        if "instruction" in row and names == SIDES[0]:
            yield from check_asked(row)
            yield from (problem for name in names if name in row for problem in check_output(row, name))
            if not missing and row[names[0]] == row[names[1]]:
                yield _same(names)
            return
        if names[0].startswith("preferred"):
            given = row.get("input")
            if not isinstance(given, dict) or "messages" not in given:
                yield wrong_type("input", 'an object {"messages": […]}', given)
                return
            yield from unknown_keys(given, ("messages", "tools", "parallel_tool_calls"), "input")
            if not isinstance(given.get("parallel_tool_calls"), bool | None):
                path = "input.parallel_tool_calls"
                yield wrong_type(path, "a boolean", given["parallel_tool_calls"])
        elif "conversations" in row:
            yield from check_system(row, row["conversations"])
        if not missing:
            yield from _check_pair(_pair(row))

    def doubts(self, row: dict[str, Any]) -> Iterator[Problem]:
        pair = _pair(row)
        yield from doubts_about_tools(pair.tools, pair.tools_path)

    def messages_or_text(self, row: dict[str, Any]) -> Example:
        pair, task = _pair(row), row.get("task")
        if "instruction" in row and pair.names == SIDES[0]:
            before = asked(row)
            sides = [
                Example(
                    messages=(*before, {"role": "assistant", "content": answer}),
                    trained=(False,) * len(before) + (True,),
                    prompt=plain_prompt(row),
                    completion=answer,
                    task=task,
                )
                for _, answer in pair.sides
            ]
        elif isinstance(pair.chosen, str):
            prompt, answers = _split(pair)
            sides = [Example(prompt=prompt, completion=answer, task=task) for answer in answers]
        else:
            prompt, answers = _split(pair)
            tools = template_tools(pair.tools)
            sides = [
                Example(
                    messages=template_messages([*prompt, *answer]),
                    trained=(False,) * len(prompt) + tuple(map(is_trained, answer)),
                    tools=tools,
                    task=task,
                )
                for answer in answers
            ]
        return replace(sides[0], rejected=sides[1])

    def roles(self, row: dict[str, Any]) -> Iterable[str]:
        """Those of the prompt and of both answers."""
        example = self.messages_or_text(row)
        if not example.messages or example.rejected is None:
            return ()
        prompt = (
            len(_split(_pair(row))[0]) if isinstance(_pair(row).chosen, list) else len(example.messages) - 1
        )
        return [role_of(message) for message in (*example.messages, *example.rejected.messages[prompt:])]


def _names(row: dict[str, Any]) -> tuple[str, str]:
    return next((pair for pair in SIDES if pair[0] in row or pair[1] in row), SIDES[0])


def _pair(row: dict[str, Any]) -> _Pair:
    """The row in one way of writing; of a row with problems, what can be had of it."""
    names = _names(row)
    # One message, without the brackets around it, is an answer of one message.
    chosen, rejected = ([side] if isinstance(side, dict) else side for side in map(row.get, names))
    if names[0].startswith("preferred"):
        given = row["input"] if isinstance(row.get("input"), dict) else {}
        made = _Pair(
            names,
            given.get("messages"),
            "input.messages",
            chosen,
            rejected,
            given.get("tools"),
            "input.tools",
        )
    elif "conversations" in row and names == SIDES[0]:
        turns = row["conversations"]
        prompt = [*system_of(row), *turns] if isinstance(turns, list) else turns
        made = _Pair(names, prompt, "conversations", chosen, rejected, row.get("tools"))
    else:
        made = _Pair(names, row.get("prompt"), "prompt", chosen, rejected, row.get("tools"))
    if isinstance(chosen, list) and isinstance(rejected, list) and made.prompt is not None:
        # The prompt is given, and both conversations begin with it all the same.
        prompt = [{"role": "user", "content": made.prompt}] if isinstance(made.prompt, str) else made.prompt
        if isinstance(prompt, list) and prompt:
            end = len(prompt)
            if chosen[:end] == prompt == rejected[:end] and min(len(chosen), len(rejected)) > end:
                made = replace(made, prompt=prompt, chosen=chosen[end:], rejected=rejected[end:])
    return made


def _common(pair: _Pair) -> int:
    """How much both answers have in common at the beginning; something is left of each."""
    chosen, rejected = pair.chosen, pair.rejected
    end = min(len(chosen), len(rejected)) - 1
    same = next((at for at in range(end) if chosen[at] != rejected[at]), max(end, 0))
    return same - 1 if isinstance(chosen, str) and same and chosen[same - 1] == " " else same


def _split(pair: _Pair) -> tuple[Any, tuple[Any, Any]]:
    """(prompt, answers) of a good pair."""
    if pair.prompt is not None:
        return pair.prompt, (pair.chosen, pair.rejected)
    end = _common(pair)
    return pair.chosen[:end], (pair.chosen[end:], pair.rejected[end:])


def _same(names: tuple[str, str]) -> Problem:
    said = f"{names[0]} and {names[1]} are the same: there is nothing to prefer."
    return Problem(names[1], "chosen_equals_rejected", said, "remove the row")


def _check_pair(pair: _Pair) -> Iterator[Problem]:
    kinds = [type(side) for _, side in pair.sides]
    for name, side in pair.sides:
        if not isinstance(side, str | list):
            yield wrong_type(name, "a string or an array of messages", side)
    if not all(kind in (str, list) for kind in kinds):
        return
    if kinds[0] is not kinds[1]:
        said = (
            f"{pair.names[0]} is {json_type(pair.chosen)}, but {pair.names[1]} is {json_type(pair.rejected)}."
        )
        yield Problem(pair.names[1], "wrong_type", said, "make both strings, or both arrays of messages")
        return
    if pair.prompt is not None and not isinstance(pair.prompt, kinds[0]):
        kind = json_type(pair.chosen)
        said = f"{pair.prompt_path} is {json_type(pair.prompt)}, but {pair.names[0]} is {kind}."
        hint = "make all three strings, or all three arrays of messages"
        yield Problem(pair.prompt_path, "wrong_type", said, hint)
        return
    for name, side in pair.sides:
        if not side if isinstance(side, list) else not side.strip():
            yield Problem(name, "empty_completion", f"{name} is empty.")
    if pair.chosen == pair.rejected:
        yield _same(pair.names)
        return
    if kinds[0] is str:
        if pair.tools:
            said = "Tools need messages: here the answers are strings."
            yield Problem(pair.tools_path, "unexpected_key", said)
        return
    yield from check_tools(pair.tools, pair.tools_path)
    yield from _check_conversations(pair)


def _check_conversations(pair: _Pair) -> Iterator[Problem]:
    if pair.prompt is None:
        start = _common(pair)
        for name, side in pair.sides:
            yield from check_messages(side, name)
        if not start:
            said = "The two conversations have no message in common at their beginning: there is no prompt."
            yield Problem(pair.names[1], "different_prompts", said)
            return
        places = [(name, side[start:], start) for name, side in pair.sides]
    else:
        # The prompt's problems once, then those of each answer behind it.
        seen = set[Problem]()
        for name, side in pair.sides:
            for problem in check_thread(*threaded([(pair.prompt, pair.prompt_path), (side, name)])):
                if problem not in seen:
                    seen.add(problem)
                    yield problem
        if not pair.prompt:
            yield Problem(pair.prompt_path, "empty_messages", "There are no messages.")
        places = [(name, side, 0) for name, side in pair.sides]
    for name, answer, start in places:
        first = answer[0] if answer and isinstance(answer[0], dict) else None
        if first is not None and role_of(first) in ("user", "system", "developer"):
            here = f"{join('', name)}[{start}]"
            if pair.prompt is None:
                said = "The conversations part before an assistant's message: the prompts differ."
                yield Problem(here, "different_prompts", said, "both must answer the same prompt")
            else:
                said = f"The answer begins with a message of the role {role_of(first)}."
                yield Problem(here, "answer_not_assistant", said, "the prompt goes in front of both answers")
        yield from check_last(answer, within(name, start))
        yield from check_targets(answer, name, within(name, start))
