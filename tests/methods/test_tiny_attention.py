"""Tiny attention: experts drawn by row, and their mean in the artifact."""

import torch
from safetensors.torch import load_file

from peft_service.methods.tiny_attention import TinyAttention
from peft_service.tuners.tiny_attention import drawn
from tests.methods.checks import Live, Trial, load

FIELDS = {"size": 2, "heads": 1, "experts": 3}


def test_a_rows_expert_depends_on_seed_step_and_row_alone(root):
    live = Live(Trial(TinyAttention(**FIELDS), "llama", "causal_lm"), root)
    part = live.attached.parts[0]
    live.attached.before_step(5)
    live.attached.inputs(live.batch([3, 0, 7]))
    together = part.chosen.tolist()
    for place, row in enumerate((3, 0, 7)):
        live.attached.inputs(live.batch([row]))  # other padding, another place
        assert part.chosen.tolist() == [together[place]]
    draws = [drawn(0, step, [1, 2, 3]) % 3 for step in range(300)]
    assert all(70 < draws.count(expert) < 130 for expert in range(3))


def test_all_experts_train_and_the_artifact_is_their_mean(root, tmp_path):
    live = Live(Trial(TinyAttention(**FIELDS), "llama", "causal_lm"), root, rate=0.01)
    start = live.engine.trainable()
    for step in range(6):
        live.step(step)
    now = live.engine.trainable()
    for expert in range(3):
        assert any(not torch.equal(now[name][expert], start[name][expert]) for name in now)
    said = live.answers()
    saved = load_file(live.save(tmp_path / "a") / "adapter_model.safetensors")
    for name, tensor in now.items():
        torch.testing.assert_close(saved[name.replace(".default", "")], tensor.mean(0, keepdim=True))
    _, again = load(live, tmp_path / "a")
    torch.testing.assert_close(again["logits"], said["logits"], rtol=1e-5, atol=1e-5)
