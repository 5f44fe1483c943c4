"""LT-SFT: the K weights that moved most, everything else the base's bits, and differences that add up."""

import itertools

import torch

from peft_service import artifact, delta
from peft_service.methods.full import Full
from peft_service.methods.lt_sft import LTSFT
from tests.methods.checks import Live, Trial, directory_of


def test_the_ticket_is_the_top_k_of_full_fine_tuning_and_starts_again_from_the_base(root, tmp_path):
    live = Live(Trial(LTSFT(density=0.05, embeddings=True), "llama", "causal_lm"), root, steps=6, rate=0.01)
    full = Live(Trial(Full(), "llama", "causal_lm"), root, steps=6, rate=0.01)
    base = {name: p.detach().clone() for name, p in live.engine.parameters.items()}
    for step in range(3):
        live.step(step)
        full.step(step)
    moved = {name: (p.detach() - base[name]).abs() for name, p in full.engine.parameters.items()}
    every = torch.cat([tensor.flatten() for tensor in moved.values()])
    count = round(0.05 * every.numel())
    limit = every.sort(descending=True).values[count - 1]
    for name, mask in live.attached.masks.items():
        assert bool((moved[name][mask] >= limit).all()), name
        assert bool((moved[name][~mask] <= limit).all()), name
        assert torch.equal(live.engine.parameters[name], base[name]), f"{name} was not reset"

    for step in range(3, 6):
        live.step(step)
    live.save(tmp_path / "made")
    made = delta.load(tmp_path / "made")
    assert made.values == count
    assert not made.dense
    for name, parameter in live.engine.parameters.items():
        mask = live.attached.masks[name]
        assert torch.equal(parameter[~mask], base[name][~mask]), name


def test_a_language_and_a_task_add_up_in_any_order_and_revert(root, tmp_path):
    made = []
    for number in range(2):
        live = Live(Trial(LTSFT(density=0.1), "t5", "seq2seq_lm"), root, steps=4 + 2 * number, rate=0.01)
        for step in range(4 + 2 * number):
            live.step(step)
        made.append(delta.load(live.save(tmp_path / f"{number}")))
    models = [artifact.load_base(directory_of("t5", root), "seq2seq_lm") for _ in range(2)]
    before = {name: p.detach().clone() for name, p in models[0].named_parameters()}
    one = delta.apply(models[0], made)
    delta.apply(models[1], made[::-1])
    other = dict(models[1].named_parameters())
    changed = 0
    for name, parameter in models[0].named_parameters():
        assert torch.equal(parameter, other[name]), name
        changed += int((parameter != before[name]).sum())
    assert changed > made[0].values * 0.9
    one.revert()
    for name, parameter in models[0].named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_the_head_trains_in_both_phases_and_is_saved_whole(root, tmp_path):
    live = Live(Trial(LTSFT(density=0.05), "bert", "sequence_classification"), root, steps=4, rate=0.01)
    seen = []
    for step in range(4):
        live.step(step)
        seen.append(live.engine.parameters["classifier.weight"].detach().clone())
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))
    made = delta.load(live.save(tmp_path / "made"))
    assert made.dense.keys() == {"classifier.weight", "classifier.bias"}
    assert torch.equal(made.dense["classifier.weight"], seen[-1])


def test_the_token_embedding_is_left_out_unless_it_is_asked_for(root):
    """Its unused rows have gradients that never change sign: Adam moves them as far as any."""
    masks = {}
    for embeddings in (False, True):
        method = LTSFT(density=0.02, embeddings=embeddings)
        live = Live(Trial(method, "llama", "causal_lm"), root, steps=4, rate=1e-3)
        table = live.engine.model.get_input_embeddings().weight
        assert table.requires_grad == embeddings
        live.step(0)
        live.step(1)
        masks[embeddings] = {name: int(mask.sum()) for name, mask in live.attached.masks.items()}
    assert not any("embed_tokens" in name for name in masks[False])
    (rows,) = [count for name, count in masks[True].items() if "embed_tokens" in name]
    assert rows > 0


def test_both_trainings_have_a_whole_schedule(root):
    live = Live(Trial(LTSFT(), "llama", "causal_lm"), root, steps=6)
    assert [live.attached.phase(step, 6) for step in range(6)] == [(0, 3), (1, 3), (2, 3)] * 2
