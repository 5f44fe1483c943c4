"""QA-LoRA's linear layer of group-wise codes, its training, its merge, and its artifact.

An artifact has `qa_lora.safetensors` and `qa_lora_config.json`. Of every quantised layer the first holds

    <layer>.codes    uint8 (d_out, bytes)            codes of `bits` bits, 8 // bits in a byte, low bits first
    <layer>.scale    float32 (d_out, d_in / group)   α
    <layer>.zero     float32 (d_out, d_in / group)   β, so that W = α (q - β)
    <layer>.lora_A   float32 (rank, d_in / group)    only where it is not merged
    <layer>.lora_B   float32 (d_out, rank)           likewise

and the task's head under its names in the model; the second says `bits`, `group`, `scaling`, `merged`, and
d_in by layer. Everything else (embeddings, norms, biases) is the base's own: `apply` puts the layers on it.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils.integrations import gather_params_ctx
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from peft_service.attached import Attached, head_modules
from peft_service.errors import InvalidRequest
from peft_service.targets import linear_layers

WEIGHTS = "qa_lora.safetensors"
CONFIG = "qa_lora_config.json"
FORMAT = "peft-service/qa-lora/1"
_AS_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}
_AS_FLOAT = {whole: real for real, whole in _AS_INTEGER.items()}


def quantise(weight_OI: Tensor, group: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes uint8 (O, I), scale (O, I/group), zero (O, I/group)): the least and the largest weight of a
    group become the codes 0 and 2^bits - 1, and W ≈ scale (codes - zero).

    In the weight's own dtype, float32 at least.
    """
    weight_OI = weight_OI.detach().to(torch.promote_types(weight_OI.dtype, torch.float32))
    weight_OGg = weight_OI.view(len(weight_OI), -1, group)
    low_OG, high_OG = weight_OGg.amin(-1), weight_OGg.amax(-1)
    levels = 2**bits - 1
    scale_OG = (high_OG - low_OG) / levels
    # A group of one value: any scale is exact, and it must not be zero, for the merge divides by it.
    scale_OG = torch.where(scale_OG > 0, scale_OG, torch.ones_like(scale_OG))
    zero_OG = -low_OG / scale_OG
    codes_OGg = (weight_OGg / scale_OG[..., None] + zero_OG[..., None]).round().clamp(0, levels)
    return codes_OGg.to(torch.uint8).flatten(-2), scale_OG, zero_OG


def packed(codes_OI: Tensor, bits: int) -> Tensor:
    """Codes in bytes, 8 // bits in each, the first in the lowest bits; the last byte of a row may be partly
    empty."""
    each = 8 // bits
    if each == 1:
        return codes_OI
    width = 8 // each
    filled_OBe = functional.pad(codes_OI, (0, -codes_OI.shape[1] % each)).view(len(codes_OI), -1, each)
    whole = torch.zeros_like(filled_OBe[..., 0])
    for place in range(each):
        whole |= filled_OBe[..., place] << (place * width)
    return whole


def unpacked(bytes_OB: Tensor, bits: int, d_in: int) -> Tensor:
    """What `packed` was given."""
    each = 8 // bits
    if each == 1:
        return bytes_OB
    width = 8 // each
    parts = [(bytes_OB >> (place * width)) & (2**width - 1) for place in range(each)]
    return torch.stack(parts, -1).flatten(-2)[:, :d_in]


def dequantised(
    bytes_OB: Tensor, scale_OG: Tensor, zero_OG: Tensor, bits: int, d_in: int, dtype: torch.dtype
) -> Tensor:
    """W (d_out, d_in) = scale (codes - zero), computed in the scale's dtype and given in `dtype`."""
    codes_OGg = unpacked(bytes_OB, bits, d_in).reshape(*scale_OG.shape, -1).to(scale_OG.dtype)
    weight_OGg = (codes_OGg - zero_OG[..., None]) * scale_OG[..., None]
    return weight_OGg.flatten(-2).to(dtype)


class _Product(torch.autograd.Function):
    """x W^T that keeps codes, not weights, until the backward pass: else a step would hold the whole
    unpacked base."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bytes_OB: Tensor, scale: Tensor, zero: Tensor, bits: int, d_in: int
    ) -> Tensor:
        ctx.save_for_backward(bytes_OB, scale, zero)
        ctx.bits, ctx.d_in = bits, d_in
        return x @ dequantised(bytes_OB, scale, zero, bits, d_in, x.dtype).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None, None
        bytes_OB, scale, zero = ctx.saved_tensors
        weight = dequantised(bytes_OB, scale, zero, ctx.bits, ctx.d_in, gradient.dtype)
        return gradient @ weight, None, None, None, None, None


class GroupLinear(nn.Module):
    """y = W̃ x + s B A pool(x) + bias, W̃ in groups of codes; without A and B it is the quantised layer alone.

    Shapes: x (…, d_in), y (…, d_out); pool sums each group's inputs, (…, d_in / group).
    """

    codes: Tensor

    def __init__(
        self,
        codes_OB: Tensor,
        scale_OG: Tensor,
        zero_OG: Tensor,
        bits: int,
        d_in: int,
        bias: nn.Parameter | None,
        scaling: float = 0.0,
        factors: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.bits, self.in_features, self.out_features, self.scaling = bits, d_in, len(codes_OB), scaling
        self.bias = bias
        self.register_buffer("codes", codes_OB.contiguous())
        # As bit patterns: an engine that makes a module bfloat16 would round floats, and with them the base.
        self.register_buffer("scale_bits", scale_OG.contiguous().view(_AS_INTEGER[scale_OG.dtype]))
        self.register_buffer("zero_bits", zero_OG.contiguous().view(_AS_INTEGER[zero_OG.dtype]))
        self.lora_A = self.lora_B = None
        if factors is not None:
            self.lora_A, self.lora_B = (nn.Parameter(factor) for factor in factors)

    @property
    def scale(self) -> Tensor:
        """α (d_out, d_in / group)."""
        return self._real(self.scale_bits)

    @property
    def zero(self) -> Tensor:
        """β (d_out, d_in / group)."""
        return self._real(self.zero_bits)

    @staticmethod
    def _real(bits: Any) -> Tensor:
        whole: Tensor = bits
        return whole.view(_AS_FLOAT[whole.dtype])

    @property
    def group(self) -> int:
        return self.in_features // self.scale.shape[1]

    @property
    def weight(self) -> Tensor:
        """W̃ (d_out, d_in): some models of transformers ask a layer for its weight's dtype."""
        return dequantised(self.codes, self.scale, self.zero, self.bits, self.in_features, self.scale.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            x, self.codes, self.scale, self.zero, self.bits, self.in_features
        )
        if self.lora_A is not None and self.lora_B is not None:
            pooled = x.reshape(*x.shape[:-1], -1, self.group).sum(-1).to(self.lora_A.dtype)
            low = functional.linear(pooled, self.lora_A)
            y = y + self.scaling * functional.linear(low, self.lora_B).to(y.dtype)
        return y if self.bias is None else y + self.bias

    def merged_zero(self, a_RG: Tensor, b_OR: Tensor) -> Tensor:
        """β' = β - s B A / α, in the scale's dtype."""
        scale = self.scale
        return self.zero - self.scaling * (b_OR.to(scale) @ a_RG.to(scale)) / scale

    def merge(self) -> None:
        """Move the zero points by B A, and drop A and B. The codes are not touched. Twice is once."""
        if self.lora_A is None or self.lora_B is None:
            return
        with torch.no_grad():
            moved = self.merged_zero(self.lora_A.detach(), self.lora_B.detach())
        self.zero_bits = moved.contiguous().view(_AS_INTEGER[moved.dtype])
        self.lora_A = self.lora_B = None


class Quantised(Attached):
    """The linear layers of the blocks replaced with quantised ones, whose A and B train."""

    def __init__(
        self, model: Any, rank: int, scaling: float, group: int, bits: int, merged: bool, seed: int
    ) -> None:
        self.group, self.bits, self.scaling, self.merged = group, bits, scaling, merged
        names = linear_layers(model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for name in names:
            layer = model.get_submodule(name)
            with gather_params_ctx(list(layer.parameters()), modifier_rank=None):
                weight = layer.weight.detach()
                weight = (weight.T if isinstance(layer, Conv1D) else weight).clone()
                bias = layer.bias
            codes, scale, zero = quantise(weight, group, bits)
            (d_out, d_in), dtype = weight.shape, scale.dtype
            # LoRA's kaiming_uniform(√5) for A's own number of inputs, drawn on the CPU: the same on all ranks
            bound = 1 / math.sqrt(d_in // group)
            a = (torch.rand(rank, d_in // group, generator=generator) * 2 - 1) * bound
            factors = a.to(weight.device, dtype), torch.zeros(d_out, rank, device=weight.device, dtype=dtype)
            _replace(
                model, name, GroupLinear(packed(codes, bits), scale, zero, bits, d_in, bias, scaling, factors)
            )
        for module in head_modules(model):
            for parameter in model.get_submodule(module).parameters():
                parameter.data = parameter.data.float() if not hasattr(parameter, "ds_id") else parameter.data
                parameter.requires_grad_(True)
        super().__init__(model)

    def save(self, trainable: Mapping[str, Tensor], directory: Path, base: "tuple[str, str | None]") -> None:
        model: Any = self.model
        tensors: dict[str, Tensor] = {}
        widths: dict[str, int] = {}
        rest = dict(trainable)
        for name, layer in layers_of(model).items():
            a, b = rest.pop(f"{name}.lora_A"), rest.pop(f"{name}.lora_B")
            zero = layer.zero
            if self.merged:
                zero = layer.merged_zero(a.to(zero.device), b.to(zero.device))
            else:
                tensors |= {f"{name}.lora_A": a, f"{name}.lora_B": b}
            tensors |= {f"{name}.codes": layer.codes, f"{name}.scale": layer.scale, f"{name}.zero": zero}
            widths[name] = layer.in_features
        config = {
            "format": FORMAT,
            "method": "qa_lora",
            "base_model_name_or_path": base[0],
            "revision": base[1],
            "bits": self.bits,
            "group": self.group,
            "scaling": self.scaling,
            "merged": self.merged,
            "layers": widths,
        }
        _write(directory, tensors | rest, config)


def layers_of(model: nn.Module) -> dict[str, GroupLinear]:
    """Name -> quantised layer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GroupLinear)}


def apply(model: Any, directory: Path) -> Any:
    """`model` with the quantised layers of an artifact in place of its own, and the head's values.

    Raises:
        InvalidRequest: it is no such artifact, or one of another base.
    """
    tensors, config = _read(directory)
    for name, d_in in config["layers"].items():
        try:
            there = model.get_submodule(name)
        except AttributeError:
            raise InvalidRequest(
                f"{directory.name} has {name}, which this model lacks: another base?"
            ) from None
        codes, scale, zero = (tensors.pop(f"{name}.{part}") for part in ("codes", "scale", "zero"))
        shape = (
            tuple(reversed(there.weight.shape)) if isinstance(there, Conv1D) else tuple(there.weight.shape)
        )
        if shape != (len(codes), d_in):
            raise InvalidRequest(
                f"{name} is {[len(codes), d_in]} in {directory.name}, the model's {list(shape)}"
            )
        factors = None
        if not config["merged"]:
            factors = tensors.pop(f"{name}.lora_A"), tensors.pop(f"{name}.lora_B")
        made = GroupLinear(codes, scale, zero, config["bits"], d_in, there.bias, config["scaling"], factors)
        _replace(model, name, made.to(there.weight.device).requires_grad_(False))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name not in parameters or parameters[name].shape != tensor.shape:
                raise InvalidRequest(
                    f"{directory.name} has {name}, which this model lacks: another base, or labels?"
                )
            parameters[name].copy_(tensor)
    return model.eval()


def dense(model: Any, directory: Path) -> Any:
    """`model` with what an artifact computes as ordinary weights in its own linear layers.

    Raises:
        InvalidRequest: as `apply`.
    """
    own = {name: model.get_submodule(name) for name in _read(directory)[1]["layers"]}
    apply(model, directory)
    with torch.no_grad():
        for name, layer in layers_of(model).items():
            layer.merge()
            weight_OI = layer.weight
            own[name].weight.copy_(weight_OI.T if isinstance(own[name], Conv1D) else weight_OI)
            _replace(model, name, own[name])
    return model.eval()


def merge(directory: Path, target: Path) -> None:
    """Write the merged form of an artifact that has A and B: the same codes, other zero points."""
    tensors, config = _read(directory)
    for name, d_in in config["layers"].items():
        if config["merged"]:
            break
        scale, zero = tensors[f"{name}.scale"], tensors[f"{name}.zero"]
        layer = GroupLinear(
            tensors[f"{name}.codes"], scale, zero, config["bits"], d_in, None, config["scaling"]
        )
        a, b = tensors.pop(f"{name}.lora_A"), tensors.pop(f"{name}.lora_B")
        tensors[f"{name}.zero"] = layer.merged_zero(a, b)
    _write(target, tensors, {**config, "merged": True})


def _replace(model: Any, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, last, layer)


def _write(directory: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _read(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config = json.loads((directory / CONFIG).read_text())
    if config.get("format") != FORMAT:
        raise InvalidRequest(f"{directory.name}: format {config.get('format')!r} is not {FORMAT!r}")
    return load_file(directory / WEIGHTS), config
