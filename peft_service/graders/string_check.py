"""String check: 1 where a string is (eq), is not (ne) or has in it (like, ilike) another, else 0."""

from collections.abc import Collection, Iterator, Sequence
from typing import Literal

from peft_service.formats import Problem
from peft_service.graders import Allowed, Grader, Judge, Outcome, Pair, template


class StringCheck(Grader):
    type: Literal["string_check"] = "string_check"

    input: str
    """A template; mostly `{{sample.output_text}}`."""
    reference: str
    """A template; mostly `{{item.…}}`."""
    operation: Literal["eq", "ne", "like", "ilike"]
    """like: the input has the reference in it; ilike: whatever the case of the letters."""

    def problems(self, columns: Collection[str] | None, allowed: Allowed) -> Iterator[Problem]:
        yield from template.problems(self.input, "input", columns)
        yield from template.problems(self.reference, "reference", columns)

    def grade(self, pairs: Sequence[Pair], judge: Judge) -> list[Outcome]:
        return [self._grade(pair) for pair in pairs]

    def _grade(self, pair: Pair) -> Outcome:
        try:
            found, wanted = template.rendered(self.input, pair), template.rendered(self.reference, pair)
        except template.Unfilled as error:
            return Outcome(0.0, error.fault, error.detail)
        right = {
            "eq": found == wanted,
            "ne": found != wanted,
            "like": wanted in found,
            "ilike": wanted.casefold() in found.casefold(),
        }
        return Outcome(float(right[self.operation]))
