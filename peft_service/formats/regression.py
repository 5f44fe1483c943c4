"""`{"text", "score"}`: a text, or two as in `classification`, and a number.

The number is called `score`, `value` or `label`. A row with a `label` is of this format if the number has a
fraction (4.0 has one); once a file is, whole numbers under `label` are read too. A number in a string ("4.5",
as a table in CSV has it) is taken under `score` and `value`, where it can mean nothing else.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

from peft_service.formats import Example, Format, Problem, wrong_type
from peft_service.formats.texts import KEYS, check_texts, has_text, texts_of

NUMBERS = ("score", "value", "label")


class Regression(Format):
    kind: Literal["regression"] = "regression"

    keys = (*KEYS, *NUMBERS, "task")
    rank = 36
    sample = '{"text": "Arrived quickly, works well.", "score": 4.5}'
    dialects = (
        '{"sentence1": "It rains.", "sentence2": "Rain is falling.", "label": 4.0}',
        '{"text": "Arrived broken.", "value": -1}',
    )

    def detect(self, row: dict[str, Any]) -> bool:
        if not has_text(row):
            return False
        return isinstance(row.get("label"), float) or (
            "label" not in row and ("score" in row or "value" in row)
        )

    def fits(self, row: dict[str, Any]) -> bool:
        return has_text(row)

    def check(self, row: dict[str, Any]) -> Iterator[Problem]:
        yield from check_texts(row)
        given = [key for key in NUMBERS if key in row]
        if not given:
            yield Problem("score", "missing_key", 'The key "score" is missing.')
        for key in given[1:]:
            yield Problem(key, "unexpected_key", f'The row has "{given[0]}" too.', "keep one number")
        for key in given:
            if _number(row, key) is None:
                yield wrong_type(key, "a number", row[key])

    def messages_or_text(self, row: dict[str, Any]) -> Example:
        text, pair = texts_of(row)
        (key,) = (key for key in NUMBERS if key in row)
        return Example(prompt=text, pair=pair, value=_number(row, key), task=row.get("task"))


def _number(row: dict[str, Any], key: str) -> float | None:
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and (key == "label" or len(value) > 40):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
