"""Child-tuning: masks are functions of (seed, step, parameter); D keeps all other weights bit for bit."""

import math

import pytest
import torch

from peft_service.methods.child_tuning import ChildTuning
from peft_service.tuners.in_place import bernoulli, chosen
from tests.methods.checks import Live, Trial


def _live(root, steps=6, base="llama", task="causal_lm", **fields):
    return Live(Trial(ChildTuning(**fields), base, task), root, steps=steps, rate=0.01)


def _gradients(live, step, parts=1):
    """Gradients of the same eight rows, in `parts` microbatches."""
    live.attached.before_step(step)
    for part in range(parts):
        size = 8 // parts
        nll, _ = live.objective.loss_sum(live.engine.model, live.batch(range(part * size, (part + 1) * size)))
        nll.backward()
    found = {name: p.grad.clone() for name, p in live.engine.parameters.items()}
    for parameter in live.engine.parameters.values():
        parameter.grad = None
    return found


def test_f_masks_a_share_of_the_gradients_and_scales_the_rest(root):
    whole = _gradients(_live(root, variant="f", share=1.0), 0)
    child = _gradients(_live(root, variant="f", share=0.3), 0)
    seen = kept = 0
    for name, gradient in whole.items():
        there = gradient != 0
        left = child[name] != 0
        assert not (left & ~there).any()
        torch.testing.assert_close(child[name][left], gradient[left] / 0.3, rtol=1e-4, atol=1e-6)
        seen, kept = seen + int(there.sum()), kept + int((left & there).sum())
    assert abs(kept - 0.3 * seen) < 5 * math.sqrt(seen * 0.3 * 0.7)


def test_f_is_the_same_in_every_microbatch_of_a_step_and_another_in_the_next(root):
    live = _live(root, variant="f")
    one, four, next_ = _gradients(live, 2), _gradients(live, 2, parts=4), _gradients(live, 3)
    for name in one:
        torch.testing.assert_close(one[name], four[name], rtol=1e-3, atol=1e-5)
        assert torch.equal(one[name] != 0, four[name] != 0), name
    assert not all(torch.equal(one[name] != 0, next_[name] != 0) for name in one)


def test_f_expects_the_unmasked_gradient():
    like = torch.ones(64)
    mean = sum(bernoulli(1, step, "w", 0.3, like).double() for step in range(2000)) / 2000 / 0.3
    assert float((mean - 1).abs().max()) < 5 * math.sqrt(0.7 / 0.3 / 2000)
    assert not torch.equal(bernoulli(1, 0, "w", 0.3, like), bernoulli(1, 0, "v", 0.3, like))
    assert not torch.equal(bernoulli(1, 0, "w", 0.3, like), bernoulli(2, 0, "w", 0.3, like))


def test_f_with_share_1_is_full_fine_tuning(root):
    from peft_service.methods.full import Full

    child, full = (
        _live(root, variant="f", share=1.0),
        Live(Trial(Full(), "llama", "causal_lm"), root, rate=0.01),
    )
    for step in range(3):
        child.step(step)
        full.step(step)
    for name, parameter in full.engine.parameters.items():
        assert torch.equal(parameter, child.engine.parameters[name]), name


def test_d_keeps_the_top_fisher_weights_and_leaves_every_other_bit(root):
    """The mask against a brute-force Fisher information of the same steps on an untouched base."""
    live = _live(root, steps=6, variant="d", share=0.1, fisher=0.34)
    plain = _live(root, steps=6, variant="f", share=1.0)
    fisher = {}
    original = live.attached.before_update

    def also(engine, step):
        if step < 2:
            for name, parameter in engine.parameters.items():
                fisher[name] = fisher.get(name, 0) + parameter.grad.double() ** 2
        original(engine, step)

    live.attached.before_update = also
    for step in range(2):
        live.step(step)
        for name, parameter in live.engine.parameters.items():
            assert torch.equal(parameter, plain.engine.parameters[name]), f"{name} moved early"
    every = torch.cat([fisher[name].flatten() for name in live.attached.names])
    count = round(0.1 * every.numel())
    limit = every.sort(descending=True).values[count - 1]
    for name in live.attached.names:
        clear = (fisher[name] - limit).abs() > 1e-6 * limit
        assert torch.equal((fisher[name] > limit)[clear], live.attached.masks[name][clear]), name
    assert sum(int(mask.sum()) for mask in live.attached.masks.values()) == count

    for step in range(2, 6):
        live.step(step)
    state = live.engine.state()
    assert int(state["step"]) == 4  # moments began anew
    for name, mask in live.attached.masks.items():
        now, base = live.engine.parameters[name], plain.engine.parameters[name]
        assert torch.equal(now[~mask], base[~mask]), name
        assert not state[f"exp_avg.{name}"][~mask].any()
        assert not state[f"exp_avg_sq.{name}"][~mask].any()
    moved = sum(
        int((live.engine.parameters[n][m] != plain.engine.parameters[n][m]).sum())
        for n, m in live.attached.masks.items()
    )
    assert moved > 0.95 * count


def test_chosen_is_exact_also_among_equals():
    scores = {"a": torch.tensor([[0.0, 3.0], [1.0, 1.0]]), "b": torch.tensor([1.0, 5.0, 0.0, 0.0])}
    masks = chosen(scores, 0.5)
    assert masks["a"].tolist() == [[False, True], [True, True]]
    assert masks["b"].tolist() == [False, True, False, False]
    assert sum(int(m.sum()) for m in chosen({"a": torch.zeros(10)}, 0.3).values()) == 3


@pytest.mark.parametrize(("name", "variant"), [("child_tuning_f", "f"), ("Child-Tuning-D", "d")])
def test_both_variants_have_names(name, variant):
    from peft_service import methods

    assert methods.names()[methods.spelled(name)] == ("child_tuning", {"variant": variant})
