"""Generate docs/objectives.md and docs/formats.md from the files of the objectives and formats.

python tools/data_docs.py           write the pages
python tools/data_docs.py --check   exit code 1 if one is stale (`make check`)
"""

import json
import sys
from pathlib import Path
from typing import Any

from jobs import objectives as requests
from peft_service.formats import FORMATS
from peft_service.objectives import OBJECTIVES
from peft_service.variants import kind_of

ROOT = Path(__file__).resolve().parents[1]
ROWS = {
    "text": "prompts with answers, or documents",
    "pairs": "a prompt with a better and a worse answer",
    "unpaired": "an answer that is good or bad",
    "prompts": "prompts; graders judge the answers",
    "classes": "a text and its class",
    "class_sets": "a text and any number of classes",
    "values": "a text and a number",
    "tags": "words and their tags",
    "answers": "a question, a text and the answer in it",
}


def main(arguments: list[str]) -> int:
    pages = {ROOT / "docs" / "objectives.md": objectives(), ROOT / "docs" / "formats.md": formats()}
    stale = []
    for path, text in pages.items():
        if "--check" not in arguments:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            stale.append(path)
    for path in stale:
        sys.stderr.write(f"{path.relative_to(ROOT)} is stale: run `make format`\n")
    return 1 if stale else 0


def objectives() -> str:
    known: list[Any] = sorted(OBJECTIVES, key=lambda variant: str(kind_of(variant)))
    wire = {kind: name for name, kind in requests.OPENAI.items() if kind}
    lines = [
        "# Objectives",
        "",
        "What a job minimises: `method.type` in a request. Without it, the training file's format decides.",
        "Each is one file in `peft_service/objectives/`; this page is made from them (`make format`).",
        "Losses are sums over the targets of a whole step divided by their number, so that they do not",
        "depend on workers, microbatches or packing. Each is checked, with its gradients, against TRL's",
        "trainers, transformers' own losses or the paper's formula in float64.",
        "",
        "| `method.type` | learns from | loss | better means | packs |",
        "|---|---|---|---|---|",
    ]
    for variant in known:
        kind = kind_of(variant)
        names = [f"`{name}`" for name in dict.fromkeys([wire.get(kind, kind), kind, *variant.aliases])]
        lines.append(
            f"| [{', '.join(names)}](#{kind}) | {ROWS[variant.rows]} | {_cell(variant.formula)} | "
            f"{_cell(variant.measure)} | {'yes' if variant.packs else 'no'} |"
        )
    for variant in known:
        kind = kind_of(variant)
        lines += ["", f"## {kind}", "", variant.summary, ""]
        if variant.paper:
            lines += [f"Source: {variant.paper}", ""]
        lines.append(f"Formats: {', '.join(f'`{name}`' for name in variant.formats)}.")
        if variant.default_for:
            lines.append(f"A file of {', '.join(f'`{name}`' for name in variant.default_for)} means it.")
        if variant.rate_scale != 1:
            lines.append(f"Default learning rate: the method's own times {variant.rate_scale:g}.")
        fields = [(name, info) for name, info in variant.model_fields.items() if name != "kind"]
        if fields:
            lines += ["", "| field | default | |", "|---|---|---|"]
            for name, info in fields:
                default = "required" if info.is_required() else json.dumps(info.get_default())
                lines.append(f"| `{name}` | {default} | {_cell(info.description or '')} |")
    return "\n".join(lines) + "\n"


def formats() -> str:
    known: list[Any] = sorted(FORMATS, key=lambda variant: str(kind_of(variant)))
    lines = [
        "# Formats",
        "",
        "What a row of a data file looks like. The format is detected from the rows; a file has one.",
        "Each is one file in `peft_service/formats/`; this page is made from them (`make format`).",
        "Other shapes go in with a [column mapping](data.md#columns).",
    ]
    for variant in known:
        kind = kind_of(variant)
        means = [
            kind_of(objective)
            for objective in OBJECTIVES
            if kind in objective.default_for  # type: ignore[attr-defined]
        ]
        able = [
            kind_of(objective)
            for objective in OBJECTIVES
            if kind in objective.formats and kind_of(objective) not in means  # type: ignore[attr-defined]
        ]
        doc = (sys.modules[variant.__module__].__doc__ or "").strip()
        lines += ["", f"## {kind}", "", *doc.splitlines(), "", "```json", variant.sample, "```", ""]
        said = f"Means {', '.join(means)}." if means else ""
        also = f" Also for {', '.join(able)}." if able else ""
        lines.append((said + also).strip())
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
