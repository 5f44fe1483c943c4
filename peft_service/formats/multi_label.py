"""`{"text", "labels"}`: a text, or two as in `classification`, and its classes, also none."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

from peft_service.formats import Example, Format, Problem, shown, wrong_type
from peft_service.formats.texts import KEYS, check_label, check_texts, has_text, named, texts_of


class MultiLabel(Format):
    kind: Literal["multi_label"] = "multi_label"

    keys = (*KEYS, "labels", "task")
    rank = 35
    sample = '{"text": "The parcel was late and broken.", "labels": ["late", "damaged"]}'
    dialects = ('{"premise": "It rains.", "hypothesis": "The street is wet.", "labels": []}',)

    def detect(self, row: dict[str, Any]) -> bool:
        return "labels" in row and has_text(row)

    def fits(self, row: dict[str, Any]) -> bool:
        return has_text(row) and not ("label" in row and "labels" not in row)

    def check(self, row: dict[str, Any]) -> Iterator[Problem]:
        yield from check_texts(row)
        labels = row.get("labels")
        if "labels" not in row:
            yield Problem("labels", "missing_key", 'The key "labels" is missing.', "write [] for none")
        elif not isinstance(labels, list):
            yield wrong_type("labels", "an array of labels", labels)
        else:
            seen = set()
            for index, label in enumerate(labels):
                yield from check_label(label, f"labels[{index}]")
                name = str(label) if isinstance(label, str | int) else None
                if name is not None and name in seen:
                    yield Problem(
                        f"labels[{index}]", "label_twice", f"The label {shown(name)} is there twice."
                    )
                seen.add(name)

    def messages_or_text(self, row: dict[str, Any]) -> Example:
        text, pair = texts_of(row)
        return Example(prompt=text, pair=pair, labels=tuple(self.labels(row)), task=row.get("task"))

    def labels(self, row: dict[str, Any]) -> Iterable[str]:
        return [named(row, label) for label in row["labels"]]
