"""QA-LoRA: codes that never change, a merge into zero points that is exact, and the formula in float64."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from peft_service import artifact, base_model, methods
from peft_service.errors import InvalidRequest
from peft_service.methods import Case, Material
from peft_service.methods.qa_lora import QALoRA
from peft_service.tuners import qa_lora
from peft_service.tuners.qa_lora import GroupLinear, dequantised, layers_of, packed, quantise, unpacked
from tests.methods import checks
from tests.methods.checks import Live, Trial


def live_of(root, base="llama", task="causal_lm", **fields):
    method = QALoRA(rank=4, alpha=8, **{"group": 8, **fields})
    return Live(Trial(method, base, task), root, rate=1e-2)


def trained(root, steps=3, **fields):
    live = live_of(root, **fields)
    for number in range(steps):
        live.step(number)
    return live


def layer(d_out=24, d_in=48, group=8, bits=4, rank=3, scaling=1.7):
    """A layer in float64 with A and B far from zero, and what it was made of."""
    torch.manual_seed(0)
    weight = torch.randn(d_out, d_in, dtype=torch.float64)
    codes, scale, zero = quantise(weight, group, bits)
    a = torch.randn(rank, d_in // group, dtype=torch.float64)
    b = torch.randn(d_out, rank, dtype=torch.float64)
    made = GroupLinear(packed(codes, bits), scale, zero, bits, d_in, None, scaling, (a, b))
    return made, weight, (codes, scale, zero, a, b)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_a_layer_is_the_formula_of_the_paper_written_out(bits):
    made, _, (codes, scale, zero, a, b) = layer(bits=bits, group=8)
    x = torch.randn(5, 48, dtype=torch.float64)
    wanted = torch.zeros(5, 24, dtype=torch.float64)
    for row in range(5):
        pool = [sum(x[row, g * 8 + k] for k in range(8)) for g in range(6)]
        inner = [sum(a[r, g] * pool[g] for g in range(6)) for r in range(3)]
        for out in range(24):
            w = sum(
                scale[out, i // 8] * (float(codes[out, i]) - zero[out, i // 8]) * x[row, i] for i in range(48)
            )
            wanted[row, out] = w + 1.7 * sum(b[out, r] * inner[r] for r in range(3))
    assert float((made(x) - wanted).detach().abs().max()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_merge_moves_zero_points_only_and_is_exact(dtype):
    made, weight, (_, _, _, a, b) = layer()
    if dtype == torch.float32:
        codes, scale, zero = quantise(weight.float(), 8, 4)
        made = GroupLinear(packed(codes, 4), scale, zero, 4, 48, None, 1.7, (a.float(), b.float()))
    x = torch.randn(7, 48, dtype=dtype)
    before, codes, scale, zero = made(x), made.codes.clone(), made.scale.clone(), made.zero.clone()
    made.merge()
    assert made.lora_A is None
    assert made.lora_B is None
    assert made.codes.numpy().tobytes() == codes.numpy().tobytes()
    assert torch.equal(made.scale, scale)
    assert not torch.allclose(made.zero, zero)
    worst = float(((made(x) - before).abs() / before.abs().max()).max())
    assert worst < (1e-12 if dtype == torch.float64 else 1e-5)
    moved = made.zero.clone()
    made.merge()
    assert torch.equal(made.zero, moved)


def test_a_merged_zero_point_is_the_formula_value_by_value():
    made, _, (_, scale, zero, a, b) = layer()
    made.merge()
    for out in range(24):
        for g in range(6):
            moved = sum(float(b[out, r]) * float(a[r, g]) for r in range(3))
            wanted = float(zero[out, g]) - 1.7 * moved / float(scale[out, g])
            assert float(made.zero[out, g]) == pytest.approx(wanted, rel=1e-12)


def test_gradients_are_those_of_the_formula():
    made, _, (codes, scale, zero, a, b) = layer()
    x = torch.randn(7, 48, dtype=torch.float64, requires_grad=True)
    y = made(x)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    x2, a2, b2 = (t.detach().clone().requires_grad_() for t in (x, a, b))
    w = (scale[..., None] * (codes.double().view(24, 6, 8) - zero[..., None])).flatten(1)
    pool = functional.avg_pool1d(x2[:, None], 8)[:, 0] * 8  # the authors' pooling layer
    ((x2 @ w.T + 1.7 * pool @ a2.T @ b2.T) * weights).sum().backward()
    for ours, wanted in ((x.grad, x2.grad), (made.lora_A.grad, a2.grad), (made.lora_B.grad, b2.grad)):
        assert float((ours - wanted).abs().max()) < 1e-11


@pytest.mark.parametrize("bits", range(2, 9))
def test_no_weight_is_further_than_half_a_code_from_the_base(bits):
    weight = torch.randn(12, 40, dtype=torch.float64)
    weight[3, :8] = 0.25  # a group of one value
    codes, scale, zero = quantise(weight, 8, bits)
    assert int(codes.max()) <= 2**bits - 1
    assert torch.equal(unpacked(packed(codes, bits), bits, 40), codes)
    again = dequantised(packed(codes, bits), scale, zero, bits, 40, torch.float64)
    gap = (again - weight).abs().view(12, 5, 8)
    assert bool((gap <= scale[..., None] / 2 + 1e-12).all())
    assert torch.equal(again[3, :8], weight[3, :8])
    assert packed(codes, 4 if bits <= 4 else 8).shape[1] == (20 if bits <= 4 else 40)


def test_rows_that_do_not_fill_their_last_byte():
    codes = torch.randint(0, 16, (5, 7), dtype=torch.uint8)
    assert packed(codes, 4).shape == (5, 4)
    assert torch.equal(unpacked(packed(codes, 4), 4, 7), codes)


def test_groups_of_one_are_lora_on_the_dequantised_base():
    made, _, (_, _, _, a, b) = layer(group=1, d_in=16)
    from peft import LoraConfig, get_peft_model

    plain = torch.nn.Sequential(torch.nn.Linear(16, 24, bias=False, dtype=torch.float64))
    plain[0].weight.data = made.weight.clone()
    model = get_peft_model(
        plain, LoraConfig(r=3, lora_alpha=6, target_modules=["0"]), autocast_adapter_dtype=False
    )
    lora = model.base_model.model[0]
    lora.lora_A.default.weight.data, lora.lora_B.default.weight.data = a.clone(), b.clone()
    made.scaling = 2.0
    x = torch.randn(4, 16, dtype=torch.float64)
    assert float((made(x) - model(x)).abs().max()) < 1e-12


@pytest.mark.parametrize("base", ["llama", "bert", "t5"])
def test_the_first_answers_are_those_of_the_dequantised_base(base, root):
    task = "causal_lm" if base == "llama" else "sequence_classification"
    live = live_of(root, base, task)
    plain = base_model.load(live.directory, precision="fp32", task=task, labels=live.case.labels)
    plain.config.pad_token_id = 2
    found = layers_of(live.attached.model)
    linears = checks.shape_of(base, root).for_task(task).linears
    assert len(found) == len(linears)
    assert all(any(name.endswith(stored) for name in found) for stored, _, _ in linears)
    moved = 0.0
    for name, made in found.items():
        weight = plain.get_submodule(name).weight
        moved = max(moved, float((weight - made.weight).abs().max()))
        weight.data = made.weight
        assert made.lora_A.shape == (4, made.in_features // 8)
    with torch.no_grad():
        wanted = checks._answers(plain, live.probe)
    assert moved > 1e-3
    assert checks.difference(live.answers(), wanted, live.probe) < 2e-5


def test_training_and_merging_leave_every_code_as_it_was(root, tmp_path):
    live = live_of(root)
    before = {name: made.codes.numpy().tobytes() for name, made in layers_of(live.attached.model).items()}
    for number in range(4):
        live.step(number)
    live.save(tmp_path / "merged")
    tensors = load_file(tmp_path / "merged" / "qa_lora.safetensors")
    for name, made in layers_of(live.attached.model).items():
        assert made.codes.numpy().tobytes() == before[name] == tensors[f"{name}.codes"].numpy().tobytes()
        assert torch.equal(tensors[f"{name}.scale"], made.scale)
        assert not torch.equal(tensors[f"{name}.zero"], made.zero)


def test_merged_and_unmerged_artifacts_answer_alike(root, tmp_path):
    live = trained(root, merged=False)
    apart = live.save(tmp_path / "apart")
    assert json.loads((apart / "qa_lora_config.json").read_text())["merged"] is False
    values = sum(t.numel() for t in load_file(apart / "qa_lora.safetensors").values())
    shape = checks.shape_of("llama", root)
    assert values == methods.stored(live.trial.method, shape, live.case)
    qa_lora.merge(apart, tmp_path / "together")
    artifact.write_task(tmp_path / "together", "causal_lm", ())
    one, said = checks.load(live, apart)
    two, merged = checks.load(live, tmp_path / "together")
    assert any(made.lora_A is not None for made in layers_of(one).values())
    assert all(made.lora_A is None for made in layers_of(two).values())
    assert checks.difference(said, live.answers(), live.probe) < 1e-5
    assert checks.difference(said, merged, live.probe) < 1e-5
    straight = copy.deepcopy(one)
    for made in layers_of(straight).values():
        made.merge()
    with torch.no_grad():
        assert checks.difference(checks._answers(straight, live.probe), merged, live.probe) < 1e-6
    whole = trained(root, merged=True).save(tmp_path / "whole")
    written = load_file(whole / "qa_lora.safetensors")
    for name, tensor in load_file(tmp_path / "together" / "qa_lora.safetensors").items():
        assert torch.equal(tensor, written[name]), name


def test_a_bfloat16_engine_does_not_round_the_base(root):
    live = live_of(root)
    found = layers_of(live.attached.model)
    before = {name: (made.scale.clone(), made.zero.clone()) for name, made in found.items()}
    live.attached.model.bfloat16()
    for name, (scale, zero) in before.items():
        assert torch.equal(found[name].scale, scale)
        assert torch.equal(found[name].zero, zero)
    assert live.attached.model(**live.probe.inputs).logits.dtype == torch.bfloat16


def test_four_bits_are_half_a_byte_a_weight(root, tmp_path):
    tensors = load_file(trained(root, 1).save(tmp_path / "a") / "qa_lora.safetensors")
    codes = sum(t.numel() for name, t in tensors.items() if name.endswith("codes"))
    assert codes * 2 == sum(o * i for _, o, i in checks.shape_of("llama", root).linears)


def test_a_backward_pass_keeps_no_unpacked_weight():
    made, _, _ = layer(d_out=512, d_in=512)
    kept = []
    x = torch.randn(2, 512, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        made(x)
    assert max(kept) < 512 * 512 * 8 / 2


def test_what_it_refuses_says_what_works(root, tmp_path):
    shape = checks.shape_of("llama", root)
    with pytest.raises(
        InvalidRequest, match=r"group 24 does not divide the 64 inputs of .*: 1, 2, 4, 8, 16, 32"
    ) as refused:
        methods.admit(QALoRA(group=24), shape, Case())
    assert refused.value.param == "adapter.group"
    with pytest.raises(InvalidRequest, match="NF4's codebook"):
        methods.admit(QALoRA(group=8), shape, Case(quantize="nf4"))
    saved = trained(root, 1).save(tmp_path / "a")
    other = artifact.load_base(checks.directory_of("opt", root), "causal_lm", dtype=torch.float32)
    with pytest.raises(InvalidRequest, match="another base"):
        artifact.load(other, saved)


def test_the_same_seed_draws_the_same_a(root):
    one, two = (live_of(root).attached.model for _ in range(2))
    for name, made in layers_of(one).items():
        assert torch.equal(made.lora_A, layers_of(two)[name].lora_A)
        assert not made.lora_B.any()
    other = QALoRA(rank=4, alpha=8, group=8).attach(
        base_model.load(checks.directory_of("llama", root), precision="fp32"), Case(seed=1), Material()
    )
    name, made = next(iter(layers_of(one).items()))
    assert not torch.equal(made.lora_A, layers_of(other.model)[name].lora_A)
