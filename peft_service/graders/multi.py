"""Multi: a formula over the scores of several graders.

`calculate_output` has names of the graders, numbers, `+ - * / ^` and brackets, and the functions abs, ceil,
exp, floor, log, max, min, sqrt. It is read by Python's parser and worked out here, node by node; nothing in
it is ever run.
"""

import ast
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from peft_service import graders
from peft_service.formats import Problem, did_you_mean, shown
from peft_service.graders import Allowed, Grader, Judge, Outcome, Pair, finite
from peft_service.variants import union_of, variants_of

if TYPE_CHECKING:
    OneGrader = Grader
else:
    # At this point of the import, the variants are all graders but this one.
    OneGrader = union_of(variants_of(Grader, graders.__name__, graders.__path__, tag="type"), tag="type")

FUNCTIONS: dict[str, Callable[..., float]] = {
    "abs": abs, "ceil": math.ceil, "exp": math.exp, "floor": math.floor, "log": math.log,
    "max": max, "min": min, "sqrt": math.sqrt,
}  # fmt: skip
OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: math.pow,
}


class Multi(Grader):
    type: Literal["multi"] = "multi"

    graders: dict[str, OneGrader] = Field(min_length=1, max_length=16)
    """By the names that the formula uses. One grader without a name in front is known by its own."""
    calculate_output: str = Field(min_length=1, max_length=1000)
    """For example `0.7 * correct + 0.3 * min(brief, 0.5)`."""

    @field_validator("graders", mode="before")
    @classmethod
    def _one_alone(cls, value: Any) -> Any:
        # The type that OpenAI's client declares for this field, though its guide writes names in front.
        if isinstance(value, dict) and isinstance(value.get("type"), str):
            return {str(value.get("name")): value}
        return value

    def problems(self, columns: Collection[str] | None, allowed: Allowed) -> Iterator[Problem]:
        for name, grader in self.graders.items():
            where = f"graders.{name}"
            if not name.isidentifier() or not name.isascii() or name in FUNCTIONS:
                hint = "take letters, digits and _, with a letter first"
                yield Problem(where, "invalid_value", f"{shown(name)} is no name for a formula.", hint)
            for problem in grader.problems(columns, allowed):
                yield Problem(f"{where}.{problem.path}", problem.code, problem.message, problem.hint)
        try:
            used = _names(parse(self.calculate_output))
        except ValueError as error:
            yield Problem("calculate_output", "invalid_formula", f"{error}.")
            return
        for name in sorted(used - set(self.graders)):
            hint = did_you_mean(name, self.graders) or f"graders are {', '.join(self.graders)}"
            yield Problem("calculate_output", "unknown_variable", f"No grader is named {shown(name)}.", hint)
        for name in self.graders:
            if name not in used:
                hint = "use it, or leave the grader out"
                yield Problem(f"graders.{name}", "unused_grader", "The formula does not use it.", hint)

    def grade(self, pairs: Sequence[Pair], judge: Judge) -> list[Outcome]:
        found = {
            name: [finite(outcome) for outcome in grader.grade(pairs, judge)]
            for name, grader in self.graders.items()
        }
        formula = parse(self.calculate_output)
        made = []
        for place in range(len(pairs)):
            outcomes = {name: outcomes[place] for name, outcomes in found.items()}
            parts = {name: outcome.score for name, outcome in outcomes.items()}
            wrong = next(((n, o) for n, o in outcomes.items() if o.fault), None)
            fault, detail = (wrong[1].fault, f"{wrong[0]}: {wrong[1].detail}") if wrong else ("", "")
            try:
                made.append(Outcome(value(formula, parts), fault, detail, parts))
            except (ArithmeticError, ValueError) as error:
                made.append(Outcome(0.0, "formula_parse_error", str(error), parts))
        return made


def parse(formula: str) -> ast.expr:
    """
    Raises:
        ValueError: it is no formula; says where.
    """
    try:
        # In OpenAI's formulas ^ is the power, and binds as one.
        tree = ast.parse(formula.strip().replace("^", "**"), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ValueError(f"not a formula: {getattr(error, 'msg', None) or error}") from None
    _check(tree, 0)
    return tree


def value(node: ast.expr, scores: Mapping[str, float]) -> float:
    """What the formula comes to.

    Raises:
        ArithmeticError, ValueError: it has no value for these scores (1 / 0, log(0), the root of -1).
    """
    match node:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.Name():
            return scores[node.id]
        case ast.UnaryOp():
            inner = value(node.operand, scores)
            return -inner if isinstance(node.op, ast.USub) else inner
        case ast.BinOp():
            return OPERATORS[type(node.op)](value(node.left, scores), value(node.right, scores))
        case ast.Call(func=ast.Name(id=name)):
            return float(FUNCTIONS[name](*(value(argument, scores) for argument in node.args)))
    raise AssertionError("`_check` lets nothing else pass")


def _check(node: ast.AST, depth: int) -> None:
    if depth > 50:
        raise ValueError("brackets are nested deeper than 50 levels")
    match node:
        case ast.Constant():
            if isinstance(node.value, bool) or not isinstance(node.value, (int, float)):
                raise ValueError(f"{ast.unparse(node)[:60]} is no number")
            if isinstance(node.value, int) and node.value.bit_length() > 64:
                raise ValueError("a number is too large")
        case ast.Name():
            pass
        case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
            _check(node.operand, depth + 1)
        case ast.BinOp() if type(node.op) in OPERATORS:
            _check(node.left, depth + 1)
            _check(node.right, depth + 1)
        case ast.Call(func=ast.Name(id=name)):
            if name not in FUNCTIONS:
                hint = did_you_mean(name, FUNCTIONS) or f"there are {', '.join(FUNCTIONS)}"
                raise ValueError(f"there is no function {name[:60]} ({hint})")
            least, most = {"max": (2, 16), "min": (2, 16), "log": (1, 2)}.get(name, (1, 1))
            if node.keywords or not least <= len(node.args) <= most:
                raise ValueError(f"{name} takes {least if least == most else f'{least} to {most}'} numbers")
            for argument in node.args:
                _check(argument, depth + 1)
        case _:
            raise ValueError(f"{ast.unparse(node)[:60]} is none of + - * / ^, numbers, names and functions")


def _names(node: ast.expr) -> set[str]:
    """The graders that the formula names: not its functions."""
    called = {id(inner.func) for inner in ast.walk(node) if isinstance(inner, ast.Call)}
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name) and id(inner) not in called}
