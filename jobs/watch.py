"""A job followed in the terminal: a bar with loss, speed and time left, or plain lines in a pipe."""

import time
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn
from rich.text import Text

from jobs.client import Event, Job, Update

SPARKS = "▁▂▃▄▅▆▇█"
LINE_SECONDS = 10.0
"""Outside of a terminal, steps are written this often."""


class History:
    """What a watch has seen: losses by step, and how long each phase took.

    An attempt that resumed overwrites the steps it repeats.
    """

    def __init__(self) -> None:
        self.by_step: dict[int, float] = {}
        self.seconds: dict[str, float] = {}
        """By phase, in the order in which they were seen."""
        self._looked: tuple[str, float] | None = None

    def add(self, update: Update, now: float | None = None) -> None:
        for event in update.events:
            data = event.data or {}
            if isinstance(data.get("train_loss"), (int, float)) and isinstance(data.get("step"), int):
                self.by_step[data["step"]] = data["train_loss"]
        now = time.monotonic() if now is None else now
        if self._looked is not None:
            phase, since = self._looked
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - since
        self._looked = None if update.job.final else (phase_of(update.job), now)

    def losses(self) -> list[float]:
        return [self.by_step[step] for step in sorted(self.by_step)]


def phase_of(job: Job) -> str:
    """One word for what the job does: its phase while it runs, else its status."""
    return (job.phase or "starting") if job.status == "running" else job.status


def sparkline(values: list[float], width: int = 40) -> str:
    """The values as blocks from ▁ to █."""
    if not values:
        return ""
    values = grouped(values, width)
    low, high = min(values), max(values)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((value - low) * scale)] for value in values)


def plot(values: list[float], height: int = 8, width: int = 60) -> list[str]:
    """The same as a chart of `height` lines with its scale on the left."""
    if not values:
        return []
    columns = grouped(values, width)
    low, high = min(columns), max(columns)
    span = (high - low) or 1.0
    lines = []
    for row in range(height):
        top, bottom = high - span * row / height, high - span * (row + 1) / height
        filled = [(value - bottom) / (top - bottom) for value in columns]
        # The smallest value fills nothing of the lowest line; it still gets a block, or it would not be seen.
        blocks = [SPARKS[min(7, int(part * 8))] if part > 0 or row == height - 1 else " " for part in filled]
        lines.append(f"{top:8.3f} │{''.join(blocks)}")
    lines.append(f"{low:8.3f} └{'─' * len(columns)}")
    return lines


def grouped(values: list[float], width: int) -> list[float]:
    """At most `width` values: means of neighbouring groups."""
    if len(values) <= width:
        return list(values)
    edges = [round(index * len(values) / width) for index in range(width + 1)]
    return [sum(values[left:right]) / (right - left) for left, right in pairwise(edges)]


def waiting_for(job: Job) -> str:
    """Why no step is made at this moment, in words; empty when steps are made, or when the job is final."""
    if job.final:
        return ""
    if job.status_reason:
        return job.status_reason
    if job.status == "queued":
        position = (job.queue or {}).get("position")
        return f"waiting, number {position} in the queue" if position else "waiting for the scheduler"
    if job.status == "validating_files":
        return "checking the files"
    if job.status == "running" and job.phase in (None, "training") and numbers(job).get("step"):
        return ""
    return phase_of(job)


def numbers(job: Job) -> dict[str, Any]:
    """step, total_steps, train_loss and tokens_per_second as far as they are known."""
    return {key: value for key, value in (job.progress or {}).items() if value is not None}


def duration(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def follow(updates: Iterable[Update], console: Console) -> tuple[Job, History]:
    """Show the job until it is final. Ctrl-C comes out as KeyboardInterrupt; the job goes on."""
    return _bar(updates, console) if console.is_terminal else _lines(updates, console)


def _bar(updates: Iterable[Update], console: Console) -> tuple[Job, History]:
    history, job = History(), None
    columns = (
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        _Figures(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None, loss=None, speed=None, left=None, spark="")
        for update in updates:
            job = update.job
            history.add(update)
            _messages(update, progress.console)
            known = numbers(job)
            reason = update.problem or waiting_for(job)
            progress.update(
                task,
                description=escape(reason) or f"[bold]{phase_of(job)}[/]",
                total=None if reason else known.get("total_steps"),
                completed=known.get("step", 0),
                loss=known.get("train_loss"),
                speed=known.get("tokens_per_second"),
                left=known.get("eta_seconds"),
                spark=sparkline(history.losses(), 20),
            )
    assert job is not None
    return job, history


def _lines(updates: Iterable[Update], console: Console) -> tuple[Job, History]:
    history, job, said, step, spoke = History(), None, "", 0, 0.0
    for update in updates:
        job = update.job
        history.add(update)
        _messages(update, console)
        known = numbers(job)
        reason = update.problem or waiting_for(job)
        if reason and reason != said:
            console.print(escape(reason), highlight=False, soft_wrap=True)
        said = reason
        due = time.monotonic() - spoke >= LINE_SECONDS or known.get("step") == known.get("total_steps")
        if not reason and known.get("step", 0) != step and due:
            step, spoke = known["step"], time.monotonic()
            figures = _figures(
                known.get("train_loss"), known.get("tokens_per_second"), known.get("eta_seconds")
            )
            console.print(
                f"step {step}/{known.get('total_steps')}  {figures}", highlight=False, soft_wrap=True
            )
    assert job is not None
    return job, history


def _messages(update: Update, console: Console) -> None:
    """Events in words; the figures of the steps are in the bar."""
    for event in update.events:
        if event.type != "metrics":
            console.print(_line(event), highlight=False, soft_wrap=True)


class _Figures(TextColumn):
    """step 12/88  loss 1.234  1,234 tokens/s  0:42 left  ▇▅▃▂"""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text(duration(task.elapsed or 0))
        fields = task.fields
        figures = _figures(fields["loss"], fields["speed"], fields["left"])
        return Text(f"{int(task.completed)}/{int(task.total)}  {figures}  {fields['spark']}")


def _figures(loss: float | None, speed: float | None, left: float | None) -> str:
    parts = [
        f"loss {loss:.3f}" if loss is not None else "",
        f"{speed:,.0f} tokens/s" if speed else "",
        f"{duration(left)} left" if left is not None else "",
    ]
    return "  ".join(part for part in parts if part)


def _line(event: Event) -> str:
    colour = {"warn": "yellow", "warning": "yellow", "error": "red"}.get(event.level)
    clock = time.strftime("%H:%M:%S", time.localtime(event.created_at))
    text = escape(event.message)
    return f"[dim]{clock}[/]  " + (f"[{colour}]{text}[/]" if colour else text)
