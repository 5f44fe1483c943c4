"""What graders may use here: scripts or not, and the OpenAI-compatible endpoint whose models judge."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import httpx

from peft_service.graders import Allowed, Ask

SECONDS = 120.0
"""For one answer."""
TRIES = 4
BUSY = {408, 409, 429, 500, 502, 503, 504}


class JudgeFailed(Exception):
    """The endpoint gave no answer. The message says what it gave instead."""


def allowed(python: Literal["off", "isolated", "trusted"], url: str | None, key: str | None) -> Allowed:
    """
    Args:
        url: base URL of the endpoint, up to and with its `/v1`; None: no model judges.
        key: what the endpoint is sent as `Authorization: Bearer`.
    """
    return Allowed(python, None if url is None else asking(url, key))


def asking(url: str, key: str | None, sleep: Callable[[float], None] = time.sleep) -> Ask:
    """A function that asks the endpoint; it raises JudgeFailed after several tries."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    client = httpx.Client(headers=headers, timeout=SECONDS)

    def ask(model: str, messages: Sequence[dict[str, str]], sampling: Mapping[str, Any]) -> str:
        options = dict(sampling)
        if "max_completions_tokens" in options:  # a grader's name for it; the endpoint's is another
            options["max_completion_tokens"] = options.pop("max_completions_tokens")
        body = {"model": model, "messages": list(messages), **options}
        problem = ""
        for turn in range(TRIES):
            if turn:
                sleep(min(0.5 * 2**turn, 8.0))
            try:
                answer = client.post(f"{url.rstrip('/')}/chat/completions", json=body)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if answer.status_code == 200:
                return _text_in(answer)
            problem = f"status {answer.status_code}: {answer.text[:300]}"
            if answer.status_code not in BUSY:
                break
        raise JudgeFailed(problem)

    return ask


def _text_in(answer: httpx.Response) -> str:
    try:
        text = answer.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        text = None
    if not isinstance(text, str):
        raise JudgeFailed(f"the answer has no text: {answer.text[:300]}")
    return text
