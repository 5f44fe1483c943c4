"""PASTA: a trained vector on the hidden states of special tokens, before each layer's self-attention.

Yang et al. 2022, arXiv:2210.04382; not the attention steering of the same name. The vector (d,) of layer l
for the k-th special token of a row (`index_by="occurrence"`; from the last vector on, all share it) or for
its id (`index_by="id"`) is added to the layer's input, and starts at zero. All other positions get the very
input they had. Parameters: L · n · d. Token ids are read at the embedding, so `inputs_embeds` are refused.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft.utils import PeftType
from torch import Tensor, nn

from peft_service.tuners import side_cache, sites
from peft_service.tuners.registration import register
from peft_service.tuners.wrapper import Wrapper, WrapperConfig, WrapperModel


@dataclass
class PastaConfig(WrapperConfig):
    token_ids: list[int] = field(default_factory=list)
    """The special tokens."""
    index_by: Literal["occurrence", "id"] = field(default="occurrence")
    vectors: int | None = field(default=None)
    """n; None: as many as there are token ids. With index_by="id" it is always that."""
    dropout: float = field(default=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("PASTA")
        self.token_ids = sorted(set(self.token_ids))
        if not self.token_ids or self.token_ids[0] < 0:
            raise ValueError(f"token_ids are at least one id, none negative; not {self.token_ids}.")
        if self.index_by not in ("occurrence", "id"):
            raise ValueError(f'index_by is "occurrence" or "id", not {self.index_by!r}.')
        if self.vectors is None:
            self.vectors = len(self.token_ids)
        if self.vectors < 1 or (self.index_by == "id" and self.vectors != len(self.token_ids)):
            raise ValueError(
                f"vectors is at least 1, and one a token id if index_by is id; not {self.vectors}."
            )


class Seen:
    """The token ids of the embedding that ran last, within one pass of the whole model."""

    def __init__(self) -> None:
        self.ids: Tensor | None = None
        self.handles: list[Any] = []

    def watch(self, model: nn.Module) -> None:
        table: Any = model.get_input_embeddings()  # type: ignore[operator]
        # Encoder-decoders have several modules over one table; a wrapper would miss the others.
        for module in model.modules():
            if isinstance(module, nn.Embedding) and (module is table or module.weight is table.weight):
                self.handles.append(module.register_forward_pre_hook(self.see, with_kwargs=True))
        self.handles.append(model.register_forward_pre_hook(self.begin, with_kwargs=True))
        self.handles.append(model.register_forward_hook(self.end, always_call=True))

    def unwatch(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.ids = args[0] if args else kwargs["input"]

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.ids = None
        for name in ("inputs_embeds", "decoder_inputs_embeds"):
            if kwargs.get(name) is not None:
                raise ValueError(f"PASTA needs token ids, and {name} has none; pass input_ids.")

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.ids = None

    def of(self, hidden_BTD: Tensor) -> Tensor:
        """Token ids (B, T) of these hidden states."""
        if self.ids is None or self.ids.shape != hidden_BTD.shape[:2]:
            raise ValueError("PASTA needs the token ids of its input; pass input_ids, not embeddings.")
        return self.ids


class Vectors(nn.Module):
    """h (B, T, d) and the vector's number at each position (B, T), -1 for none, to h + vectors."""

    def __init__(self, number: int, width: int, dropout: float, zero: bool) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.zeros(number, width) if zero else torch.randn(number, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, h_BTD: Tensor, number_BT: Tensor) -> Tensor:
        chosen = self.dropout(nn.functional.embedding(number_BT.clamp(min=0), self.vectors))
        there = number_BT[..., None] >= 0
        return torch.where(there, (h_BTD + chosen).to(h_BTD.dtype), h_BTD)


class PastaLayer(Wrapper):
    """Around a transformer layer: changes the hidden states that go in."""

    seen: Seen
    layers = 0
    settings: dict[str, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        names = self.running()
        if names:
            called = side_cache.arguments(self.get_base_layer(), args, kwargs)
            hidden: Tensor = called["hidden_states"]
            ids = self.seen.of(hidden)
            for name in names:
                hidden = self.part(name)(hidden, self.numbers(name, ids, called.get("past_key_values")))
            if args:
                args = (hidden, *args[1:])
            else:
                kwargs = {**kwargs, "hidden_states": hidden}
        return self.base_layer(*args, **kwargs)

    def numbers(self, adapter_name: str, ids_BT: Tensor, cache: Any) -> Tensor:
        """Which vector each position gets (B, T), -1 for none."""
        config = self.settings[adapter_name]
        wanted = torch.tensor(config.token_ids, device=ids_BT.device)
        same = ids_BT[..., None] == wanted
        special = same.any(-1)
        if config.index_by == "id":
            numbers = same.int().argmax(-1)
        else:
            flags = special[:, None, :, None].float()
            if cache is not None:
                flags, _ = side_cache.remember(cache, (id(self), adapter_name), flags, flags, self.layers)
            counted = flags[:, 0, :, 0].cumsum(-1)[:, -ids_BT.shape[1] :]
            numbers = (counted.long() - 1).clamp(max=config.vectors - 1)
        return torch.where(special, numbers, -1)


class PastaModel(WrapperModel):
    prefix = "pasta_"
    containers = ("pasta_parts",)

    def targets(self, config: Any) -> str:
        return sites.layers_of(self.model)

    def layer(self, config: Any, name: str, module: nn.Module) -> PastaLayer:
        wrapper = PastaLayer(module, self.containers)
        wrapper.layers = side_cache.decoder_layers(self.model)
        # Shared with the tuner, so that a layer knows the settings of all adapters.
        wrapper.settings = self.peft_config
        return wrapper

    def parts(self, config: Any, name: str, wrapper: Wrapper) -> tuple[nn.Module, ...]:
        width = sites.hidden_size(self.model)
        return (Vectors(config.vectors, width, config.dropout, config.init_weights),)

    def join(self) -> None:
        wrappers: list[Any] = [wrapper for _, wrapper in self.wrappers()]
        seen = next((w.seen for w in wrappers if "seen" in w.__dict__), None)
        if seen is None:
            seen = Seen()
            seen.watch(self.model)
        for wrapper in wrappers:
            wrapper.seen = seen
            wrapper.settings = {**wrapper.settings, **self.peft_config}

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        watching = {id(w.seen): w.seen for _, w in self.wrappers()}
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for seen in watching.values():
            seen.unwatch()
        return model


register("pasta", PastaConfig, PastaModel)
