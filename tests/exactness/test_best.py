"""Early stopping and the best checkpoint: `fit` against the rules in words, over sequences of evaluations.

The oracle is a plain loop over the whole sequence. Evaluations are constructed, since no real run gives ties,
plateaus and relapses on demand; all else of `fit` is real, with one parameter to train.
"""

from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from peft_service import train
from peft_service.attached import Attached
from peft_service.objectives import Objective
from peft_service.spec import Training
from peft_service.tokenised import Tokenised
from peft_service.train import Evaluation, LocalEngine, Progress, fit

EVALUATIONS, EVERY = 8, 2
STEPS = EVALUATIONS * EVERY


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))


class Square(Objective):
    """The square of a model's only parameter, for every row."""

    kind: Literal["square"] = "square"
    formats: ClassVar[tuple[str, ...]] = ()

    def targets(self, batch: Any) -> Any:
        return torch.tensor(len(batch.rows))

    def loss_sum(self, model: Any, batch: Any) -> tuple[Any, Any]:
        return model.weight**2 * len(batch.rows), torch.zeros(())


def data_of(rows):
    ids = np.arange(2 * rows, dtype=np.int32)
    return Tokenised(ids, np.ones(2 * rows, np.uint8), np.arange(0, 2 * rows + 1, 2), np.arange(rows) + 1)


def fitted(values, monkeypatch, start=None, stop_after=None, **options):
    """(Fitted, steps that were trained, steps that were saved)."""
    training = Training(
        learning_rate=1e-2, batch_size=1, n_epochs=1, eval_steps=EVERY, checkpoint_steps=5, **options
    )
    start, lines, saved = start or Progress(), [], []
    left = iter(values[start.step // EVERY :])

    def next_one(*args, **named):
        value = next(left)
        of = {"loss": Evaluation(value, 0.5, 1), "accuracy": Evaluation(0.5, value, 1)}
        return of.get(training.select_by, Evaluation(0.5, 0.5, 1))

    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", next_one)
        patch.setattr(train, "STOP_POLL_SECONDS", 0.0)
        scores = iter(values[start.step // EVERY :])
        done = fit(
            LocalEngine(Attached(One()), training),
            Square(),
            training,
            0,
            data_of(STEPS),
            data_of(1),
            microbatch=1,
            pad_id=0,
            start=start,
            log=lines.append,
            save=saved.append,
            stop_requested=lambda: asked.append(1) or len(asked) == stop_after,
            further=(lambda: {"valid_score": next(scores)}) if training.select_by == "score" else None,
        )
    return done, [line["step"] for line in lines if line["type"] == "step"], saved


def rules(values, select_by, patience, threshold):
    """(last step, step of the best, its value, evaluations since, steps that improved)."""
    best, best_step, stale, improved = None, 0, 0, []
    for number, value in enumerate(values, 1):
        gain = None if best is None else (best - value if select_by == "loss" else value - best)
        if gain is None or gain > threshold:
            best, best_step, stale = value, number * EVERY, 0
            improved.append(number * EVERY)
        else:
            stale += 1
        if patience is not None and stale == patience:
            return number * EVERY, best_step, best, stale, improved
    return len(values) * EVERY, best_step, best, stale, improved


# Quarters: sums and differences of them are exact, so that a tie is one.
VALUES = st.lists(st.integers(0, 8).map(lambda x: x / 4), min_size=EVALUATIONS, max_size=EVALUATIONS)


@given(
    values=VALUES,
    select_by=st.sampled_from(["loss", "accuracy", "score"]),
    patience=st.sampled_from([None, 1, 2, 3]),
    threshold=st.sampled_from([0.0, 0.25, 0.5]),
    keep=st.booleans(),
    stop_after=st.integers(1, STEPS),
)
@settings(deadline=None, max_examples=60)
def test_fit_does_what_the_rules_say_and_a_resume_keeps_them(
    values, select_by, patience, threshold, keep, stop_after
):
    monkeypatch = pytest.MonkeyPatch()
    options = {
        "select_by": select_by,
        "early_stopping_patience": patience,
        "early_stopping_threshold": threshold,
        "best_checkpoint": keep,
    }
    last, best_step, best, stale, improved = rules(values, select_by, patience, threshold)
    done, steps, saved = fitted(values, monkeypatch, **options)
    assert done.finished
    assert steps == list(range(1, last + 1))
    progress = done.progress
    assert (progress.step, progress.best.step, progress.best.value) == (last, best_step, best)
    assert progress.stale == stale
    due = {step for step in steps if step % 5 == 0} | {last} | (set(improved) if keep else set())
    assert [at.step for at in saved] == sorted(due)
    for at in saved:
        # What is saved knows of the evaluation at its step.
        before = rules(values[: at.step // EVERY], select_by, patience, threshold)
        assert (at.stale, at.best and at.best.step) == (before[3], before[1] or None)

    stopped, first, _ = fitted(values, monkeypatch, stop_after=stop_after, **options)
    assert stopped.finished == (stop_after >= last)
    assert stopped.progress.step == min(stop_after, last)
    resumed, second, _ = fitted(values, monkeypatch, start=stopped.progress, **options)
    assert resumed.finished
    assert first + second == steps
    assert replace(resumed.progress, metrics=None) == replace(progress, metrics=None)


def test_a_run_that_was_given_up_is_over_when_it_is_resumed(monkeypatch):
    """A worker that dies after the last step, and before the adapter is there, does not train on."""
    values = [1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    done, steps, _ = fitted(values, monkeypatch, early_stopping_patience=2)
    assert steps[-1] == 6
    again, more, saved = fitted(values, monkeypatch, start=done.progress, early_stopping_patience=2)
    assert (again.finished, more, saved, again.progress) == (True, [], [], done.progress)
