"""`{"text"}`: a document. Every token is learned: continued pre-training."""

from collections.abc import Iterator
from typing import Any, Literal

from peft_service.formats import Example, Format, Problem, wrong_type


class Text(Format):
    kind: Literal["text"] = "text"

    keys = ("text", "task")
    rank = 90
    sample = '{"text": "Once upon a time there was a service."}'
    siblings = ("label", "labels", "text_pair", "score", "value")

    def detect(self, row: dict[str, Any]) -> bool:
        return "text" in row

    def check(self, row: dict[str, Any]) -> Iterator[Problem]:
        text = row.get("text")
        if "text" not in row:
            yield Problem("text", "missing_key", 'The key "text" is missing.')
        elif not isinstance(text, str):
            yield wrong_type("text", "a string", text)
        elif not text.strip():
            yield Problem("text", "empty_text", 'The "text" is empty: there is nothing to learn.')

    def messages_or_text(self, row: dict[str, Any]) -> Example:
        return Example(document=row["text"], task=row.get("task"))
