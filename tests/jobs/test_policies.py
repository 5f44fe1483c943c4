"""Policies are pure functions: their promises are tested as properties, for every policy there is."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.plan import Demand, Node, fits
from jobs.policies import POLICIES, Decision, Explain, Holding, Policy, Snapshot, Start, Waiting
from jobs.policies.priority_fifo import PriorityFIFO

demands = st.builds(
    Demand,
    workers=st.integers(1, 4),
    cpus=st.sampled_from([0.0, 1.0, 2.0]),
    gpus=st.sampled_from([0.0, 1.0, 2.0]),
    memory_bytes=st.sampled_from([0, 1_000, 4_000]),
)
nodes = st.lists(
    st.builds(
        Node,
        cpus=st.sampled_from([1.0, 4.0, 8.0]),
        gpus=st.sampled_from([0.0, 1.0, 4.0]),
        memory_bytes=st.sampled_from([4_000, 16_000]),
    ),
    max_size=4,
)


@st.composite
def queues(draw: st.DrawFn) -> list[Waiting]:
    wanted = draw(st.lists(st.tuples(st.integers(0, 3), demands), max_size=8))
    order = draw(st.permutations(range(len(wanted))))
    return [Waiting(f"j{seq}", wanted[seq][0], seq, wanted[seq][1]) for seq in order]


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """Holding what fits, as a cluster in order does."""
    there = draw(nodes)
    holding: list[Holding] = []
    for number, demand in enumerate(draw(st.lists(demands, max_size=4))):
        if fits([*(held.demand for held in holding), demand], there):
            holding.append(Holding(f"h{number}", demand))
    return Snapshot(draw(queues()), holding, there)


def started(decisions: Sequence[Decision]) -> list[str]:
    return [decision.job for decision in decisions if isinstance(decision, Start)]


@pytest.fixture(params=POLICIES, ids=lambda policy: policy.__name__)
def policy(request: pytest.FixtureRequest) -> Policy:
    made: Policy = request.param()
    return made


class TestEveryPolicy:
    @pytest.mark.parametrize("kind", POLICIES, ids=lambda policy: policy.__name__)
    @given(snapshot=snapshots())
    def test_every_waiting_job_gets_one_decision_and_capacity_is_never_exceeded(
        self, kind: type[Policy], snapshot: Snapshot
    ) -> None:
        decisions = kind().decide(snapshot, fits)
        assert sorted(decision.job for decision in decisions) == sorted(job.job for job in snapshot.waiting)
        by_name = {job.job: job.demand for job in snapshot.waiting}
        running = [held.demand for held in snapshot.holding]
        running += [by_name[job] for job in started(decisions)]
        assert fits(running, snapshot.nodes)
        assert all(decision.reason for decision in decisions if isinstance(decision, Explain))

    @pytest.mark.parametrize("kind", POLICIES, ids=lambda policy: policy.__name__)
    @given(waiting=queues(), there=nodes, data=st.data())
    def test_nobody_who_could_run_waits_forever(
        self, kind: type[Policy], waiting: list[Waiting], there: list[Node], data: st.DataObject
    ) -> None:
        """Jobs end one after another, in any order; meanwhile smaller, younger ones keep coming."""
        waiting = list(waiting)
        originals = {job.job for job in waiting if fits([job.demand], there)}
        holding: list[Holding] = []
        lowest = min((job.priority for job in waiting), default=0)
        small = Demand(workers=1, cpus=1, gpus=0, memory_bytes=0)
        for round in range(4 * len(originals) + 4):
            decisions = kind().decide(Snapshot(waiting, holding, there), fits)
            for job in [job for job in waiting if job.job in started(decisions)]:
                waiting.remove(job)
                holding.append(Holding(job.job, job.demand))
            if holding:
                ended = data.draw(st.integers(0, len(holding) - 1))
                holding.pop(ended)
            waiting.append(Waiting(f"late{round}", lowest, 1000 + round, small))
        assert not originals & {job.job for job in waiting}


class TestPriorityFIFO:
    @given(snapshot=snapshots())
    def test_nobody_overtakes_a_job_that_could_run_on_an_empty_cluster(self, snapshot: Snapshot) -> None:
        starts = started(PriorityFIFO().decide(snapshot, fits))
        order = sorted(snapshot.waiting, key=lambda job: (-job.priority, job.seq))
        possible = [job.job for job in order if fits([job.demand], snapshot.nodes)]
        assert starts == possible[: len(starts)]

    @given(snapshot=snapshots())
    def test_no_room_is_left_that_the_next_job_could_take(self, snapshot: Snapshot) -> None:
        starts = started(PriorityFIFO().decide(snapshot, fits))
        order = sorted(snapshot.waiting, key=lambda job: (-job.priority, job.seq))
        possible = [job for job in order if fits([job.demand], snapshot.nodes)]
        running = [held.demand for held in snapshot.holding]
        running += [job.demand for job in possible[: len(starts)]]
        if len(starts) < len(possible):
            assert not fits([*running, possible[len(starts)].demand], snapshot.nodes)


def gpus(workers: int, each: float = 1) -> Demand:
    return Demand(workers=workers, cpus=0, gpus=each, memory_bytes=0)


@pytest.mark.parametrize(
    ("holding", "waiting", "expected"),
    [
        (
            [Holding("ftjob-a", gpus(7))],
            [Waiting("ftjob-b", 50, 1, gpus(2))],
            {
                "ftjob-b": "1st in the queue; needs 2 workers with 1 GPU each; 1 GPU is free, "
                "7 are used by ftjob-a"
            },
        ),
        (
            [Holding(f"ftjob-{n}", gpus(1)) for n in range(5)],
            [
                Waiting("ftjob-b", 50, 1, gpus(1, 4)),
                Waiting("ftjob-c", 50, 2, gpus(1)),
                Waiting("ftjob-d", 90, 3, gpus(1, 4)),
            ],
            {
                "ftjob-d": "1st in the queue; needs 1 worker with 4 GPUs; 3 GPUs are free, "
                "5 are used by ftjob-0, ftjob-1, ftjob-2 and 2 more",
                "ftjob-b": "2nd in the queue; ahead: ftjob-d",
                "ftjob-c": "3rd in the queue; ahead: ftjob-d, ftjob-b",
            },
        ),
        (
            [],
            [Waiting("ftjob-b", 50, 1, gpus(9))],
            {
                "ftjob-b": "needs 9 workers with 1 GPU each; the living nodes could not hold that even if "
                "they were empty (1 of them: 8 GPUs + 16 CPUs + 100 GB): waiting for nodes"
            },
        ),
        (
            [Holding("ftjob-a", Demand(workers=1, cpus=1, gpus=0, memory_bytes=70 * 10**9))],
            [Waiting("ftjob-b", 50, 1, Demand(workers=2, cpus=1, gpus=0, memory_bytes=20 * 10**9))],
            {
                "ftjob-b": "1st in the queue; needs 2 workers with 1 CPU + 20 GB each; 30 GB are free, "
                "70 are used by ftjob-a"
            },
        ),
    ],
)
def test_a_waiting_job_says_why_in_words(
    holding: list[Holding], waiting: list[Waiting], expected: dict[str, str]
) -> None:
    there = [Node(cpus=16, gpus=8, memory_bytes=100 * 10**9)]
    decisions = PriorityFIFO().decide(Snapshot(waiting, holding, there), fits)
    assert {decision.job: getattr(decision, "reason", "starts") for decision in decisions} == expected


def test_room_in_pieces_is_named_as_such() -> None:
    there = [Node(cpus=0, gpus=3, memory_bytes=0), Node(cpus=0, gpus=3, memory_bytes=0)]
    snapshot = Snapshot([Waiting("ftjob-c", 50, 1, gpus(1, 2))], [Holding("ftjob-a", gpus(2, 2))], there)
    (decision,) = PriorityFIFO().decide(snapshot, fits)
    assert isinstance(decision, Explain)
    assert decision.reason == (
        "1st in the queue; needs 1 worker with 2 GPUs; 2 GPUs are free, 4 are used by ftjob-a; "
        "what is free is spread over nodes so that no whole gang has room"
    )


def test_a_cluster_without_nodes_is_named_as_such() -> None:
    (decision,) = PriorityFIFO().decide(Snapshot([Waiting("ftjob-c", 50, 1, gpus(1))], [], []), fits)
    assert isinstance(decision, Explain)
    assert "the cluster has no living node" in decision.reason
