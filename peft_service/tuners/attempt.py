"""Attention over frozen source prompts, at the embedding layer.  Asai et al. 2022, arXiv:2205.11961.

With source prompts P_1 … P_S, the target prompt P_{S+1} = P_target, and the row's embedded tokens x:

    P_row = P_target + Σ_j a_j P_j        a = softmax_j(P̂_j · LN(W_up SiLU(W_down x̂)) / T)

x̂ and P̂_j are maxima over tokens, each of d numbers; T is d·e. x̂ is of the row's prompt alone (`boundary_B`
says how long it is; without it all is prompt): an answer would be told to the virtual tokens in front of it,
and could not be there when it is to be written. Where a row has no prompt at all, x̂ is zero.

Virtual tokens get into a row as in `template_prompt`, all of them in front of its first token. The sources
are a buffer, not parameters: ZeRO-3 cuts parameters, also those that do not train.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_service.attached import Attached, head_modules
from peft_service.methods import Case
from peft_service.tasks import PEFT_TASKS
from peft_service.tuners import prompts
from peft_service.tuners.registration import register
from peft_service.tuners.template_prompt import (
    Placeholders,
    TemplatePromptConfig,
    TemplatePrompted,
    TemplatePromptModel,
    input_embedding,
)
from peft_service.tuners.wrapper import Wrapper

if TYPE_CHECKING:
    from peft_service.methods.attempt import Attempt

PART = ".attempt_parts.default."
ATTENTION = (f"{PART}down.", f"{PART}up.", f"{PART}norm.")


@dataclass
class AttemptConfig(TemplatePromptConfig):
    """`before` is the number of virtual tokens; `between` and `encoder` stay as they are."""

    sources: int = field(default=0)
    size: int = field(default=100)
    """Rows of W_down."""
    temperature: float = field(default=0.0)
    """T; 0: d·e."""

    def __post_init__(self) -> None:
        super().__post_init__()
        from peft.utils import PeftType

        self.peft_type = PeftType("ATTEMPT")
        if self.between or self.encoder != "none":
            raise ValueError(
                "ATTEMPT: all virtual tokens are in front of the text, and no encoder makes them."
            )


class Mixture(nn.Module):
    """P_row of every row.

    Shapes: P virtual tokens, d width, S sources, r size, B rows, T tokens.
    """

    sources: Tensor

    def __init__(self, sources: int, count: int, width: int, size: int, temperature: float) -> None:
        super().__init__()
        self.target = nn.Parameter(torch.randn(count, width))
        self.down = nn.Linear(width, size, bias=False)
        self.up = nn.Linear(size, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.temperature = temperature or width * math.e
        # No number until they are given: a file that lacks them must not pass for one.
        self.register_buffer("sources", torch.full((sources, count, width), math.nan))

    def all_prompts(self) -> Tensor:
        """(S + 1, P, d), the target last."""
        return torch.cat([self.sources.to(self.target.dtype), self.target[None]])

    def attention(self, words_BTd: Tensor, pooled_BT: Tensor) -> Tensor:
        """a, (B, S + 1), float32; `pooled_BT` says which tokens x̂ is of."""
        taken = pooled_BT.bool()
        most_Bd = words_BTd.masked_fill(~taken[..., None], -math.inf).amax(1)
        most_Bd = torch.where(taken.any(1, keepdim=True), most_Bd, 0).to(self.target.dtype)
        query_Bd = self.norm(self.up(nn.functional.silu(self.down(most_Bd))))
        wide = torch.promote_types(query_Bd.dtype, torch.float32)
        keys_Sd = self.all_prompts().amax(1).to(wide)
        a_BS: Tensor = (query_Bd.to(wide) @ keys_Sd.T / self.temperature).softmax(-1)
        return a_BS

    def forward(self, words_BTd: Tensor, pooled_BT: Tensor) -> Tensor:
        """P_row, (B, P, d)."""
        a_BS = self.attention(words_BTd, pooled_BT)
        mixed = torch.einsum("bs,spd->bpd", a_BS, self.all_prompts().to(a_BS.dtype))
        return self.target + mixed


class MixedPlaceholders(Placeholders):
    """An embedding layer whose virtual tokens depend on the row's other ones."""

    pooled_BT: Tensor | None = None
    """Which tokens of the rows about to be embedded x̂ is of; None: these rows have no virtual tokens."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        ids, *rest = args
        names = self.running()
        if not names or self.pooled_BT is None:
            return self.base_layer(ids, *rest, **kwargs)
        virtual = ids >= self.vocabulary
        words = self.base_layer(torch.where(virtual, 0, ids), *rest, **kwargs)
        made_BPd = self.part(names[-1])(words, self.pooled_BT).to(words.dtype)
        which = torch.where(virtual, ids - self.vocabulary, 0)
        rows = made_BPd.gather(1, which[..., None].expand(*which.shape, made_BPd.shape[-1]))
        return torch.where(virtual[..., None], rows, words)


class AttemptModel(TemplatePromptModel):
    prefix = "attempt_"
    containers = ("attempt_parts",)

    def layer(self, config: Any, name: str, module: nn.Module) -> Wrapper:
        return MixedPlaceholders(module, self.containers, config.vocabulary)

    def parts(self, config: Any, name: str, wrapper: Wrapper) -> tuple[nn.Module, ...]:
        return (Mixture(config.sources, config.count, config.width, config.size, config.temperature),)

    def _pool(self, pooled_BT: Tensor | None) -> None:
        for _, wrapper in self.wrappers():
            if isinstance(wrapper, MixedPlaceholders):
                wrapper.pooled_BT = pooled_BT

    def expanded(
        self, input_ids: Tensor, attention_mask: Tensor | None, boundary_B: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(ids, mask, source, position) with the virtual tokens in; the embedding layer is told which tokens
        are the rows' prompts."""
        ids, mask, source, position = super().expanded(input_ids, attention_mask, boundary_B)
        real_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        pooled_BT = real_BT.bool()
        if boundary_B is not None:
            pooled_BT = pooled_BT & (real_BT.cumsum(1) <= boundary_B[:, None])
        virtual = pooled_BT.new_zeros(len(ids), ids.shape[1] - input_ids.shape[1])
        self._pool(torch.cat([pooled_BT, virtual], 1).gather(1, source))
        return ids, mask, source, position

    def _insert(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        self._pool(None)
        return super()._insert(module, args, kwargs)

    def _remove(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        self._pool(None)
        return super()._remove(module, args, kwargs, output)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' generate behind P_row; what comes back is what it returns where a model is given
        embeddings: of a decoder the new tokens alone."""
        if self._config() is None:
            return self.model.generate(*args, **kwargs)
        ids, mask, _, _ = self.expanded(kwargs.pop("input_ids"), kwargs.pop("attention_mask", None), None)
        embeds = self.model.get_submodule(input_embedding(self.model))(ids)
        self._pool(None)
        return self.model.generate(*args, inputs_embeds=embeds, attention_mask=mask, **kwargs)


class Attempted(TemplatePrompted):
    """Says where a row's prompt ends, gives the attention a rate of its own, and saves the sources."""

    def __init__(
        self,
        model: nn.Module,
        config: AttemptConfig,
        writes: bool,
        sources_SPd: Tensor,
        attention_rate: float,
    ) -> None:
        super().__init__(model, config, writes)
        self.attention_rate = attention_rate
        # An engine may hold the module in bf16, its buffers too; the file has what the sources' files had.
        self.sources_SPd = sources_SPd.detach().float().cpu().clone()

    def ratio(self, name: str) -> float:
        return self.attention_rate if any(mark in name for mark in ATTENTION) else 1.0

    def save(self, trainable: Mapping[str, Tensor], directory: Path, base: "tuple[str, str | None]") -> None:
        where = next(name.partition(PART)[0] for name in trainable if PART in name)
        self.save_peft(self.model, {**trainable, f"{where}{PART}sources": self.sources_SPd}, directory, base)


def attach(model: Any, case: Case, method: "Attempt", sources_SPd: Tensor) -> Attached:
    """A PeftModel with a mixture of these sources; P_target starts as embeddings of random tokens."""
    from peft import TaskType, get_peft_model

    count, tokens, width = sources_SPd.shape
    embedding = model.get_submodule(input_embedding(model))
    config = AttemptConfig(
        before=tokens,
        width=width,
        vocabulary=embedding.num_embeddings,
        sources=count,
        size=method.size,
        temperature=method.temperature or 0.0,
        modules_to_save=head_modules(model) or None,
        task_type=TaskType(PEFT_TASKS[case.task]),
    )
    first = prompts.first_values(model, "vocab", tokens, case.seed, None, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        made = get_peft_model(model, config)
    mixture = mixture_of(made)
    with torch.no_grad():
        mixture.target.copy_(first)
        mixture.sources.copy_(sources_SPd)
    return Attempted(made, config, case.task == "causal_lm", sources_SPd, method.attention_rate)


def mixture_of(model: nn.Module) -> Mixture:
    """The one in this model."""
    return next(module for module in model.modules() if isinstance(module, Mixture))


register("attempt", AttemptConfig, AttemptModel)
