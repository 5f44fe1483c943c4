"""What graders that ask a model share: messages with templates, many questions at a time, JSON in answers."""

import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from pydantic import Field

from peft_service.formats import Problem
from peft_service.graders import Allowed, Judge, Outcome, Pair, template
from peft_service.variants import Frozen

AT_ONCE = 8
"""Questions that wait for the model at one time."""


class TextPart(Frozen):
    """A piece of a message."""

    type: Literal["input_text", "output_text"]
    text: str


class Message(Frozen):
    """A message to the model that judges; its texts are templates. Pictures and sound are not taken."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | TextPart | tuple[str | TextPart, ...]
    type: Literal["message"] = "message"

    def texts(self) -> Iterator[str]:
        parts = self.content if isinstance(self.content, tuple) else (self.content,)
        for part in parts:
            yield part if isinstance(part, str) else part.text


class Sampling(Frozen):
    """How the model that judges writes; by OpenAI's names."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    max_completions_tokens: int | None = Field(None, ge=1)
    reasoning_effort: str | None = None


def problems(
    messages: Sequence[Message], columns: Collection[str] | None, allowed: Allowed
) -> Iterator[Problem]:
    """What is wrong with the messages, or that nobody can be asked."""
    for number, message in enumerate(messages):
        for text in message.texts():
            yield from template.problems(text, f"input[{number}].content", columns)
    if allowed.ask is None:
        yield Problem(
            "model",
            "no_judge",
            "This service has no models that judge.",
            "its operator sets PEFT_SERVICE_JUDGE_URL to an OpenAI-compatible endpoint",
        )


def ask_all(
    model: str,
    messages: Sequence[Message],
    wanted: str,
    sampling: Sampling | None,
    pairs: Sequence[Pair],
    judge: Judge,
    read: Callable[[Any], Outcome],
) -> list[Outcome]:
    """An outcome for each pair.

    Args:
        wanted: the system message that says what to answer, put behind the others.
        read: makes an outcome of `result` in the JSON object of the answer.
    """
    ask = judge.allowed.ask
    assert ask is not None, "`problems` refuses graders that nobody can be asked for"
    options = sampling.model_dump(exclude_none=True) if sampling else {}

    def one(pair: Pair) -> Outcome:
        try:
            told = [
                {"role": m.role, "content": "\n".join(template.rendered(t, pair) for t in m.texts())}
                for m in messages
            ]
        except template.Unfilled as error:
            return Outcome(0.0, error.fault, error.detail)
        try:
            answer = ask(model, [*told, {"role": "system", "content": wanted}], options)
        except Exception as error:  # the server's fault, whatever it is: the text gets no score
            return Outcome(0.0, "model_grader_server_error", f"{type(error).__name__}: {error}"[:500])
        found = _object_in(answer)
        if found is None or "result" not in found:
            detail = f"the answer has no JSON object with a result: {answer[:200]!r}"
            return Outcome(0.0, "model_grader_parse_error", detail)
        return read(found["result"])

    with ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(one, pairs))


def _object_in(answer: str) -> dict[str, Any] | None:
    """The last JSON object in an answer that may have words around it."""
    decoder = json.JSONDecoder()
    found, position = None, 0
    while (start := re.compile(r"\{").search(answer, position)) is not None:
        try:
            value, position = decoder.raw_decode(answer, start.start())
            found = value
        except (ValueError, RecursionError):
            position = start.end()
    return found
