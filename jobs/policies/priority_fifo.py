"""Highest priority first, then oldest first; a gang starts whole or not at all.

The first job that has no room now holds back all behind it, even those that would fit: a big job would
otherwise wait forever while small ones slip past. Only a job that the living nodes could not hold even if
they were empty holds nobody back; it waits for nodes, not for its turn.
"""

from collections.abc import Sequence
from typing import Literal

from cluster.plan import Demand, Node
from jobs.policies import Decision, Explain, Fits, Holding, Policy, Snapshot, Start

NAMED = 3
"""So many jobs are named in a sentence; more are counted."""


class PriorityFIFO(Policy):
    kind: Literal["priority_fifo"] = "priority_fifo"

    def decide(self, snapshot: Snapshot, fits: Fits) -> list[Decision]:
        holding = list(snapshot.holding)
        decisions: list[Decision] = []
        ahead: list[str] = []
        for waiting in sorted(snapshot.waiting, key=lambda waiting: (-waiting.priority, waiting.seq)):
            if not fits([waiting.demand], snapshot.nodes):
                decisions.append(Explain(waiting.job, _too_big(waiting.demand, snapshot.nodes)))
            elif ahead:
                decisions.append(Explain(waiting.job, _behind(ahead)))
                ahead.append(waiting.job)
            elif fits([*(held.demand for held in holding), waiting.demand], snapshot.nodes):
                decisions.append(Start(waiting.job))
                holding.append(Holding(waiting.job, waiting.demand))
            else:
                decisions.append(Explain(waiting.job, _no_room(waiting.demand, holding, snapshot.nodes)))
                ahead.append(waiting.job)
        return decisions


def _too_big(demand: Demand, nodes: Sequence[Node]) -> str:
    if not nodes:
        return f"needs {_gang(demand)}; the cluster has no living node: waiting for nodes"
    offers = ", ".join(_each(node.gpus, node.cpus, node.memory_bytes) for node in nodes[:NAMED])
    more = f" and {len(nodes) - NAMED} more" if len(nodes) > NAMED else ""
    return (
        f"needs {_gang(demand)}; the living nodes could not hold that even if they were empty "
        f"({len(nodes)} of them: {offers}{more}): waiting for nodes"
    )


def _behind(ahead: Sequence[str]) -> str:
    return f"{_ordinal(len(ahead) + 1)} in the queue; ahead: {_names(ahead)}"


def _no_room(demand: Demand, holding: Sequence[Holding], nodes: Sequence[Node]) -> str:
    """1st in the queue; needs 2 workers with 1 GPU each; 1 GPU is free, 7 are used by ftjob-…"""
    kind, unit = ("gpus", "GPU") if demand.gpus else ("cpus", "CPU")
    if not _short_of(kind, demand, holding, nodes):
        # Then it is the memory, or the room is there in pieces too small for one worker.
        kind, unit = (
            ("memory_bytes", "GB") if _short_of("memory_bytes", demand, holding, nodes) else (kind, unit)
        )
    scale = 1e9 if unit == "GB" else 1
    used = sum(held.demand.workers * getattr(held.demand, kind) for held in holding) / scale
    free = max(0.0, sum(getattr(node, kind) for node in nodes) / scale - used)
    users = [held.job for held in holding if getattr(held.demand, kind)]
    text = f"1st in the queue; needs {_gang(demand)}; {_count(free, unit)} {_is(free)} free"
    if users:
        text += f", {_number(used)} {_is(used)} used by {_names(users)}"
    if not _short_of(kind, demand, holding, nodes):
        text += "; what is free is spread over nodes so that no whole gang has room"
    return text


def _short_of(kind: str, demand: Demand, holding: Sequence[Holding], nodes: Sequence[Node]) -> bool:
    used = sum(held.demand.workers * getattr(held.demand, kind) for held in holding)
    return bool(sum(getattr(node, kind) for node in nodes) - used < demand.workers * getattr(demand, kind))


def _gang(demand: Demand) -> str:
    workers = "1 worker" if demand.workers == 1 else f"{demand.workers} workers"
    size = _each(demand.gpus, demand.cpus, demand.memory_bytes)
    return f"{workers} with {size}{' each' if demand.workers > 1 else ''}"


def _each(gpus: float, cpus: float, memory_bytes: float) -> str:
    parts = [_count(gpus, "GPU")] if gpus else []
    parts += [_count(cpus, "CPU")] if cpus else []
    parts += [_size(memory_bytes)] if memory_bytes else []
    return " + ".join(parts) or "nothing"


def _count(amount: float, unit: str) -> str:
    return f"{_number(amount)} {unit}" + ("s" if unit != "GB" and amount != 1 else "")


def _size(memory_bytes: float) -> str:
    return f"{_number(memory_bytes / 1e9)} GB" if memory_bytes >= 1e9 else f"{_number(memory_bytes / 1e6)} MB"


def _number(amount: float) -> str:
    return f"{round(amount, 1):g}"


def _is(amount: float) -> str:
    return "is" if amount == 1 else "are"


def _names(jobs: Sequence[str]) -> str:
    more = f" and {len(jobs) - NAMED} more" if len(jobs) > NAMED else ""
    return ", ".join(jobs[:NAMED]) + more


def _ordinal(number: int) -> str:
    tail = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{tail}"
