"""What holds for every tuner on every architecture: start, training, files, switching, merging."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_service.tuners.wrapper import NotMergeable, Wrapper
from tests.peft_service.tuners import bases
from tests.peft_service.tuners.cases import CASES, IDS, PAIRS

each = pytest.mark.parametrize(("case", "kind"), PAIRS, ids=IDS)


@each
def test_it_starts_as_the_base_bit_for_bit_and_its_parameters_are_float32(case, kind):
    given = bases.inputs(kind)
    before = bases.logits(bases.base(kind), given)
    model = get_peft_model(bases.base(kind), case.make()).eval()
    assert torch.equal(bases.logits(model, given), before)
    trained = [value for value in model.parameters() if value.requires_grad]
    assert trained
    assert {value.dtype for value in trained} == {torch.float32}


@each
def test_a_bfloat16_base_keeps_its_dtype_and_the_adapter_float32(case, kind):
    model = get_peft_model(bases.base(kind).to(torch.bfloat16), case.make()).eval()
    bases.stir(model)
    out = bases.logits(model, bases.inputs(kind))
    assert out.dtype == torch.bfloat16
    assert torch.isfinite(out).all()
    assert {value.dtype for value in model.parameters() if value.requires_grad} == {torch.float32}


@each
@pytest.mark.parametrize("reentrant", [True, False])
def test_it_trains_with_checkpointing_and_leaves_the_base_alone(case, kind, reentrant):
    plain, checkpointed = (get_peft_model(bases.base(kind), case.make()) for _ in range(2))
    bases.stir(plain)
    checkpointed.load_state_dict(plain.state_dict())
    frozen = {name: value.clone() for name, value in plain.named_parameters() if not value.requires_grad}
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    gradients = []
    for model in (plain, checkpointed):
        for module in model.modules():  # dropout would differ between the two
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.train()
        model.base_model.model.config.use_cache = False
        _without_functional_dropout(model)
        (bases.ready(model)(**bases.inputs(kind)).logits.float() ** 2).mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert any(gradient.abs().sum() > 0 for gradient in gradients[0].values())
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2)
    optimizer.step()
    now = dict(plain.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())


def _without_functional_dropout(model):
    for module in model.modules():
        for name in ("dropout", "activation_dropout", "attention_dropout", "dropout_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


@each
def test_it_learns(case, kind):
    model = get_peft_model(bases.base(kind), case.make())
    bases.stir(model, scale=0.03)
    torch.manual_seed(0)
    given = bases.inputs(kind)
    target = torch.randn(bases.logits(model, given).shape)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(25):
        loss = ((model(**given).logits - target) ** 2).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.97 * losses[0], losses[:: len(losses) - 1]


@each
def test_adapters_are_added_switched_disabled_deleted_and_unloaded(case, kind):
    given = bases.inputs(kind)
    raw = bases.base(kind)
    names = [name for name, _ in raw.named_modules()]
    untouched = bases.logits(raw, given)
    model = get_peft_model(raw, case.make(), adapter_name="one").eval()
    bases.stir(model, seed=1)
    one = bases.logits(model, given)
    assert not torch.allclose(one, untouched)
    model.add_adapter("two", case.make())
    assert torch.equal(bases.logits(model, given), one)  # added, not active
    model.set_adapter("two")
    assert torch.equal(bases.logits(model, given), untouched)
    bases.stir(model, seed=2)
    two = bases.logits(model, given)
    assert not torch.allclose(two, one)
    model.set_adapter("one")
    assert torch.equal(bases.logits(model, given), one)
    assert {n for n, p in model.named_parameters() if p.requires_grad and ".two" in n} == set()
    copied = copy.deepcopy(model)
    with model.disable_adapter():
        assert torch.equal(bases.logits(model, given), untouched)
    assert torch.equal(bases.logits(model, given), one)
    model.delete_adapter("one")
    assert torch.equal(bases.logits(model, given), two)
    assert torch.equal(bases.logits(copied, given), one)
    assert torch.equal(bases.logits(model.unload(), given), untouched)
    assert [name for name, _ in raw.named_modules()] == names
    assert not any(isinstance(module, Wrapper) for module in raw.modules())


@each
def test_mixed_batches_are_refused(case, kind):
    model = get_peft_model(bases.base(kind), case.make())
    with pytest.raises(ValueError, match="adapter_names"):
        model(**bases.inputs(kind), adapter_names=["default"] * 3)


@each
def test_merging_gives_the_same_logits_or_is_refused_before_anything_changes(case, kind):
    given = bases.inputs(kind)
    model = get_peft_model(bases.base(kind), case.make()).eval()
    bases.stir(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    apart = bases.logits(model, given)
    if kind not in case.merges:
        with pytest.raises(NotMergeable):
            model.merge_adapter()
        assert torch.equal(bases.logits(model, given), apart)
        with pytest.raises(NotMergeable):
            model.merge_and_unload()
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        return
    model.merge_adapter()
    torch.testing.assert_close(bases.logits(model, given), apart, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    merged = model.merge_and_unload()
    assert not any(isinstance(module, Wrapper) for module in merged.modules())
    torch.testing.assert_close(bases.logits(merged, given), apart, rtol=1e-5, atol=1e-5)


LOADER = """
import json, sys
import torch
from safetensors.torch import save_file
import peft_service.tuners
from peft import PeftModel
from tests.peft_service.tuners import bases

out = {}
for name, kind, folder in json.loads(sys.argv[1]):
    given = bases.inputs(kind)
    model = PeftModel.from_pretrained(bases.base(kind), folder).eval()
    out[name + "/peft"] = bases.logits(model, given)
    assert not any(p.requires_grad for p in model.parameters()), name
    cheap = PeftModel.from_pretrained(bases.base(kind), folder, adapter_name="b", low_cpu_mem_usage=True)
    out[name + "/low_cpu_mem_usage"] = bases.logits(cheap.eval(), given)
    native = bases.base(kind)
    native.load_adapter(folder, adapter_name="c")
    out[name + "/transformers"] = bases.logits(native.eval(), given)
save_file(out, sys.argv[2])
"""


def test_a_fresh_process_loads_them_with_peft_and_with_transformers(tmp_path):
    wanted, listed = {}, []
    for (case, kind), name in zip(PAIRS, IDS, strict=True):
        model = get_peft_model(bases.base(kind), case.make(), adapter_name="trained").eval()
        bases.stir(model)
        wanted[name] = bases.logits(model, bases.inputs(kind))
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
        folder = tmp_path / name / "trained"
        keys = load_file(folder / "adapter_model.safetensors")
        assert not any("trained" in key for key in keys)
        assert sum(value.numel() for value in keys.values()) == bases.trainable(model) or "fusion" in name
        listed.append((name, kind, str(folder)))
    done = subprocess.run(
        [sys.executable, "-c", LOADER, json.dumps(listed), str(tmp_path / "out.safetensors")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    got = load_file(tmp_path / "out.safetensors")
    assert len(got) == 3 * len(wanted)
    for key, value in got.items():
        assert torch.equal(value, wanted[key.split("/")[0]]), key


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_trainable_reload_goes_on_as_the_live_model_would(case, tmp_path):
    kind = case.kinds[0]
    model = get_peft_model(bases.base(kind), case.make())
    bases.stir(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again = PeftModel.from_pretrained(bases.base(kind), tmp_path, is_trainable=True)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_chosen_layers_only(case):
    kind = case.kinds[0]
    model = get_peft_model(bases.base(kind), case.make(layers_to_transform=[1]))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names
    assert all(".1." in name for name in names), names
