"""LoRA-drop: the layers that say most are the ones that keep their own, all others of a kind are one."""

import math

import pytest
import torch

from peft_service import base_model, methods
from peft_service.errors import InvalidRequest
from peft_service.methods import Case, Material
from peft_service.methods.lora_drop import LoRADrop
from peft_service.tuners import lora_drop
from peft_service.tuners.low_rank import down, lora_layers, up
from tests.methods import checks
from tests.methods.checks import Live, Trial

METHOD = LoRADrop(rank=4, alpha=8, sample_rows=8)


def _live(root, method=METHOD):
    return Live(Trial(method, "t5", "seq2seq_lm"), root, rate=0.01)


def test_who_keeps_its_own_is_an_argsort():
    draw = torch.Generator().manual_seed(1)
    names = [f"m.{index}.q" for index in range(9)]
    values = torch.rand(9, generator=draw)
    owners = lora_drop.owners(
        dict(zip(names, values.tolist(), strict=True)), {("q", 1, 1): names}, METHOD.kept
    )
    best = set(values.argsort(descending=True)[: math.ceil(9 / 2)].tolist())
    rest = [index for index in range(9) if index not in best]
    for index, name in enumerate(names):
        assert owners[name] == (name if index in best else names[rest[0]])


def test_importance_is_the_sum_of_squares_of_what_each_lora_says(root):
    live = _live(root)
    layers = lora_layers(live.attached.model)
    draw = torch.Generator().manual_seed(0)
    for layer in layers.values():
        with torch.no_grad():
            up(layer).weight.copy_(torch.randn(up(layer).weight.shape, generator=draw))
    rows = [live.batch([row]) for row in range(3)]
    wanted = dict.fromkeys(layers, 0.0)
    for name, layer in layers.items():
        change = 2 * up(layer).weight.detach() @ down(layer).weight.detach()

        def see(module, args, name=name, change=change):
            wanted[name] += float((args[0] @ change.T).square().sum())

        layer.base_layer.register_forward_pre_hook(see)
    found = lora_drop.measured(live.attached.model, 2.0, rows)
    assert found == pytest.approx(wanted, rel=1e-4)
    assert len(set(found.values())) > len(found) // 2


def test_layers_that_matter_are_found(root):
    """With the gradient of all LoRAs but those of some layers taken away, these are the ones that are
    kept."""
    live = _live(root)
    model = LoRADrop(rank=4, alpha=8).lora(
        base_model.load(live.directory, precision="fp32", task="seq2seq_lm"), Case()
    )
    planted = set()
    for names in lora_drop.kinds(model).values():
        planted |= set(names[-METHOD.kept(len(names)) :])
    for name, layer in lora_layers(model).items():
        if name not in planted:
            up(layer).weight.register_hook(torch.zeros_like)
    material = Material(
        sample=lambda count: [live.batch([row]) for row in range(count)], objective=live.objective
    )
    before = {name: value.clone() for name, value in model.named_parameters()}
    shares = lora_drop.importance(model, METHOD, material)
    owners = lora_drop.owners(shares, lora_drop.kinds(model), METHOD.kept)
    assert {name for name, owner in owners.items() if name == owner} >= planted
    for names in lora_drop.kinds(model).values():
        assert sum(shares[name] for name in names) == pytest.approx(1)
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


def test_who_shares_stays_one_and_is_written_out_for_each(root, tmp_path):
    from safetensors.torch import load_file

    live = _live(root)
    for step in range(4):
        live.step(step)
    saved = load_file(live.save(tmp_path / "artifact") / "adapter_model.safetensors")
    groups = {}
    for name, owner in live.attached.owner.items():
        groups.setdefault(owner, []).append(name)
    assert sorted(map(len, groups.values()))[-1] == 3  # of six layers called q three keep their own
    for owner, names in groups.items():
        for part in "AB":
            tensors = [saved[f"{name}.lora_{part}.weight"] for name in names]
            assert all(torch.equal(tensors[0], tensor) for tensor in tensors)
        assert up(live.attached.layers[owner]).weight.any()
    separate = {saved[f"{owner}.lora_A.weight"].sum().item() for owner in groups}
    assert len(separate) == len(groups)


def test_fewer_values_train_than_with_lora(root):
    live = _live(root)
    trained = sum(p.numel() for p in live.engine.parameters.values())
    shape = checks.shape_of("t5", root)
    assert trained == methods.trainable(METHOD, shape, live.case) < METHOD.pairs(shape)


def test_every_rank_and_attempt_takes_the_decision_that_was_stored(root):
    live = _live(root)
    names = list(live.attached.layers)
    asked = []

    def decided(name, compute):
        asked.append((name, sorted(compute())))
        return {layer: float(index) for index, layer in enumerate(names)}

    material = Material(
        sample=lambda count: [live.batch([row]) for row in range(count)],
        objective=live.objective,
        decided=decided,
    )
    model = base_model.load(live.directory, precision="fp32", task="seq2seq_lm")
    owner = METHOD.attach(model, Case(task="seq2seq_lm"), material).owner
    assert asked == [("lora_drop", sorted(names))]
    for members in lora_drop.kinds(live.attached.model).values():
        assert owner[members[-1]] == members[-1]
        if len(members) > 2:
            assert owner[members[1]] == members[0]


def test_without_rows_nothing_can_be_decided(root):
    model = base_model.load(checks.directory_of("llama", root), precision="fp32")
    with pytest.raises(InvalidRequest, match="rows"):
        METHOD.attach(model, Case(), Material())
