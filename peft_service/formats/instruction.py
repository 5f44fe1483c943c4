"""`{"instruction", "input"?, "output", "system"?, "history"?}`: the Alpaca shape, as LLaMA-Factory reads it.

With a chat template: system, the history's turns, instruction and input (each on lines of its own) as the
user, output as the assistant; the answers in the history are trained too, as LLaMA-Factory does.
Without one: Alpaca's headings, written out below; then only `output` is trained, because plain text has no
mark at which an earlier answer ends.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

from peft_service.formats import Example, Format, Problem, typo_of, wrong_type


class Instruction(Format):
    kind: Literal["instruction"] = "instruction"

    keys = ("instruction", "input", "output", "system", "history", "task")
    rank = 60
    sample = '{"instruction": "Add the numbers.", "input": "2 and 2", "output": "4"}'
    dialects = (
        '{"instruction": "Add 2 to it.", "output": "6", "system": "Be brief.", "history": [["2+2?", "4"]]}',
    )
    siblings = ("chosen", "rejected", "kto_tag", "label")

    def detect(self, row: dict[str, Any]) -> bool:
        return "instruction" in row and any(key == "output" or typo_of(key, ("output",)) for key in row)

    def fits(self, row: dict[str, Any]) -> bool:
        return "instruction" in row

    def check(self, row: dict[str, Any]) -> Iterator[Problem]:
        yield from check_asked(row)
        yield from check_output(row, "output")

    def messages_or_text(self, row: dict[str, Any]) -> Example:
        messages = [*asked(row), {"role": "assistant", "content": row["output"]}]
        return Example(
            messages=tuple(messages),
            trained=tuple(message["role"] == "assistant" for message in messages),
            prompt=plain_prompt(row),
            completion=row["output"],
            task=row.get("task"),
        )

    def roles(self, row: dict[str, Any]) -> Iterable[str]:
        return [*(message["role"] for message in asked(row)), "assistant"]


def check_asked(row: dict[str, Any]) -> Iterator[Problem]:
    """What is wrong with all keys but the answer's."""
    if "instruction" not in row:
        yield Problem("instruction", "missing_key", 'The key "instruction" is missing.')
    elif not isinstance(row["instruction"], str):
        yield wrong_type("instruction", "a string", row["instruction"])
    for key in ("input", "system"):
        if not isinstance(row.get(key), str | None):
            yield wrong_type(key, "a string", row[key])
    instruction, given = row.get("instruction"), row.get("input")
    if isinstance(instruction, str) and not f"{instruction}{given or ''}".strip():
        yield Problem("instruction", "missing_content", "Instruction and input are both empty.")
    yield from _check_history(row.get("history"))


def check_output(row: dict[str, Any], key: str) -> Iterator[Problem]:
    """What is wrong with an answer in plain text."""
    if key not in row:
        yield Problem(key, "missing_key", f'The key "{key}" is missing.')
    elif not isinstance(row[key], str):
        yield wrong_type(key, "a string", row[key])
    elif not row[key].strip():
        yield Problem(key, "empty_completion", f"The {key} is empty: there is nothing to learn.")


def asked(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages before the answer: system, the history's turns, and instruction and input as the user."""
    messages: list[dict[str, Any]] = []
    if row.get("system"):
        messages.append({"role": "system", "content": row["system"]})
    for question, answer in row.get("history") or []:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    parts = [part for part in (row["instruction"], row.get("input")) if part]
    return [*messages, {"role": "user", "content": "\n".join(parts)}]


def plain_prompt(row: dict[str, Any]) -> str:
    """What stands before the output where there is no chat template. It ends where the output begins."""
    parts = [row["system"]] if row.get("system") else []
    for question, answer in row.get("history") or []:
        parts += [f"### Instruction:\n{question}", f"### Response:\n{answer}"]
    parts.append(f"### Instruction:\n{row['instruction']}")
    if row.get("input"):
        parts.append(f"### Input:\n{row['input']}")
    return "\n\n".join(parts) + "\n\n### Response:\n"


def _check_history(history: Any) -> Iterator[Problem]:
    if history is None:
        return
    if not isinstance(history, list):
        yield wrong_type("history", "an array of [question, answer] pairs", history)
        return
    for index, turn in enumerate(history):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(part, str) for part in turn):
            yield Problem(
                f"history[{index}]",
                "wrong_type",
                "A turn of the history must be two strings: [question, answer].",
            )
        elif not turn[1].strip():
            yield Problem(
                f"history[{index}][1]", "empty_completion", "The answer is empty: nothing to learn."
            )
