"""Generate docs/methods/: a page for each method, the table and the chart, from the methods' own files.

python tools/method_docs.py           write the pages
python tools/method_docs.py --check   exit code 1 if one is stale (`make check`)

Measured figures come from docs/methods/results.json, which `tools/compare_methods.py` writes.
"""

import html
import json
import math
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "methods"
RESULTS = DOCS / "results.json"
CLAIMS = DOCS / "claims.json"
TASKS = {
    "banking77": "20 classes of banking77 on a 22 M encoder (accuracy)",
    "tool_calls": "tool calls on the shipped 3.4 M base (share of answer tokens that are right)",
}
WORDS = {
    "peft": "a PEFT adapter that plain peft loads",
    "registered": "a PEFT adapter of a type of ours: loads after `import peft_service.tuners`",
    "delta": "a delta: changed weights of the base, put on by `peft_service.artifact.load`",
    "model": "a whole model that plain transformers loads",
    "composite": "several parts in one directory, put together by `peft_service.artifact.load`",
}


def main(arguments: list[str]) -> int:
    wanted = pages()
    stale = []
    for path, text in wanted.items():
        if "--check" in arguments:
            if not path.exists() or path.read_text() != text:
                stale.append(path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    known = {path.name for path in wanted} | {RESULTS.name, CLAIMS.name}
    stray = [path for path in DOCS.glob("*") if path.name not in known]
    for path in stray:
        if "--check" in arguments:
            stale.append(path)
        else:
            path.unlink()
    for path in stale:
        sys.stderr.write(f"{path.relative_to(ROOT)} is stale: run `make format`\n")
    return 1 if stale else 0


def pages() -> dict[Path, str]:
    """Every generated file with its text."""
    from peft_service.methods import METHODS

    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    methods: list[Any] = list(METHODS)
    made = {DOCS / f"{kind_of(method)}.md": page(method, results) for method in methods}
    made[DOCS / "README.md"] = index(methods, results)
    for task in TASKS:
        made[DOCS / f"{task}.svg"] = chart(task, results)
    return made


def kind_of(method: Any) -> str:
    return str(method.model_fields["kind"].default)


def page(method: Any, results: dict[str, Any]) -> str:
    """One method."""
    kind, can = kind_of(method), method.can
    others = [name for name, preset in method.aliases.items() if not preset]
    presets = {name: preset for name, preset in method.aliases.items() if preset}
    lines = [
        f"# {method.title}",
        "",
        f"`adapter.kind`: `{kind}`"
        + (f", also {', '.join(f'`{name}`' for name in others)}" if others else "")
        + f" · {method.family} · [paper]({method.paper})",
        "",
        method.summary,
        "",
        f"**Formula.** {method.formula}",
        "",
        f"**When to use it.** {method.use_when}",
        "",
    ]
    if method.limits:
        lines += [f"**Limits.** {method.limits}", ""]
    if presets:
        lines += ["**Other names**, which set fields:", ""]
        for name, preset in presets.items():
            lines.append(f"- `{name}`: " + ", ".join(f"{key} = {json.dumps(v)}" for key, v in preset.items()))
        lines.append("")
    lines += [
        "## Fields",
        "",
        f"Learning rate, if the request gives none: {method.learning_rate:g}.",
        "",
        "| field | default | what it is |",
        "|---|---|---|",
    ]
    for name, field in method.model_fields.items():
        if name == "kind":
            continue
        default = "required" if field.is_required() else _shown(field.get_default(call_default_factory=True))
        words = " ".join((field.description or "").split()).replace("|", "\\|")
        lines.append(f"| `{name}` | {default} | {words} |")
    lines += [
        "",
        "## A request",
        "",
        "```json",
        json.dumps(
            {"model": "your/base", "training_file": "file-…", "adapter": example(method)},
            indent=2,
            ensure_ascii=False,
        ),
        "```",
        "",
        "## Where it works",
        "",
        "| | |",
        "|---|---|",
        *_capabilities(method),
        "",
        f"The artifact is {WORDS[can.carrier]}. At best it is loaded by: {_servers(can)}. What a given "
        "artifact can be loaded by, and why not by the others, is in its manifest and on its card.",
        "",
    ]
    if method.corrections:
        lines += ["## Often said, and not so", ""]
        claims = json.loads(CLAIMS.read_text())
        lines += [f"- {text.format(**claims)}" for text in method.corrections]
        lines.append("")
    measured = [(task, results.get(f"{task}/{kind}")) for task in TASKS]
    if any(found and "quality" in found for _, found in measured):
        lines += [
            "## Measured",
            "",
            "Same data, steps and seed for all methods, each at its own default rate; one CPU thread.",
            "",
            "| | quality | loss | trainable | seconds | memory | artifact |",
            "|---|---|---|---|---|---|---|",
        ]
        for task, found in measured:
            if found and "quality" in found:
                lines.append(f"| {TASKS[task]} | {_row(found)} |")
        lines.append("")
    lines += ["All methods: [README](README.md).", ""]
    return "\n".join(lines)


def _servers(can: Any) -> str:
    return ", ".join(can.servers) or "our own loader"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        value = list(value)
    return f"`{json.dumps(value, ensure_ascii=False, default=str)}`"


def example(method: Any) -> dict[str, Any]:
    """`adapter` of a request that works as it is; the references stand for adapters of one's own."""
    found: dict[str, Any] = {"kind": kind_of(method)}
    for name, field in method.model_fields.items():
        if name == "kind":
            continue
        if name == "sources":
            found[name] = [f"my-{method.sources_of[0].replace('_', '-')}-{number}@1" for number in (1, 2)]
        elif field.is_required():
            found[name] = method.small[name]
    return found


def _capabilities(method: Any) -> list[str]:
    can = method.can

    def line(name: str, said: str, limit: str) -> str:
        why = can.why.get(limit, "")
        return f"| {name} | {said}{': ' + why if why else ''} |"

    def yes(value: bool) -> str:
        return "yes" if value else "no"

    words = {"sequence_classification": "classes", "token_classification": "tags", "causal_lm": "text"}
    words |= {"question_answering": "answers", "seq2seq_lm": "text (encoder-decoder)"}
    return [
        line("models", ", ".join(name.replace("_", "-") for name in can.architectures), "architectures"),
        line("tasks", ", ".join(words[name] for name in can.tasks), "tasks"),
        line("base in 4 bits", yes(can.nf4), "nf4"),
        line("ZeRO stages", ", ".join(map(str, can.zero_stages)), "zero_stages"),
        line("gradient checkpointing", yes(can.gradient_checkpointing), "gradient_checkpointing"),
        line("weight decay", yes(can.weight_decay), "weight_decay"),
        line("starts as the base", yes(can.starts_as_base), "starts_as_base"),
        line("merges into the base", yes(can.mergeable), "mergeable"),
        line("switched on one base", yes(can.hot_switch), "hot_switch"),
    ]


def _row(found: dict[str, Any]) -> str:
    return (
        f"{found['quality']:.3f} | {found['loss']:.3f} | {found['trainable']:,} ({found['share']:.3%}) | "
        f"{found['seconds']:.0f} | {found['memory_mb']:.0f} MB | {_bytes(found['artifact_bytes'])}"
    )


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def index(methods: list[Any], results: dict[str, Any]) -> str:
    """The table of all methods."""
    families: dict[str, list[Any]] = {}
    for method in methods:
        families.setdefault(method.family, []).append(method)
    lines = [
        "# Fine-tuning methods",
        "",
        f"{len(methods)} methods, one file each in `peft_service/methods/`; this page and the others here "
        "are generated from them",
        "by `tools/method_docs.py`. `GET /v1/methods` says the same over the API. A request names one in "
        '`"adapter": {"kind": …}`;',
        "names are compared without case, blanks, `-` and `_`.",
        "",
    ]
    for family, members in sorted(families.items()):
        lines += [
            f"## {family[:1].upper()}{family[1:]}",
            "",
            "| method | what it is | models | 4 bits | ZeRO | merges | artifact | served at best by |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for method in members:
            can = method.can
            short = {"decoder": "dec", "encoder": "enc", "encoder_decoder": "enc-dec"}
            lines.append(
                f"| [{method.title}]({kind_of(method)}.md) `{kind_of(method)}` | {method.summary} | "
                f"{', '.join(short[name] for name in can.architectures)} | {'yes' if can.nf4 else 'no'} | "
                f"{', '.join(map(str, can.zero_stages))} | {'yes' if can.mergeable else 'no'} | "
                f"{can.carrier} | {_servers(can)} |"
            )
        lines.append("")
    lines += _measured(methods, results)
    return "\n".join(lines)


def _measured(methods: list[Any], results: dict[str, Any]) -> list[str]:
    if not results:
        return []
    lines = [
        "## Measured",
        "",
        "Written by `make compare`: every method with the same data, steps and seed, at its own default",
        "learning rate, one CPU thread. Not tuned: a method that needs longer shows it. Memory is what the",
        "training added to the process; time is the thread's own. A rate for billions of weights and",
        "thousands of steps moves these small bases little: methods that are then hardly above the base are",
        "there once more, at a higher rate.",
        "",
    ]
    for task, words in TASKS.items():
        found = {key.partition("/")[2]: value for key, value in results.items() if key.startswith(f"{task}/")}
        good = {name: value for name, value in found.items() if "quality" in value}
        if not good:
            continue
        some = next(iter(good.values()))
        lines += [
            f"### {words[:1].upper()}{words[1:]}",
            "",
            f"{some['steps']} steps of {some['batch_size']} rows.",
            "",
            f"![trainable share against quality]({task}.svg)",
            "",
            "| method | quality | loss | trainable | seconds | memory | artifact |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, value in sorted(good.items(), key=lambda item: -item[1]["quality"]):
            lines.append(f"| {_label(name)} | {_row(value)} |")
        bad = {name: value["error"] for name, value in found.items() if "error" in value}
        lines.append("")
        if bad:
            lines += ["Not in the table:", ""]
            lines += [f"- `{name}`: {_short(text)}" for name, text in sorted(bad.items())]
            lines.append("")
    return lines


def _short(error: str) -> str:
    return error.partition(": ")[2] or error


def _label(name: str) -> str:
    return {
        "baseline": "*(the base, untouched)*",
        "head_only": "*(only the head is trained)*",
    }.get(name, f"`{name}`")


def chart(task: str, results: dict[str, Any]) -> str:
    """SVG: trainable share on a logarithmic axis against quality relative to the best.

    Full fine-tuning would be the usual measure; at its own rate it is far from done within this budget.
    """
    width, height, left, top, right, bottom = 860, 470, 70, 36, 30, 56
    found = {
        key.partition("/")[2]: value
        for key, value in results.items()
        if key.startswith(f"{task}/") and value.get("trainable") and "quality" in value
    }
    full = max((v["quality"] for v in found.values()), default=1.0)
    points = [(name, value["share"], value["quality"] / full) for name, value in found.items()]
    low = math.floor(math.log10(min((share for _, share, _ in points), default=1e-4)))
    most = max((relative for *_, relative in points), default=1.0)
    ceiling = max(1.05, math.ceil(most * 10) / 10)

    def x(share: float) -> float:
        return left + (math.log10(share) - low) / (0.3 - low) * (width - left - right)

    def y(relative: float) -> float:
        return height - bottom - relative / ceiling * (height - top - bottom)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="20" font-size="14">{html.escape(TASKS[task])}</text>',
        f'<text x="{width / 2}" y="{height - 12}" text-anchor="middle">trainable share of the base '
        f"(logarithmic)</text>",
        f'<text transform="translate(18 {height / 2}) rotate(-90)" text-anchor="middle">quality relative '
        f"to the best</text>",
    ]
    for exponent in range(low, 1):
        at = x(10.0**exponent)
        out.append(f'<line x1="{at:.1f}" y1="{top}" x2="{at:.1f}" y2="{height - bottom}" stroke="#ddd"/>')
        label = f"{100 * 10.0**exponent:g} %"
        out.append(f'<text x="{at:.1f}" y="{height - bottom + 16}" text-anchor="middle">{label}</text>')
    for tenth in range(0, int(ceiling * 10) + 1, 2):
        at = y(tenth / 10)
        out.append(f'<line x1="{left}" y1="{at:.1f}" x2="{width - right}" y2="{at:.1f}" stroke="#ddd"/>')
        out.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{tenth / 10:.1f}</text>')
    if "baseline" in {key.partition("/")[2] for key in results if key.startswith(f"{task}/")}:
        base = results[f"{task}/baseline"].get("quality", 0) / full
        out.append(
            f'<line x1="{left}" y1="{y(base):.1f}" x2="{width - right}" y2="{y(base):.1f}" stroke="#b33" '
            f'stroke-dasharray="5 4"/><text x="{left + 4}" y="{y(base) - 4:.1f}" fill="#b33">untouched '
            f"base</text>"
        )
    taken: list[tuple[float, float]] = []
    for name, share, relative in sorted(points, key=lambda point: -point[2]):
        px, py = x(share), y(relative)
        out.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5" fill="#2b6cb0"/>')
        place = py + 4
        # Labels are moved down until they have room; a line leads back to the point.
        while any(abs(place - other) < 11 and abs(px - there) < 105 for there, other in taken):
            place += 11
        if place > height - bottom - 2:
            continue
        taken.append((px, place))
        if abs(place - py) > 8:
            out.append(
                f'<line x1="{px:.1f}" y1="{py:.1f}" x2="{px + 6:.1f}" y2="{place - 4:.1f}" stroke="#aaa"/>'
            )
        end = px > width - right - 90
        anchor, shift = ("end", -7) if end else ("start", 7)
        out.append(
            f'<text x="{px + shift:.1f}" y="{place:.1f}" text-anchor="{anchor}">{html.escape(name)}</text>'
        )
    out.append("</svg>")
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
