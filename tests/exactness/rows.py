"""Generated rows of every kind that an objective reads, through the real `tokenise`.

Row n begins with a letter of its own, so that it can be found again among others in a line of a batch; the
lengths are uneven, and so are the shares of what is learned.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_service.formats import FORMATS
from peft_service.objectives import Objective
from peft_service.tasks import Task
from peft_service.tokenise import Meaning, tokenise
from peft_service.tokenised import Tokenised
from peft_service.variants import kind_of
from tests.methods import bases

MAX_SEQ_LEN = 64
TRAINING_ROWS, VALIDATION_ROWS = 13, 7
LABELS = ("bird", "fish", "tree")
TASKS = ("one", "two")


def format_of(objective: Objective, task: Task) -> str:
    """Of the formats that the objective reads, the one whose rows are generated."""
    if objective.kind == "sft":
        return "chat" if task == "causal_lm" else "prompt_completion"
    return {"distillation": "prompt_completion"}.get(objective.kind, type(objective).formats[0])


def row(format: str, number: int) -> dict[str, Any]:
    one, two = bases.WORDS[number % 12], bases.WORDS[(number * 7 + 3) % 12]
    text = f"{chr(97 + number)}: {one} {two}" + " the" * (number % 3)
    good, bad = f" {two} {one}" + " blue" * (number % 4), f" {one}" + " lazy" * (number % 3)
    if format == "chat":
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": good}]
        if number % 3 == 1:
            messages += [{"role": "user", "content": "and"}, {"role": "assistant", "content": bad}]
        return {"messages": messages}
    if format == "preference":
        return {"prompt": text, "chosen": good, "rejected": bad}
    if format == "token_classification":
        words = text.split()
        return {"tokens": words, "tags": [LABELS[len(word) % 3] for word in words]}
    if format == "question_answering":
        context = f"the {one} is {two}"
        answer = {"text": [two], "answer_start": [context.rindex(two)]}
        return {"question": text, "context": context, "answers": answer}
    more: dict[str, dict[str, Any]] = {
        "prompt_completion": {"prompt": text, "completion": good},
        "text": {"text": text + good},
        "unpaired": {"prompt": text, "completion": good if number % 3 else bad, "label": number % 3 > 0},
        "prompts": {"prompt": text, "wanted": two[0]},
        "classification": {"text": text, "label": LABELS[number % 3]},
        "multi_label": {"text": text, "labels": [x for place, x in enumerate(LABELS) if number >> place & 1]},
        "regression": {"text": text, "score": number % 5 / 2 + 0.5},
    }
    return more[format]


@dataclass(frozen=True)
class Data:
    """What a run gets of its files."""

    training: Tokenised
    validation: Tokenised
    labels: tuple[str, ...]
    """Of the training file."""


def tokenised(objective: Objective, base: str, task: Task, with_tasks: bool, directory: Path) -> Data:
    """Training and validation rows for this objective; kept in `directory`, where only one process may make
    them."""
    format = format_of(objective, task)
    shape = next(variant() for variant in FORMATS if kind_of(variant) == format)
    rows = [row(format, number) for number in range(TRAINING_ROWS + VALIDATION_ROWS)]
    if with_tasks:
        rows = [made | {"task": TASKS[number % 2]} for number, made in enumerate(rows)]
    labels = tuple(sorted({label for made in rows for label in shape.labels(made)}))
    tasks = TASKS if with_tasks else ()
    meaning = Meaning(task, objective.labels(labels), tasks, objective.rows)
    found = []
    for name, part in (("training", rows[:TRAINING_ROWS]), ("validation", rows[TRAINING_ROWS:])):
        stem = directory / f"{format}-{objective.rows}-{base}-{task}-{len(tasks)}-{name}"
        kept = stem.with_suffix(".safetensors")
        if not kept.exists():
            file = stem.with_suffix(".jsonl")
            file.write_text("".join(json.dumps(made) + "\n" for made in part))
            made = tokenise(file, format, bases.tokenizer(base), MAX_SEQ_LEN, "error", meaning)
            made.save(kept)
        found.append(Tokenised.load(kept))
    return Data(*found, labels)
