"""Label model: a language model picks a label; 1 where it is one of those that pass, else 0."""

import json
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from peft_service.formats import Problem
from peft_service.graders import Allowed, Grader, Judge, Outcome, Pair
from peft_service.graders import model as models


class LabelModel(Grader):
    type: Literal["label_model"] = "label_model"

    model: str = Field(min_length=1, max_length=200)
    """As the endpoint of the operator knows it."""
    input: tuple[models.Message, ...] = Field(min_length=1, max_length=64)
    labels: tuple[str, ...] = Field(min_length=2, max_length=100)
    passing_labels: tuple[str, ...] = Field(min_length=1, max_length=100)
    sampling_params: models.Sampling | None = None

    @model_validator(mode="after")
    def _labels_are_known(self) -> Self:
        for label in self.passing_labels:
            if label not in self.labels:
                raise ValueError(f"{label!r} of passing_labels is not one of labels")
        return self

    def problems(self, columns: Collection[str] | None, allowed: Allowed) -> Iterator[Problem]:
        yield from models.problems(self.input, columns, allowed)

    def grade(self, pairs: Sequence[Pair], judge: Judge) -> list[Outcome]:
        wanted = (
            'Answer with a JSON object {"result": x} and nothing else. x is the label that fits, one of '
            f"{json.dumps(self.labels, ensure_ascii=False)}."
        )

        def read(result: Any) -> Outcome:
            if result not in self.labels:
                return Outcome(
                    0.0, "model_grader_parse_error", f"{str(result)[:100]!r} is none of the labels"
                )
            return Outcome(float(result in self.passing_labels))

        return models.ask_all(self.model, self.input, wanted, self.sampling_params, pairs, judge, read)
