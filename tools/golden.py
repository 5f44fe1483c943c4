"""Record what AdapterHub's `adapters` and `loralib` compute for tiny models, as golden files for our tests.

Run with an environment of its own, because `adapters` pins another `transformers` than ours:

    python3 -m venv HUB && HUB/bin/pip install adapters==1.3.0 transformers==4.57.6 torch loralib safetensors
    HUB/bin/python tools/golden.py [NAME ...]        writes tests/golden/NAME.safetensors (all without a name)

Computed in float64 from float32 weights and stored as float32: a difference seen later is not this side's.
Imports nothing of peft_service: what these files say must not depend on what they judge.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import adapters
import loralib
import torch
import transformers
from adapters import (
    AdapterConfig,
    DoubleSeqBnConfig,
    IA3Config,
    LoRAConfig,
    MAMConfig,
    MTLLoRAConfig,
    ParBnConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    SeqBnConfig,
    UniPELTConfig,
)
from adapters.composition import Fuse, MultiTask
from adapters.configuration import AdapterFusionConfig
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.golden import DIRECTORY, base_weights, chirp, fill, output_of

BATCH, LENGTH, PREFIX = 3, 6, 3
LIMIT = 150_000  # bytes of one file

BERT = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 32, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
LLAMA = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64,
    "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False,
}  # fmt: skip
T5 = {
    "vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2,
    "num_heads": 4, "relative_attention_num_buckets": 8, "dropout_rate": 0.0, "pad_token_id": 0,
    "eos_token_id": 1, "decoder_start_token_id": 0, "use_cache": False,
}  # fmt: skip
BART = {
    "vocab_size": 100, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 32,
    "dropout": 0.0, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
    "forced_eos_token_id": None, "use_cache": False,
}  # fmt: skip
BASES = {
    "bert": ("BertModel", BERT),
    "llama": ("LlamaForCausalLM", LLAMA),
    "t5": ("T5ForConditionalGeneration", T5),
    "bart": ("BartForConditionalGeneration", BART),
}

FLAT = PrefixTuningConfig(flat=True, prefix_length=PREFIX)
METHODS: dict[str, tuple[AdapterConfig, tuple[str, ...]]] = {
    "lora": (LoRAConfig(r=4, alpha=8), ("bert", "llama", "t5")),
    "lora-wide": (
        LoRAConfig(r=4, alpha=8, attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True),
        ("bert", "llama"),
    ),
    "houlsby": (DoubleSeqBnConfig(reduction_factor=8), ("bert", "llama", "t5")),
    "pfeiffer": (SeqBnConfig(reduction_factor=8), ("bert", "llama", "t5")),
    "parallel": (ParBnConfig(reduction_factor=8, scaling=4.0), ("bert", "llama", "t5")),
    "prefix": (FLAT, ("bert", "llama", "bart")),
    "prompt": (PromptTuningConfig(prompt_length=PREFIX), ("bert",)),
    "ia3": (IA3Config(), ("bert", "llama", "t5")),
    "mam": (MAMConfig(FLAT, ParBnConfig(reduction_factor=8, scaling=4.0)), ("bert", "llama")),
    "unipelt": (
        UniPELTConfig(FLAT, SeqBnConfig(reduction_factor=8), LoRAConfig(r=4, alpha=2)),
        ("bert", "llama"),
    ),
    "fusion": (SeqBnConfig(reduction_factor=8), ("bert", "llama")),
    "mtl-lora": (MTLLoRAConfig(r=4, alpha=8, n_up_projection=2), ("bert", "llama")),
}


def plain_base(kind: str) -> torch.nn.Module:
    """The base by itself, its weights from the formula of tests/golden."""
    class_name, options = BASES[kind]
    model_class = getattr(transformers, class_name)
    extra = {"add_pooling_layer": False} if kind == "bert" else {}
    config = model_class.config_class(**options, attn_implementation="eager")
    model = model_class(config, **extra).eval()
    fill(model, base_weights({name: list(p.shape) for name, p in model.named_parameters()}))
    return model.double()


def inputs_of(method: str, kind: str) -> dict[str, torch.Tensor]:
    """Token ids and a mask whose rows end in 0, 1 and 2 pads; decoder inputs where there is a decoder."""
    count = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    for row in range(BATCH):
        mask[row, LENGTH - row :] = 0
    inputs = {"input_ids": 5 + (count * 37 + 11) % 90, "attention_mask": mask}
    if kind in ("t5", "bart"):
        inputs["decoder_input_ids"] = 5 + (count[:, :5] * 53 + 7) % 90
    elif method in ("prefix", "prompt", "mam", "unipelt"):
        # Positions after the virtual tokens', as peft counts them; AdapterHub's own default starts at 0.
        inputs["position_ids"] = (PREFIX + torch.arange(LENGTH)).expand(BATCH, -1).contiguous()
    if method == "mtl-lora":
        inputs["task_ids"] = torch.tensor([1, 0, 1])
    return inputs


def value_of(name: str, shape: list[int], index: int) -> torch.Tensor:
    """Far from any initial value, and of a size that moves the output by about its own size."""
    wave = chirp(shape, 0.37 * index + 100)
    if name.endswith("weights"):  # MTL-LoRA divides these by 0.05 before the softmax
        return (0.05 * wave).float()
    if name.endswith("task_specific.values") or ("lora_B" in name and shape[-1] == 1):  # around one
        return (1 + 0.4 * wave).float()
    if name.endswith(("gate.weight", "prefix_gates.a.weight")):
        return (0.6 * wave).float()
    if "control_trans" in name or "prompt_embedding" in name:
        return (0.8 * wave).float()
    return (0.3 * wave).float()


def record(method: str, kind: str) -> None:
    """One file of AdapterHub's."""
    config, _ = METHODS[method]
    model = plain_base(kind)
    base = dict(model.named_parameters())
    shapes = {name: list(parameter.shape) for name, parameter in base.items()}
    inputs = inputs_of(method, kind)
    with torch.no_grad():
        base_output = output_of(model, inputs)

    adapters.init(model)
    described = config.to_dict()
    if method == "fusion":
        model.add_adapter("a", config=config)
        model.add_adapter("b", config=config)
        model.add_adapter_fusion(["a", "b"], "dynamic")
        model.active_adapters = Fuse("a", "b")
        described["fusion"] = AdapterFusionConfig.load("dynamic").to_dict()
    elif method == "mtl-lora":
        for task in ("t0", "t1"):
            model.add_adapter(task, config=config)
        model.share_parameters(["t0", "t1"], name="shared")
        model.active_adapters = MultiTask("t0", "t1")
    else:
        model.add_adapter("a", config=config)
        model.set_active_adapters("a")
    model.double().eval()

    known = {id(parameter) for parameter in base.values()}
    tuned = {name: p for name, p in model.named_parameters() if id(p) not in known}
    with torch.no_grad():
        for index, (name, parameter) in enumerate(sorted(tuned.items())):
            parameter.copy_(value_of(name, list(parameter.shape), index))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in tuned.values():
        parameter.requires_grad_(True)

    extra = {}
    if method == "prompt":
        # AdapterHub puts the prompt behind BERT's embedding layer, peft in front of it. A prompt that is what
        # that layer makes of `before` is the same in both.
        before = torch.nn.Parameter(next(iter(tuned.values())).detach().clone())
        layer = model.embeddings
        after = layer.LayerNorm(
            before + layer.position_embeddings.weight[:PREFIX] + layer.token_type_embeddings.weight[0]
        )
        with torch.no_grad():
            next(iter(tuned.values())).copy_(after.float())

    made = model(**inputs, return_dict=True)
    output = made.logits if "logits" in made else made.last_hidden_state
    (output**2).sum().backward()
    if method == "prompt":
        after.backward(next(iter(tuned.values())).grad)
        extra = {"prompt_before_embedding": before.detach(), "prompt_before_embedding_gradient": before.grad}
    write(f"{method}-{kind}", BASES[kind], shapes, described, inputs, base_output, output, tuned, extra)


def record_loralib() -> None:
    """loralib's LoRA on a linear layer by itself."""
    options = {"in_features": 32, "out_features": 48}
    layer = loralib.Linear(**options, r=4, lora_alpha=8, merge_weights=False).double()
    base = {"weight": layer.weight, "bias": layer.bias}
    shapes = {name: list(parameter.shape) for name, parameter in base.items()}
    tuned = {"lora_A": layer.lora_A, "lora_B": layer.lora_B}
    with torch.no_grad():
        for name, weight in base_weights(shapes).items():
            base[name].copy_(weight)
        for index, (name, parameter) in enumerate(tuned.items()):
            parameter.copy_(value_of(name, list(parameter.shape), index))
    inputs = {"input": chirp([5, 32], 50).float().double()}  # exact in the float32 it is stored as
    base_output = torch.nn.functional.linear(inputs["input"], layer.weight, layer.bias).detach()
    output = layer(inputs["input"])
    (output**2).sum().backward()
    config = {"r": 4, "lora_alpha": 8}
    write("lora-linear", ("Linear", options), shapes, config, inputs, base_output, output, tuned, {})


def write(name, base, shapes, config, inputs, base_output, output, tuned, extra) -> None:
    """The file; ValueError when the adapter does too little, or the file is too large."""
    unused = [key for key, parameter in tuned.items() if parameter.grad is None or not parameter.grad.any()]
    if unused:
        raise ValueError(f"{name}: no gradient for {unused}")
    # A prefix is one module that every layer refers to; the first layer's name for it would mislead.
    tuned = {"pool." + key.partition(".pool.")[2] if ".pool." in key else key: p for key, p in tuned.items()}
    tensors = {"base_output": base_output, "output": output.detach()}
    tensors |= {f"adapter.{key}": parameter.detach() for key, parameter in tuned.items()}
    tensors |= {f"gradient.{key}": parameter.grad for key, parameter in tuned.items()}
    tensors |= {f"input.{key}": value for key, value in inputs.items()}
    tensors |= {f"extra.{key}": value for key, value in extra.items()}
    packages = ("adapters", "transformers", "torch", "loralib", "safetensors")
    described = {
        "base_class": base[0],
        "base_config": base[1],
        "base_shapes": shapes,
        "config": config,
        "versions": {package: version(package) for package in packages},
    }
    metadata = {"golden": json.dumps(described)}  # one entry: safetensors writes several in any order
    path = DIRECTORY / f"{name}.safetensors"
    # float64 to float32; token ids stay what they are
    single = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
    save_file({key: value.contiguous().clone() for key, value in single.items()}, path, metadata)
    size = path.stat().st_size
    if size > LIMIT:
        raise ValueError(f"{name}: {size} bytes")
    path.chmod(0o644)
    sys.stdout.write(f"{name:16} {size:6} bytes, {len(tuned):2} tensors\n")


def main(wanted: list[str]) -> None:
    torch.set_num_threads(1)
    every = {f"{method}-{kind}": (method, kind) for method, (_, kinds) in METHODS.items() for kind in kinds}
    for name, (method, kind) in every.items():
        if not wanted or name in wanted:
            record(method, kind)
    if not wanted or "lora-linear" in wanted:
        record_loralib()


if __name__ == "__main__":
    main(sys.argv[1:])
