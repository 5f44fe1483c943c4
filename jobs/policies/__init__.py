"""Who goes next. One file a policy; `decide` is pure, so that each of its rules is tested as a function."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from cluster.plan import Demand, Node
from peft_service.variants import Frozen, union_of, variants_of


@dataclass(frozen=True)
class Waiting:
    """A job that may start if there is room; not one that waits for a delay or for its last attempt."""

    job: str
    priority: int
    seq: int
    """Lower is older."""
    demand: Demand


@dataclass(frozen=True)
class Holding:
    """What an attempt takes that has not ended; also one that is being stopped."""

    job: str
    demand: Demand


@dataclass(frozen=True)
class Snapshot:
    """All that a policy may know. `waiting` is the head of the queue, not all of it."""

    waiting: Sequence[Waiting]
    holding: Sequence[Holding]
    nodes: Sequence[Node]


@dataclass(frozen=True)
class Start:
    job: str


@dataclass(frozen=True)
class Explain:
    """Why a job does not start now, for its user."""

    job: str
    reason: str


Decision = Start | Explain


class Fits(Protocol):
    """Whether all workers of all demands have room at the same time; `cluster.plan.fits`."""

    def __call__(self, demands: Iterable[Demand], nodes: Sequence[Any], /) -> bool: ...


class Policy(Frozen):
    """A rule for who goes next. Stateless: what it should remember belongs in the snapshot."""

    kind: str

    def decide(self, snapshot: Snapshot, fits: Fits) -> list[Decision]:
        """One decision for each waiting job. The starts, in the order given, fit beside what is held."""
        raise NotImplementedError


POLICIES = variants_of(Policy, __name__, __path__)
if TYPE_CHECKING:
    AnyPolicy = Policy
else:
    AnyPolicy = union_of(POLICIES)
