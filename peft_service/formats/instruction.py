"""`{"instruction", "input"?, "output", "system"?, "history"?}`: the Alpaca shape, as LLaMA-Factory reads it.

With a chat template: system, the history's turns, instruction and input (a blank line between them) as the
user, output as the assistant; the answers in the history are trained too, as LLaMA-Factory does.
Without one: Alpaca's headings, written out below; then only `output` is trained, because plain text has no
mark at which an earlier answer ends.
"""

from collections.abc import Iterator
from typing import Any, Literal

from peft_service.formats import Example, Format, Problem, unknown_keys, wrong_type


class Instruction(Format):
    kind: Literal["instruction"] = "instruction"

    keys = ("instruction", "input", "output", "system", "history", "task")
    sample = '{"instruction": "Add the numbers.", "input": "2 and 2", "output": "4"}'

    def detect(self, row: dict[str, Any]) -> bool:
        return "instruction" in row

    def check(self, row: dict[str, Any]) -> Iterator[Problem]:
        yield from unknown_keys(row, self.keys)
        for key in ("instruction", "output"):
            if key not in row:
                yield Problem(key, "missing_key", f'The key "{key}" is missing.')
            elif not isinstance(row[key], str):
                yield wrong_type(key, "a string", row[key])
        for key in ("input", "system"):
            if not isinstance(row.get(key), str | None):
                yield wrong_type(key, "a string", row[key])
        if isinstance(row.get("output"), str) and not row["output"].strip():
            yield Problem("output", "empty_completion", "The output is empty: there is nothing to learn.")
        instruction, given = row.get("instruction"), row.get("input")
        asked = f"{instruction}{given or ''}" if isinstance(instruction, str) else "?"
        if not asked.strip():
            yield Problem("instruction", "missing_content", "Instruction and input are both empty.")
        yield from _check_history(row.get("history"))

    def messages_or_text(self, row: dict[str, Any]) -> Example:
        system, history = row.get("system"), row.get("history") or []
        messages = [{"role": "system", "content": system}] if system else []
        for question, answer in history:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        asked = [part for part in (row["instruction"], row.get("input")) if part]
        messages += [
            {"role": "user", "content": "\n\n".join(asked)},
            {"role": "assistant", "content": row["output"]},
        ]
        return Example(
            messages=tuple(messages),
            trained=tuple(message["role"] == "assistant" for message in messages),
            prompt=plain_prompt(row),
            completion=row["output"],
            task=row.get("task"),
        )


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
