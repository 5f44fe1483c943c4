"""The golden files can be trusted: same bases here as where they were made, and peft agrees where it has the method.

Largest differences measured (float32, two threads or one): bases 9e-7; peft's outputs LORA_DIFF.
"""

import pytest
import torch

from tests import golden

NAMES = golden.names()
TOLERANCE = 1e-5


def of(*methods: str) -> list[str]:
    return [name for name in NAMES if name.rpartition("-")[0] in methods]


def path_of(key: str) -> str:
    """The linear layer that a tensor of AdapterHub's LoRA or (IA)³ belongs to."""
    return key.partition(".loras.")[0]


def difference(seen: torch.Tensor, recorded: torch.Tensor) -> float:
    """The largest difference, relative to the largest number recorded where that is above one."""
    assert seen.shape == recorded.shape
    return float((seen - recorded).abs().max() / recorded.abs().max().clamp(min=1))


def same(name: str, what: str, seen: torch.Tensor, recorded: torch.Tensor) -> None:
    apart = difference(seen, recorded)
    assert apart <= TOLERANCE, f"{name}: {what} differs by {apart:.2g} from the file"


def test_every_method_is_there():
    methods = {name.rpartition("-")[0] for name in NAMES}
    assert methods == {
        "lora", "lora-wide", "houlsby", "pfeiffer", "parallel", "prefix", "prompt", "ia3", "fusion", "mam",
        "unipelt", "mtl-lora",
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_base_is_the_recorded_one(name):
    file = golden.load(name)
    with torch.no_grad():
        seen = golden.output_of(file.base(), file.inputs)
    same(name, "the base", seen, file.base_output)


@pytest.mark.parametrize("name", NAMES)
def test_adapter_does_something(name):
    """A file whose adapter changes nothing could not fail anyone."""
    file = golden.load(name)
    recorded = file.output[:, -file.base_output.shape[1] :]  # behind a prompt
    assert difference(recorded, file.base_output) > 0.1
    assert file.adapter.keys() == file.gradients.keys()
    for key, gradient in file.gradients.items():
        assert gradient.shape == file.adapter[key].shape
        assert gradient.abs().max() > 1e-4, key
        assert file.adapter[key].std() > 0 or file.adapter[key].numel() == 1, key


def agrees(name: str, model: torch.nn.Module, tuned: dict[str, torch.nn.Parameter]) -> None:
    """peft's model, given the file's weights in `tuned` (by the file's names), does what the file says."""
    file = golden.load(name)
    with torch.no_grad():
        for key, parameter in tuned.items():
            parameter.requires_grad_(True)
            parameter.copy_(file.adapter[key].reshape(parameter.shape))
    inputs = {key: value for key, value in file.inputs.items() if key != "position_ids"}  # peft's own are these
    made = model(**inputs)
    output = made.logits if "logits" in made else made.last_hidden_state
    same(name, "the output", output, file.output)
    (output**2).sum().backward()
    for key, parameter in tuned.items():
        same(name, f"the gradient of {key}", parameter.grad.reshape(file.gradients[key].shape), file.gradients[key])


def layers_of(model: torch.nn.Module, file: golden.Golden) -> dict[str, torch.nn.Module]:
    """Each adapted layer of a peft model, by the base's name for it."""
    modules = dict(model.base_model.model.named_modules())
    return {path: modules[path] for path in map(path_of, file.adapter)}


@pytest.mark.parametrize("name", [name for name in of("lora", "lora-wide") if name != "lora-linear"])
def test_peft_lora(name):
    from peft import LoraConfig, get_peft_model

    file = golden.load(name)
    config = LoraConfig(
        r=file.config["r"], lora_alpha=file.config["alpha"], target_modules=[*map(path_of, file.adapter)]
    )
    model = get_peft_model(file.base(), config).eval()
    layers = layers_of(model, file)
    tuned = {
        key: getattr(layers[path_of(key)], key.rpartition(".")[2])["default"].weight for key in file.adapter
    }
    agrees(name, model, tuned)


def test_peft_lora_on_a_layer():
    """loralib's Linear."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    file = golden.load("lora-linear")
    config = LoraConfig(r=file.config["r"], lora_alpha=file.config["lora_alpha"])
    layer = Linear(file.base(), "default", config, r=config.r, lora_alpha=config.lora_alpha)
    tuned = {"lora_A": layer.lora_A["default"].weight, "lora_B": layer.lora_B["default"].weight}
    with torch.no_grad():
        for key, parameter in tuned.items():
            parameter.copy_(file.adapter[key])
    output = layer(**{"x": file.inputs["input"]})
    same("lora-linear", "the output", output, file.output)
    (output**2).sum().backward()
    for key, parameter in tuned.items():
        same("lora-linear", key, parameter.grad, file.gradients[key])


@pytest.mark.parametrize("name", of("ia3"))
def test_peft_ia3(name):
    """AdapterHub scales what comes out of every layer; peft does that for layers it is not told feed forward."""
    from peft import IA3Config, get_peft_model

    file = golden.load(name)
    config = IA3Config(target_modules=[*map(path_of, file.adapter)], feedforward_modules=[])
    model = get_peft_model(file.base(), config).eval()
    layers = layers_of(model, file)
    agrees(name, model, {key: layers[path_of(key)].ia3_l["default"] for key in file.adapter})


@pytest.mark.parametrize("name", ["prefix-bert", "prefix-llama"])
def test_peft_prefix(name):
    """Both lay a flat prefix out as (P, 2·layers, kv heads, head size). (BART: peft has no encoder prefix.)"""
    from peft import PrefixTuningConfig, get_peft_model

    file = golden.load(name)
    heads = file.base_config["num_attention_heads"]
    kv_heads = file.base_config.get("num_key_value_heads", heads)
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM" if "llama" in name else "FEATURE_EXTRACTION",
        num_virtual_tokens=file.config["prefix_length"],
        num_layers=file.base_config["num_hidden_layers"],
        num_attention_heads=kv_heads,
        token_dim=file.base_config["hidden_size"] // heads * kv_heads,
    )
    model = get_peft_model(file.base(), config).eval()
    (key,) = file.adapter
    agrees(name, model, {key: model.prompt_encoder["default"].embedding.weight})


def test_peft_prompt():
    """The file's prompt is what BERT's embedding layer makes of peft's: see tests/golden/README.md."""
    from peft import PromptTuningConfig, get_peft_model

    file = golden.load("prompt-bert")
    config = PromptTuningConfig(
        task_type="FEATURE_EXTRACTION", num_virtual_tokens=file.config["prompt_length"], token_dim=32
    )
    model = get_peft_model(file.base(), config).eval()
    prompt = model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        prompt.copy_(file.extra["prompt_before_embedding"])
    output = model(input_ids=file.inputs["input_ids"], attention_mask=file.inputs["attention_mask"])
    same("prompt-bert", "the output", output.last_hidden_state, file.output)
    (output.last_hidden_state**2).sum().backward()
    same("prompt-bert", "the gradient", prompt.grad, file.extra["prompt_before_embedding_gradient"])
