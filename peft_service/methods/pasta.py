"""PASTA: a trained vector on the hidden states of special tokens, before each layer.  Yang et al. 2022.

arXiv:2210.04382; not the attention steering of the same name. Which tokens are special: those that the
tokenizer declares, without padding, mask and unknown. On an encoder these are [CLS] and [SEP]; on a decoder
the first token (BOS) and the marks of the chat template; of an encoder-decoder also what the decoder starts
with.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service import sites
from peft_service.errors import InvalidRequest
from peft_service.methods import Capabilities, Case, Material, Method
from peft_service.methods.adapter import NO_SERVER

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape

SAMPLE = 64
"""Rows that are looked through for special tokens."""


class Pasta(Method):
    kind: Literal["pasta"] = "pasta"
    vectors: int = Field(3, ge=1, le=1024)
    """n: the k-th special token of a row has vector k, and all from the n-th on share the last."""
    tokens: tuple[str, ...] | None = Field(None, min_length=1)
    """The tokens that get vectors, as the tokenizer spells them; None: its special tokens."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """On the vectors."""

    learning_rate: ClassVar[float] = 5e-3
    title: ClassVar[str] = "PASTA"
    family: ClassVar[str] = "scale and shift"
    paper: ClassVar[str] = "https://arxiv.org/abs/2210.04382"
    summary: ClassVar[str] = (
        "Vectors on special tokens such as [CLS], before every layer; nothing else changes."
    )
    formula: ClassVar[str] = "h_p + v_k at the k-th special token p of a row; L·n·d values"
    use_when: ClassVar[str] = "Classification and tagging with an encoder, with 0.03 % of its weights."
    limits: ClassVar[str] = (
        "Rows without a special token are answered as the base does. On a decoder it needs a tokenizer that "
        "sets "
        "a first token, or chat rows: only tokens behind a special one see it."
    )
    aliases: ClassVar[dict[str, dict[str, Any]]] = {"parameter_efficient_special_tokens": {}}
    small: ClassVar[dict[str, Any]] = {
        "vectors": 16,
        "tokens": ("<|begin|>", "<|end|>", ":", *"abdefhilnorstuvyĠ"),
    }
    can: ClassVar[Capabilities] = Capabilities(
        packing=False,
        carrier="registered",
        mergeable=False,
        servers=("peft",),
        why={
            "packing": "pasta counts special tokens from the start of a line: which vectors a row gets "
            "would depend on its neighbours",
            "mergeable": "it changes hidden states at some tokens only, which no weight of the base can. "
            "Use ssf",
            "servers": NO_SERVER,
        },
    )

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.attached import Attached
        from peft_service.tuners.pasta import PastaConfig
        from peft_service.tuners.wrapper import attach

        ids = self.ids(model, material)
        return Attached(
            attach(model, case, PastaConfig, token_ids=ids, vectors=self.vectors, dropout=self.dropout)
        )

    def ids(self, model: Any, material: Material) -> list[int]:
        """The tokens that get vectors.

        Raises:
            InvalidRequest: a token is unknown, or none of them is in the rows.
        """
        tokenizer = material.tokenizer
        ids = special(tokenizer) if self.tokens is None else self._named(tokenizer)
        if model.config.is_encoder_decoder:
            ids |= {int(model.config.decoder_start_token_id or 0)}
        ids = {number for number in ids if number < model.get_input_embeddings().num_embeddings}
        rows = material.sample(SAMPLE) if material.sample else []
        wanted = sorted(ids)
        if not wanted or (
            rows and not any(set(wanted) & set(row.tokens_BT.flatten().tolist()) for row in rows)
        ):
            raise InvalidRequest(
                f"pasta puts vectors on special tokens, and the first {len(rows)} rows have none of "
                f"{tokenizer.convert_ids_to_tokens(wanted)}. Train on chat rows, name tokens that are there "
                f"in "
                "`tokens`, or use ssf, which changes every token.",
                param="adapter.tokens",
            )
        return wanted

    def _named(self, tokenizer: Any) -> set[int]:
        known = tokenizer.get_vocab()
        if unknown := [token for token in self.tokens or () if token not in known]:
            raise InvalidRequest(
                f"pasta: the tokenizer has no token {unknown[0]!r}. Its special tokens are "
                f"{tokenizer.convert_ids_to_tokens(sorted(special(tokenizer)))}.",
                param="adapter.tokens",
            )
        return {known[token] for token in self.tokens or ()}

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        places = sites.of_shape(shape)
        return len(places.found(places.layers)) * self.vectors * shape.hidden

    def check(self, shape: "ModelShape", case: Case) -> None:
        try:
            self.trainable(shape, case)
        except ValueError:
            raise sites.unknown(self.kind, shape, "the layers") from None


def special(tokenizer: Any) -> set[int]:
    """Special tokens that stand in texts: named ones and those of a chat template, not padding."""
    ids = set(tokenizer.all_special_ids)
    ids |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return ids - {tokenizer.pad_token_id, tokenizer.mask_token_id, tokenizer.unk_token_id}
