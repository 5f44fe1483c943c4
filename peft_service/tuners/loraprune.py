"""LoRAPrune at work: importance from LoRA's gradients, masks in the forward pass, the smaller model.

A mask multiplies what o_proj and down_proj read. A head or channel that they do not see is as good as cut
out, with all of its rows in q, k, v, gate and up; so the model that is sliced in the end answers as the
masked one.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_service.attached import Attached
from peft_service.methods.loraprune import ATTENTION, FEED_FORWARD
from peft_service.tuners.in_place import WholeModel
from peft_service.tuners.low_rank import base_weight, down, lora_layers, names_of, up

if TYPE_CHECKING:
    from peft_service.train import Engine

_PREFIX = "base_model.model."
_ENDS = {"o_proj": 1, "down_proj": 1}
"""Of these layers a group has columns, of the others rows."""


def estimated_gradient(a: Tensor, b: Tensor, gradient_a: Tensor, gradient_b: Tensor) -> Tensor:
    """ĝ (d_out, d_in) = g_B A + B g_A - g_B g_A: how far a step of rate 1 moves B A, with its sign turned."""
    estimate: Tensor = gradient_b @ a + b @ gradient_a - gradient_b @ gradient_a
    return estimate


def importance(weight_OI: Tensor, gradient_OI: Tensor, groups: int, dim: int) -> Tensor:
    """(groups,): |gradient ⊙ weight| summed over each group's neighbouring rows (dim 0) or columns (1),
    divided by the norm of all of them, so that no module outweighs the others."""
    by_line = (gradient_OI * weight_OI).abs().sum(1 - dim)
    by_group = by_line.view(groups, -1).sum(1)
    relative: Tensor = by_group / (by_group.norm() + 1e-8)
    return relative


class Block:
    """A layer's attention or feed-forward network: its LoRA layers, its groups, and its mask."""

    def __init__(self, name: str, layers: Mapping[str, Any], groups: int) -> None:
        self.name, self.groups = name, groups
        self.layers = dict(layers)
        """Layer's name -> LoRA layer; the last one reads what the mask multiplies."""
        self.attention = any(name.endswith(".o_proj") for name in layers)
        self.last: Any = self.layers[list(self.layers)[-1]]
        device = self.last.get_base_layer().weight.device
        mask = torch.ones(groups, dtype=torch.bool, device=device)
        self.last.register_buffer("group_mask", mask, persistent=False)
        self.last.register_forward_pre_hook(_masked)

    @property
    def mask(self) -> Tensor:
        """bool (groups,): false where a group is pruned."""
        found: Tensor = self.last.group_mask
        return found

    def prune(self, scores: Tensor, keep: int) -> None:
        """Mask all but `keep` groups: the least scores go, of equal ones the last; none comes back."""
        scores = scores.cpu().double().masked_fill(~self.mask.cpu(), -1.0)
        order = torch.sort(scores, descending=True, stable=True).indices
        mask = torch.zeros(self.groups, dtype=torch.bool)
        mask[order[:keep]] = True
        self.mask.copy_(mask.to(self.mask.device) & self.mask)


def _masked(layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    x, *rest = arguments
    mask: Any = layer.group_mask
    return (x * mask.repeat_interleave(x.shape[-1] // len(mask)).to(x.dtype), *rest)


class Pruned(Attached):
    """LoRA on a decoder whose layers lose groups while it trains."""

    def __init__(
        self,
        model: Any,
        scaling: float,
        keep: Sequence[tuple[int, int]],
        looks: frozenset[int],
        memory: float,
    ) -> None:
        """`keep[n]` has the (key-value heads, channels) that a layer has after n updates, `looks` the n at
        which groups are masked."""
        super().__init__(model)
        self.scaling, self.keep, self.looks, self.memory = scaling, keep, looks, memory
        config = model.get_base_model().config
        self.config = config
        found: dict[str, dict[str, Any]] = {}
        for name, layer in lora_layers(model).items():
            parent, _, part = name.rpartition(".")
            if part in (*ATTENTION, *FEED_FORWARD):
                found.setdefault(parent, {})[name] = layer
        self.blocks: list[Block] = []
        for parent, layers in found.items():
            attention = any(name.endswith("o_proj") for name in layers)
            order = ATTENTION if attention else FEED_FORWARD
            ordered = {f"{parent}.{part}": layers[f"{parent}.{part}"] for part in order}
            groups = config.num_key_value_heads if attention else config.intermediate_size
            self.blocks.append(Block(parent, ordered, groups))
        self.mean = {block.name: torch.zeros(block.groups) for block in self.blocks}

    def before_update(self, engine: "Engine", step: int) -> None:
        done = step + 1
        kv_heads, channels = self.keep[min(done, len(self.keep) - 1)]
        with torch.no_grad():
            for block in self.blocks:
                found = self.scores(engine, block).cpu()
                mean = self.mean[block.name]
                self.mean[block.name] = self.memory * mean + (1 - self.memory) * found
                if done in self.looks:
                    block.prune(self.mean[block.name], kv_heads if block.attention else channels)

    def scores(self, engine: "Engine", block: Block) -> Tensor:
        """Importance (groups,) of the block's groups in this step, over all of its layers. Collective."""
        total: Tensor | None = None
        for name, layer in block.layers.items():
            of_a, of_b = names_of(name)
            gradient_a, gradient_b = engine.gradient(of_a), engine.gradient(of_b)
            a, b = down(layer).weight.detach().float(), up(layer).weight.detach().float()
            weight = base_weight(layer) + self.scaling * (b @ a)
            gradient = estimated_gradient(a, b, gradient_a, gradient_b)
            dim = _ENDS.get(name.rpartition(".")[2], 0)
            part = importance(weight, gradient, block.groups, dim)
            total = part if total is None else total + part
        assert total is not None, "a block has layers"
        return total

    def state(self) -> dict[str, Tensor]:
        return {f"mask.{block.name}": block.mask.cpu().clone() for block in self.blocks} | {
            f"mean.{name}": mean.clone() for name, mean in self.mean.items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for block in self.blocks:
            block.mask.copy_(state[f"mask.{block.name}"].bool())
            self.mean[block.name] = state[f"mean.{block.name}"].float().clone()

    def save(self, trainable: Mapping[str, Tensor], directory: Path, base: "tuple[str, str | None]") -> None:
        model: Any = self.model
        inner = model.get_base_model()
        tensors, inner.config = self.sliced(trainable)
        try:
            inner.save_pretrained(directory, state_dict=tensors, max_shard_size=WholeModel.SHARD)
        finally:
            inner.config = self.config

    def sliced(self, trainable: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
        """(tensors, config) of the smaller transformers model: W + s B A, computed in float32, without the
        groups that are masked. All layers have one width, for as many are masked in each."""
        model: Any = self.model
        inner = model.get_base_model()
        tied = set(getattr(inner, "all_tied_weights_keys", None) or ())
        tensors: dict[str, Tensor] = {}
        for name, tensor in inner.state_dict().items():
            plain = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
            if not (plain in tied or ".lora_" in name or ".original_module." in name):
                tensors[plain] = trainable.get(f"{_PREFIX}{name}", tensor).detach().cpu()
        for block in self.blocks:
            kept = block.mask.cpu().nonzero().flatten()
            for name, layer in block.layers.items():
                a, b = (trainable[part].float().cpu() for part in names_of(name))
                plain, dim = name.removeprefix(_PREFIX), _ENDS.get(name.rpartition(".")[2], 0)
                stored = tensors[f"{plain}.weight"]
                weight = base_weight(layer).cpu() + self.scaling * (b @ a)
                tensors[f"{plain}.weight"] = _without(weight, kept, block.groups, dim).to(stored.dtype)
                if dim == 0 and f"{plain}.bias" in tensors:
                    tensors[f"{plain}.bias"] = _without(tensors[f"{plain}.bias"], kept, block.groups, 0)
        config = copy.deepcopy(self.config)
        left = {block.attention: int(block.mask.sum()) for block in self.blocks}
        ratio = config.num_attention_heads // config.num_key_value_heads
        # Said by itself, for a config derives it from the number of heads where it is not.
        config.head_dim = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        config.num_key_value_heads, config.num_attention_heads = left[True], left[True] * ratio
        config.intermediate_size = left[False]
        config.use_cache = True  # it was off for training only
        config.dtype = next(iter(tensors.values())).dtype
        return tensors, config


def _without(tensor: Tensor, kept: Tensor, groups: int, dim: int) -> Tensor:
    """`tensor` with only the groups `kept` of its `dim`, each of neighbouring lines."""
    lines = torch.arange(tensor.shape[dim]).view(groups, -1)[kept].flatten()
    return tensor.index_select(dim, lines).contiguous()
