"""MTL-LoRA as a method: tasks come as an argument of forward and generate, and stay for a replayed pass.

What it computes is compared with AdapterHub in `tests/peft_service/tuners/test_mtl_lora.py`.
"""

import pytest
import torch

from peft_service import artifact
from peft_service.methods.mtl_lora import MTLLoRA
from tests.methods.checks import Live, Trial, directory_of

SMALL = MTLLoRA(rank=4, alpha=8, ups=2)


def stirred(root, base="llama", task="causal_lm"):
    live = Live(Trial(SMALL, base, task), root, rate=0.03)
    for step in range(3):
        live.step(step)
    return live


@pytest.mark.parametrize(("base", "task"), [("llama", "causal_lm"), ("bert", "sequence_classification")])
def test_the_argument_decides_row_by_row_and_is_forgotten(root, tmp_path, base, task):
    live = stirred(root, base, task)
    labels = live.case.labels
    fresh = artifact.load_base(directory_of(base, root), task, labels, dtype=torch.float32)
    model = artifact.load(fresh, live.save(tmp_path / "a"))
    batch, order = live.batch(range(4)), [0, 1, 1, 0]
    with torch.no_grad():
        mixed = model(**batch.inputs, row_tasks=torch.tensor(order)).logits
        for row, number in enumerate(order):
            alone = model(**batch.inputs, row_tasks=torch.tensor([number] * 4)).logits[row]
            torch.testing.assert_close(alone, mixed[row], rtol=1e-5, atol=1e-5)
        other = model(**batch.inputs, row_tasks=torch.tensor([1 - number for number in order])).logits
        assert (other - mixed).abs().max() > 1e-3
        with pytest.raises(ValueError, match="row_tasks"):
            model(**batch.inputs)


def test_it_generates_by_task(root, tmp_path):
    live = stirred(root)
    for name, parameter in live.engine.parameters.items():
        if "task_mix" in name:
            parameter.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        elif name.endswith("ups"):
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    base = artifact.load_base(directory_of("llama", root), "causal_lm", dtype=torch.float32)
    model = artifact.load(base, live.save(tmp_path / "a"))
    inputs = live.batch([0]).inputs
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    one, two = (model.generate(**inputs, **options, row_tasks=[task]) for task in (0, 1))
    tokens = inputs["input_ids"]
    for _ in range(8):
        with torch.no_grad():
            logits = model(input_ids=tokens, row_tasks=[1]).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(two, tokens)
    assert not torch.equal(one, two)


def test_gradient_checkpointing_replays_with_the_tasks(root):
    gradients = []
    for checkpointed in (False, True):
        live = stirred(root)
        if checkpointed:
            live.attached.model.gradient_checkpointing_enable({"use_reentrant": False})
            live.attached.model.enable_input_require_grads()
        batch = live.batch(range(4))
        batch.extra = live.attached.inputs(batch)
        live.objective.loss_sum(live.engine.model.train(), batch)[0].backward()
        gradients.append({name: p.grad for name, p in live.engine.parameters.items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    assert any(gradient.any() for gradient in gradients[0].values())
