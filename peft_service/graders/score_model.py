"""Score model: a language model gives a number."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator

from peft_service.formats import Problem
from peft_service.graders import Allowed, Grader, Judge, Outcome, Pair
from peft_service.graders import model as models


class ScoreModel(Grader):
    type: Literal["score_model"] = "score_model"

    model: str = Field(min_length=1, max_length=200)
    """As the endpoint of the operator knows it."""
    input: tuple[models.Message, ...] = Field(min_length=1, max_length=64)
    range: tuple[float, float] = (0.0, 1.0)
    """The lowest and the highest score."""
    sampling_params: models.Sampling | None = None

    @field_validator("range", mode="after")
    @classmethod
    def _in_order(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not value[0] < value[1]:
            raise ValueError("the first number must be below the second")
        return value

    def problems(self, columns: Collection[str] | None, allowed: Allowed) -> Iterator[Problem]:
        yield from models.problems(self.input, columns, allowed)

    def grade(self, pairs: Sequence[Pair], judge: Judge) -> list[Outcome]:
        low, high = self.range
        wanted = (
            f'Answer with a JSON object {{"result": x}} and nothing else. x is a number from {low:g} to '
            f"{high:g}: your score."
        )

        def read(result: Any) -> Outcome:
            if isinstance(result, bool) or not isinstance(result, (int, float)) or not low <= result <= high:
                detail = f"{str(result)[:100]!r} is no number from {low:g} to {high:g}"
                return Outcome(0.0, "model_grader_parse_error", detail)
            return Outcome(float(result))

        return models.ask_all(self.model, self.input, wanted, self.sampling_params, pairs, judge, read)
