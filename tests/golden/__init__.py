"""Results of other people's code, recorded: `load(name)` gives one; README.md says what each holds.

The base models' weights are a formula (`base_weights`), so that a file holds only what cannot be computed:
the adapter's weights, the inputs, and what the other library made of them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

DIRECTORY = Path(__file__).parent
# A tensor's name in a file is "<group>.<name>"; "output" and "base_output" have no group.
GROUPS = ("adapter", "input", "gradient", "extra")


@dataclass(frozen=True)
class Golden:
    """One recorded forward (and backward) of another implementation, everything in float32."""

    name: str
    base_class: str
    """Class in `transformers`, or in `torch.nn` for "Linear"."""
    base_config: dict[str, Any]
    """Keyword arguments of that class's configuration (of the class itself for "Linear")."""
    base_state: dict[str, torch.Tensor]
    """Every parameter of the base; one name of tied ones."""
    adapter: dict[str, torch.Tensor]
    """The method's parameters, by the other library's own names."""
    inputs: dict[str, torch.Tensor]
    """Keyword arguments of the model's `forward` ("task_ids" apart, which only MTL-LoRA takes)."""
    base_output: torch.Tensor
    """What the base gives for the inputs without the adapter."""
    output: torch.Tensor
    """With the adapter: `logits`, or `last_hidden_state` of a model without a head."""
    gradients: dict[str, torch.Tensor]
    """Of `(output**2).sum()`, all positions, for each tensor of `adapter`."""
    extra: dict[str, torch.Tensor]
    """What a file has besides; README.md says."""
    config: dict[str, Any]
    """The method's configuration in the other library, all fields."""
    versions: dict[str, str]

    def base(self) -> torch.nn.Module:
        """The base model in the installed `transformers`, in evaluation mode, with these weights."""
        if self.base_class == "Linear":
            model: torch.nn.Module = torch.nn.Linear(**self.base_config)
        else:
            import transformers

            model_class = getattr(transformers, self.base_class)
            options = {"add_pooling_layer": False} if self.base_class == "BertModel" else {}
            config = model_class.config_class(**self.base_config, attn_implementation="eager")
            model = model_class(config, **options)
        fill(model, self.base_state)
        return model.eval()


def names() -> list[str]:
    """Of all files about methods; those about objectives have a loader of their own."""
    return sorted(path.stem for path in DIRECTORY.glob("*.safetensors") if "objectives-" not in path.stem)


@dataclass(frozen=True)
class Losses:
    """What TRL computes for one case of `objectives-<name>.safetensors`; README.md says what is in it."""

    case: str
    rows: list[dict[str, Any]]
    """Token ids by part of the row: prompt, chosen, rejected; or prompt, completion, other, label."""
    options: dict[str, Any]
    """TRL's own."""
    loss: float
    gradients: dict[str, torch.Tensor]
    """Of the loss, for every trainable parameter."""
    base_config: dict[str, Any]
    lora: dict[str, Any]
    """Arguments of peft's LoraConfig."""
    scale: float
    """Parameter t (names sorted) of the adapter is scale·chirp(shape, t + 100); all others are the base's."""
    kl: float | None


def losses(name: str) -> dict[str, Losses]:
    """The cases of the file `objectives-<name>.safetensors`."""
    with safe_open(DIRECTORY / f"objectives-{name}.safetensors", framework="pt") as file:
        meta = json.loads(file.metadata()["objectives"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    found = {}
    for case, what in meta["cases"].items():
        start = f"gradient.{case}."
        found[case] = Losses(
            case=case,
            rows=what.get("rows", meta["rows"]),
            options=what["options"],
            loss=what["loss"],
            gradients={key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)},
            base_config=meta["base"],
            lora=meta["lora"],
            scale=meta["scale"],
            kl=what.get("kl"),
        )
    return found


def load(name: str) -> Golden:
    """The file `<name>.safetensors` of this directory."""
    with safe_open(DIRECTORY / f"{name}.safetensors", framework="pt") as file:
        meta = json.loads(file.metadata()["golden"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    groups: dict[str, dict[str, torch.Tensor]] = {group: {} for group in GROUPS}
    for key, tensor in tensors.items():
        group, _, rest = key.partition(".")
        if rest:
            groups[group][rest] = tensor
    return Golden(
        name=name,
        base_class=meta["base_class"],
        base_config=meta["base_config"],
        base_state=base_weights(meta["base_shapes"]),
        adapter=groups["adapter"],
        inputs=groups["input"],
        base_output=tensors["base_output"],
        output=tensors["output"],
        gradients=groups["gradient"],
        extra=groups["extra"],
        config=meta["config"],
        versions=meta["versions"],
    )


def base_weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Weights by formula: element i of the t-th tensor (names sorted) is a·sin(0.7 + 1.3t + 0.9i + 0.0137i²).

    i counts row by row from 0, computed in float64, rounded to float32. The square makes matrices of full
    rank, which a plain sine does not. a = 0.25; the scale of a norm (one dimension, named "weight") is
    1 + 0.1·sin(…).
    """
    weights = {}
    for t, name in enumerate(sorted(shapes)):
        wave = chirp(shapes[name], t)
        norm = len(shapes[name]) == 1 and name.endswith("weight")
        weights[name] = (1 + 0.1 * wave if norm else 0.25 * wave).float()
    return weights


def chirp(shape: list[int], t: float) -> torch.Tensor:
    """sin(0.7 + 1.3t + 0.9i + 0.0137i²) in float64, in the shape given."""
    i = np.arange(int(np.prod(shape)), dtype=np.float64)
    return torch.from_numpy(np.sin(0.7 + 1.3 * t + 0.9 * i + 0.0137 * i * i)).reshape(shape)


def fill(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put `weights` into the model's parameters; KeyError unless the names are exactly the same."""
    parameters = dict(model.named_parameters())  # tied ones once
    if parameters.keys() != weights.keys():
        raise KeyError(f"names differ: {sorted(parameters.keys() ^ weights.keys())}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def output_of(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What `output` and `base_output` are: logits, or the last hidden state, or a Linear's result."""
    if isinstance(model, torch.nn.Linear):
        return model(inputs["input"])
    inputs = {name: value for name, value in inputs.items() if name != "task_ids"}
    made = model(**inputs, return_dict=True)
    return made.logits if "logits" in made else made.last_hidden_state
