"""`{"text", "label"}`: a text, or with `text_pair` two, and the class it belongs to.

Two texts may also be called text_a and text_b, sentence1 and sentence2, or premise and hypothesis. A label is
a string or a whole number. What a file is for is decided by its first row: a label with a fraction, or
`score` or `value` in its place, makes it a `regression`, `labels` makes it `multi_label`.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

from peft_service.formats import Example, Format, Problem
from peft_service.formats.texts import KEYS, check_label, check_texts, has_text, named, texts_of


class Classification(Format):
    kind: Literal["classification"] = "classification"

    keys = (*KEYS, "label", "task")
    rank = 40
    sample = '{"text": "My card has not arrived.", "label": "card_arrival"}'
    dialects = (
        '{"text": "It rains.", "text_pair": "The street is wet.", "label": 0}',
        '{"premise": "It rains.", "hypothesis": "The street is wet.", "label": "entailment"}',
        '{"sentence1": "It rains.", "sentence2": "Rain is falling.", "label": "equal"}',
        '{"text_a": "It rains.", "text_b": "Rain is falling.", "label": "equal"}',
    )

    def detect(self, row: dict[str, Any]) -> bool:
        return "label" in row and has_text(row)

    def fits(self, row: dict[str, Any]) -> bool:
        return has_text(row) and not ("labels" in row and "label" not in row)

    def check(self, row: dict[str, Any]) -> Iterator[Problem]:
        yield from check_texts(row)
        if "label" not in row:
            yield Problem("label", "missing_key", 'The key "label" is missing.')
        else:
            yield from check_label(row["label"], "label")

    def messages_or_text(self, row: dict[str, Any]) -> Example:
        text, pair = texts_of(row)
        return Example(prompt=text, pair=pair, label=named(row, row["label"]), task=row.get("task"))

    def labels(self, row: dict[str, Any]) -> Iterable[str]:
        return (named(row, row["label"]),)
