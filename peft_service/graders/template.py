"""`{{item.answer}}`, `{{sample.output_json.steps[0]}}`: values of a row and a text put into a string.

No language: a path and nothing else, so that there is nothing to escape from. A value that is a string goes
in as it is, any other as JSON. What goes in is not looked at again: a text cannot bring templates along.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from peft_service.formats import Problem, did_you_mean, shown
from peft_service.graders import Fault, Pair, Sample

SAMPLE = ("output_text", "output_json", "output_tools")
_PLACE = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_STEP = re.compile(r"""\.([A-Za-z0-9_\-]+)|\[(\d{1,9})\]|\[(?:"([^"\]]+)"|'([^'\]]+)')\]""")
_NAMESPACE = re.compile(r"[A-Za-z_]\w*")

Path = tuple[str, tuple[str | int, ...]]
"""(namespace, steps): a number is an index of an array."""


class Unfilled(Exception):
    """A place has no value for this text. `fault` is OpenAI's name for it."""

    def __init__(self, fault: Fault, detail: str) -> None:
        super().__init__(detail)
        self.fault, self.detail = fault, detail


def rendered(template: str, pair: Pair) -> str:
    """`template` with every place filled.

    Raises:
        Unfilled: a place has no value.
    """

    def value(match: re.Match[str]) -> str:
        path = parse(match[1])
        if path is None:
            raise Unfilled("invalid_variable_error", f"{{{{{match[1][:60]}}}}} is no path")
        found = _look_up(path, pair)
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)

    return _PLACE.sub(value, template)


def namespace_of(sample: Sample) -> dict[str, Any]:
    """What a script gets as `sample`; `output_json` is None where the text is no JSON."""
    try:
        parsed = json.loads(sample.text)
    except (ValueError, RecursionError):
        parsed = None
    return {"output_text": sample.text, "output_json": parsed, "output_tools": list(sample.tools)}


def parse(text: str) -> Path | None:
    """The path in a place; None: it is none."""
    text = text.strip()
    start = _NAMESPACE.match(text)
    if start is None:
        return None
    steps: list[str | int] = []
    position = start.end()
    while position < len(text):
        step = _STEP.match(text, position)
        if step is None:
            return None
        name, index, *quoted = step.groups()
        steps.append(int(index) if index is not None else name or quoted[0] or quoted[1])
        position = step.end()
    return start[0], tuple(steps)


def problems(template: str, where: str, columns: Collection[str] | None) -> Iterator[Problem]:
    """Every place that cannot be filled, whatever the text is; `columns` as in `Grader.problems`."""
    for match in _PLACE.finditer(template):
        said = shown("{{" + match[1] + "}}")
        path = parse(match[1])
        if path is None:
            yield Problem(
                where, "invalid_template", f"{said} is no path.", 'write {{item.key}}, {{item["a key"][0]}}'
            )
            continue
        namespace, steps = path
        if namespace not in ("item", "sample"):
            hint = did_you_mean(namespace, ("item", "sample")) or "there are item and sample"
            yield Problem(where, "unknown_variable", f"{said}: there is no {shown(namespace)}.", hint)
        elif not steps:
            yield Problem(where, "unknown_variable", f"{said} names no variable.", f"{{{{{namespace}.key}}}}")
        elif namespace == "sample" and steps[0] not in SAMPLE:
            hint = did_you_mean(str(steps[0]), SAMPLE) or f"there are {', '.join(SAMPLE)}"
            yield Problem(where, "unknown_variable", f"{said}: sample has no {shown(steps[0])}.", hint)
        elif namespace == "sample" and steps[0] == "output_text" and len(steps) > 1:
            yield Problem(where, "unknown_variable", f"{said}: output_text is a string.", "output_json?")
        elif namespace == "item" and columns is not None and steps[0] not in columns:
            known = sorted(map(str, columns))
            hint = did_you_mean(str(steps[0]), known) or f"rows have {', '.join(known[:20])}"
            yield Problem(where, "unknown_variable", f"{said}: rows have no {shown(steps[0])}.", hint)
    rest = _PLACE.sub("", template)
    if "{{" in rest:
        yield Problem(where, "invalid_template", "A {{ has no }}.", "write {{item.key}}")


def _look_up(path: Path, pair: Pair) -> Any:
    namespace, steps = path
    value: Any = pair.item
    if namespace == "sample":
        value = namespace_of(pair.sample)
        if steps[:1] == ("output_json",) and value["output_json"] is None:
            raise Unfilled("sample_parse_error", "the text is not JSON")
    elif namespace != "item":
        raise Unfilled("invalid_variable_error", f"there is no {namespace[:60]}")
    # A text that is JSON, but not the JSON that the grader looks for, is the text's fault.
    fault: Fault = "sample_parse_error" if namespace == "sample" else "invalid_variable_error"
    for number, step in enumerate(steps):
        if isinstance(value, Mapping) and str(step) in value:
            value = value[str(step)]
        elif isinstance(value, list) and str(step).isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            way = ".".join([namespace, *map(str, steps[: number + 1])])
            raise Unfilled(fault, f"there is no {way[:200]}")
    return value
