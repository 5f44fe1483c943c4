"""Soft prompts, each against a forward pass of its own: prompt tuning, prefix, P-tuning v2 and P-tuning."""

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model

from peft_service import artifact
from peft_service.errors import InvalidRequest
from peft_service.methods.p_tuning import PTuning
from peft_service.methods.p_tuning_v2 import PTuningV2
from peft_service.methods.prefix_tuning import PrefixTuning
from peft_service.methods.prompt_tuning import PromptTuning
from peft_service.tuners.prompts import first_values, prefix_shape
from peft_service.tuners.template_prompt import Table, placed
from tests import golden
from tests.methods import bases, checks
from tests.methods.checks import Live, Trial


def _live(root, method, base="llama", task="causal_lm", **options):
    return Live(Trial(method, base, task), root, **options)


@pytest.mark.parametrize(
    ("base", "task"), [("llama", "causal_lm"), ("opt", "causal_lm"), ("t5", "seq2seq_lm")]
)
def test_a_prompt_of_real_embeddings_is_that_text_typed_in(root, base, task):
    text = "the sky is blue"
    live = _live(root, PromptTuning(virtual_tokens=6, init="text", text=text), base, task)
    known = bases.tokenizer(base)(text, add_special_tokens=False)["input_ids"]
    typed = torch.tensor((known * 6)[:6])
    model = artifact.load_base(checks.directory_of(base, root), task)
    given = dict(live.probe.inputs)
    rows, _width = given["input_ids"].shape
    given["input_ids"] = torch.cat([typed.expand(rows, 6), given["input_ids"]], 1)
    given["attention_mask"] = torch.cat([torch.ones(rows, 6, dtype=torch.long), given["attention_mask"]], 1)
    with torch.no_grad():
        expected = model.eval()(**given).logits
    said = live.answers()["logits"]
    torch.testing.assert_close(said, expected[:, -said.shape[1] :], atol=2e-5, rtol=1e-4)


def test_the_prompts_start_is_of_the_vocabulary_and_the_same_on_every_rank(root):
    one, two = (_live(root, PromptTuning(virtual_tokens=5)) for _ in range(2))
    (prompt,) = one.engine.parameters.values()
    assert torch.equal(prompt, next(iter(two.engine.parameters.values())))
    words = one.engine.model.get_input_embeddings().weight
    assert all(bool((words == row).all(1).any()) for row in prompt)
    with pytest.raises(InvalidRequest, match="belong together"):
        PromptTuning(init="text").check(checks.shape_of("llama", root), one.case)


def test_generation_with_a_prompt_is_greedy_forward_passes(root):
    live = _live(root, PromptTuning(virtual_tokens=4), rate=0.05)
    for step in range(3):
        live.step(step)
    _greedy(live)


def test_generation_with_a_template_is_greedy_forward_passes(root):
    live = _live(root, PTuning(template="{prompt:2}{text}{prompt:3}", encoder="none"), rate=0.05)
    for step in range(3):
        live.step(step)
    ids = live.probe.tokens_BT[:1, :4]
    live.engine.model.eval()
    with torch.no_grad():
        made = live.engine.model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, eos_token_id=299)[
            0
        ]
        row = ids
        for token in made:
            said = live.engine.model(input_ids=row, boundary_B=torch.tensor([4])).logits[0, -1]
            if row.shape[1] == 4:  # nothing written yet: the virtual tokens behind the prompt speak
                said = _last_virtual(live, row)
            assert int(said.argmax()) == int(token)
            row = torch.cat([row, token[None, None]], 1)


def _last_virtual(live, row):
    tuner = live.engine.model.base_model
    ids, mask, _, _ = tuner.expanded(row, None, None)
    embeds = tuner.model.get_input_embeddings()(ids)
    return tuner.model(inputs_embeds=embeds, attention_mask=mask).logits[0, -1]


def _greedy(live):
    model, ids = live.engine.model.eval(), live.probe.tokens_BT[:1, :4]
    with torch.no_grad():
        made = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, eos_token_id=299)
        row = ids
        for _ in range(5):
            row = torch.cat([row, model(input_ids=row).logits[:, -1:].argmax(-1)], 1)
    assert made[0, -5:].tolist() == row[0, -5:].tolist()


@pytest.mark.parametrize("name", ["prefix-llama", "prefix-bert"])
def test_a_prefix_is_adapterhubs(name):
    recorded = golden.load(name)
    (prefix,) = recorded.adapter.values()  # flat (P, layers, 2, kv heads, head size)
    model = recorded.base()
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = config.hidden_size // config.num_attention_heads
    count = prefix.numel() // (config.num_hidden_layers * 2 * heads * size)
    fields = prefix_shape(model)
    assert fields == {
        "num_layers": config.num_hidden_layers,
        "token_dim": heads * size,
        "num_attention_heads": heads,
    }
    task = "CAUSAL_LM" if "llama" in name else "FEATURE_EXTRACTION"
    made = get_peft_model(
        model, PrefixTuningConfig(task_type=task, num_virtual_tokens=count, **fields)
    ).eval()
    with torch.no_grad():
        made.prompt_encoder["default"].embedding.weight.copy_(prefix.reshape(count, -1))
        inputs = {key: value for key, value in recorded.inputs.items() if key != "position_ids"}
        said = golden.output_of(made, inputs)
    real = recorded.inputs["attention_mask"].bool()
    torch.testing.assert_close(said[real], recorded.output[real], atol=2e-5, rtol=1e-4)


def _prefixed(root, base, task):
    live = _live(root, PrefixTuning(virtual_tokens=4), base, task, rate=0.1)
    for step in range(3):
        live.step(step)
    live.engine.model.eval()
    return live


@pytest.mark.parametrize("base", ["llama", "opt"])
def test_a_prefix_that_is_masked_out_leaves_the_base(root, base):
    """Its keys and values are there, and nobody may look: the base's own answers at the same positions."""
    live = _prefixed(root, base, "causal_lm")
    model, batch = live.engine.model, live.probe
    rows, length = batch.tokens_BT.shape
    places = torch.arange(length).expand(rows, length)
    with torch.no_grad():
        masked = model.get_base_model()(
            input_ids=batch.tokens_BT,
            attention_mask=torch.cat([torch.zeros(rows, 4, dtype=torch.long), batch.mask_BT], 1),
            past_key_values=model.get_prompt(rows),
            position_ids=places,
        ).logits
    assert checks.difference({"logits": masked}, live.before, batch) < 2e-5
    assert checks.difference(live.answers(), live.before, batch) > 1e-3


@pytest.mark.parametrize(
    ("base", "task"), [("llama", "causal_lm"), ("opt", "causal_lm"), ("t5", "seq2seq_lm")]
)
def test_generation_with_a_prefix_is_greedy_forward_passes(root, base, task):
    live = _prefixed(root, base, task)
    if base != "t5":
        _greedy(live)
        return
    model, given = live.engine.model, live.batch([0]).inputs
    given.pop("decoder_input_ids")
    with torch.no_grad():
        made = model.generate(**given, max_new_tokens=5, do_sample=False, eos_token_id=299)
        row = torch.tensor([[model.config.decoder_start_token_id]])
        for _ in range(5):
            said = model(**given, decoder_input_ids=row).logits
            row = torch.cat([row, said[:, -1:].argmax(-1)], 1)
    assert made[0, -5:].tolist() == row[0, -5:].tolist()


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_prefix_does_not_depend_on_the_padding(root, beams):
    live = _prefixed(root, "llama", "causal_lm")
    ids = live.probe.tokens_BT[:1, :4]
    padded = torch.cat([torch.full((1, 3), 2), ids], 1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": 299, "num_beams": beams}
    with torch.no_grad():
        alone = live.engine.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        beside = live.engine.model.generate(input_ids=padded, attention_mask=mask, **options)
    assert alone[0, -5:].tolist() == beside[0, -5:].tolist()


def test_a_prefix_has_the_heads_of_the_decoder():
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=8, decoder_attention_heads=4,
        encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=50, max_position_embeddings=64,
    )  # fmt: skip
    model = BartForConditionalGeneration(config)
    fields = prefix_shape(model)
    assert fields == {"num_layers": 2, "token_dim": 32, "num_attention_heads": 4}
    made = get_peft_model(model, PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, **fields))
    ids = torch.arange(3, 9)[None]
    assert made(input_ids=ids, decoder_input_ids=ids).logits.shape == (1, 6, 50)


def test_a_reparametrised_prefix_keeps_only_what_its_mlp_makes(root, tmp_path):
    method = PrefixTuning(virtual_tokens=4, reparametrised=True, encoder_hidden=8)
    live = _live(root, method, rate=0.01)
    k, layers = 16, 2
    assert (
        method.trainable(checks.shape_of("llama", root), live.case)
        == (4 * k + (k + 1) * 8 + 9 * 2 * layers * k)
        == sum(p.numel() for p in live.engine.parameters.values())
    )
    for step in range(3):
        live.step(step)
    model, said = checks.load(live, live.save(tmp_path / "made"))
    assert isinstance(model, PeftModel)
    assert model.prompt_encoder["default"].embedding.weight.shape == (4, 2 * layers * k)
    assert checks.difference(said, live.answers(), live.probe) < 2e-5


@pytest.mark.parametrize("task", ["sequence_classification", "token_classification", "question_answering"])
def test_an_encoder_reads_every_layer_of_the_deep_prompt(root, task):
    live = _live(root, PTuningV2(virtual_tokens=3), "bert", task)
    live.before_gradient = live.objective.loss_sum(live.engine.model, live.probe)[0].backward()
    gradient = live.engine.parameters["prompt_encoder.default.embedding.weight"].grad.view(3, 4, 32)
    assert bool((gradient.abs().amax((0, 2)) > 0)[1::2].all())  # the values of both layers


@pytest.mark.parametrize("base", ["llama", "opt"])
@pytest.mark.parametrize(
    "method", [PTuningV2(virtual_tokens=4), PTuning(template="{prompt:3}{text}{prompt:2}")]
)
def test_a_decoders_class_does_not_depend_on_the_padding(root, base, method):
    live = _live(root, method, base, "sequence_classification", rate=0.05)
    live.step(0)
    before = live.answers()["logits"]
    batch = live.probe
    rows = len(batch.tokens_BT)
    batch.tokens_BT = torch.cat([torch.full((rows, 5), 2), batch.tokens_BT], 1)
    batch.mask_BT = torch.cat([torch.zeros(rows, 5, dtype=torch.long), batch.mask_BT], 1)
    torch.testing.assert_close(live.answers()["logits"], before, atol=2e-5, rtol=1e-4)


def test_prompt_tuning_of_a_decoders_class_is_refused_because_it_would(root):
    trial = Trial(PromptTuning(virtual_tokens=4), "llama", "sequence_classification")
    with pytest.raises(InvalidRequest, match="other rows of its batch"):
        trial.method.check(checks.shape_of("llama", root), checks.case_of(trial))


def test_where_virtual_tokens_stand():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]])
    source, position = placed(mask, torch.tensor([2, 2, 1]), 1, 2)
    # 4: before, 5 and 6: between
    assert source.tolist() == [[4, 0, 1, 5, 6, 2, 3], [4, 0, 1, 5, 6, 2, 3], [0, 1, 4, 2, 5, 6, 3]]
    assert position.tolist() == [[1, 2, 5, 6], [1, 2, 5, 6], [0, 1, 3, 6]]
    source, _ = placed(mask, None, 1, 2)
    assert source.tolist() == [[4, 0, 1, 2, 3, 5, 6], [4, 0, 1, 5, 6, 2, 3], [0, 1, 4, 2, 3, 5, 6]]


def test_in_front_a_template_is_prompt_tuning_and_elsewhere_it_is_not(root):
    prompt = _live(root, PromptTuning(virtual_tokens=5, init="random"))
    weight = next(iter(prompt.engine.parameters.values())).detach()
    said = []
    for template in ("{prompt:5}{text}", "{prompt:2}{text}{prompt:3}{answer}"):
        live = _live(root, PTuning(template=template, encoder="none"))
        (table,) = live.engine.parameters.values()
        with torch.no_grad():
            table.copy_(weight)
        said.append(live.answers())
    assert checks.difference(said[0], prompt.answers(), prompt.probe) < 2e-5
    assert checks.difference(said[1], prompt.answers(), prompt.probe) > 1e-3


def test_in_front_and_with_an_mlp_it_is_pefts_own_p_tuning(root):
    from peft import PromptEncoderConfig

    live = _live(root, PTuning(template="{prompt:5}{text}", encoder="mlp"))
    base = artifact.load_base(checks.directory_of("llama", root), "causal_lm")
    config = PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=5,
        encoder_reparameterization_type="MLP",
        encoder_hidden_size=32,
    )
    theirs = get_peft_model(base, config).eval()
    encoder = theirs.prompt_encoder["default"]
    mine = {name.split(".default.")[1]: p for name, p in live.engine.parameters.items()}
    mine["embedding.weight"] = mine.pop("weight")
    # peft's file has one list of layers, of which one in two is a ReLU, as here.
    mine = {name.replace("mlp.", "mlp_head."): p for name, p in mine.items()}
    encoder.load_state_dict(mine)
    with torch.no_grad():
        said = {"logits": theirs(**live.probe.inputs).logits[:, 5:]}
    assert checks.difference(live.answers(), said, live.probe) < 2e-5


def test_a_text_without_tokens_is_refused(root):
    model = artifact.load_base(checks.directory_of("llama", root), "causal_lm")
    with pytest.raises(InvalidRequest, match="no tokens of ' '") as refused:
        first_values(model, "text", 4, 0, " ", lambda text, **options: {"input_ids": []})
    assert refused.value.param == "adapter.text"


@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
def test_what_is_kept_is_what_the_encoder_makes(root, tmp_path, encoder):
    method = PTuning(template="{prompt:3}{text}{prompt:2}", encoder=encoder)
    live = _live(root, method, rate=0.01)
    trained = sum(p.numel() for p in live.engine.parameters.values())
    assert trained == method.trainable(checks.shape_of("llama", root), live.case)
    for step in range(2):
        live.step(step)
    part = next(m for m in live.engine.model.modules() if isinstance(m, Table))
    model, _ = checks.load(live, live.save(tmp_path / "made"))
    kept = next(m for m in model.modules() if isinstance(m, Table))
    assert type(kept) is Table
    torch.testing.assert_close(kept.weight, part(), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(
    "bad", ["{prompt:3}", "{text}", "{text}{answer}{prompt:3}", "{prompt:x}{text}", "hello {text}"]
)
def test_other_templates_are_refused(bad):
    with pytest.raises(ValueError, match="numbers of virtual tokens"):
        PTuning(template=bad)
