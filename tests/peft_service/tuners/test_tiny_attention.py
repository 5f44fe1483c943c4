"""Tests of the tiny-attention adapter: count, formula, what it may see, generation, experts."""

import pytest
import torch
from peft import get_peft_model

from peft_service.tuners.tiny_attention import TinyAttention, TinyAttentionConfig
from tests.peft_service.tuners import bases


def adapted(kind, seed=5, **options):
    torch.manual_seed(0)
    model = get_peft_model(bases.base(kind), TinyAttentionConfig(**options)).eval()
    bases.stir(model, seed=seed, scale=0.5)
    return model


def test_it_has_roberta_larges_172296_parameters():
    part = TinyAttention(width=1024, size=1, heads=1, experts=1, dropout=0.0, zero=True)
    assert 24 * sum(p.numel() for p in part.parameters()) == 24 * (7 * 1024 + 11) == 172296


@pytest.mark.parametrize("kind", bases.KINDS)
@pytest.mark.parametrize(("size", "experts"), [(1, 1), (4, 3)])
def test_count_is_the_formulas(kind, size, experts):
    blocks = bases.LAYERS * (2 if kind in ("t5", "bart") else 1)
    model = get_peft_model(bases.base(kind), TinyAttentionConfig(size=size, heads=1, experts=experts))
    d, a = bases.WIDTH, size
    assert bases.trainable(model) == blocks * experts * (3 * d + 4 * a * d + 4 * a * a + 7 * a)


def test_it_is_torchs_multihead_attention_between_two_linear_layers():
    width, size, heads = 12, 6, 3
    part = TinyAttention(width, size, heads, experts=1, dropout=0.0, zero=False)
    for parameter in part.parameters():
        parameter.data.normal_()
    oracle = torch.nn.MultiheadAttention(size, heads, batch_first=True)
    oracle.in_proj_weight.data, oracle.in_proj_bias.data = part.in_weight[0].data, part.in_bias[0].data
    oracle.out_proj.weight.data, oracle.out_proj.bias.data = part.out_weight[0].data, part.out_bias[0].data
    h = torch.randn(2, 5, width)
    x = torch.nn.functional.layer_norm(h, (width,), part.norm_weight[0], part.norm_bias[0])
    q, k, v = (x @ part.down_weight[0].T + part.down_bias[0]).chunk(3, dim=-1)
    blind = torch.ones(5, 5, dtype=torch.bool).triu(1)
    wanted = oracle(q, k, v, attn_mask=blind)[0] @ part.up_weight[0].T + part.up_bias[0]
    mask = torch.zeros(5, 5).masked_fill(blind, torch.finfo(torch.float32).min)[None, None]
    torch.testing.assert_close(part(h, lambda k, v: (k, v), lambda q, k: mask), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_no_position_sees_a_later_one(kind, attention):
    model = adapted(kind, size=4)
    model.base_model.model.set_attn_implementation(attention)
    given = bases.inputs(kind, length=9)
    for masked in (True, False):
        if not masked:
            given.pop("attention_mask")
        before = bases.logits(model, given)
        changed = {**given, "input_ids": given["input_ids"].clone()}
        changed["input_ids"][:, 6] = 99
        after = bases.logits(model, changed)
        assert torch.equal(after[:, :6], before[:, :6])
        assert not torch.allclose(after[:, 6:], before[:, 6:])


def test_an_encoder_sees_both_ways():
    model = adapted("bert", size=4)
    wrapper = model.base_model.model.bert.encoder.layer[0].attention
    assert not wrapper.causal()
    part = wrapper.tiny_attention_parts["default"]
    h = torch.randn(1, 5, bases.WIDTH)
    later = h.clone()
    later[:, 4] += torch.randn(bases.WIDTH)
    run = [part(x, lambda k, v: (k, v), lambda q, k: None)[:, 0] for x in (h, later)]
    assert not torch.allclose(*run)


@pytest.mark.parametrize("kind", ["bert", "llama", "t5", "bart"])
def test_padding_changes_nothing(kind):
    model = adapted(kind, size=4)
    given = bases.inputs(kind, rows=1)
    plain = bases.logits(model, given)
    left = kind == "llama"
    padding = torch.zeros(1, 3, dtype=torch.long)
    order = (lambda pad, x: (pad, x)) if left else (lambda pad, x: (x, pad))
    padded = {**given, "input_ids": torch.cat(order(padding, given["input_ids"]), 1)}
    padded["attention_mask"] = torch.cat(order(padding, given["attention_mask"]), 1)
    if kind == "llama":
        padded["position_ids"] = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    out = bases.logits(model, padded)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out[:, 3:] if left else out, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bart"])
def test_cached_generation_is_uncached_generation(kind, beams):
    model = adapted(kind, size=4)
    given = bases.inputs(kind)
    given.pop("decoder_input_ids", None)
    if kind in ("llama", "gpt2"):
        given["attention_mask"][0, :2] = 0  # left padding in one row
    made = [
        model.generate(
            **given,
            max_new_tokens=8,
            do_sample=False,
            num_beams=beams,
            use_cache=cache,
            eos_token_id=None,
            output_scores=True,
            return_dict_in_generate=True,
        )
        for cache in (True, False)
    ]
    assert torch.equal(made[0].sequences, made[1].sequences)
    for cached, uncached in zip(made[0].scores, made[1].scores, strict=True):
        torch.testing.assert_close(cached, uncached, rtol=1e-4, atol=1e-4)


def test_forward_step_by_step_with_a_bare_cache_is_one_forward():
    from transformers import DynamicCache

    model = adapted("llama", size=4)
    ids = bases.inputs("llama")["input_ids"]
    whole = model(input_ids=ids).logits
    cache = DynamicCache()  # without the configuration it grows by position
    steps = [model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for t in range(ids.shape[1])]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)


def test_experts_get_their_rows_in_training_and_their_mean_afterwards():
    width = 8
    part = TinyAttention(width, 2, 1, experts=3, dropout=0.0, zero=False)
    for parameter in part.parameters():
        parameter.data.normal_()
    h = torch.randn(7, 4, width)
    free = (lambda k, v: (k, v)), (lambda q, k: None)
    part.train()
    mixed = part(h, *free)
    alone = TinyAttention(width, 2, 1, experts=1, dropout=0.0, zero=False)
    for expert in range(3):
        for mine, theirs in zip(alone.parameters(), part.parameters(), strict=True):
            mine.data.copy_(theirs.data[expert : expert + 1])
        torch.testing.assert_close(alone(h, *free)[expert::3], mixed[expert::3])
    for mine, theirs in zip(alone.parameters(), part.parameters(), strict=True):
        mine.data.copy_(theirs.data.mean(0, keepdim=True))
    torch.testing.assert_close(part.eval()(h, *free), alone(h, *free))


def test_averaged_experts_are_the_model_in_evaluation_and_a_third_of_the_size(tmp_path):
    from peft import PeftModel

    model = adapted("bert", size=2, experts=3)
    given = bases.inputs("bert")
    before, size = bases.logits(model, given), bases.trainable(model)
    model.base_model.average_experts()
    torch.testing.assert_close(bases.logits(model, given), before, rtol=1e-6, atol=1e-6)
    assert bases.trainable(model) == size / 3
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again = PeftModel.from_pretrained(bases.base("bert"), tmp_path).eval()
    assert again.peft_config["default"].experts == 1
    assert torch.equal(bases.logits(again, given), bases.logits(model, given))


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="multiple of heads"):
        TinyAttentionConfig(size=3, heads=2)
    with pytest.raises(ValueError, match="experts is at least 1"):
        TinyAttentionConfig(experts=0)
