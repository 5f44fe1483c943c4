"""ATTEMPT: the mix of every row by its formula, and nothing that a row must not depend on."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from peft_service import artifact
from peft_service.errors import InvalidRequest
from peft_service.methods import Case
from peft_service.methods.attempt import Attempt
from peft_service.tuners.attempt import AttemptConfig, Mixture, mixture_of
from peft_service.tuners.task_prompts import source_prompts
from tests.methods import checks
from tests.methods.checks import Live, Trial

SHARP = {"virtual_tokens": 5, "size": 8, "temperature": 2.0}
"""At d·e the attention of a tiny base is flat; this one is not."""


def _live(root, base="llama", task="causal_lm", count=2, steps=3, **fields):
    """Trained for some steps, in eval mode."""
    method = Attempt(**{**SHARP, "sources": ("a", "b", "c")[:count], **fields})
    live = Live(Trial(method, base, task), root, rate=0.05)
    for step in range(steps):
        live.step(step)
    live.engine.model.eval()
    return live


def _files(live):
    """The sources as their own files have them, (S, P, d)."""
    paths = checks.sources(live.trial, live.root)
    return torch.stack([load_file(path / "adapter_model.safetensors")["prompt_embeddings"] for path in paths])


def _expected(mixture, sources, words, temperature):
    """(a, P_row) of one row's embedded prompt (T, d), by the paper's formula in float64, one source at a
    time."""
    own = {name: p.detach().double() for name, p in mixture.named_parameters()}
    h = own["down.weight"] @ words.double().amax(0)
    h = own["up.weight"] @ (h / (1 + torch.exp(-h)))
    h = (h - h.mean()) / (h.var(correction=0) + 1e-5).sqrt() * own["norm.weight"] + own["norm.bias"]
    every = [*sources.double(), own["target"]]
    scores = [math.exp(float(p.amax(0) @ h) / temperature) for p in every]
    a = [score / sum(scores) for score in scores]
    return torch.tensor(a, dtype=torch.float64), own["target"] + sum(
        w * p for w, p in zip(a, every, strict=True)
    )


def test_with_weights_of_zero_the_mix_is_the_mean():
    torch.manual_seed(0)
    mixture = Mixture(3, 4, 6, 5, 0.0)
    mixture.sources.normal_()
    words, pooled = torch.randn(2, 7, 6), torch.ones(2, 7)
    spread = mixture.attention(words, pooled)
    torch.nn.init.zeros_(mixture.up.weight)
    assert (spread - 0.25).abs().max() > 1e-3
    torch.testing.assert_close(mixture.attention(words, pooled), torch.full((2, 4), 0.25))
    mean = (mixture.sources.sum(0) + mixture.target) / 4
    torch.testing.assert_close(mixture(words, pooled), (mixture.target + mean).expand(2, 4, 6))


@pytest.mark.parametrize(("count", "temperature"), [(1, 0.7), (3, 2.0), (2, None)])
@pytest.mark.parametrize(("base", "task"), [("llama", "causal_lm"), ("t5", "seq2seq_lm")])
def test_the_prompt_of_a_row_is_the_papers(root, base, task, count, temperature):
    live = _live(root, base, task, count, temperature=temperature)
    mixture, batch = mixture_of(live.engine.model), live.probe
    made = []
    mixture.register_forward_hook(lambda module, args, output: made.append((module.attention(*args), output)))
    said = live.answers()["logits"]
    ((a_BS, prompt_BPd),) = made
    fresh = artifact.load_base(live.directory, task)
    words_of = fresh.get_input_embeddings()
    boundary_B = live.attached.inputs(batch).get("boundary_B", batch.mask_BT.sum(1))
    if task == "causal_lm":
        assert bool((boundary_B < batch.mask_BT.sum(1)).all())  # the answer is not read
    for row, ids in enumerate(batch.tokens_BT):
        a, prompt = _expected(
            mixture, _files(live), words_of(ids[: boundary_B[row]]).detach(), temperature or 32 * math.e
        )
        torch.testing.assert_close(a_BS[row].double(), a, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(prompt_BPd[row].double(), prompt, atol=1e-5, rtol=1e-5)
    if temperature:
        assert a_BS.std(0).max() > 1e-3  # rows differ
    # And it stands in front of the row: the plain base, given these embeddings, says the same.
    given = {name: t for name, t in batch.inputs.items() if name not in ("input_ids", "boundary_B")}
    given["inputs_embeds"] = torch.cat([prompt_BPd, words_of(batch.tokens_BT)], 1)
    given["attention_mask"] = torch.cat([torch.ones(len(prompt_BPd), 5).long(), batch.mask_BT], 1)
    with torch.no_grad():
        plain = fresh.eval()(**given).logits[:, -said.shape[1] :]
    real = torch.ones_like(said[..., 0]).bool() if task == "seq2seq_lm" else batch.mask_BT.bool()
    torch.testing.assert_close(said[real], plain[real], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("base", "task"),
    [
        ("llama", "causal_lm"),
        ("llama", "sequence_classification"),
        ("bert", "sequence_classification"),
        ("t5", "seq2seq_lm"),
    ],
)
@pytest.mark.parametrize("left", [False, True])
def test_a_row_does_not_depend_on_its_padding(root, base, task, left):
    if left and base != "llama":
        pytest.skip("an encoder's positions count from the left")
    live = _live(root, base, task)
    batch = live.probe
    before, mask = live.answers()["logits"], batch.mask_BT.bool()
    rows = len(batch.tokens_BT)

    def wider(tensor, value):
        more = torch.full((rows, 4), value)
        return torch.cat([more, tensor] if left else [tensor, more], 1)

    # Padding is another token than the usual one: only the mask tells.
    batch.tokens_BT, batch.mask_BT = (
        wider(batch.tokens_BT, 2 if "class" in task else 7),
        wider(batch.mask_BT, 0),
    )
    if task == "causal_lm":
        batch.labels_BT = wider(batch.labels_BT, -100)
        boundary = live.attached.inputs
        if left:
            live.attached.inputs = lambda b: {"boundary_B": boundary(b)["boundary_B"] - 4}
    after = live.answers()["logits"]
    if task == "causal_lm":
        before, after = before[mask], (after[:, 4:] if left else after[:, :-4])[mask]
    torch.testing.assert_close(after, before, atol=2e-5, rtol=1e-4)


def test_what_follows_the_prompt_does_not_change_the_mix(root):
    live = _live(root)
    batch = live.probe
    boundary_B = live.attached.inputs(batch)["boundary_B"]
    made = []
    mixture_of(live.engine.model).register_forward_hook(lambda module, args, output: made.append(output))
    live.answers()
    places = torch.arange(batch.tokens_BT.shape[1])
    answer = (places >= boundary_B[:, None]) & batch.mask_BT.bool()
    batch.tokens_BT = torch.where(answer, (batch.tokens_BT + 31) % 290, batch.tokens_BT)
    live.answers()
    assert torch.equal(*made)
    batch.tokens_BT = torch.where(~answer, (batch.tokens_BT + 31) % 290, batch.tokens_BT)
    live.answers()
    assert not torch.equal(made[0], made[2])


def test_sources_stay_and_are_in_the_artifact(root, tmp_path):
    live = _live(root, steps=0)
    files, mixture = _files(live), mixture_of(live.engine.model)
    assert torch.equal(mixture.sources, files)
    before = {name: p.detach().clone() for name, p in mixture.named_parameters()}
    assert before.keys() == {"target", "down.weight", "up.weight", "norm.weight", "norm.bias"}
    for step in range(3):
        live.step(step)
    assert torch.equal(mixture.sources, files)
    assert not [name for name, p in mixture.named_parameters() if torch.equal(p, before[name])]
    live.engine.model.bfloat16()  # as an engine in bf16 does to buffers
    live.attached.save(
        {name: p.detach().float() for name, p in live.engine.model.named_parameters() if p.requires_grad},
        tmp_path / "made",
        ("tiny/base", None),
    )
    stored = load_file(tmp_path / "made" / "adapter_model.safetensors")
    (kept,) = (tensor for name, tensor in stored.items() if name.endswith(".sources"))
    assert torch.equal(kept, files)
    told = json.loads((tmp_path / "made" / "adapter_config.json").read_text())
    assert told["peft_type"] == "ATTEMPT"
    assert str(root) not in json.dumps(told)
    fresh = artifact.load(artifact.load_base(live.directory, "causal_lm"), tmp_path / "made")
    assert torch.equal(mixture_of(fresh).sources, files)
    assert torch.isnan(Mixture(2, 5, 32, 8, 0.0).sources).all()  # what is not loaded is seen


def test_the_attention_learns_at_its_own_rate(root):
    live = _live(root, steps=0, attention_rate=0.25)
    slow = {name for name in live.engine.parameters if live.attached.ratio(name) == 0.25}
    assert {name.partition("default.")[2] for name in slow} == {
        "down.weight", "up.weight", "norm.weight", "norm.bias",
    }  # fmt: skip
    assert all(live.attached.ratio(name) == 1 for name in live.engine.parameters.keys() - slow)


@pytest.mark.parametrize("base", ["llama", "opt"])
def test_generation_is_greedy_forward_passes(root, base):
    live = _live(root, base)
    model, prompts = live.engine.model, live.probe.tokens_BT[:2, :4]
    with torch.no_grad():
        made = model.generate(input_ids=prompts, max_new_tokens=5, do_sample=False, eos_token_id=299)
        row = prompts
        for _ in range(5):
            said = model(input_ids=row, boundary_B=torch.tensor([4, 4])).logits[:, -1:]
            row = torch.cat([row, said.argmax(-1)], 1)
        alone = model(input_ids=row).logits[:, -1:]
    assert made.tolist() == row[:, 4:].tolist()
    assert not torch.equal(alone, said)
    # Rows of other lengths beside it, padded on the left as for generation, change nothing.
    padded = torch.cat([torch.full((1, 3), 2), prompts[:1]], 1)
    other = live.probe.tokens_BT[1:2, :4].repeat(1, 2)[:, :7]
    mask = torch.tensor([[0] * 3 + [1] * 4, [1] * 7])
    with torch.no_grad():
        beside = model.generate(
            input_ids=torch.cat([padded, other]), attention_mask=mask, max_new_tokens=5, do_sample=False,
            eos_token_id=299,
        )  # fmt: skip
    assert beside[0].tolist() == made[0].tolist()


@pytest.mark.parametrize("base", ["t5", "bart"])
def test_an_encoder_decoder_generates_what_its_forward_passes_say(root, base):
    live = _live(root, base, "seq2seq_lm")
    model, batch = live.engine.model, live.probe
    start = model.config.decoder_start_token_id
    with torch.no_grad():
        made = model.generate(
            input_ids=batch.tokens_BT, attention_mask=batch.mask_BT, max_new_tokens=5, do_sample=False,
            eos_token_id=299,
        )  # fmt: skip
        row = torch.full((len(batch.tokens_BT), 1), start)
        for _ in range(5):
            said = model(input_ids=batch.tokens_BT, attention_mask=batch.mask_BT, decoder_input_ids=row)
            row = torch.cat([row, said.logits[:, -1:].argmax(-1)], 1)
    assert made.tolist() == row.tolist()


def test_the_papers_count_on_t5_base():
    """Table 1: 232K with 100 virtual tokens and r of 100."""
    from peft_service.base_model import ModelShape

    shape = ModelShape.model_construct(hidden=768)
    method = Attempt(sources=("a",) * 6, virtual_tokens=100)
    assert method.trainable(shape, Case()) == 231_936
    assert method.stored(shape, Case()) == 231_936 + 6 * 100 * 768


def test_what_does_not_fit_is_refused(root):
    prompts = checks.sources(_live(root).trial, root)
    assert source_prompts(prompts, 5, 32).shape == (2, 5, 32)
    with pytest.raises(InvalidRequest, match="set virtual_tokens to 5"):
        source_prompts(prompts, 7, 32)
    with pytest.raises(ValueError, match="in front of the text"):
        AttemptConfig(before=2, between=1)
    trial = Trial(Attempt(**SHARP, sources=("a",)), "bart", "sequence_classification")
    with pytest.raises(InvalidRequest, match="encoder's ids again"):
        trial.method.check(checks.shape_of("bart", root), checks.case_of(trial))
