"""Run a command on a terminal of its own, and save the last screens of what it showed as an SVG picture.

python tools/record.py docs/demo.svg -- make demo
"""

import argparse
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

WIDTH = 110
MOVES = re.compile(r"\x1b\[[0-9;?]*[A-Za-ln-z]")
"""A cursor that moves has no place in a picture; colours (…m) have."""


def run(command: list[str]) -> tuple[int, str]:
    """Exit code, and everything the command wrote to its terminal; it is shown here too."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(WIDTH), "LINES": "60", "TERM": "xterm-256color"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    chunks = []
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not chunk:
            break
        sys.stdout.buffer.write(chunk)
        sys.stdout.flush()
        chunks.append(chunk)
    return process.wait(), b"".join(chunks).decode(errors="replace")


def screen(text: str) -> str:
    """What remains to be seen: of a line that was written over, its last state."""
    lines: list[str] = []
    for line in text.replace("\r\n", "\n").split("\n"):
        ups = sum(int(count or 1) for count in re.findall(r"\x1b\[(\d*)A", line))
        if ups:
            del lines[len(lines) - ups :]
        last = [part for part in line.split("\r") if part.strip()]
        lines.append(MOVES.sub("", last[-1]) if last else "")
    # Where the checkout lies on this machine is nobody's business.
    return "\n".join(lines).strip().replace(os.getcwd(), ".")


def main() -> int:
    from rich.console import Console
    from rich.text import Text

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    code, text = run(options.command)
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere, force_terminal=True)
        console.print(Text.from_ansi(screen(text)))
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        console.save_svg(str(options.picture), title=" ".join(options.command))
    return code


if __name__ == "__main__":
    sys.exit(main())
