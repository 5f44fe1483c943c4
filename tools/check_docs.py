"""Docs describe today's code: every package README's map names each file once, and nothing else.

A map is the lines of the README that start with a backticked path, `file.py`, then text. Run by `make check`.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAPPED = ("peft_service", "cluster", "jobs", "infra", "tests", "tools")
ENTRY = re.compile(r"^[-*]? ?`([^`]+)`\s+\S")


def tracked(package: str) -> set[str]:
    """Files of the package that a reader meets: sources and manifests, not data, not empty markers."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", package],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    wanted = set()
    for name in listed:
        path = ROOT / name
        if not path.exists() or path.name in ("README.md", "py.typed"):
            continue
        if path.name == "__init__.py" and not path.read_text().strip():
            continue
        if path.suffix in (".py", ".yaml", ".sh", ".ini", ".mako") or path.name == "Dockerfile":
            wanted.add(str(path.relative_to(ROOT / package)))
    return wanted


def mapped(readme: Path) -> list[str]:
    """The paths that the README's map lines name."""
    found = []
    inside = False
    for line in readme.read_text().splitlines():
        if line.startswith("## "):
            inside = line.strip().lower() == "## map"
        match = ENTRY.match(line) if inside else None
        if match:
            found.append(match.group(1))
    return found


def main() -> int:
    problems = []
    for package in MAPPED:
        readme = ROOT / package / "README.md"
        if not readme.exists():
            problems.append(f"{package}/README.md is missing: write its `## Map`, a line a file")
            continue
        entries, files = mapped(readme), tracked(package)
        # An entry that ends with / stands for a folder whose files are variants of one thing.
        folders = tuple(entry for entry in entries if entry.endswith("/"))
        for entry in entries:
            if entries.count(entry) > 1:
                problems.append(f"{package}/README.md names `{entry}` twice")
            if not (ROOT / package / entry).exists():
                problems.append(f"{package}/README.md names `{entry}`, which does not exist")
        for name in sorted(files - set(entries)):
            if not name.startswith(folders or ("\0",)):
                problems.append(f"{package}/{name} is not in the map of {package}/README.md")
    for problem in problems:
        sys.stderr.write(problem + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
