"""Soft prompts by peft: with first values that are the same on every rank, and saved as what they encode.

peft keeps of a prompt only the vectors that its encoder makes. Here they are computed from the gathered
parameters, not by the live module, whose own parameters ZeRO-3 has cut.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn

from peft_service.attached import Attached, head_modules
from peft_service.errors import InvalidRequest
from peft_service.methods import Case
from peft_service.tasks import PEFT_TASKS

ENCODER = "prompt_encoder.default."


class Prompted(Attached):
    """A PeftModel with one prompt."""

    def __init__(self, model: Any, positions: bool = False) -> None:
        """`positions`: rows are padded on the left, and a prefix must not see how far."""
        super().__init__(model)
        self.positions = positions

    def inputs(self, batch: Any) -> dict[str, Any]:
        if not self.positions:
            return {}
        return {"position_ids": (batch.mask_BT.cumsum(1) - 1).clamp_min(0)}

    def save(self, trainable: Mapping[str, Tensor], directory: Path, base: "tuple[str, str | None]") -> None:
        made = encoded(self.model, trainable)
        model: Any = self.model
        model.get_prompt_embedding_to_save = lambda adapter_name: made
        try:
            self.save_peft(model, trainable, directory, base)
        finally:
            del model.get_prompt_embedding_to_save


def encoded(model: Any, trainable: Mapping[str, Tensor]) -> Tensor:
    """What the prompt's encoder makes of its indices: (virtual tokens, width)."""
    config = model.peft_config["default"]
    own = {n.removeprefix(ENCODER): t.float() for n, t in trainable.items() if n.startswith(ENCODER)}
    if own.keys() == {"embedding.weight"}:
        return own["embedding.weight"]
    encoder = type(model.prompt_encoder["default"])(config)
    encoder.load_state_dict(own)
    with torch.no_grad():
        made: Tensor = encoder(torch.arange(config.num_virtual_tokens)[None])[0]
    return made


def attach_prompt(model: Any, case: Case, kind: Any, **fields: Any) -> Any:
    """A PeftModel with peft's prompt configuration `kind`, in float32."""
    from peft import TaskType, get_peft_model

    config = kind(
        task_type=TaskType(PEFT_TASKS[case.task]), modules_to_save=head_modules(model) or None, **fields
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        made = get_peft_model(model, config)
    made.prompt_encoder.float()
    return made


def width_of(model: Any) -> int:
    """Of a token's embedding."""
    return int(model.get_input_embeddings().embedding_dim)


def prefix_shape(model: Any) -> dict[str, int]:
    """peft's fields for a prefix: widths of keys and values with grouped queries and explicit head sizes."""
    config = model.config.get_text_config()

    def first(*names: str) -> int:
        return next((int(found) for name in names if (found := getattr(config, name, None))), 0)

    heads = first("num_attention_heads", "n_head", "num_heads")
    if model.config.is_encoder_decoder:
        heads = first("decoder_attention_heads") or heads  # BART's plain name is the encoder's
    kv_heads = first("num_key_value_heads") or heads
    size = first("head_dim", "d_kv") or first("hidden_size", "n_embd", "d_model") // heads
    if model.config.is_encoder_decoder:
        layers = first("decoder_layers", "num_decoder_layers", "num_layers", "num_hidden_layers")
    else:
        layers = first("num_hidden_layers", "n_layer", "num_layers")
    return {"num_layers": layers, "token_dim": kv_heads * size, "num_attention_heads": kv_heads}


def first_values(model: Any, init: str, count: int, seed: int, text: str | None, tokenizer: Any) -> Tensor:
    """(count, width) embeddings to start with: of random tokens of the vocabulary, or of a text's tokens,
    repeated or cut.

    Raises:
        InvalidRequest: the text has no tokens.
    """
    words: nn.Embedding = model.get_input_embeddings()
    if init == "vocab":
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, words.num_embeddings, (count,), generator=draw)
    else:
        known = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not known:
            raise InvalidRequest(
                f"text: the base's tokenizer makes no tokens of {text!r}. Write words, or leave text out and "
                'set init to "vocab".',
                param="adapter.text",
            )
        ids = torch.tensor((known * (count // len(known) + 1))[:count])
    with gather_params_ctx(list(words.parameters()), modifier_rank=None), torch.no_grad():
        return words.weight[ids.to(words.weight.device)].detach().float().clone()
