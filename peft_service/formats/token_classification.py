"""`{"tokens", "tags"}`: the words of a text, and a tag for each (named entities, parts of speech)."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

from peft_service.formats import Example, Format, Problem, wrong_type


class TokenClassification(Format):
    kind: Literal["token_classification"] = "token_classification"

    keys = ("tokens", "tags", "task")
    rank = 20
    sample = '{"tokens": ["Ada", "wrote", "it"], "tags": ["B-PER", "O", "O"]}'

    def detect(self, row: dict[str, Any]) -> bool:
        return "tokens" in row and "tags" in row

    def fits(self, row: dict[str, Any]) -> bool:
        return "tokens" in row

    def check(self, row: dict[str, Any]) -> Iterator[Problem]:
        words, tags = row.get("tokens"), row.get("tags")
        for key, value in (("tokens", words), ("tags", tags)):
            if not isinstance(value, list):
                yield wrong_type(key, "an array", value)
                return
        assert isinstance(words, list)
        assert isinstance(tags, list)
        if not words:
            yield Problem("tokens", "empty_text", "The row has no words.")
        if len(words) != len(tags):
            yield Problem("tags", "length_mismatch", f"{len(words)} tokens, but {len(tags)} tags.")
        for index, word in enumerate(words):
            if not isinstance(word, str) or not word.strip():
                yield wrong_type(f"tokens[{index}]", "a word", word)
        for index, tag in enumerate(tags):
            if isinstance(tag, bool) or not isinstance(tag, str | int) or not 1 <= len(str(tag)) <= 200:
                yield wrong_type(f"tags[{index}]", "a tag: a string or a whole number", tag)

    def messages_or_text(self, row: dict[str, Any]) -> Example:
        return Example(words=tuple(row["tokens"]), tags=tuple(map(str, row["tags"])), task=row.get("task"))

    def labels(self, row: dict[str, Any]) -> Iterable[str]:
        return map(str, row["tags"])
