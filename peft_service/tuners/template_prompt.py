"""Virtual tokens anywhere in a template, at the embedding layer.  Liu et al. 2021, arXiv:2103.10385.

peft's own P_TUNING has them in front only. Here a row of tokens becomes

    [before] prompt [between] answer          (or [before] text [between], where nothing is to be written)

with the virtual tokens as ids beyond the vocabulary, which a wrapper of the embedding layer looks up in a
table of its own. A hook in front of the model puts them in, and one behind it takes what was said at them out
again: a caller sees logits of the tokens it gave. `boundary_B` says how many tokens of a row are the prompt;
without it all are, which is what generation needs.

While it trains, the table is what an encoder makes of trainable vectors: h = MLP(BiLSTM(e)), or an MLP alone.
Only h is kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peft_service.attached import Attached
from peft_service.tuners.registration import register
from peft_service.tuners.wrapper import Wrapper, WrapperConfig, WrapperModel

IGNORE = -100


@dataclass
class TemplatePromptConfig(WrapperConfig):
    before: int = field(default=0)
    """Virtual tokens in front of a row's first token."""
    between: int = field(default=0)
    """Virtual tokens behind the row's prompt."""
    encoder: Literal["lstm", "mlp", "none"] = field(default="none")
    """What makes the virtual tokens while they train; an artifact holds what it made, and says none."""
    width: int = field(default=0)
    vocabulary: int = field(default=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        from peft.utils import PeftType

        self.peft_type = PeftType("TEMPLATE_PROMPT")
        if self.before < 0 or self.between < 0 or self.before + self.between == 0:
            raise ValueError("a template has at least one virtual token, before the text or between.")

    @property
    def count(self) -> int:
        return self.before + self.between


class Table(nn.Module):
    """The virtual tokens themselves: (count, width)."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, width))

    def forward(self) -> Tensor:
        return self.weight


class Encoder(Table):
    """h = MLP(BiLSTM(e)) or MLP(e); the LSTM has two layers of half the width each way."""

    def __init__(self, count: int, width: int, kind: str) -> None:
        super().__init__(count, width)
        self.lstm = (
            nn.LSTM(width, width // 2, num_layers=2, bidirectional=True, batch_first=True)
            if kind == "lstm"
            else None
        )
        # peft's MLP has three layers, the authors' behind the LSTM two.
        sizes = 2 if kind == "lstm" else 3
        layers: list[nn.Module] = [nn.Linear(width, width)]
        for _ in range(sizes - 1):
            layers += [nn.ReLU(), nn.Linear(width, width)]
        self.mlp = nn.Sequential(*layers)

    def forward(self) -> Tensor:
        x = self.weight[None]
        if self.lstm is not None:
            x = self.lstm(x)[0]
        made: Tensor = self.mlp(x)[0]
        return made


class Placeholders(Wrapper):
    """An embedding layer that also knows the virtual tokens: ids from `vocabulary` on."""

    def __init__(self, base_layer: nn.Module, containers: tuple[str, ...], vocabulary: int) -> None:
        super().__init__(base_layer, containers)
        self.vocabulary = vocabulary

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        ids, *rest = args
        names = self.running()
        if not names:
            return self.base_layer(ids, *rest, **kwargs)
        virtual = ids >= self.vocabulary
        words = self.base_layer(torch.where(virtual, 0, ids), *rest, **kwargs)
        table = self.part(names[-1])()
        rows = table[torch.where(virtual, ids - self.vocabulary, 0)].to(words.dtype)
        return torch.where(virtual[..., None], rows, words)


def placed(mask_BT: Tensor, boundary_B: Tensor | None, before: int, between: int) -> tuple[Tensor, Tensor]:
    """(source (B, T + P), position (B, T)): what stands where, and where the row's own tokens went.

    `source` is a token's place in the row, or T + the number of the virtual token. Virtual tokens are
    beside the row's real ones, wherever its padding is.
    """
    rows, length = mask_BT.shape
    device = mask_BT.device
    places = torch.arange(length, device=device).expand(rows, length)
    first_B = torch.where(mask_BT.bool(), places, length).amin(1)
    last_B = torch.where(mask_BT.bool(), places, -1).amax(1)
    end_B = last_B + 1 if boundary_B is None else first_B + boundary_B
    keys = torch.cat(
        [
            2 * places + 1,
            (2 * first_B)[:, None].expand(rows, before),
            (2 * end_B)[:, None].expand(rows, between),
        ],
        1,
    )
    source = keys.argsort(dim=1, stable=True)
    return source, source.argsort(dim=1)[:, :length]


class TemplatePromptModel(WrapperModel):
    prefix = "template_prompt_"
    containers = ("template_prompt_parts",)

    def targets(self, config: Any) -> str:
        import re

        return re.escape(input_embedding(self.model))

    def layer(self, config: Any, name: str, module: nn.Module) -> Wrapper:
        return Placeholders(module, self.containers, config.vocabulary)

    def parts(self, config: Any, name: str, wrapper: Wrapper) -> tuple[nn.Module, ...]:
        if config.encoder == "none":
            return (Table(config.count, config.width),)
        return (Encoder(config.count, config.width, config.encoder),)

    def join(self) -> None:
        if not hasattr(self, "_hooked"):
            self._hooked = True
            self.model.register_forward_pre_hook(self._insert, with_kwargs=True)
            self.model.register_forward_hook(self._remove, with_kwargs=True)
            self._positions: Tensor | None = None

    def _config(self) -> Any:
        """Of the adapter at work, or None."""
        for _, wrapper in self.wrappers():
            for name in wrapper.running():
                return self.peft_config[name]
        return None

    def expanded(
        self, input_ids: Tensor, attention_mask: Tensor | None, boundary_B: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(ids, mask, source, position) with the virtual tokens in."""
        config = self._config()
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        source, position = placed(mask, boundary_B, config.before, config.between)
        rows, count = len(input_ids), config.count
        virtual = torch.arange(count, device=input_ids.device) + config.vocabulary
        ids = torch.cat([input_ids, virtual.expand(rows, count)], 1).gather(1, source)
        whole = torch.cat([mask, mask.new_ones(rows, count)], 1).gather(1, source)
        return ids, whole, source, position

    def _insert(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        boundary = kwargs.pop("boundary_B", None)
        self._positions = None
        ids = kwargs.get("input_ids")
        if self._config() is None or ids is None or kwargs.get("past_key_values") is not None:
            return args, kwargs
        if kwargs.get("position_ids") is not None or kwargs.get("labels") is not None:
            raise ValueError(
                "template prompts: give input_ids and attention_mask, without positions and labels."
            )
        ids, mask, source, position = self.expanded(ids, kwargs.get("attention_mask"), boundary)
        kwargs |= {"input_ids": ids, "attention_mask": mask}
        if (types := kwargs.get("token_type_ids")) is not None:
            extra = types.new_zeros(len(types), ids.shape[1] - types.shape[1])
            kwargs["token_type_ids"] = torch.cat([types, extra], 1).gather(1, source)
        self._positions = position
        return args, kwargs

    def _remove(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        position, self._positions = self._positions, None
        if position is None or self.model.config.is_encoder_decoder:
            return output
        for name in ("logits", "start_logits", "end_logits"):
            said = output.get(name)
            if said is None or (name == "logits" and said.ndim != 3):
                continue
            index = (
                position if said.ndim == 2 else position[..., None].expand(*position.shape, said.shape[-1])
            )
            output[name] = said.gather(1, index)
        return output

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' generate behind the template; what comes back are the new tokens alone, as where
        a model is given embeddings.

        Raises:
            ValueError: the base is an encoder-decoder.
        """
        if self._config() is None or self.model.config.is_encoder_decoder:
            if self._config() is not None:
                raise ValueError(
                    "template prompts: generation is for decoders; of an encoder-decoder call forward."
                )
            return self.model.generate(*args, **kwargs)
        ids, mask, _, _ = self.expanded(kwargs.pop("input_ids"), kwargs.pop("attention_mask", None), None)
        embeds = self.model.get_input_embeddings()(ids)
        return self.model.generate(*args, inputs_embeds=embeds, attention_mask=mask, **kwargs)


def input_embedding(model: Any) -> str:
    """Name of the module that embeds what a user gives: of an encoder-decoder the encoder's."""
    inner = model.get_encoder() if model.config.is_encoder_decoder else model
    wanted = inner.get_input_embeddings()
    return str(next(name for name, module in model.named_modules() if module is wanted))


class TemplatePrompted(Attached):
    """Says where a row's prompt ends, and saves what the encoder makes."""

    def __init__(self, model: nn.Module, config: TemplatePromptConfig, writes: bool) -> None:
        super().__init__(model)
        self.config, self.writes = config, writes

    def inputs(self, batch: Any) -> dict[str, Any]:
        if not self.writes or batch.decoder_BT is not None:
            return {}
        places = torch.arange(batch.labels_BT.shape[1], device=batch.labels_BT.device)
        target_BT = batch.labels_BT != IGNORE
        first_B = torch.where(target_BT, places, batch.mask_BT.sum(1, keepdim=True)).amin(1)
        return {"boundary_B": first_B}

    def save(self, trainable: Mapping[str, Tensor], directory: Path, base: "tuple[str, str | None]") -> None:
        mark = ".template_prompt_parts.default."
        own = {name.partition(mark)[2]: t.float() for name, t in trainable.items() if mark in name}
        where = next(name.partition(mark)[0] for name in trainable if mark in name)
        kept = {name: tensor for name, tensor in trainable.items() if mark not in name}
        kept[f"{where}{mark}weight"] = table_of(self.config, own)
        self.save_peft(self.model, kept, directory, base, encoder="none")


def table_of(config: TemplatePromptConfig, tensors: Mapping[str, Tensor]) -> Tensor:
    """What the encoder with these parameters makes: (count, width)."""
    part: Table = (
        Table(config.count, config.width)
        if config.encoder == "none"
        else Encoder(config.count, config.width, config.encoder)
    )
    part.load_state_dict(dict(tensors))
    with torch.no_grad():
        made: Tensor = part()
        return made.clone()


register("template_prompt", TemplatePromptConfig, TemplatePromptModel)
