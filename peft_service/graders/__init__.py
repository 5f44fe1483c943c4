"""Who says how good a text is. One file a grader, by OpenAI's names and fields; tagged by `type`, as there.

A grader never ends a run: what goes wrong with one text (a script that fails, an answer that is no JSON) is a
score of 0 with the reason beside it. What is wrong with the grader itself is refused before the run,
by `Grader.problems`.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from pydantic import Field

from peft_service.errors import InvalidRequest
from peft_service.formats import Problem
from peft_service.variants import Frozen, union_of, variants_of

if TYPE_CHECKING:
    from peft_service.graders.sandbox import Sandbox

Fault = Literal[
    "",
    "formula_parse_error",
    "invalid_variable_error",
    "model_grader_parse_error",
    "model_grader_server_error",
    "other_error",
    "python_grader_runtime_error",
    "python_grader_server_error",
    "sample_parse_error",
]
"""OpenAI's names for what can go wrong with one text; empty: nothing has."""


class Outcome(NamedTuple):
    """What a grader says about one text."""

    score: float
    """Finite; 0 where something went wrong."""
    fault: Fault = ""
    detail: str = ""
    parts: Mapping[str, float] = {}
    """The scores that it was put together from, by the name of the grader."""


@dataclass(frozen=True)
class Sample:
    """What a model has written."""

    text: str
    tools: tuple[dict[str, Any], ...] = ()
    """Tool calls, in OpenAI's form."""


class Pair(NamedTuple):
    """One text, and the row of the data file that it answers."""

    item: Mapping[str, Any]
    sample: Sample


Ask = Callable[[str, Sequence[dict[str, str]], Mapping[str, Any]], str]
"""(model, messages, sampling parameters by OpenAI's names) -> the answer's text. Called from several threads;
may raise anything: that is the server's fault."""


@dataclass(frozen=True)
class Allowed:
    """What the operator of a service lets graders use."""

    python: Literal["off", "isolated", "trusted"] = "off"
    """isolated: scripts run where the kernel can shut them in, else they are refused; trusted: they run
    anyway, with the rights of the service."""
    ask: Ask | None = None
    """How models that judge are asked; None: there are none."""


class Grader(Frozen):
    """A judge of texts."""

    type: str

    name: str = Field(min_length=1, max_length=64)
    """By which its score is listed."""

    def problems(self, columns: Collection[str] | None, allowed: Allowed) -> Iterator[Problem]:
        """Everything that is wrong with the grader, whatever texts it will get.

        Args:
            columns: the keys that every row of the data has; None: not known yet.
        """
        raise NotImplementedError

    def grade(self, pairs: Sequence[Pair], judge: "Judge") -> list[Outcome]:
        """An outcome for each pair; depends on nothing but the pair."""
        raise NotImplementedError


class Judge:
    """A grader at work: `with Judge(grader, allowed) as judge: judge(items, samples)`.

    Keeps what is slow to start between calls (the process of a script). One thread at a time.
    """

    def __init__(self, grader: Grader, allowed: Allowed) -> None:
        """
        Raises:
            InvalidRequest: the grader can never work; says why.
        """
        check(grader, None, allowed)
        self.grader = grader
        self.allowed = allowed
        self._sandboxes: dict[str, Sandbox] = {}
        self._open = ExitStack()

    def __call__(self, items: Sequence[Mapping[str, Any]], samples: Sequence[Sample]) -> list[Outcome]:
        """An outcome for each sample, whose row is the item at the same place."""
        pairs = [Pair(item, sample) for item, sample in zip(items, samples, strict=True)]
        return [finite(outcome) for outcome in self.grader.grade(pairs, self)]

    def sandbox(self, source: str) -> "Sandbox":
        """The process that runs this script, and no other."""
        from peft_service.graders.sandbox import Sandbox

        if source not in self._sandboxes:
            sandbox = Sandbox(source, trusted=self.allowed.python == "trusted")
            self._sandboxes[source] = self._open.enter_context(sandbox)
        return self._sandboxes[source]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()
        self._sandboxes.clear()


def check(grader: Grader, columns: Collection[str] | None, allowed: Allowed, where: str = "grader") -> None:
    """
    Args:
        where: path of the grader in the request.

    Raises:
        InvalidRequest: the first problem, the others in `details["errors"]`.
    """
    found = list(grader.problems(columns, allowed))
    if found:
        errors = [
            {"param": ".".join(filter(None, (where, problem.path))), "message": _sentence(problem)}
            for problem in found
        ]
        raise InvalidRequest(
            "; ".join(f"{error['param']}: {error['message']}" for error in errors[:5]),
            code=found[0].code,
            param=errors[0]["param"],
            details={"errors": errors[:100]},
        )


def finite(outcome: Outcome) -> Outcome:
    """The outcome, or a fault in the place of a score that is no finite number."""
    if math.isfinite(outcome.score):
        return outcome
    return outcome._replace(
        score=0.0, fault=outcome.fault or "other_error", detail=outcome.detail or f"score {outcome.score}"
    )


def _sentence(problem: Problem) -> str:
    return problem.message + (f" ({problem.hint})" if problem.hint else "")


GRADERS = variants_of(Grader, __name__, __path__, tag="type")
"""At the end: the graders' files import the names above."""
if TYPE_CHECKING:
    AnyGrader = Grader
else:
    AnyGrader = union_of(GRADERS, tag="type")
