"""LongLoRA at work: shifted sparse attention while the model trains, rotary positions of a longer context.

The artifact is a LoRA with embedding and norms among its `modules_to_save`. Where positions were not changed,
plain peft loads it. Else it is the one part of a composition whose `composite.json` has
`"rope": {"factor": f, "context": T}`, and `artifact.load` applies that to the base first, with `interpolate`.
"""

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from peft_service.artifact import COMPOSITE, COMPOSITE_FORMAT
from peft_service.attached import Attached
from peft_service.errors import InvalidRequest
from peft_service.targets import shortest
from peft_service.tuners.sites import is_norm

PART = "part-0"


def grouped_attention(
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    group: int,
    real_BT: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention within groups of `group` neighbouring tokens, the last of them maybe smaller.

    `real_BT` is true where there is a token; keys elsewhere are not seen. Without it all are seen, which
    right padding allows: it comes after every token.
    """
    batch, length = query_BHTD.shape[0], query_BHTD.shape[2]
    group = min(group, length)
    behind = -length % group
    count = (length + behind) // group

    def cut(x_BHTD: Tensor) -> Tensor:
        x_BHTD = functional.pad(x_BHTD, (0, 0, 0, behind))
        x_BHNGD = x_BHTD.reshape(*x_BHTD.shape[:2], count, group, -1)
        return x_BHNGD.transpose(1, 2).flatten(0, 1)

    seen = None
    if real_BT is not None:
        causal_GG = torch.ones(group, group, dtype=torch.bool, device=real_BT.device).tril()
        keys_NG = functional.pad(real_BT.bool(), (0, behind)).reshape(-1, group)
        # Padding sees itself: a row of a softmax over nothing is not a number, and so would be its gradient.
        itself_GG = torch.eye(group, dtype=torch.bool, device=real_BT.device)
        seen = ((causal_GG & keys_NG[:, None, :]) | itself_GG)[:, None]
    out_NHGD = functional.scaled_dot_product_attention(
        cut(query_BHTD), cut(key_BHTD), cut(value_BHTD),
        attn_mask=seen, dropout_p=dropout, is_causal=seen is None, scale=scale,
    )  # fmt: skip
    out_BNHGD = out_NHGD.reshape(batch, count, *out_NHGD.shape[1:])
    return out_BNHGD.transpose(1, 2).flatten(2, 3)[:, :, :length]


def shifted_sparse_attention(
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    group: int,
    shift: int,
    real_BT: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """S²-Attn, split: the first half of the heads attends in groups [0, G), [G, 2G), …, the second in
    [0, shift), [shift, shift + G), ….  All of them causally."""
    heads, length = query_BHTD.shape[1:3]
    still = heads - heads // 2
    attend = partial(grouped_attention, scale=scale, dropout=dropout)

    def part(of: slice, start: int, end: int, size: int) -> Tensor:
        q, k, v = (x[:, of, start:end] for x in (query_BHTD, key_BHTD, value_BHTD))
        return attend(q, k, v, size, None if real_BT is None else real_BT[:, start:end])

    first = part(slice(0, still), 0, length, group)
    if still == heads:
        return first
    moved, shift = slice(still, heads), min(shift, length)
    pieces = []
    if shift:
        pieces.append(part(moved, 0, shift, shift))
    if shift < length:
        pieces.append(part(moved, shift, length, group))
    return torch.cat([first, torch.cat(pieces, 2)], 1)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    group: int,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls. Shapes: query (B, heads, T, D), key and value (B, kv heads, T, D); (B, T,
    heads, D) comes back."""
    times = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(times, 1) if times > 1 else x for x in (key, value))
    out = shifted_sparse_attention(query, key, value, group, group // 2, attention_mask, scaling, dropout)
    return out.transpose(1, 2).contiguous(), None


def _mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """What `_attend` gets as its mask: (B, T), or None where padding is on the right only.

    T x T of it, as other implementations make, would cost what the groups are to save.
    """
    if attention_mask is None or bool((attention_mask[:, :-1].int() >= attention_mask[:, 1:].int()).all()):
        return None
    return attention_mask.bool()


def register(group: int) -> str:
    """The name under which transformers finds this attention."""
    # Its parameters are part of the name, for transformers hands an implementation nothing of ours.
    name = f"shifted_sparse_{group}"
    AttentionInterface.register(name, partial(_attend, group=group))
    AttentionMaskInterface.register(name, _mask)
    return name


def rope_of(model: Any, length: int) -> dict[str, int] | None:
    """{"factor", "context"} with which the model takes `length` tokens; None where it does already.

    Raises:
        InvalidRequest: its positions are changed already, in a way that this cannot be added to.
    """
    config = model.config
    factor = math.ceil(length / config.max_position_embeddings)
    if factor <= 1:
        return None
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    if kind not in ("default", "linear"):
        raise InvalidRequest(
            f"the base's positions are of the type {kind!r}, to which linear interpolation cannot be added: "
            f"set training.max_seq_len to {config.max_position_embeddings} at most, or take another base.",
            code="method_not_applicable",
            param="training.max_seq_len",
        )
    return {"factor": factor, "context": factor * config.max_position_embeddings}


def interpolate(model: Any, factor: float, context: int) -> None:
    """Divide the positions of a loaded model by `factor`, and say so in its config. In place."""
    config = model.config
    told = dict(config.rope_parameters)
    told["factor"] = told.get("factor", 1.0) * factor
    config.rope_parameters = {**told, "rope_type": "linear"}
    config.max_position_embeddings = context
    for module in list(model.modules()):
        for name, child in module.named_children():
            if hasattr(child, "inv_freq"):
                remade: Any = type(child)
                setattr(module, name, remade(config=config).to(child.inv_freq.device))


class Long(Attached):
    """Trains in groups; at evaluation the model has its own attention back."""

    def __init__(self, model: Any, length: int, share: float, lora: Callable[..., Any]) -> None:
        """`lora(model, …)` puts LoRA on the model.

        Raises:
            InvalidRequest: the base has sliding windows, or positions that cannot be interpolated.
        """
        window = getattr(model.config, "sliding_window", None)
        if window is not None and window < length:
            raise InvalidRequest(
                f"the base attends to the last {window} tokens only, and groups over {length} would change "
                f"that: set training.max_seq_len to {window} at most, or use lora.",
                code="method_not_applicable",
                param="training.max_seq_len",
            )
        self.rope = rope_of(model, length)
        if self.rope:
            interpolate(model, **self.rope)
        self.group = max(2, math.ceil(length * share))
        whole = [name for name, module in model.named_modules() if is_norm(module)]
        embedding = model.get_input_embeddings()
        whole += [name for name, module in model.named_modules() if module is embedding]
        tied = model.get_output_embeddings() is not None and model.config.tie_word_embeddings
        for parameter in model.parameters():
            # Layers do not mix dtypes: norms in float32 would hand float32 to a frozen layer in 16 bits. An
            # engine for 16 bits casts all of it back.
            if parameter.is_floating_point() and not hasattr(parameter, "ds_id"):
                parameter.data = parameter.data.float()
        super().__init__(lora(model, whole=shortest(model, whole), ensure_weight_tying=bool(tied)))
        self.sparse, self.full = register(self.group), model.config._attn_implementation
        self.inner = model
        self.model.register_forward_pre_hook(self._choose)

    def _choose(self, model: nn.Module, arguments: Any) -> None:
        """Before a forward pass."""
        wanted = self.sparse if model.training else self.full
        if self.inner.config._attn_implementation != wanted:
            self.inner.set_attn_implementation(wanted)

    def save(self, trainable: Mapping[str, Tensor], directory: Path, base: "tuple[str, str | None]") -> None:
        # The output head of a tied model is the embedding, under a second name that peft asks for.
        known = {id(p): name for name, p in self.model.named_parameters() if name in trainable}
        again = self.model.named_parameters(remove_duplicate=False)
        trainable = {name: trainable[known[id(p)]] for name, p in again if id(p) in known}
        if self.rope is None:
            self.save_peft(self.model, trainable, directory, base)
            return
        (directory / PART).mkdir(parents=True, exist_ok=True)
        self.save_peft(self.model, trainable, directory / PART, base)
        told = {"format": COMPOSITE_FORMAT, "parts": [PART], "rope": self.rope}
        (directory / COMPOSITE).write_text(json.dumps(told, indent=2) + "\n")
