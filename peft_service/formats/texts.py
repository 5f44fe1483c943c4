"""A text, or two, that a label or a number belongs to: the names of their columns."""

from collections.abc import Iterator
from typing import Any

from peft_service.formats import Problem, wrong_type

NAMES = (
    ("text", "text_pair"),
    ("text_a", "text_b"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
)
KEYS = tuple(key for pair in NAMES for key in pair)


def names_in(row: dict[str, Any]) -> tuple[str, str]:
    """The columns of the first and the second text, by the first of them that is there."""
    return next((pair for pair in NAMES if pair[0] in row), NAMES[0])


def has_text(row: dict[str, Any]) -> bool:
    return any(first in row for first, _ in NAMES)


def check_texts(row: dict[str, Any]) -> Iterator[Problem]:
    first, second = names_in(row)
    if first not in row:
        yield Problem("text", "missing_key", 'The key "text" is missing.')
    if first != "text" and second not in row:
        said = f'"{first}" is the first of two texts, but "{second}" is missing.'
        yield Problem(second, "missing_key", said, 'a single text is "text"')
    for key in KEYS:
        if key not in row:
            continue
        if key not in (first, second):
            yield Problem(key, "unexpected_key", f'The row has "{first}" too.', "keep one pair of texts")
        elif not isinstance(row[key], str):
            # A column that most rows leave empty.
            if row[key] is not None or key != "text_pair":
                yield wrong_type(key, "a string", row[key])
        elif not row[key].strip():
            yield Problem(key, "empty_text", f'The "{key}" is empty.')


def texts_of(row: dict[str, Any]) -> tuple[str, str | None]:
    """The texts of a good row."""
    first, second = names_in(row)
    return row[first], row.get(second)


def check_label(label: Any, path: str) -> Iterator[Problem]:
    if isinstance(label, bool) or not isinstance(label, str | int):
        yield wrong_type(path, "a string or a whole number", label)
    elif not 1 <= len(str(label)) <= 200 or not str(label).strip():
        yield Problem(path, "bad_label", "A label has 1 to 200 characters, not all of them blanks.")


def named(row: dict[str, Any], label: str | int) -> str:
    """A class of a good row: in multi-task data, every task has its own."""
    return str(label) if row.get("task") is None else f"{row['task']}/{label}"
