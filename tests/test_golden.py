"""The golden files can be trusted: the bases are the same here, peft agrees, and so do plain formulas.

Largest differences measured, output / gradient, relative to the largest number where that is above one:
bases in transformers 5.23: 9.1e-7; peft 0.21.2 in float32: LoRA 8.3e-7 / 3.8e-6, (IA)³ 5.1e-7 / 1.4e-6,
prefix 7.6e-7 / 1.3e-6, prompt 3.5e-7 / 6.1e-7; formulas in float64: 1.5e-7 / 2.0e-6, with a prefix on LLaMA
3.7e-7 / 4.8e-6 (its attention takes the softmax in float32 whatever the model is in).
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
        # A bias of the keys adds the same to every adapter's score, and a softmax does not see that.
        assert gradient.abs().max() > 1e-4 or key.endswith("a,b.key.bias"), key
        assert file.adapter[key].abs().min() > 0, key


def agrees(name: str, model: torch.nn.Module, tuned: dict[str, torch.nn.Parameter]) -> None:
    """peft's model, given the file's weights in `tuned` (by the file's names), does what the file says."""
    file = golden.load(name)
    with torch.no_grad():
        for key, parameter in tuned.items():
            parameter.requires_grad_(True)
            parameter.copy_(file.adapter[key].reshape(parameter.shape))
    # Where a file has positions, they are the ones that peft counts itself.
    inputs = {key: value for key, value in file.inputs.items() if key != "position_ids"}
    made = model(**inputs)
    output = made.logits if "logits" in made else made.last_hidden_state
    same(name, "the output", output.detach(), file.output)
    (output**2).sum().backward()
    for key, parameter in tuned.items():
        gradient = parameter.grad.reshape(file.gradients[key].shape)
        same(name, f"the gradient of {key}", gradient, file.gradients[key])


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
    output = layer(file.inputs["input"])
    same("lora-linear", "the output", output.detach(), file.output)
    (output**2).sum().backward()
    for key, parameter in tuned.items():
        same("lora-linear", key, parameter.grad, file.gradients[key])


@pytest.mark.parametrize("name", of("ia3"))
def test_peft_ia3(name):
    """AdapterHub scales what comes out of a layer; so does peft, unless told that it is feed forward."""
    from peft import IA3Config, get_peft_model

    file = golden.load(name)
    config = IA3Config(target_modules=[*map(path_of, file.adapter)], feedforward_modules=[])
    model = get_peft_model(file.base(), config).eval()
    layers = layers_of(model, file)
    agrees(name, model, {key: layers[path_of(key)].ia3_l["default"] for key in file.adapter})


@pytest.mark.parametrize("name", ["prefix-bert", "prefix-llama"])
def test_peft_prefix(name):
    """Both lay a flat prefix out as (P, 2·layers, kv heads, head size)."""
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
    same("prompt-bert", "the output", output.last_hidden_state.detach(), file.output)
    (output.last_hidden_state**2).sum().backward()
    same("prompt-bert", "the gradient", prompt.grad, file.extra["prompt_before_embedding_gradient"])


# What AdapterHub computes, written down as formulas in float64 on the plain base. A method of ours that
# differs from a file differs from one of these lines.


class Formulas:
    """Hooks on a base that do what the file's tensors say; README.md has the formulas in words."""

    def __init__(self, file: golden.Golden):
        self.file = file
        self.model = file.base().double()
        self.weights = {key: tensor.double().requires_grad_() for key, tensor in file.adapter.items()}
        self.modules = dict(self.model.named_modules())
        self.inputs: dict[str, torch.Tensor] = {}

    def output(self) -> torch.Tensor:
        for owner in sorted({key.partition(".adapters.")[0] for key in self.weights if ".adapters." in key}):
            self.bottleneck(owner)
        for path in sorted({path_of(key) for key in self.weights if ".loras." in key}):
            self.lora(path)
        if any(key.startswith("pool.") for key in self.weights):
            self.prefix()
        return golden.output_of(self.model, self.file.inputs)

    def watch(self, path: str) -> None:
        """Keep the first input of a module."""

        def keep(module, args, kwargs):
            self.inputs[path] = args[0] if args else kwargs["hidden_states"]

        self.modules[path].register_forward_pre_hook(keep, with_kwargs=True)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def gate(self, name: str, x_BTD: torch.Tensor) -> torch.Tensor:
        """UniPELT's: one number a row of the batch, the mean over all positions, pads too."""
        if f"{name}.weight" not in self.weights:
            return torch.ones(1, 1, 1)
        return torch.sigmoid(self.linear(name, x_BTD)).mean(dim=1, keepdim=True)

    def place(self, owner: str) -> tuple[str, str, str | None]:
        """The linear layer y comes out of, the module whose input is the residual stream, the norm after."""
        if owner.endswith("attention.output"):
            return f"{owner}.dense", owner.removesuffix("output") + "self", f"{owner}.LayerNorm"
        if owner.endswith(".output"):
            return f"{owner}.dense", owner.removesuffix("output") + "intermediate", f"{owner}.LayerNorm"
        if owner.endswith("attention_adapters"):
            layer = owner.removesuffix("attention_adapters")
            return f"{layer}self_attn.o_proj", f"{layer}input_layernorm", None
        if owner.endswith("output_adapters"):
            layer = owner.removesuffix("output_adapters")
            return f"{layer}mlp.down_proj", f"{layer}post_attention_layernorm", None
        inner = "SelfAttention.o" if f"{owner}.SelfAttention.o" in self.modules else "DenseReluDense.wo"
        return f"{owner}.{inner}", f"{owner}.layer_norm", None

    def bottleneck(self, owner: str) -> None:
        config = self.file.config
        if "configs" in config:
            config = next(part for part in config["configs"] if "reduction_factor" in part)
        path, stream, norm = self.place(owner)
        act = {"swish": torch.nn.functional.silu, "relu": torch.relu}[config["non_linearity"]]
        self.watch(stream)

        def up(which, x):
            return self.linear(f"{which}.adapter_up", act(self.linear(f"{which}.adapter_down.0", x)))

        def hook(module, args, y):
            residual = self.inputs[stream]
            if config["is_parallel"]:
                x = residual
            elif config["original_ln_before"]:
                x = y + residual
                x = self.modules[norm](x) if norm else x
            else:
                x = y
            fusion = f"{owner}.adapter_fusion_layer.a,b"
            if f"{fusion}.query.weight" not in self.weights:
                one = f"{owner}.adapters.a"
                return y + self.gate(f"{one}.gate", x) * config["scaling"] * up(one, x)
            ups = torch.stack([up(f"{owner}.adapters.{which}", x) for which in "ab"], dim=-2)
            scores = self.linear(f"{fusion}.key", ups) @ self.linear(f"{fusion}.query", x)[..., None]
            return y + (scores.softmax(dim=-2) * self.linear(f"{fusion}.value", ups)).sum(dim=-2)

        self.modules[path].register_forward_hook(hook)

    def lora(self, path: str) -> None:
        config = self.file.config
        if "configs" in config:
            config = next(part for part in config["configs"] if part.get("architecture") == "lora")

        def hook(module, args, y):
            (x,) = args
            one = f"{path}.loras.a"
            if config["composition_mode"] == "scale":
                return y * self.weights[f"{one}.lora_B"][:, 0]
            scale = config["alpha"] / config["r"]
            if config["architecture"] == "mtl_lora":
                shared = f"{path}.shared_parameters.shared"
                a, b = self.weights[f"{shared}.lora_A"], self.weights[f"{shared}.lora_B"]
                rows = []
                for row, task in enumerate(self.file.inputs["task_ids"]):
                    one = f"{path}.loras.t{task}"
                    share = (self.weights[f"{one}.weights"] / config["weights_sharpness"]).softmax(dim=0)
                    mixed = torch.einsum("n,nor->or", share, b) * self.weights[f"{one}.task_specific.values"]
                    rows.append(y[row] + scale * x[row] @ (mixed @ a).T)
                return torch.stack(rows)
            if config["use_gating"]:  # instead of alpha / r
                scale = self.gate(f"{one}.gate", x)
            return y + scale * (x @ self.weights[f"{one}.lora_A"].T @ self.weights[f"{one}.lora_B"].T)

        self.modules[path].register_forward_hook(hook)

    def prefix(self) -> None:
        """Prefixes in front of the keys and values, behind any rotation; the mask lets everyone see them."""
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask

        attentions: dict[str, list[str]] = {}
        for path in self.modules:
            if path.endswith(("attention.self", "self_attn", "encoder_attn")):
                kind = "encoder" if ".encoder." in path and "self_attn" in path else "self"
                attentions.setdefault("cross" if "encoder_attn" in path else kind, []).append(path)
                self.watch(path)
        of_module = {}
        for kind, paths in attentions.items():
            flat = self.weights[f"pool.prefix_tunings.a.{kind}_prefix.control_trans"]
            heads = self.file.base_config.get("num_key_value_heads", 4)
            layered = flat.reshape(-1, len(paths), 2, heads, 8)  # P, layer, key or value, head, size
            halves = layered.permute(1, 2, 3, 0, 4)
            of_module |= {self.modules[path]: (path, pair) for path, pair in zip(paths, halves, strict=True)}

        def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
            path, (keys, values) = of_module[module]
            gate = self.gate(f"{path}.prefix_tuning.prefix_gates.a", self.inputs[path])[..., None]
            key = torch.cat([(gate * keys).expand(len(key), -1, -1, -1), key], dim=2)
            value = torch.cat([(gate * values).expand(len(value), -1, -1, -1), value], dim=2)
            groups = query.shape[1] // key.shape[1]
            scores = query @ key.repeat_interleave(groups, 1).mT * query.shape[-1] ** -0.5
            if attention_mask is not None:
                scores = scores + torch.nn.functional.pad(attention_mask, (keys.shape[1], 0))
            mixed = scores.softmax(-1) @ value.repeat_interleave(groups, 1)
            return mixed.transpose(1, 2).contiguous(), None

        AttentionInterface.register("golden_prefix", attend)
        AttentionMaskInterface.register("golden_prefix", eager_mask)
        self.model.set_attn_implementation("golden_prefix")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("lora-linear", "prompt-bert")])
def test_formula(name):
    file = golden.load(name)
    formulas = Formulas(file)
    output = formulas.output()
    same(name, "the output", output.detach(), file.output)
    (output**2).sum().backward()
    for key, weight in formulas.weights.items():
        same(name, f"the gradient of {key}", weight.grad, file.gradients[key])
