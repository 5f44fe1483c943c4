"""`make demo`: one real job, from REST request to a proven adapter, with the same prompts before and after.

It uses a service of its own, in a data directory of its own, through the same client as everybody. What
happens after the pull runs in another process that knows transformers and peft and nothing of us.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from jobs import demo_data, up
from jobs.client import Client
from jobs.settings import load
from jobs.watch import duration, follow, plot
from peft_service import shipped
from peft_service.errors import RunFailed

COMPARING_SECONDS = 300
SHOWN_CHARACTERS = 90
TRAINING = {
    "n_epochs": demo_data.N_EPOCHS,
    "max_steps": demo_data.MAX_STEPS,
    "batch_size": demo_data.BATCH_SIZE,
    "learning_rate": demo_data.LEARNING_RATE,
    "max_seq_len": 256,
}
ADAPTER = {"kind": "lora", "rank": 16, "alpha": 32}


@dataclass
class Report:
    """What the demo found."""

    job: str = ""
    status: str = ""
    adapter: str = ""
    location: str = ""
    base_loss: float = 0.0
    adapter_loss: float = 0.0
    answers: list[dict[str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def better(self) -> bool:
        """On rows that it was not trained on."""
        return self.status == "succeeded" and self.adapter_loss < self.base_loss


def run(data_dir: Path, console: Console, *, seed: int = 0) -> Report:
    """Do all of it, and say so on `console`."""
    report = Report()
    # A polite kill ends the service too, like Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    settings = load(data_dir=data_dir, port=0)
    ours = up.running(settings) is None
    try:
        with _timed(report, "start the service"):
            console.print("[bold]peft-service demo[/]: starting the service")
            service = up.up(settings, say=lambda text: console.print(f"  {escape(text)}", style="dim"))
        console.print(f"  {service.url}  (data in {escape(str(settings.data_dir))})", highlight=False)
        with Client(service.url, service.key) as client, tempfile.TemporaryDirectory() as scratch:
            _journey(client, Path(scratch), report, console, seed)
    finally:
        if ours:
            with _timed(report, "stop the service"):
                up.down(settings)
    _summary(report, console)
    return report


def _journey(client: Client, scratch: Path, report: Report, console: Console, seed: int) -> None:
    with _timed(report, "upload and check the data"):
        training, validation = scratch / "train.jsonl", scratch / "validation.jsonl"
        training.write_bytes(demo_data.write_jsonl(demo_data.training_rows(seed)))
        validation.write_bytes(demo_data.write_jsonl(demo_data.validation_rows(seed)))
        training_file, validation_file = client.upload(training), client.upload(validation)
    console.print(f"\n[bold]1[/] uploaded {training_file.id} and {validation_file.id}", highlight=False)
    body = {
        "model": shipped.SHIPPED_ID,
        "training_file": training_file.id,
        "validation_file": validation_file.id,
        "name": "demo",
        "seed": seed,
        "adapter": ADAPTER,
        "training": TRAINING,
        # Two threads halve a step of so small a model; a machine with one core has one.
        "resources": {"workers": 1, "cpus_per_worker": min(2, os.cpu_count() or 1)},
    }
    with _timed(report, "job, from submit to succeeded"):
        job = client.submit(body)
        console.print(f"[bold]2[/] POST /v1/fine_tuning/jobs -> {job.id}", highlight=False)
        job, history = follow(client.follow(job.id, poll=0.3), console)
    report.job, report.status = job.id, job.status
    if job.status != "succeeded":
        reason = (job.error or {}).get("message") or "no reason was given"
        console.print(f"[red]{job.id} {job.status}: {escape(reason)}[/]", highlight=False)
        return
    for phase, seconds in history.seconds.items():
        report.seconds[f"  {phase}"] = seconds
    console.print("\n[dim]training loss[/]")
    for line in plot(history.losses()):
        console.print(f"  {line}", highlight=False, style="cyan")
    target = scratch / "adapter"
    with _timed(report, "pull and verify the adapter"):
        adapter = client.adapter(job.id)
        client.pull(adapter.id, target)
    report.adapter, report.location = adapter.reference, adapter.url
    console.print(f"\n[bold]3[/] pulled {report.adapter}: every checksum is right", highlight=False)
    console.print(f"  bucket   {escape(report.location)}", highlight=False, soft_wrap=True)
    console.print(f"  catalog  GET /v1/adapters/{adapter.id}", highlight=False)
    with _timed(report, "plain transformers + peft, before and after"):
        found = _in_another_process(shipped.path(), target, validation)
    report.base_loss, report.adapter_loss = found["base_loss"], found["adapter_loss"]
    wanted = dict(demo_data.PROMPTS)
    report.answers = [{**answer, "wanted": wanted[answer["prompt"]]} for answer in found["answers"]]
    console.print("[bold]4[/] plain transformers + peft, in another process: prompts it was never trained on")
    table = Table("prompt", "base", f"with {report.adapter}", show_lines=True)
    for answer in report.answers:
        right = answer["after"] == answer["wanted"]
        style = "green" if right else "yellow" if _tool(answer["after"]) == _tool(answer["wanted"]) else "red"
        table.add_row(
            answer["prompt"], Text(_cut(answer["before"])), Text(_cut(answer["after"]), style=style)
        )
    console.print(table)
    for what, count in (
        ("call the right tool", sum(_tool(a["after"]) == _tool(a["wanted"]) for a in report.answers)),
        ("are right in every character", sum(a["after"] == a["wanted"] for a in report.answers)),
    ):
        console.print(f"  {count} of {len(report.answers)} answers {what}", highlight=False)


def _tool(answer: str) -> str | None:
    """The tool that an answer calls; None if it is no JSON object."""
    try:
        value = json.loads(answer)
    except ValueError:
        return None
    return value.get("tool") if isinstance(value, dict) else None


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"


def _summary(report: Report, console: Console) -> None:
    table = Table("", "seconds", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name, seconds in report.seconds.items():
        table.add_row(name, f"{seconds:.1f}")
    total = sum(seconds for name, seconds in report.seconds.items() if not name.startswith(" "))
    table.add_row("[bold]together[/]", f"[bold]{total:.1f}[/] ({duration(total)})")
    console.print()
    console.print(table)
    if report.status != "succeeded":
        console.print(f"\n[red]The job ended {report.status or 'before it began'}.[/]")
        return
    colour, words = ("green", "lower") if report.better else ("red", "NOT lower")
    new = f"[bold {colour}]{report.adapter_loss:.3f}[/] ({words})"
    console.print(f"\nheld-out loss: base {report.base_loss:.3f} -> adapter {new}", highlight=False)


@contextmanager
def _timed(report: Report, what: str) -> Iterator[None]:
    began = time.monotonic()
    try:
        yield
    finally:
        report.seconds[what] = time.monotonic() - began


# ------------------------------------------------------------------------------------------- another process


def _in_another_process(base: Path, adapter: Path, validation: Path) -> dict[str, Any]:
    """`compare` where none of our packages has been imported.

    Raises:
        RunFailed: with the end of what it said.
    """
    question = {
        "base": str(base),
        "adapter": str(adapter),
        "validation": str(validation),
        "prompts": [prompt for prompt, _ in demo_data.PROMPTS],
    }
    # The file itself and not `-m jobs.demo`: a module would import this package and all that it imports.
    script = Path(__file__).with_name("demo_compare.py")
    try:
        done = subprocess.run(
            # -P: its directory stays off the path, where our queue.py would hide the standard one.
            [sys.executable, "-P", str(script)],
            input=json.dumps(question),
            capture_output=True,
            text=True,
            timeout=COMPARING_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise RunFailed(f"loading the adapter with plain peft took more than {COMPARING_SECONDS} s") from None
    if done.returncode != 0:
        raise RunFailed(f"loading the adapter with plain peft failed:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer
