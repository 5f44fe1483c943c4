"""`{"text", "label"}`: a text, or with `text_pair` two, and the class it belongs to."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

from peft_service.formats import Example, Format, Problem, unknown_keys, wrong_type


class Classification(Format):
    kind: Literal["classification"] = "classification"

    keys = ("text", "text_pair", "label", "task")
    sample = '{"text": "My card has not arrived.", "label": "card_arrival"}'

    def detect(self, row: dict[str, Any]) -> bool:
        return "label" in row and "text" in row

    def check(self, row: dict[str, Any]) -> Iterator[Problem]:
        yield from unknown_keys(row, self.keys)
        for key in ("text", "text_pair"):
            if key in row and not isinstance(row[key], str):
                yield wrong_type(key, "a string", row[key])
            elif key in row and not row[key].strip():
                yield Problem(key, "empty_text", f'The "{key}" is empty.')
        label = row.get("label")
        if isinstance(label, bool) or not isinstance(label, str | int):
            yield wrong_type("label", "a string or a whole number", label)
        elif not 1 <= len(str(label)) <= 200:
            yield Problem("label", "bad_label", "A label has 1 to 200 characters.")

    def messages_or_text(self, row: dict[str, Any]) -> Example:
        (label,) = self.labels(row)
        return Example(prompt=row["text"], pair=row.get("text_pair"), label=label, task=row.get("task"))

    def labels(self, row: dict[str, Any]) -> Iterable[str]:
        task = row.get("task")
        return (str(row["label"]) if task is None else f"{task}/{row['label']}",)
