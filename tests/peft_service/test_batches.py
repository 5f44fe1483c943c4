"""Steps and microbatches: what is computed does not depend on how many compute it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_service.batches import microbatches, order, rows_of_step, steps_of
from peft_service.objectives.sft import IGNORE, SFT
from peft_service.spec import Training
from peft_service.tokenised import Tokenised
from tests.tiny import tiny_llama

PAD = 299


def training(**options) -> Training:
    return Training(learning_rate=1e-3, **options)


def some_rows(count: int, seed: int = 0) -> Tokenised:
    """Rows of 2 to 20 tokens, each with at least one target; token 0 of row i is i, to know it again."""
    random = np.random.default_rng(seed)
    lengths = random.integers(2, 21, size=count)
    ids, masks = [], []
    for row, length in enumerate(lengths):
        ids.append(np.concatenate([[row], random.integers(3, 250, size=length - 1)]).astype(np.int32))
        mask = (random.random(length) < 0.5).astype(np.uint8)
        mask[0], mask[-1] = 0, 1
        masks.append(mask)
    return Tokenised(
        input_ids=np.concatenate(ids),
        target_mask=np.concatenate(masks),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        lines=np.arange(1, count + 1),
    )


def test_the_order_is_frozen_for_ever():
    """Runs are resumed after upgrades: if this fails, it is the code that is wrong, not the numbers."""
    assert order(8, 0, 0).tolist() == [0, 4, 6, 5, 1, 7, 2, 3]
    assert order(8, 1, 7).tolist() == [7, 4, 3, 0, 5, 6, 1, 2]


@given(rows=st.integers(1, 300), epoch=st.integers(0, 50), seed=st.integers(0, 2**31 - 1))
@settings(deadline=None)
def test_an_epoch_is_a_permutation_and_no_two_are_the_same(rows, epoch, seed):
    assert sorted(order(rows, epoch, seed).tolist()) == list(range(rows))
    if rows > 20:
        assert order(rows, epoch, seed).tolist() != order(rows, epoch + 1, seed).tolist()
        assert order(rows, epoch, seed).tolist() != order(rows, epoch, seed + 1).tolist()


@given(rows=st.integers(1, 60), batch=st.integers(1, 20), epochs=st.integers(1, 4), seed=st.integers(0, 9))
@settings(deadline=None)
def test_every_row_is_taken_once_an_epoch_and_no_step_is_empty_or_too_large(rows, batch, epochs, seed):
    plan = training(n_epochs=epochs, batch_size=batch)
    steps = [rows_of_step(step, rows, plan, seed) for step in range(steps_of(rows, plan))]
    assert all(1 <= len(step) <= batch for step in steps)
    per_epoch = len(steps) // epochs
    for epoch in range(epochs):
        taken = [row for step in steps[epoch * per_epoch : (epoch + 1) * per_epoch] for row in step]
        assert sorted(taken) == list(range(rows))
    with pytest.raises(IndexError):
        rows_of_step(len(steps), rows, plan, seed)


def test_max_steps_ends_a_run_early_and_never_prolongs_it():
    assert steps_of(10, training(n_epochs=2, batch_size=4)) == 6
    assert steps_of(10, training(n_epochs=2, batch_size=4, max_steps=5)) == 5
    assert steps_of(10, training(n_epochs=2, batch_size=4, max_steps=50)) == 6


@given(
    count=st.integers(1, 12),
    world=st.integers(1, 6),
    microbatch=st.integers(1, 5),
    seed=st.integers(0, 3),
)
@settings(deadline=None)
def test_the_ranks_together_compute_exactly_the_rows_of_the_step(count, world, microbatch, seed):
    tokenised = some_rows(20, seed)
    rows = np.random.default_rng(seed).permutation(20)[:count].tolist()
    ranks = [microbatches(tokenised, rows, rank, world, microbatch, PAD, "cpu") for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = []
    for rank, batches in enumerate(ranks):
        mine = []
        for batch in batches:
            shape = batch.tokens_BT.shape
            assert batch.labels_BT.shape == batch.mask_BT.shape == shape
            assert 1 <= shape[0] <= microbatch
            assert bool((batch.mask_BT.sum(1) > 0).all())
            assert bool(((batch.labels_BT == IGNORE) | (batch.labels_BT == batch.tokens_BT)).all())
            for tokens, labels, mask in zip(batch.tokens_BT, batch.labels_BT, batch.mask_BT, strict=True):
                if bool((labels == IGNORE).all()):
                    assert set(tokens.tolist()) == {PAD}  # a padding row
                    continue
                row = int(tokens[0])
                ids, targets = tokenised.row(row)
                length = int(mask.sum())
                assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
                assert tokens[:length].tolist() == ids.tolist()
                assert set(tokens[length:].tolist()) <= {PAD}
                assert (labels != IGNORE).tolist()[:length] == targets.astype(bool).tolist()
                assert bool((labels[length:] == IGNORE).all())
                mine.append(row)
        # Longest first, in the order of the step: what is in one microbatch needs little padding.
        ordered = sorted(rows, key=lambda row: -len(tokenised.row(row)[0]))
        assert mine == ordered[rank::world]
        seen += mine
    assert sorted(seen) == sorted(rows)


def test_loss_and_gradients_are_those_of_one_big_batch_also_with_padding_rows():
    tokenised, model, objective = some_rows(7), tiny_llama(), SFT()

    def gradients(world: int, microbatch: int) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        total = 0.0
        for rank in range(world):
            for batch in microbatches(tokenised, range(7), rank, world, microbatch, PAD, "cpu"):
                loss, _ = objective.loss_sum(model, batch)
                loss.backward()
                total += float(loss.detach())
        return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    loss, whole = gradients(1, 7)
    assert whole.isfinite().all()
    for world, microbatch in ((1, 2), (2, 2), (3, 1), (9, 4)):
        other_loss, other = gradients(world, microbatch)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(other, whole, rtol=1e-3, atol=1e-4)
