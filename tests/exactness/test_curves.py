"""Whatever computes it, it is the same run: design §7.1, 2, 4, 5, and the same bytes again.

What a trial must give is what torch alone gives in this process with whole batches (`Trial.plain`). The sets
of rank processes (`ranks`) work beside it.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from peft_service.store import FileStore
from tests.exactness.live import HALF, STEPS, Live, prepare
from tests.exactness.ranks import FAILED, Sets, apart, differing
from tests.exactness.trials import AGAIN, ALL, KINDS, RESUMED, SLICE, TRIALS, TWINS, Trial

TIMEOUT_SECONDS = 4000 if ALL else 400
pytestmark = pytest.mark.timeout(TIMEOUT_SECONDS + 60)  # the first test waits for all processes

ATOL = {"fp32": 1e-4, "bf16": 5e-2}
"""Of a loss, and of a trained parameter; a gradient's norm may differ by ten times that share of it. In
float32 only the order of sums differs. bf16 has three digits, and is compared with float32."""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """(directory, the sets of rank processes); they are at work."""
    directory = tmp_path_factory.mktemp("exactness")
    prepare(directory, TRIALS)
    with Sets(directory) as sets:
        yield directory, sets


@pytest.fixture(scope="module")
def plain(work):
    """Of a trial's `plain` one: (what came out, trained parameters, state); all are made while the ranks are
    at work."""
    torch.set_num_threads(1)
    made = {}
    for trial in TRIALS:
        if trial.plain.id not in made:
            try:
                made[trial.plain.id] = alone(trial.plain, work[0])
            except Exception as error:
                made[trial.plain.id] = error  # of this trial; the others' tests go on
                FileStore((work[0] / "local").as_uri()).put(f"{FAILED}/{trial.plain.id}", b"")

    def of(trial):
        found = made[trial.plain.id]
        if isinstance(found, Exception):
            raise found
        return found

    return of


def alone(trial, work):
    live = Live(trial, work, FileStore((work / "local").as_uri()))
    start = live.engine.trainable()
    told = live.fit(save=True)
    told.sha256 = live.artifact(work / "local" / "artifacts" / trial.id)
    trained, state = live.engine.trainable(), live.engine.state()
    assert live.moved() == []
    assert apart(start, trained) > 20 * ATOL["fp32"], f"{trial.id}: nothing is learnt"
    told.diverged = live.poisoned()
    return told, trained, state


@pytest.fixture(scope="module")
def results(work, plain):
    """(set, trial) -> what came out there."""
    directory, sets = work
    sets.finish(TIMEOUT_SECONDS)

    def of(trial, name=""):
        path = directory / (name or f"w{trial.world}") / f"{trial.id}.json"
        logs = "\n".join(log.read_text()[-2000:] for log in sorted(path.parent.glob("log-*")))
        assert path.exists(), logs
        told = json.loads(path.read_text())
        assert "failed" not in told, told["failed"]
        return told, load_file(path.with_suffix(".safetensors"))

    return of


def every(trials):
    return pytest.mark.parametrize("trial", trials, ids=lambda trial: trial.id)


def close(told, wanted, precision):
    """The curves of two runs, or of the same number of last steps."""
    atol = ATOL[precision]
    count = len(told["loss"])
    assert told["loss"] == pytest.approx(wanted.loss[-count:], rel=0, abs=atol)
    assert told["norm"] == pytest.approx(wanted.norm[-count:], rel=atol * 10)
    assert told["valid"] == pytest.approx(wanted.valid[-len(told["valid"]) :], rel=0, abs=atol)


@every(TRIALS)
def test_the_curve_and_the_adapter_are_those_of_torch_alone(results, plain, trial):
    told, trained = results(trial)
    wanted, theirs, _ = plain(trial)
    assert len(told["loss"]) == STEPS
    if trial.precision == "bf16" and trial.objective.generates:
        assert all(map(torch.isfinite, map(torch.tensor, told["loss"])))  # other answers: nothing to compare
        return
    close(told, wanted, trial.precision)
    assert apart(trained, theirs) < ATOL[trial.precision]
    if trial.precision == "fp32":
        # Against a reference, the first step is a tie: it is rounding that says which answer is better.
        first = int(trial.objective.needs_reference)
        assert told["further"][first:] == [pytest.approx(line, rel=1e-6) for line in wanted.further[first:]]
        assert told["further"][0]["tokens"] == wanted.further[0]["tokens"]
        assert {**told["progress"], "metrics": 0, "best": 0} == {**wanted.progress, "metrics": 0, "best": 0}


@every(TRIALS)
def test_only_what_the_method_says_has_moved(results, trial):
    assert results(trial)[0]["moved"] == []


def named(found):
    """What an error of a poisoned row must say."""
    assert found["error"] == "Diverged", found
    assert found["details"]["step"] == 2
    assert found["line"] in found["details"]["lines"]
    assert "step 2: the loss is nan, in rows from line" in found["message"]
    assert f"{found['line']}" in found["message"]
    assert found["moved"] == []


@every(TRIALS)
def test_a_loss_that_is_no_number_never_reaches_the_weights(results, trial):
    found = results(trial)[0]["diverged"]
    named(found)
    if trial.microbatch == 1 and not trial.packing and not trial.objective.generates:
        assert found["details"]["lines"] == [found["line"]]


@pytest.mark.parametrize("kind", KINDS)
def test_nor_does_it_in_one_process(plain, kind):
    named(plain(Trial(KINDS[kind]))[0].diverged)


@every(RESUMED)
def test_a_resume_is_no_interruption_bit_for_bit(results, trial):
    told = results(trial)[0]
    again = told["again"]
    assert again["differs"] == []
    assert again["loss"] == told["loss"][HALF:]
    assert again["norm"] == told["norm"][HALF:]
    assert again["further"] == told["further"][HALF:]
    assert again["progress"] == told["progress"]


@every(RESUMED)
def test_ranks_go_on_from_what_torch_alone_has_left(results, plain, trial):
    moved = results(trial)[0]["from_torch"]
    wanted, _, _ = plain(trial)
    assert len(moved["loss"]) == STEPS - HALF
    close(moved, wanted, "fp32")
    assert moved["apart"] < ATOL["fp32"]
    assert moved["progress"]["step"] == STEPS
    assert moved["progress"]["trained_tokens"] == wanted.progress["trained_tokens"]


@every(RESUMED)
def test_torch_alone_goes_on_from_what_ranks_have_left(results, plain, work, trial):
    results(trial)
    store = FileStore((work[0] / f"w{trial.world}" / "store").as_uri())
    live = Live(trial.plain, work[0], FileStore((work[0] / "local").as_uri()))
    told = live.fit(live.resume(store, trial.id, HALF))
    wanted, theirs, _ = plain(trial)
    close(vars(told), wanted, "fp32")
    assert apart(live.engine.trainable(), theirs) < ATOL["fp32"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_and_a_resume_in_one_process_are_no_interruption(plain, work, kind, monkeypatch, tmp_path):
    """Asked to stop after half of the steps; the rest in another engine."""
    monkeypatch.setattr("peft_service.train.STOP_POLL_SECONDS", 0.0)
    trial = Trial(KINDS[kind])
    wanted, _, state = plain(trial)
    store, asked = FileStore(tmp_path.as_uri()), []
    first = Live(trial, work[0], store)
    before = first.fit(save=True, stop=lambda: asked.append(1) or len(asked) == HALF)
    assert (first.saved, before.progress["step"]) == ([HALF], HALF)
    second = Live(trial, work[0], store)
    after = second.fit(second.resume(store, trial.id, HALF))
    assert before.loss + after.loss == wanted.loss
    assert before.norm + after.norm == wanted.norm
    assert before.valid + after.valid == wanted.valid
    assert after.progress == wanted.progress
    assert differing(second.engine.state(), state) == []


@every(TWINS)
def test_another_process_makes_the_same_bytes(results, plain, trial):
    told = results(trial)[0]
    wanted = plain(trial)[0]
    assert told["sha256"] == wanted.sha256
    assert told["loss"] == wanted.loss


@pytest.mark.skipif(not ALL, reason="a second set of ranks: make test-all")
@every(AGAIN)
def test_other_ranks_make_the_same_bytes(results, trial):
    (told, trained), (again, others) = results(trial), results(trial, "w2-again")
    assert told["sha256"] == again["sha256"]
    assert told["loss"] == again["loss"]
    assert differing(trained, others) == []


def test_the_slice_has_every_objective_and_both_values_of_every_option():
    assert {trial.objective.kind for trial in SLICE} == set(KINDS)
    for option, values in (
        ("packing", {True, False}),
        ("checkpointing", {True, False}),
        ("stage", {0, 1, 2, 3}),
        ("world", {1, 2}),
        ("precision", {"fp32", "bf16"}),
    ):
        assert {getattr(trial, option) for trial in SLICE} == values
