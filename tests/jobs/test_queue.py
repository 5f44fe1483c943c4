"""The queue's promises, each on SQLite and on PostgreSQL."""

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, Select, select, text, update
from sqlalchemy.dialects import postgresql, sqlite

from jobs import queue
from jobs.db import job_events, jobs, now, reading, writing
from jobs.queue import Event, Lease, LeaseLost
from peft_service.errors import Conflict, InvalidRequest, NotFound
from tests.jobs.rows import PROJECT, add_project, new_job

TTL = 60


def at_once(work: Callable[[int], Any], count: int) -> list[Any]:
    """`work(0..count-1)` in threads that begin together; what each returned or raised."""
    results: list[Any] = [None] * count
    barrier = threading.Barrier(count)

    def one(index: int) -> None:
        barrier.wait()
        try:
            results[index] = work(index)
        except Exception as problem:
            results[index] = problem

    threads = [threading.Thread(target=one, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def messages(engine: Engine, job: str) -> list[str]:
    """Oldest first."""
    page = queue.events(engine, PROJECT, job, limit=1000)
    return [event.message for event in reversed(page.items)]


def claimed(engine: Engine, job: str, ttl: float = TTL) -> Lease:
    lease = queue.claim(engine, job, "a scheduler", ttl)
    assert lease is not None
    return lease


def expire(engine: Engine, job: str) -> None:
    with writing(engine) as conn:
        conn.execute(update(jobs).where(jobs.c.id == job).values(lease_expires_at=now() - 1))


# ---------------------------------------------------------------------------------------------- submit


def test_a_submitted_job_waits_and_has_told_its_beginning(engine: Engine) -> None:
    job = queue.submit(engine, new_job(metadata={"team": "search", "run": "7"}))
    assert job.id.startswith("ftjob-")
    assert (job.state, job.attempt, job.live_attempt) == ("queued", 0, None)
    assert job.metadata == {"team": "search", "run": "7"}
    assert queue.get(engine, PROJECT, job.id) == job
    assert messages(engine, job.id) == [
        f"Created fine-tuning job: {job.id}",
        "Validating training file: file-0123456789abcdef01234567",
        "Files validated, moving job to queued state",
    ]


def test_another_projects_job_does_not_exist(engine: Engine) -> None:
    add_project(engine, "other", "Other")
    job = queue.submit(engine, new_job())
    for ask in (queue.get, queue.cancel, queue.pause, queue.resume, queue.events, queue.list_checkpoints):
        with pytest.raises(NotFound, match=job.id):
            ask(engine, "other", job.id)
    with pytest.raises(NotFound):
        queue.page(engine, "other", after=job.id)
    assert queue.get(engine, PROJECT, job.id) == job


def test_an_idempotency_key_makes_one_job_and_means_one_body(engine: Engine) -> None:
    first = queue.submit(engine, new_job("a", idempotency_key="k"))
    assert queue.submit(engine, new_job("a", idempotency_key="k")).id == first.id
    with pytest.raises(Conflict, match=first.id):
        queue.submit(engine, new_job("b", idempotency_key="k"))
    assert queue.submit(engine, new_job("a", idempotency_key="k2")).id != first.id
    add_project(engine, "other", "Other")
    assert queue.submit(engine, new_job("a", project="other", idempotency_key="k")).id != first.id
    assert len(queue.page(engine, PROJECT).items) == 2


def test_the_same_body_is_the_same_job_only_when_the_client_says_that_it_retries(engine: Engine) -> None:
    first = queue.submit(engine, new_job("a"))
    second = queue.submit(engine, new_job("a"))
    assert second.id != first.id, "two originals are two jobs"
    assert queue.submit(engine, new_job("a", retry_count=1)).id == second.id
    assert queue.submit(engine, new_job("a", retry_count=2)).id == second.id
    assert queue.submit(engine, new_job("b", retry_count=1)).id not in (first.id, second.id)


def test_an_original_that_arrives_after_its_retry_is_that_job_once(engine: Engine) -> None:
    retry = queue.submit(engine, new_job("a", retry_count=1))
    assert queue.submit(engine, new_job("a")).id == retry.id
    assert queue.submit(engine, new_job("a")).id != retry.id, "the next original is another job"


def test_a_retry_is_believed_for_ten_minutes(engine: Engine) -> None:
    first = queue.submit(engine, new_job("a"))
    with writing(engine) as conn:
        conn.execute(update(jobs).values(created_at=now() - queue.RETRY_WINDOW_SECONDS + 30))
    assert queue.submit(engine, new_job("a", retry_count=1)).id == first.id
    with writing(engine) as conn:
        conn.execute(update(jobs).values(created_at=now() - queue.RETRY_WINDOW_SECONDS - 1))
    assert queue.submit(engine, new_job("a", retry_count=1)).id != first.id


@pytest.mark.parametrize("keyed", [True, False])
def test_an_original_and_its_retries_at_once_are_one_job(engine: Engine, keyed: bool) -> None:
    key = "k" if keyed else None
    for body in range(4):
        made = at_once(
            lambda index, body=body: (
                queue.submit(
                    engine, new_job(body, idempotency_key=key and f"{key}{body}", retry_count=index)
                ).id
            ),
            4,
        )
        assert len(set(made)) == 1, made
        assert len(queue.page(engine, PROJECT).items) == body + 1


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b"])
def test_text_that_no_database_can_hold_is_the_requests_fault(engine: Engine, text: str) -> None:
    for job in (
        new_job(request={"model": [{"x": text}]}),
        new_job(request={text: 1}),
        new_job(metadata={"k": text}),
        new_job(idempotency_key=text),
    ):
        with pytest.raises(InvalidRequest):
            queue.submit(engine, job)
    for ask in (queue.get, queue.cancel, queue.events):
        with pytest.raises(NotFound):
            ask(engine, PROJECT, text)
    with pytest.raises(NotFound):
        queue.page(engine, PROJECT, after=text)
    assert queue.page(engine, PROJECT, metadata={"k": text}).items == []
    there = queue.submit(engine, new_job(request={"literally": "a\\u0000b"}))
    with pytest.raises(NotFound):
        queue.events(engine, PROJECT, there.id, after=text)
    queue.append_event(engine, there.id, Event(f"a run says {text}"))
    assert messages(engine, there.id)[-1] == "a run says a\ufffdb"


# ---------------------------------------------------------------------------------------------- pages


def walk(ask: Callable[[str | None], queue.Page[Any]]) -> list[Any]:
    items: list[Any] = []
    while True:
        page = ask(items[-1].id if items else None)
        items += page.items
        if not page.has_more:
            return items


def test_pages_hold_every_job_once_newest_first(engine: Engine) -> None:
    made = [queue.submit(engine, new_job(body)).id for body in range(7)]
    for limit in (1, 3, 7, 100):
        seen = walk(lambda after, limit=limit: queue.page(engine, PROJECT, after=after, limit=limit))
        assert [job.id for job in seen] == made[::-1]
    with pytest.raises(NotFound, match="ftjob-nothing"):
        queue.page(engine, PROJECT, after="ftjob-nothing")


def test_a_page_is_not_disturbed_by_new_jobs(engine: Engine) -> None:
    made = [queue.submit(engine, new_job(body)).id for body in range(4)]
    first = queue.page(engine, PROJECT, limit=2)
    queue.submit(engine, new_job("new"))
    second = queue.page(engine, PROJECT, after=first.items[-1].id, limit=2)
    assert [job.id for job in first.items + second.items] == made[::-1]


def test_jobs_are_found_by_all_of_their_metadata(engine: Engine) -> None:
    both = queue.submit(engine, new_job(1, metadata={"team": "a", "kind": "x"})).id
    one = queue.submit(engine, new_job(2, metadata={"team": "a"})).id
    none = queue.submit(engine, new_job(3)).id

    def found(metadata: dict[str, str] | None) -> list[str]:
        return [job.id for job in queue.page(engine, PROJECT, metadata=metadata).items]

    assert found({"team": "a"}) == [one, both]
    assert found({"team": "a", "kind": "x"}) == [both]
    assert found({"team": "b"}) == []
    assert found({}) == [none]
    assert found(None) == [none, one, both]


def test_what_follows_a_number_is_never_missed_while_others_write(engine: Engine) -> None:
    """A reader polls for events after the last number it has seen, while four writers append."""
    job = queue.submit(engine, new_job()).id
    done = threading.Event()
    seen: list[int] = []

    def work(index: int) -> None:
        if index == 0:
            last = 0
            while True:
                finished = done.is_set()
                with reading(engine) as conn:
                    query = select(job_events.c.seq).where(
                        job_events.c.job_id == job, job_events.c.seq > last
                    )
                    new = conn.execute(query.order_by(job_events.c.seq)).scalars().all()
                seen.extend(new)
                last = max([last, *new])
                if finished:
                    return
        else:
            for number in range(25):
                with writing(engine) as conn:
                    queue.append_event(conn, job, Event(f"{index}.{number}"))
                    conn.execute(text("SELECT 1"))  # the number is drawn, the commit is still to come

    workers = threading.Thread(target=lambda: (at_once(lambda index: work(index + 1), 4), done.set()))
    workers.start()
    work(0)
    workers.join()
    assert seen == sorted(set(seen))
    assert len(seen) == 3 + 100


def test_told_twice_is_told_once(engine: Engine) -> None:
    job = queue.submit(engine, new_job()).id
    for _ in range(2):
        queue.append_event(engine, job, Event("Step 1/4: training loss=0.50", dedupe="step:1"))
        queue.append_event(engine, job, Event("no key"))
    assert messages(engine, job)[3:] == ["Step 1/4: training loss=0.50", "no key", "no key"]


def test_a_long_message_is_cut_not_refused(engine: Engine) -> None:
    job = queue.submit(engine, new_job()).id
    queue.append_event(engine, job, Event("x" * 10_000))
    assert len(messages(engine, job)[-1]) == 4000


# ------------------------------------------------------------------------------ cancel, pause, resume


@pytest.mark.parametrize("verb", sorted(queue.MOVES))
@pytest.mark.parametrize("state", ["queued", "running", "paused", "succeeded", "failed", "cancelled"])
def test_a_user_may_move_a_job_exactly_as_the_table_says(engine: Engine, verb: str, state: str) -> None:
    job = queue.submit(engine, new_job()).id
    _bring(engine, job, state)
    move = queue.MOVES[verb]
    act = getattr(queue, verb)
    before = queue.get(engine, PROJECT, job)
    if state in move.allowed:
        after = act(engine, PROJECT, job)
        assert after.state == move.to
        assert after.lease_token is None
        assert after.live_attempt == before.live_attempt, "it holds its resources until it has really stopped"
        assert (after.stopping_since is not None) == (before.live_attempt is not None)
        assert (after.finished_at is not None) == (move.to == "cancelled")
        assert messages(engine, job)[-1] == move.message
    else:
        with pytest.raises(Conflict, match=f"job {job} is {state}") as refused:
            act(engine, PROJECT, job)
        assert refused.value.code == move.code
        assert queue.get(engine, PROJECT, job) == before


def _bring(engine: Engine, job: str, state: str) -> None:
    if state == "paused":
        queue.pause(engine, PROJECT, job)
    elif state == "cancelled":
        queue.cancel(engine, PROJECT, job)
    elif state != "queued":
        lease = claimed(engine, job)
        if state == "failed":
            with writing(engine) as conn:
                queue.finish(conn, lease, "failed", error={"code": "c", "message": "m", "param": None})
        elif state == "succeeded":
            with writing(engine) as conn:
                queue.finish(conn, lease, "succeeded", adapter_id="adapter_1")


def test_a_stopping_attempt_keeps_its_job_from_starting_again(engine: Engine) -> None:
    job = queue.submit(engine, new_job()).id
    claimed(engine, job)
    queue.pause(engine, PROJECT, job)
    queue.resume(engine, PROJECT, job)
    assert queue.waiting(engine, 10) == []
    assert queue.claim(engine, job, "b", TTL) is None
    assert [live.job.id for live in queue.live(engine)] == [job]
    assert not queue.stopped(engine, job, 7), "another attempt"
    assert queue.stopped(engine, job, 1)
    assert not queue.stopped(engine, job, 1)
    assert queue.live(engine) == []
    assert claimed(engine, job).attempt == 2


# ---------------------------------------------------------------------------------------------- leases


def test_one_of_many_gets_the_job(engine: Engine) -> None:
    made = [queue.submit(engine, new_job(body)).id for body in range(5)]
    for job in made:
        leases = at_once(lambda index, job=job: queue.claim(engine, job, f"owner {index}", TTL), 6)
        winners = [lease for lease in leases if lease is not None]
        assert len(winners) == 1, leases
        assert winners[0].attempt == 1
        assert messages(engine, job).count("Fine-tuning job started") == 1


def test_a_claim_is_refused_if_the_cluster_is_fuller_than_the_decision_knew(engine: Engine) -> None:
    first, second = (queue.submit(engine, new_job(body)).id for body in range(2))
    assert queue.claim(engine, first, "a", TTL, seen=set()) is not None
    assert queue.claim(engine, second, "b", TTL, seen=set()) is None
    assert queue.claim(engine, second, "b", TTL, seen={(first, 1)}) is not None


def test_of_two_decisions_on_the_same_snapshot_one_holds(engine: Engine) -> None:
    for round in range(5):
        pair = [queue.submit(engine, new_job(f"{round}.{index}")).id for index in range(2)]
        seen = {(live.job.id, live.attempt) for live in queue.live(engine)}
        leases = at_once(
            lambda index, pair=pair, seen=seen: queue.claim(engine, pair[index], "o", TTL, seen=seen), 2
        )
        assert sum(lease is not None for lease in leases) == 1, leases


def test_an_expired_lease_is_adopted_once_under_the_same_attempt(engine: Engine) -> None:
    job = queue.submit(engine, new_job()).id
    dead = claimed(engine, job)
    assert queue.adopt(engine, "b", TTL) == [], "not yet expired"
    expire(engine, job)
    adopted = [
        lease for leases in at_once(lambda index: queue.adopt(engine, f"{index}", TTL), 5) for lease in leases
    ]
    assert [(lease.job, lease.attempt) for lease in adopted] == [(job, 1)]
    assert adopted[0].token != dead.token
    assert queue.running(engine, adopted[0]).lease_owner == adopted[0].owner


def test_a_zombie_can_do_nothing(engine: Engine) -> None:
    job = queue.submit(engine, new_job()).id
    zombie = claimed(engine, job)
    expire(engine, job)
    (heir,) = queue.adopt(engine, "b", TTL)
    before = queue.get(engine, PROJECT, job)
    assert queue.renew(engine, [zombie, heir], TTL) == {job}
    assert queue.renew(engine, [zombie], TTL) == set()
    for deed in _deeds(engine):
        with pytest.raises(LeaseLost, match=job):
            deed(zombie)
    after = queue.get(engine, PROJECT, job)
    assert (after.state, after.lease_token, after.adapter_version) == ("running", before.lease_token, None)
    assert messages(engine, job)[-1] == "Fine-tuning job started"
    for deed in _deeds(engine)[:3]:
        deed(heir)


@pytest.mark.parametrize("move", ["cancel", "pause"])
def test_after_a_cancel_or_a_pause_nothing_can_be_published(engine: Engine, move: str) -> None:
    job = queue.submit(engine, new_job()).id
    lease = claimed(engine, job)
    stopped = getattr(queue, move)(engine, PROJECT, job)
    assert queue.renew(engine, [lease], TTL) == set()
    for deed in _deeds(engine):
        with pytest.raises(LeaseLost):
            deed(lease)
    assert queue.get(engine, PROJECT, job) == stopped


def _deeds(engine: Engine) -> list[Callable[[Lease], object]]:
    """All that a lease allows."""

    def finish(state: Any, **values: Any) -> Callable[[Lease], None]:
        def do(lease: Lease) -> None:
            with writing(engine) as conn:
                queue.finish(conn, lease, state, news=[Event("over")], **values)

        return do

    return [
        lambda lease: queue.running(engine, lease),
        lambda lease: queue.reserve_version(engine, lease),
        lambda lease: queue.report(engine, lease, part=1, news=[Event("hello")], reached=[(1, "k", {})]),
        lambda lease: queue.requeue(engine, lease, "died", 0, 1),
        finish("failed", error={"code": "c", "message": "m", "param": None}),
        finish("succeeded", adapter_id="adapter_1"),
    ]


def test_a_released_lease_is_adopted_at_once(engine: Engine) -> None:
    job = queue.submit(engine, new_job()).id
    queue.release(engine, [claimed(engine, job)])
    assert [lease.job for lease in queue.adopt(engine, "b", TTL)] == [job]


def test_launched_is_known_even_when_the_lease_is_lost(engine: Engine) -> None:
    job = queue.submit(engine, new_job()).id
    lease = claimed(engine, job)
    queue.cancel(engine, PROJECT, job)
    with pytest.raises(LeaseLost):
        queue.launched(engine, lease)
    assert queue.get(engine, PROJECT, job).launched_at is not None


# ------------------------------------------------------------------------------------------- attempts


def test_a_report_is_applied_whole_and_once(engine: Engine) -> None:
    job = queue.submit(engine, new_job()).id
    lease = claimed(engine, job)
    for _ in range(2):
        queue.report(
            engine,
            lease,
            part=2,
            values={"progress": {"step": 4}, "phase": "training"},
            news=[Event("Checkpoint created at step 4", dedupe="checkpoint:4")],
            reached=[(4, "team/runs/x/1/checkpoints/step-00000004", {"train_loss": 0.5})],
        )
    row = queue.get(engine, PROJECT, job)
    assert (row.progress, row.phase, row.metrics_part) == ({"step": 4}, "training", 2)
    (checkpoint,) = queue.list_checkpoints(engine, PROJECT, job).items
    assert (checkpoint.step, checkpoint.attempt, checkpoint.metrics) == (4, 1, {"train_loss": 0.5})
    assert messages(engine, job).count("Checkpoint created at step 4") == 1
    with pytest.raises(LeaseLost):
        queue.report(engine, lease, part=1, values={"progress": {"step": 2}})


def test_a_requeued_job_waits_for_its_delay_and_keeps_its_place(engine: Engine) -> None:
    first, second = (queue.submit(engine, new_job(body)).id for body in range(2))
    lease = claimed(engine, first)
    queue.requeue(engine, lease, "its node died", 60, 1)
    row = queue.get(engine, PROJECT, first)
    assert (row.state, row.status_reason, row.failures, row.live_attempt) == (
        "queued",
        "its node died",
        1,
        None,
    )
    assert [job.id for job in queue.waiting(engine, 10)] == [second]
    assert queue.claim(engine, first, "a", TTL) is None
    with writing(engine) as conn:
        conn.execute(update(jobs).where(jobs.c.id == first).values(not_before=now() - 1))
    assert [job.id for job in queue.waiting(engine, 10)] == [first, second]
    assert claimed(engine, first).attempt == 2
    assert messages(engine, first)[-3:] == ["Fine-tuning job started", "its node died", "Attempt 2 started"]


def test_progress_is_a_checkpoint_that_no_attempt_had_before(engine: Engine) -> None:
    job = queue.submit(engine, new_job()).id
    first = claimed(engine, job)
    assert not queue.made_progress(engine, job, 1)
    queue.report(engine, first, reached=[(10, "a", {})])
    assert queue.made_progress(engine, job, 1)
    queue.requeue(engine, first, "died", 0, 1)
    second = claimed(engine, job)
    queue.report(engine, second, reached=[(10, "b", {})])
    assert not queue.made_progress(engine, job, 2), "it made again what was there"
    assert queue.list_checkpoints(engine, PROJECT, job).items[0].key == "b"
    queue.report(engine, second, reached=[(20, "c", {})])
    assert queue.made_progress(engine, job, 2)


def test_the_head_of_the_queue_is_by_priority_then_age(engine: Engine) -> None:
    made = [queue.submit(engine, new_job(n, priority=p)) for n, p in enumerate([50, 0, 100, 50, 100])]
    expected = [made[2], made[4], made[0], made[3], made[1]]
    assert [job.id for job in queue.waiting(engine, 10)] == [job.id for job in expected]
    assert [queue.position(engine, job) for job in expected] == [1, 2, 3, 4, 5]
    assert [job.id for job in queue.waiting(engine, 2)] == [job.id for job in expected[:2]]
    claimed(engine, made[2].id)
    assert queue.position(engine, queue.get(engine, PROJECT, made[2].id)) is None


def test_versions_are_never_given_twice(engine: Engine) -> None:
    leases = [claimed(engine, queue.submit(engine, new_job(body)).id) for body in range(6)]
    other = claimed(engine, queue.submit(engine, new_job("other", name="other")).id)
    given = at_once(lambda index: queue.reserve_version(engine, leases[index]), 6)
    assert sorted(given) == [1, 2, 3, 4, 5, 6]
    assert [queue.reserve_version(engine, lease) for lease in leases] == given, "and stay"
    assert queue.reserve_version(engine, other) == 1


def test_reasons_reach_only_jobs_that_wait(engine: Engine) -> None:
    waits, runs = (queue.submit(engine, new_job(body)).id for body in range(2))
    claimed(engine, runs)
    queue.explain(engine, {waits: "no room", runs: "no room"})
    assert queue.get(engine, PROJECT, waits).status_reason == "no room"
    assert queue.get(engine, PROJECT, runs).status_reason is None


# --------------------------------------------------------------------------------- all moves together


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    moves=st.lists(
        st.sampled_from(
            [
                "claim",
                "expire",
                "adopt",
                "report",
                "requeue",
                "finish",
                "cancel",
                "pause",
                "resume",
                "stopped",
            ]
        ),
        max_size=25,
    )
)
def test_no_order_of_moves_breaks_the_rules(engine: Engine, moves: list[str]) -> None:
    """Attempts count up by one, only the newest lease works, an end is the end. (What a row may be at all,
    the table checks by itself.)"""
    job = queue.submit(engine, new_job(random.random())).id
    leases: list[Lease] = []
    row = queue.get(engine, PROJECT, job)
    for move in moves:
        before, worked = row, True
        try:
            _play(engine, job, move, leases)
        except (LeaseLost, Conflict):
            worked = False
        row = queue.get(engine, PROJECT, job)
        assert row.attempt - before.attempt in ((0, 1) if move == "claim" else (0,))
        if before.state in ("succeeded", "failed", "cancelled"):
            assert row.state == before.state
        if move in ("report", "requeue", "finish"):
            assert worked == (
                before.state == "running" and before.lease_token == leases[-1].token if leases else False
            )
        if not worked:
            assert row == before


def _play(engine: Engine, job: str, move: str, leases: list[Lease]) -> None:
    if move == "claim":
        lease = queue.claim(engine, job, "o", TTL)
        leases += [lease] if lease else []
    elif move == "expire":
        expire_if_running(engine, job)
    elif move == "adopt":
        leases += [lease for lease in queue.adopt(engine, "o", TTL) if lease.job == job]
    elif move == "stopped":
        queue.stopped(engine, job, queue.get(engine, PROJECT, job).attempt)
    elif move in ("cancel", "pause", "resume"):
        getattr(queue, move)(engine, PROJECT, job)
    elif not leases:
        raise Conflict("nobody holds it")
    elif move == "report":
        queue.report(engine, leases[-1], news=[Event("hello")])
    elif move == "requeue":
        queue.requeue(engine, leases[-1], "died", 0, 1)
    else:
        with writing(engine) as conn:
            queue.finish(conn, leases[-1], "succeeded", adapter_id=f"adapter_{job}")


def expire_if_running(engine: Engine, job: str) -> None:
    with writing(engine) as conn:
        running = (jobs.c.id == job) & (jobs.c.state == "running")
        conn.execute(update(jobs).where(running).values(lease_expires_at=now() - 1))


# ---------------------------------------------------------------------------------------- query plans


@pytest.fixture
def many(engine: Engine) -> Engine:
    """4,000 ended jobs, 1,000 waiting, 5 running, a tenth of them in our project: a plan that reads all
    of them is the worse one."""
    add_project(engine, "other", "Other")
    template = queue.submit(engine, new_job())
    with writing(engine) as conn:
        values = dict(conn.execute(select(jobs)).one()._mapping) | {"seq": None}
        del values["seq"]
        rows = []
        for number in range(5000):
            row = values | {
                "id": f"ftjob-{number:024d}",
                "body_hash": f"{number:064d}",
                "priority": number % 100,
            }
            if number % 10:
                row |= {"project_id": "other"}
            if number < 4000:
                row |= {"state": "cancelled", "finished_at": 1.0}
            rows.append(row)
        conn.execute(jobs.insert(), rows)
        conn.execute(
            job_events.insert(),
            [
                {
                    "id": f"ftevent-{n}",
                    "job_id": f"ftjob-{n % 5000:024d}",
                    "created_at": 0.0,
                    "level": "info",
                    "type": "message",
                    "message": "m",
                }
                for n in range(10_000)
            ],
        )
    for number in range(5):
        claimed(engine, f"ftjob-{4999 - number:024d}")
    assert template.id
    with engine.connect() as conn:
        conn.execute(text("ANALYZE"))
        conn.commit()
    return engine


def test_hot_queries_use_their_indexes(many: Engine) -> None:
    page = (
        select(jobs)
        .where(jobs.c.project_id == PROJECT, jobs.c.seq < 4000)
        .order_by(jobs.c.seq.desc())
        .limit(21)
    )
    told = (
        select(job_events)
        .where(job_events.c.job_id == f"ftjob-{7:024d}")
        .order_by(job_events.c.seq.desc())
        .limit(21)
    )
    same = (
        select(jobs.c.id)
        .where(jobs.c.project_id == PROJECT, jobs.c.body_hash == f"{7:064d}")
        .order_by(jobs.c.seq.desc())
        .limit(1)
    )
    for query, index in [
        (queue.waiting_query(64), "ix_jobs_waiting"),
        (queue.live_query(), "ix_jobs_live"),
        (queue.expired_query(100), "ix_jobs_lease"),
        (page, "ix_jobs_page"),
        (told, "ix_job_events_page"),
        (same, "ix_jobs_body"),
    ]:
        shown = explained(many, query)
        assert index in shown, shown
        assert "TEMP B-TREE FOR ORDER BY" not in shown, shown


def explained(engine: Engine, query: Select[Any]) -> str:
    dialect = postgresql.dialect() if engine.dialect.name == "postgresql" else sqlite.dialect()
    statement = str(query.compile(dialect=dialect, compile_kwargs={"literal_binds": True}))
    explain = "EXPLAIN" if engine.dialect.name == "postgresql" else "EXPLAIN QUERY PLAN"
    with reading(engine) as conn:
        return "\n".join(
            str(tuple(row)) for row in conn.exec_driver_sql(f"{explain} {statement.replace('%', '%%')}")
        )
