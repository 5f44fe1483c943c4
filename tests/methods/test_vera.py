"""VeRA: one pair of random matrices for all layers, which never moves and makes the file self-contained."""

import torch
from safetensors.torch import load_file

from peft_service import base_model, methods
from peft_service.methods import Case, Material
from peft_service.methods.vera import VeRA
from tests.methods import checks
from tests.methods.checks import Live, Trial


def _live(root, seed=0, **fields):
    return Live(Trial(VeRA(**{"rank": 16} | fields), "llama", "causal_lm"), root, rate=0.1)


def test_all_layers_share_projections_that_never_move(root):
    live = _live(root)
    model = live.attached.model.base_model
    layers = [module for module in model.modules() if hasattr(module, "vera_lambda_b")]
    assert len(layers) == 14
    before = {key: value.clone() for key, value in live.attached.projections().items()}
    assert before["base_model.vera_A.default"].shape == (16, 64)
    assert before["base_model.vera_B.default"].shape == (64, 16)
    for step in range(3):
        live.step(step)
    for layer in layers:
        assert layer.vera_A["default"].data_ptr() == model.vera_A["default"].data_ptr()
        assert layer.vera_B["default"].data_ptr() == model.vera_B["default"].data_ptr()
    assert all(torch.equal(before[key], value) for key, value in live.attached.projections().items())


def test_the_layer_is_the_formula(root):
    live = _live(root)
    layer = live.attached.model.base_model.model.model.layers[1].self_attn.k_proj
    with torch.no_grad():
        layer.vera_lambda_b["default"].normal_()
        layer.vera_lambda_d["default"].normal_()
    a, b = (live.attached.projections()[f"base_model.vera_{part}.default"] for part in "AB")
    x = torch.randn(5, 32)
    inner = layer.vera_lambda_d["default"] * (x @ a[:, :32].T)
    wanted = x @ layer.base_layer.weight.T + layer.vera_lambda_b["default"] * (inner @ b[:16].T)
    torch.testing.assert_close(layer(x), wanted)


def test_the_file_has_the_projections_unless_it_is_told_not_to(root, tmp_path):
    answers = {}
    for stored in (True, False):
        live = _live(root, save_projection=stored)
        for step in range(3):
            live.step(step)
        directory = live.save(tmp_path / str(stored))
        values = load_file(directory / "adapter_model.safetensors")
        assert any("vera_A" in name for name in values) == stored
        assert sum(t.numel() for t in values.values()) == methods.stored(
            live.trial.method, checks.shape_of("llama", root), Case()
        )
        model, answers[stored] = checks.load(live, directory)
        assert checks.difference(answers[stored], live.answers(), live.probe) < 1e-5
        lora = model.base_model.supports_lora_conversion()
        assert lora
    assert checks.difference(answers[True], answers[False], live.probe) == 0


def test_another_projection_seed_is_another_projection_and_another_training_seed_is_not(root):
    directory = checks.directory_of("llama", root)
    first, again, other = (
        VeRA(rank=16, projection_seed=number)
        .attach(base_model.load(directory, precision="fp32"), Case(seed=seed), Material())
        .projections()
        for number, seed in ((0, 1), (0, 2), (1, 1))
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)


def test_adapters_of_two_trainings_are_switched_on_one_base(root, tmp_path):
    """peft takes a second one only with the same projections."""
    import peft

    directory = checks.directory_of("llama", root)
    tokens = torch.arange(24).reshape(2, 12) + 5
    said = {}
    for name, seed in (("one", 1), ("two", 2)):
        attached = VeRA(rank=16).attach(
            base_model.load(directory, precision="fp32"), Case(seed=seed), Material()
        )
        values = {n: p for n, p in attached.model.named_parameters() if p.requires_grad}
        torch.manual_seed(seed)
        for value in values.values():
            value.data.normal_()
        attached.save({n: p.detach() for n, p in values.items()}, tmp_path / name, ("tiny", None))
        with torch.no_grad():
            said[name] = attached.model.eval()(input_ids=tokens).logits
    model = peft.PeftModel.from_pretrained(
        base_model.load(directory, precision="fp32"), tmp_path / "one", adapter_name="one"
    ).eval()
    model.load_adapter(tmp_path / "two", "two")
    assert float((said["one"] - said["two"]).abs().max()) > 0.1
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        with torch.no_grad():
            assert torch.equal(model(input_ids=tokens).logits, said[name])


def test_as_a_lora_of_the_same_rank_it_says_the_same(root, tmp_path):
    """b ⊙ B (d ⊙ A) has rank 16 at most, so that peft's conversion loses nothing."""
    from peft import convert_to_lora

    live = _live(root)
    for step in range(3):
        live.step(step)
    model, said = checks.load(live, live.save(tmp_path / "vera"))
    config, tensors = convert_to_lora(model, rank=16)
    base = base_model.load(live.directory, precision="fp32")
    base.config.pad_token_id = 2
    from peft import get_peft_model, set_peft_model_state_dict

    lora = get_peft_model(base, config).eval()
    assert not set_peft_model_state_dict(lora, tensors).unexpected_keys
    with torch.no_grad():
        assert checks.difference(checks._answers(lora, live.probe), said, live.probe) < 1e-4
    assert checks.difference(said, live.before, live.probe) > 1e-2
