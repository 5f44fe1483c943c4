"""Tests of PASTA: count, special positions only, generation, refusals."""

import pytest
import torch
from peft import get_peft_model

from peft_service.tuners.pasta import PastaConfig
from tests.peft_service.tuners import bases

SPECIAL = [3, 4]


def adapted(kind, **options):
    model = get_peft_model(bases.base(kind), PastaConfig(token_ids=SPECIAL, **options)).eval()
    bases.stir(model, scale=1.0)
    return model


@pytest.mark.parametrize("kind", bases.KINDS)
def test_count_is_the_formulas(kind):
    layers = bases.LAYERS * (2 if kind in ("t5", "bart") else 1)
    for number in (1, 5):
        model = get_peft_model(bases.base(kind), PastaConfig(token_ids=SPECIAL, vectors=number))
        assert bases.trainable(model) == layers * number * bases.WIDTH


@pytest.mark.parametrize("kind", bases.KINDS)
def test_without_special_tokens_it_is_the_base_bit_for_bit(kind):
    given = bases.inputs(kind)
    assert torch.equal(bases.logits(adapted(kind), given), bases.logits(bases.base(kind), given))


@pytest.mark.parametrize("index_by", ["occurrence", "id"])
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_the_first_layers_input_changes_at_special_positions_by_their_vectors(kind, index_by):
    model = adapted(kind, index_by=index_by, vectors=2)
    given = bases.inputs(kind, length=8)
    given["input_ids"][0, [1, 3, 6]] = torch.tensor([4, 3, 4])
    given["input_ids"][1, 5] = 3
    wrapper = next(wrapper for _, wrapper in model.base_model.wrappers())
    heard = []
    handles = [
        module.register_forward_pre_hook(lambda module, args: heard.append(args[0].detach()))
        for module in (wrapper, wrapper.base_layer)
    ]
    bases.logits(model, given)
    for handle in handles:
        handle.remove()
    vectors = wrapper.pasta_parts["default"].vectors.detach()
    wanted = torch.zeros_like(heard[0])
    # By occurrence the third special token shares the last vector; by id 3 is vector 0, 4 vector 1.
    at = {
        "occurrence": {(0, 1): 0, (0, 3): 1, (0, 6): 1, (1, 5): 0},
        "id": {(0, 1): 1, (0, 3): 0, (0, 6): 1, (1, 5): 0},
    }[index_by]
    for place, number in at.items():
        wanted[place] = vectors[number]
    torch.testing.assert_close(heard[1] - heard[0], wanted, rtol=1e-5, atol=1e-5)
    untouched = (wanted == 0).all(-1)
    assert torch.equal(heard[1][untouched], heard[0][untouched])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bart"])
def test_cached_generation_is_uncached_generation(kind, beams):
    # Every id below 60 is special, so that what is generated has some too, counted across steps.
    config = PastaConfig(token_ids=list(range(60)), vectors=6)
    model = get_peft_model(bases.base(kind), config).eval()
    bases.stir(model, scale=1.0)
    given = bases.inputs(kind, length=4)
    given.pop("decoder_input_ids", None)
    made = [
        model.generate(
            **given,
            max_new_tokens=10,
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


def test_both_streams_of_an_encoder_decoder_have_their_own_ids():
    model = adapted("t5")
    given = bases.inputs("t5")
    plain = bases.logits(model, given)
    encoder = {**given, "input_ids": given["input_ids"].clone()}
    encoder["input_ids"][:, 2] = 3
    decoder = {**given, "decoder_input_ids": given["decoder_input_ids"].clone()}
    decoder["decoder_input_ids"][:, 2] = 3
    raw = bases.base("t5")
    for changed in (encoder, decoder):
        moved = bases.logits(model, changed)
        assert not torch.allclose(moved, bases.logits(raw, changed))
        assert not torch.allclose(moved, plain)
    # causal: the decoder's positions before the special token are the base's
    assert torch.equal(bases.logits(model, decoder)[:, :2], bases.logits(raw, decoder)[:, :2])


def test_embeddings_instead_of_ids_are_refused_also_after_a_pass_with_ids():
    model = adapted("llama")
    given = bases.inputs("llama")
    bases.logits(model, given)
    embeds = model.get_input_embeddings()(given["input_ids"]).detach()
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(inputs_embeds=embeds)
    bases.logits(model, given)
    with pytest.raises(ValueError, match="token ids"):
        model.base_model.model.model(inputs_embeds=embeds)  # past the outer model's hook


def test_unloading_leaves_no_hook():
    model = adapted("llama")
    raw = model.unload()
    raw(inputs_embeds=torch.randn(1, 3, bases.WIDTH))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in raw.modules())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"token_ids": []}, "at least one id"),
        ({"token_ids": [-1]}, "none negative"),
        ({"token_ids": [1], "index_by": "place"}, "index_by is"),
        ({"token_ids": [1, 2], "index_by": "id", "vectors": 1}, "vectors is"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        PastaConfig(**options)
