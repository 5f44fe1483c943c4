"""LongLoRA: groups that never see the future, full attention at evaluation, positions that reach further."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from peft_service import artifact, base_model, methods
from peft_service.errors import InvalidRequest
from peft_service.gate import weights_of
from peft_service.methods import Case, Material
from peft_service.methods.longlora import LongLoRA
from peft_service.tuners.longlora import grouped_attention, shifted_sparse_attention
from tests.methods import bases, checks
from tests.methods.checks import Live, Trial


def qkv(length=37, heads=4, batch=2):
    torch.manual_seed(0)
    return [torch.randn(batch, heads, length, 8, dtype=torch.float64) for _ in range(3)]


def live_of(root, task="causal_lm", **fields):
    method = LongLoRA.model_validate({"rank": 4, "alpha": 8, **fields})
    return Live(Trial(method, "llama", task), root, rate=1e-2)


def attached(root, length, seed=0, **fields):
    """On the tiny llama, whose context is 128; B is not zero."""
    model = base_model.load(checks.directory_of("llama", root), precision="fp32")
    found = LongLoRA(rank=4, alpha=8, **fields).attach(model, Case(max_seq_len=length), Material())
    torch.manual_seed(seed)
    for name, parameter in found.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return found


def tokens(length, rows=2):
    return torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("length", "group"), [(32, 8), (37, 8), (5, 8), (37, 7), (3, 8), (64, 16)])
def test_it_is_masked_attention_written_out(length, group):
    q, k, v = qkv(length)
    shift = group // 2
    found = shifted_sparse_attention(q, k, v, group, shift)
    for head in range(4):
        number = [(t + (group - shift if head >= 2 else 0)) // group for t in range(length)]
        seen = torch.tensor(
            [[j <= i and number[i] == number[j] for j in range(length)] for i in range(length)]
        )
        scores = (q[:, head] @ k[:, head].transpose(1, 2)) * 8**-0.5
        wanted = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v[:, head]
        assert float((found[:, head] - wanted).abs().max()) < 1e-12


@pytest.mark.parametrize(("length", "group"), [(32, 8), (64, 16), (24, 24)])
def test_it_is_the_papers_roll_but_for_what_that_leaks(length, group):
    """The paper's figure, group by group and head by head: half of the heads are rolled by half a group, and
    every group attends causally. There the last tokens come before the first, which is the one difference."""
    q, k, v = qkv(length)
    half = group // 2
    found = shifted_sparse_attention(q, k, v, group, half)
    leaked = 0.0
    for row in range(2):
        for head in range(4):
            shift = half if head >= 2 else 0
            rolled = [x[row, head].roll(-shift, 0) for x in (q, k, v)]
            out = torch.zeros(length, 8, dtype=torch.float64)
            for start in range(0, length, group):
                for i in range(start, start + group):
                    scores = torch.stack([rolled[0][i] @ rolled[1][j] / 8**0.5 for j in range(start, i + 1)])
                    for j, weight in enumerate(scores.softmax(0)):
                        out[i] += weight * rolled[2][start + j]
            gap = (out.roll(shift, 0) - found[row, head]).abs().amax(1)
            assert float(gap[shift:].max()) < 1e-12
            leaked = max(leaked, float(gap[:shift].max()) if shift else 0.0)
    assert leaked > 1e-2


def test_one_group_without_a_shift_is_full_attention():
    q, k, v = qkv()
    full = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    for group in (37, 64):
        assert float((shifted_sparse_attention(q, k, v, group, 0) - full).abs().max()) < 1e-12
    assert float((shifted_sparse_attention(q, k, v, 36, 0) - full).abs().max()) > 1e-3


def test_keys_that_are_padding_are_not_seen_and_nothing_is_nan():
    q, k, v = qkv(21)
    real = torch.ones(2, 21, dtype=torch.bool)
    real[0, :6] = False
    real[1, 17:] = False
    k.requires_grad_()
    one = shifted_sparse_attention(q, k, v, 8, 4, real)
    other_k, other_v = k.detach().clone(), v.clone()
    other_k[~real[:, None].expand(2, 4, 21)] = 50.0
    other_v[~real[:, None].expand(2, 4, 21)] = -70.0
    two = shifted_sparse_attention(q, other_k, other_v, 8, 4, real)
    at = real[:, None].expand(2, 4, 21)
    assert float((one[at] - two[at]).detach().abs().max()) < 1e-12
    one[at].sum().backward()
    assert bool(torch.isfinite(k.grad).all())
    assert float(k.grad[~at].abs().max()) == 0
    assert float((grouped_attention(q, k, v, 8) - grouped_attention(q, k, v, 8, real))[at].abs().max()) > 1e-3


@pytest.mark.parametrize("place", [0, 5, 8, 13, 20, 29])
def test_a_token_changes_no_output_before_it_while_it_trains(root, place):
    found = attached(root, 32)
    model = found.model.train()
    one, two = tokens(30), tokens(30)
    two[:, place] = (two[:, place] + 7) % 290 + 3
    with torch.no_grad():
        gap = (model(input_ids=one).logits - model(input_ids=two).logits).abs().amax((0, 2))
    assert model.config._attn_implementation == "shifted_sparse_8"
    assert float(gap[place]) > 1e-3
    assert not gap[:place].any()


def test_it_trains_in_groups_and_answers_with_the_bases_attention(root):
    found = attached(root, 32)
    model, one = found.model, tokens(30)
    with torch.no_grad():
        sparse = model.train()(input_ids=one).logits
        full = model.eval()(input_ids=one).logits
        assert model.config._attn_implementation == "sdpa"
        again = model.train()(input_ids=one).logits
    assert torch.equal(sparse, again)
    assert float((sparse - full)[:, :4].abs().max()) < 1e-5  # in the first half group both see all
    assert float((sparse - full)[:, 8:].abs().max()) > 1e-2
    model.eval()
    plain = base_model.load(checks.directory_of("llama", root), precision="fp32")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    with torch.no_grad():
        assert float((model(input_ids=one).logits - plain(input_ids=one).logits).abs().max()) < 1e-5
        with_cache = model.generate(input_ids=one[:1], max_new_tokens=6, do_sample=False, use_cache=True)
        without = model.generate(input_ids=one[:1], max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(with_cache, without)


def test_rows_of_different_lengths_do_not_touch_each_other(root):
    model = attached(root, 32).model.train()
    one = tokens(30)
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[1, 17:] = 0
    one[1, 17:] = 2
    with torch.no_grad():
        both = model(input_ids=one, attention_mask=mask).logits
        alone = model(input_ids=one[1:, :17], attention_mask=mask[1:, :17]).logits
        whole = model(input_ids=one[:1]).logits
    assert float((both[1, :17] - alone[0]).abs().max()) < 1e-5
    assert float((both[0] - whole[0]).abs().max()) < 1e-5


def test_padding_on_the_left_is_not_seen(root):
    model = attached(root, 32).model.train()
    one, two = tokens(30), tokens(30)
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[0, :9] = 0
    two[0, :9] = 2
    with torch.no_grad():
        gap = (
            model(input_ids=one, attention_mask=mask).logits
            - model(input_ids=two, attention_mask=mask).logits
        )
    assert float(gap[mask.bool()].abs().max()) < 1e-5


def test_gradient_checkpointing_repeats_the_same_attention(root):
    grads = []
    for checkpointing in (False, True):
        model = attached(root, 32).model
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()(input_ids=tokens(30)).logits.square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.allclose(one, grads[1][name], atol=1e-6) for name, one in grads[0].items())


def test_embedding_and_every_norm_move_and_a_tied_head_stays_tied(root, tmp_path):
    live = live_of(root)
    start = {
        name: p.detach().clone() for name, p in live.attached.model.named_parameters() if p.requires_grad
    }
    for number in range(3):
        live.step(number)
    moved = [
        name
        for name, p in live.attached.model.named_parameters()
        if p.requires_grad and not torch.equal(start[name], p)
    ]
    assert sum("norm" in name for name in moved) == 2 * bases.LAYERS + 1
    assert sum("embed_tokens" in name for name in moved) == 1
    assert sum("lora_" in name for name in moved) == 2 * 4 * bases.LAYERS
    inner = live.attached.model.get_base_model()
    assert inner.lm_head.weight is inner.model.embed_tokens.weight
    directory = live.save(tmp_path / "a")
    model, _ = checks.load(live, directory)
    inner = model.get_base_model()
    assert torch.equal(inner.lm_head.weight, inner.model.embed_tokens.weight)
    trained = next(
        p for name, p in live.attached.model.named_parameters() if "embed_tokens.modules_to_save" in name
    )
    assert torch.equal(inner.lm_head.weight, trained)


def test_an_untied_head_is_left_alone(tmp_path):
    from tests.tiny import save_tiny_base

    directory = save_tiny_base(tmp_path / "base", tied=False)
    shape, case = base_model.shape_of_directory(directory), Case(max_seq_len=32)
    method = LongLoRA(rank=4, alpha=8)
    found = method.attach(base_model.load(directory, precision="fp32"), case, Material())
    names = {name: p for name, p in found.model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in names.values()) == methods.trainable(method, shape, case)
    assert not any("lm_head" in name for name in names)
    found.save({name: p.detach() for name, p in names.items()}, tmp_path / "a", ("tiny", None))
    assert sum(t.numel() for t in weights_of(tmp_path / "a").values()) == methods.stored(method, shape, case)


def test_a_longer_context_divides_the_positions_and_the_artifact_says_so(root, tmp_path):
    found = attached(root, 300)
    model = found.model.eval()
    assert model.config.rope_parameters["rope_type"] == "linear"
    assert model.config.rope_parameters["factor"] == 3.0
    assert model.config.max_position_embeddings == 384
    plain = base_model.load(checks.directory_of("llama", root), precision="fp32")
    rotary = model.get_base_model().model.rotary_emb
    assert torch.allclose(rotary.inv_freq * 3, plain.model.rotary_emb.inv_freq)
    trainable = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    found.save(trainable, tmp_path / "a", ("tiny", None))
    told = json.loads((tmp_path / "a" / "composite.json").read_text())
    assert told == {
        "format": artifact.COMPOSITE_FORMAT,
        "parts": ["part-0"],
        "rope": {"factor": 3, "context": 384},
    }
    one = tokens(280)
    with torch.no_grad():
        said = model(input_ids=one).logits
        loaded = artifact.load(plain, tmp_path / "a")
        assert float((loaded(input_ids=one).logits - said).abs().max()) < 1e-5
    # A user without our package: the same three fields, then plain peft.
    import peft
    import transformers

    config = transformers.AutoConfig.from_pretrained(checks.directory_of("llama", root))
    config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": 3.0}
    config.max_position_embeddings = 384
    base = transformers.AutoModelForCausalLM.from_pretrained(
        checks.directory_of("llama", root), config=config
    )
    plain = peft.PeftModel.from_pretrained(base, tmp_path / "a" / "part-0").eval()
    with torch.no_grad():
        assert float((plain(input_ids=one).logits - said).abs().max()) < 1e-5
        merged = plain.merge_and_unload()
        assert float((merged(input_ids=one).logits - said).abs().max()) < 1e-4
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert float((again(input_ids=one).logits - said).abs().max()) < 1e-4


def test_within_the_context_plain_peft_loads_it_and_nothing_of_the_base_has_changed(root, tmp_path):
    found = attached(root, 128)
    trainable = {name: p.detach() for name, p in found.model.named_parameters() if p.requires_grad}
    found.save(trainable, tmp_path, ("tiny", None))
    assert not (tmp_path / "composite.json").exists()
    assert found.model.config.rope_parameters["rope_type"] == "default"
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert sum("norm" in name for name in names) == 2 * bases.LAYERS + 1


def test_what_it_refuses_says_what_works(root):
    method = LongLoRA()
    with pytest.raises(InvalidRequest, match=r"does not work on opt models"):
        methods.admit(method, checks.shape_of("opt", root), Case())
    with pytest.raises(InvalidRequest, match="on encoder models"):
        methods.admit(method, checks.shape_of("bert", root), Case(task="token_classification"))
    with pytest.raises(InvalidRequest, match="on encoder-decoder models"):
        methods.admit(method, checks.shape_of("t5", root), Case(task="seq2seq_lm"))
    with pytest.raises(InvalidRequest, match=r"Leave base\.quantize out"):
        methods.admit(method, checks.shape_of("llama", root), Case(quantize="nf4"))
    with pytest.raises(InvalidRequest, match="set it to 500") as refused:
        methods.admit(LongLoRA(context=200), checks.shape_of("llama", root), Case(max_seq_len=500))
    assert refused.value.param == "adapter.context"
    model = base_model.load(checks.directory_of("llama", root), precision="fp32")
    model.config.rope_parameters = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(InvalidRequest, match="'yarn'"):
        method.attach(model, Case(max_seq_len=300), Material())
    model.config.sliding_window = 16
    with pytest.raises(InvalidRequest, match="last 16 tokens"):
        method.attach(model, Case(max_seq_len=64), Material())


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2", "Qwen3", "Gemma"])
def test_other_decoders_with_rotary_positions_train_in_groups_too(kind, tmp_path):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=300, max_position_embeddings=64, bos_token_id=0,
        eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    if kind == "Mistral":
        config.sliding_window = None
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path)
    shape, case, method = base_model.shape_of_directory(tmp_path), Case(max_seq_len=100), LongLoRA(rank=2)
    methods.admit(method, shape, case)
    found = method.attach(base_model.load(tmp_path, precision="fp32"), case, Material())
    names = [p for p in found.model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in names) == methods.trainable(method, shape, case)
    one, two = tokens(60), tokens(60)
    two[:, 40] = 5
    with torch.no_grad():
        gap = found.model.train()(input_ids=one).logits - found.model(input_ids=two).logits
    assert float(gap[:, 40:].abs().max()) > 0
    assert not gap[:, :40].any()
    assert found.model.config._attn_implementation == "shifted_sparse_25"
