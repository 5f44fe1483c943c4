"""Docs describe today's code: every package README's map is made of the first sentences of its files.

python tools/check_docs.py           compare; exit code 1 if one is stale (`make check`)
python tools/check_docs.py --write   bring them up to date (`make format`)
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAPPED = ("peft_service", "cluster", "jobs", "infra", "tests", "tools")
SUFFIXES = (".py", ".yaml", ".sh")
BLOCK = re.compile(r"(?<=## Map\n).*?(?=\n## |\Z)", re.DOTALL)


def files_of(package: str) -> list[Path]:
    """Sources and manifests of the package that git knows or would; not data, not empty markers."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", package],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    paths = {ROOT / name for name in listed}
    return sorted(
        path
        for path in paths
        if path.exists()
        and (path.suffix in SUFFIXES or path.name.startswith("Dockerfile"))
        and not (path.name == "__init__.py" and not path.read_text().strip())
        and path.parent.name != "versions"  # migrations: their names say it
    )


def sentence_of(path: Path) -> str:
    """What the file says that it is: the first line of its docstring, or its first comment."""
    text = path.read_text()
    if path.suffix == ".py":
        lines = (ast.get_docstring(ast.parse(text)) or "").splitlines()
        return lines[0].strip() if lines else ""
    block: list[str] = []
    for line in text.splitlines():
        if re.match(r"#\s*\S", line) and not line.startswith(("#!", "# syntax=")):
            block.append(line.lstrip("# ").strip())
        elif block:
            break
    return re.split(r"(?<=\.) ", " ".join(block), maxsplit=1)[0]


def map_of(package: str) -> tuple[str, list[str]]:
    """The map's text, and the files that say nothing about themselves."""
    lines, silent = [], []
    for path in files_of(package):
        name, sentence = path.relative_to(ROOT / package), sentence_of(path)
        if not sentence:
            silent.append(f"{package}/{name} does not say what it is: give it a first sentence")
        lines.append(f"- `{name}`: {sentence}")
    return "\n" + "\n".join(lines) + "\n", silent


def main(arguments: list[str]) -> int:
    problems = []
    for package in MAPPED:
        readme = ROOT / package / "README.md"
        if not readme.exists() or not BLOCK.search(readme.read_text()):
            problems.append(f"{package}/README.md has no `## Map` section")
            continue
        made, silent = map_of(package)
        problems += silent
        before = readme.read_text()
        after = BLOCK.sub(made.replace("\\", r"\\"), before, count=1)
        if "--write" in arguments:
            readme.write_text(after)
        elif before != after:
            problems.append(f"the map of {package}/README.md is stale: run `make format`")
    for problem in problems:
        sys.stderr.write(problem + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
