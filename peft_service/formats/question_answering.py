"""`{"question", "context", "answers"}`: SQuAD's shape; the answer is a piece of the context."""

from collections.abc import Iterator
from typing import Any, Literal

from peft_service.formats import Example, Format, Problem, wrong_type


class QuestionAnswering(Format):
    kind: Literal["question_answering"] = "question_answering"

    keys = ("id", "title", "question", "context", "answers", "task")
    rank = 15
    sample = (
        '{"question": "Who wrote it?", "context": "Ada wrote it.", '
        '"answers": {"text": ["Ada"], "answer_start": [0]}}'
    )

    def detect(self, row: dict[str, Any]) -> bool:
        return "context" in row and "answers" in row

    def check(self, row: dict[str, Any]) -> Iterator[Problem]:
        for key in ("question", "context"):
            if not isinstance(row.get(key), str) or not row[key].strip():
                yield wrong_type(key, "a string that is not empty", row.get(key))
                return
        answers = row.get("answers")
        if not isinstance(answers, dict):
            yield wrong_type("answers", 'an object {"text": […], "answer_start": […]}', answers)
            return
        texts, starts = answers.get("text"), answers.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            message = "text and answer_start must be arrays of one length."
            yield Problem("answers", "length_mismatch", message)
            return
        for index, (text, start) in enumerate(zip(texts, starts, strict=True)):
            where = f"answers.text[{index}]"
            if not isinstance(text, str) or isinstance(start, bool) or not isinstance(start, int):
                yield wrong_type(where, "a string with a whole number as its answer_start", text)
            elif not text or row["context"][start : start + len(text)] != text or start < 0:
                message = "The context does not have this answer at its answer_start."
                yield Problem(where, "answer_not_found", message, "answer_start counts characters from 0")

    def messages_or_text(self, row: dict[str, Any]) -> Example:
        answers = row["answers"]
        start = end = 0
        if answers["text"]:
            start = answers["answer_start"][0]
            end = start + len(answers["text"][0])
        # An answer of no characters: the question has none, which is learned as the row's first token.
        return Example(prompt=row["question"], pair=row["context"], answer=(start, end), task=row.get("task"))
