"""LoRAPrune: a LoRA that removes heads and channels while it trains; the result is a smaller model.

Zhang et al. 2023, arXiv:2305.18403. The gradient of a frozen W is estimated from those of A and B, which
train: ĝ = g_B A + B g_A - g_B g_A. A weight's importance is |ĝ ⊙ (W + s B A)|; a group's is the sum over its
weights, each module's divided by their norm, averaged over all steps. Groups are the key-value heads (the
rows of q, k, v and columns of o of all query heads that share one) and the channels (rows of gate and up,
columns of down). Every `every` steps the least important of each layer are masked, up to
sparsity (1 - (1 - t)^3) of them; at the end they are cut out of W + s B A.

Two deviations. The paper leaves the first tenth of the layers and the last one whole: a transformers config
has one width for all layers, so here every layer loses the same. And a group that is masked stays so.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service.errors import InvalidRequest
from peft_service.methods import Capabilities, Case, Material, Method

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma")
"""Decoders with these seven linear layers a block, whose config can say any number of heads and channels."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


class LoRAPrune(Method):
    kind: Literal["loraprune"] = "loraprune"
    rank: int = Field(8, ge=1, le=512)
    """r, the rows of A and columns of B."""
    alpha: int = Field(16, ge=1, le=4096)
    """What is added is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of A."""
    sparsity: float = Field(0.5, gt=0, lt=1)
    """The part of each layer's channels, and of its key-value heads as far as whole ones allow, that goes."""
    heads: bool = True
    """Whether heads are pruned; channels always are."""
    every: int = Field(10, ge=1)
    """Steps from one pruning to the next."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Part of the steps before anything is pruned."""
    cooldown: float = Field(0.1, ge=0, lt=1)
    """Part of the steps after the last group has gone."""
    memory: float = Field(0.9, ge=0, lt=1)
    """Of the running mean of importance, which every step adds to."""

    learning_rate: ClassVar[float] = 1e-4
    title: ClassVar[str] = "LoRAPrune"
    family: ClassVar[str] = "low rank"
    paper: ClassVar[str] = "https://arxiv.org/abs/2305.18403"
    summary: ClassVar[str] = (
        "LoRA that prunes heads and channels while it trains; the result is a smaller model."
    )
    formula: ClassVar[str] = (
        "importance = |(g_B A + B g_A - g_B g_A) * (W + s B A)|, summed by group; rank * (d_in + d_out) "
        "values a layer train"
    )
    use_when: ClassVar[str] = (
        "The model is to be smaller and faster on any server, and may lose some quality."
    )
    limits: ClassVar[str] = (
        "Decoders of the llama kind. The estimate only correlates with the true gradient. Every layer loses "
        "the same number of heads and channels, since a transformers config has one width for all; of heads, "
        "only whole key-value heads, and for llama numbers that divide the hidden size."
    )
    aliases: ClassVar[dict[str, dict[str, Any]]] = {"lora_prune": {}}
    small: ClassVar[dict[str, Any]] = {"rank": 4, "alpha": 8, "every": 1}
    can: ClassVar[Capabilities] = Capabilities(
        architectures=("decoder",),
        nf4=False,
        zero_stages=(0, 1, 2),
        mergeable=False,
        hot_switch=False,
        carrier="model",
        servers=("vllm", "ray_serve_llm"),
        why={
            "architectures": f"its groups are those of the decoders {', '.join(MODEL_TYPES)}. LoRA works on "
            "every architecture, without making the model smaller",
            "nf4": "the result is a smaller checkpoint of full weights, and those of four bits are only near "
            "them. Leave base.quantize out",
            "zero_stages": "the checkpoint is cut out of the base's frozen weights, which stage 3 leaves in "
            "pieces",
            "mergeable": "the artifact is the whole model already, nothing is left to merge it into",
            "hot_switch": "every result is a whole model of its own shape. LoRA's adapters can be switched",
        },
    )

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        from peft_service.tuners.loraprune import Pruned
        from peft_service.tuners.low_rank import attach_lora

        config = model.config
        adapted_model = attach_lora(
            model,
            case,
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            targets=(*ATTENTION, *FEED_FORWARD),
        )
        keep = [
            self.kept(
                self.share(done, case.steps),
                config.model_type,
                config.hidden_size,
                config.num_attention_heads,
                config.num_key_value_heads,
                config.intermediate_size,
            )
            for done in range(case.steps + 1)
        ]
        return Pruned(adapted_model, self.alpha / self.rank, keep, self.looks(case.steps), self.memory)

    def share(self, done: int, steps: int) -> float:
        """The part of the groups that is gone after `done` of `steps` updates: cubic, up to `sparsity`."""
        start, end = self.warmup * steps, (1 - self.cooldown) * steps
        if done >= end:
            return self.sparsity
        left = 1 - max(0.0, done - start) / (end - start)
        return float(self.sparsity * (1 - left**3))

    def looks(self, steps: int) -> frozenset[int]:
        """The numbers of finished updates at which groups are masked."""
        last = next((done for done in range(1, steps + 1) if self.share(done, steps) == self.sparsity), steps)
        return frozenset({*range(self.every, steps + 1, self.every), last, steps})

    def kept(
        self, share: float, model_type: str, hidden: int, heads: int, kv_heads: int, channels: int
    ) -> tuple[int, int]:
        """(key-value heads, channels) that a layer still has when `share` of them should have gone.

        Never fewer heads than the share leaves: a transformers config of a llama takes only numbers of query
        heads that divide the hidden size.
        """
        left = max(1, round((1 - share) * channels))
        if not self.heads:
            return kv_heads, left
        ratio = heads // kv_heads
        able = [n for n in range(1, kv_heads + 1) if model_type != "llama" or hidden % (n * ratio) == 0]
        wanted = (1 - share) * kv_heads - 1e-9
        return min((n for n in able if n >= wanted), default=kv_heads), left

    def final(self, shape: "ModelShape") -> tuple[int, int]:
        """(key-value heads, channels) of a layer of the result."""
        return self.kept(
            self.sparsity, shape.model_type, shape.hidden, shape.heads, shape.kv_heads, shape.intermediate
        )

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        return sum(self.rank * (d_in + d_out) for _, d_out, d_in in shape.linears)

    def stored(self, shape: "ModelShape", case: Case) -> int:
        """Parameters of the smaller model."""
        kv_heads, channels = self.final(shape)
        heads_out = shape.kv_heads - kv_heads
        channels_out = shape.intermediate - channels
        per_head = dict.fromkeys(("k_proj", "v_proj"), shape.head_dim)
        per_head |= dict.fromkeys(("q_proj", "o_proj"), shape.head_dim * (shape.heads // shape.kv_heads))
        gone = 0
        for name, d_out, d_in in shape.linears:
            part = name.rpartition(".")[2]
            other = d_in if part not in ("o_proj", "down_proj") else d_out
            gone += other * (heads_out * per_head[part] if part in per_head else channels_out)
        for name, _ in shape.biases:
            part = name.split(".")[-2]
            if part in ("o_proj", "down_proj") or "norm" in part:
                continue
            gone += heads_out * per_head[part] if part in per_head else channels_out
        return shape.parameters - gone

    def check(self, shape: "ModelShape", case: Case) -> None:
        parts = {name.rpartition(".")[2] for name, _, _ in shape.linears}
        if shape.model_type not in MODEL_TYPES or parts != {*ATTENTION, *FEED_FORWARD}:
            raise InvalidRequest(
                f"{self.kind} does not work on {shape.model_type or 'this kind of'} models: its groups are "
                f"those of {', '.join(MODEL_TYPES)}. LoRA works here, without making the model smaller.",
                code="method_not_applicable",
                param="adapter.kind",
            )
        if self.warmup + self.cooldown >= 1:
            raise InvalidRequest(
                f"warmup {self.warmup:g} and cooldown {self.cooldown:g} leave no steps to prune in: their "
                "sum must be below 1, for example 0.1 and 0.1.",
                param="adapter.warmup",
            )
        if self.final(shape) == (shape.kv_heads, shape.intermediate):
            least = 1 / shape.intermediate
            raise InvalidRequest(
                f"sparsity {self.sparsity:g} removes nothing from layers of {shape.intermediate} channels: "
                f"set it to {least:.2g} or more.",
                param="adapter.sparsity",
            )
