"""Multitask prompt tuning: what a task's prompt is, and that rows keep their task in training and
generation."""

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model

from peft_service import artifact
from peft_service.methods.mpt import MPT
from tests.methods.checks import Live, Trial, directory_of

SMALL = MPT(virtual_tokens=5, rank=2)


def stirred(root, base="llama", task="causal_lm"):
    live = Live(Trial(SMALL, base, task), root, rate=0.1)
    for step in range(4):
        live.step(step)
    return live


def prompt_of(live, task):
    """P* ⊙ (u_t v_tᵀ), by loops, in float64."""
    values = {name.split(".")[-1]: p.detach().double() for name, p in live.engine.parameters.items()}
    shared, u, v = values["weight"], values["prefix_task_cols"][task], values["prefix_task_rows"][task]
    made = torch.zeros_like(shared)
    for token in range(5):
        for place in range(32):
            made[token, place] = shared[token, place] * sum(u[token, r] * v[r, place] for r in range(2))
    return made.float()


@pytest.mark.parametrize(("base", "task"), [("llama", "causal_lm"), ("t5", "seq2seq_lm")])
@pytest.mark.parametrize("number", [0, 1])
def test_a_tasks_prompt_is_the_formulas(root, base, task, number):
    live = stirred(root, base, task)
    fresh = artifact.load_base(directory_of(base, root), task, dtype=torch.float32)
    config = PromptTuningConfig(
        num_virtual_tokens=5, token_dim=32, num_transformer_submodules=1,
        task_type={"llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}[base],
    )  # fmt: skip
    plain = get_peft_model(fresh, config).eval()
    plain.prompt_encoder["default"].embedding.weight.data = prompt_of(live, number)
    batch = live.batch(range(4))
    live.engine.model.eval()
    with torch.no_grad():
        wanted = plain(**batch.inputs).logits
        batch.extra = live.attached.inputs(batch)
        found = live.engine.model(**batch.inputs | {"task_ids": torch.tensor([number] * 4)}).logits
        mixed = live.engine.model(
            **batch.inputs | {"task_ids": torch.tensor([number, 1 - number] * 2)}
        ).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[::2], wanted[::2], rtol=1e-5, atol=1e-5)
    assert (mixed[1::2] - wanted[1::2]).abs().max() > 1e-3


def test_every_task_starts_near_the_shared_prompt(root):
    live = Live(Trial(SMALL, "llama", "causal_lm"), root)
    shared = live.engine.parameters["prompt_encoder.default.embedding.weight"]
    words = live.attached.model.get_input_embeddings().weight
    assert all((row == words).all(1).any() for row in shared)
    for task in (0, 1):
        assert (prompt_of(live, task) / shared - 1).abs().max() < 0.01


@pytest.mark.parametrize(("base", "task"), [("llama", "causal_lm"), ("t5", "seq2seq_lm")])
def test_it_generates_by_task(root, tmp_path, base, task):
    live = stirred(root, base, task)
    for name, parameter in live.engine.parameters.items():
        if name.endswith("rows"):
            parameter.data[1] *= -3
    fresh = artifact.load_base(directory_of(base, root), task, dtype=torch.float32)
    fresh.generation_config.pad_token_id = 2
    model = artifact.load(fresh, live.save(tmp_path / "a"))
    inputs = live.batch([0, 1]).inputs
    inputs.pop("decoder_input_ids", None)
    for number in (0, 1):
        one = {name: tensor[number : number + 1] for name, tensor in inputs.items()}
        width = int(one["attention_mask"].sum())
        one = {name: tensor[:, :width] for name, tensor in one.items()}
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        made = [model.generate(**one, **options, task_ids=torch.tensor([t])) for t in (0, 1)]
        assert not torch.equal(*made)
        tokens = one["input_ids"]
        if base == "t5":
            tokens = torch.tensor([[fresh.config.decoder_start_token_id]])
        for _ in range(6):
            # peft makes the decoder's input from labels, one place later.
            later = torch.cat([tokens[:, 1:], torch.zeros(1, 1, dtype=torch.int64)], 1)
            given = {"input_ids": tokens} if base == "llama" else {**one, "labels": later}
            with torch.no_grad():
                logits = model(**given, task_ids=torch.tensor([number])).logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(made[number], tokens)
