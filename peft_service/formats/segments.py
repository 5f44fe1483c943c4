"""`{"segments": [{"text", "label"}, …]}`: pieces of text as they are; label says which are learned.

The shape of Axolotl's input_output: for texts that no chat template describes. Nothing is put between pieces,
so a piece holds its own blanks and line feeds.
"""

from collections.abc import Iterator
from typing import Any, Literal

from peft_service.formats import Example, Format, Problem, unknown_keys, wrong_type


class Segments(Format):
    kind: Literal["segments"] = "segments"

    keys = ("segments", "task")
    rank = 20
    sample = '{"segments": [{"text": "Q: 2+2?\\nA:", "label": false}, {"text": " 4", "label": true}]}'

    def detect(self, row: dict[str, Any]) -> bool:
        return "segments" in row

    def check(self, row: dict[str, Any]) -> Iterator[Problem]:
        segments = row.get("segments")
        if not isinstance(segments, list):
            yield wrong_type("segments", 'an array of {"text", "label"}', segments)
            return
        for index, segment in enumerate(segments):
            here = f"segments[{index}]"
            if not isinstance(segment, dict):
                yield wrong_type(here, 'an object {"text": …, "label": …}', segment)
                continue
            yield from unknown_keys(segment, ("text", "label"), here)
            if not isinstance(segment.get("text"), str):
                yield wrong_type(f"{here}.text", "a string", segment.get("text"))
            if not isinstance(segment.get("label"), bool):
                said = "label must be true (learned) or false (only read)."
                yield Problem(f"{here}.label", "label_not_boolean", said)
        learned = [
            s for s in segments if isinstance(s, dict) and s.get("label") is True and s.get("text") != ""
        ]
        if not learned:
            yield Problem("segments", "nothing_to_learn", "No segment with text has the label true.")

    def messages_or_text(self, row: dict[str, Any]) -> Example:
        return Example(
            segments=tuple((segment["text"], segment["label"]) for segment in row["segments"]),
            task=row.get("task"),
        )
