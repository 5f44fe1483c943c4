"""SPoT: the first prompt is the sources', and what is no prompt of that size is refused."""

import pytest
import torch
from safetensors.torch import load_file

from peft_service.errors import InvalidRequest
from peft_service.methods.lora import LoRA
from peft_service.methods.prompt_tuning import PromptTuning
from peft_service.methods.spot import SPoT
from peft_service.tuners.task_prompts import source_prompts
from tests.methods import checks
from tests.methods.checks import Live, Trial


@pytest.mark.parametrize(("base", "task"), [("llama", "causal_lm"), ("bert", "sequence_classification")])
@pytest.mark.parametrize("count", [1, 2])
def test_the_first_prompt_is_the_sources(root, base, task, count):
    trial = Trial(SPoT(virtual_tokens=5, sources=("a", "b")[:count]), base, task)
    live = Live(trial, root)
    files = [load_file(path / "adapter_model.safetensors") for path in checks.sources(trial, root)]
    mean = sum(file["prompt_embeddings"] for file in files) / count
    assert torch.equal(live.engine.parameters["prompt_encoder.default.embedding.weight"], mean)
    if count == 1 and task == "causal_lm":
        source = Live(Trial(PromptTuning(virtual_tokens=5), base, task), root, rate=1e-2)
        for step in range(3):
            source.step(step)
        assert checks.difference(live.answers(), source.answers(), live.probe) == 0.0


def test_what_is_no_prompt_of_that_size_is_refused(root, tmp_path):
    lora = Live(Trial(LoRA(rank=4), "llama", "causal_lm"), root)
    with pytest.raises(InvalidRequest, match="LORA") as refused:
        source_prompts([lora.save(tmp_path / "lora")], 5, 32)
    assert refused.value.param == "adapter.sources[0]"
    prompt = Live(Trial(PromptTuning(virtual_tokens=5), "llama", "causal_lm"), root).save(tmp_path / "prompt")
    with pytest.raises(InvalidRequest, match="set virtual_tokens to 5"):
        source_prompts([prompt], 7, 32)
