"""LoRA: y = W x + s * B A x, with W frozen and s = alpha / rank.  Hu et al. 2021, arXiv:2106.09685.

Shapes: A is (rank, d_in), B is (d_out, rank). B starts at zero, so step 0 is the base model. On a base
held in NF4 this is QLoRA (Dettmers et al. 2023, arXiv:2305.14314). With `rslora`, s = alpha / sqrt(rank)
(Kalajdzievski 2023, arXiv:2312.03732).
"""

from typing import Any, ClassVar, Literal

from pydantic import Field

from peft_service.errors import InvalidRequest
from peft_service.methods import Method


class LoRA(Method):
    kind: Literal["lora"] = "lora"
    rank: int = Field(16, ge=1, le=512)
    alpha: int = Field(32, ge=1, le=4096)
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of A; 0 keeps every forward pass deterministic."""
    targets: tuple[str, ...] | None = Field(None, min_length=1)
    """Last parts of the module names that are adapted; None: every linear layer but the output head."""
    rslora: bool = False

    learning_rate: ClassVar[float] = 2e-4
    paper: ClassVar[str] = "https://arxiv.org/abs/2106.09685"
    summary: ClassVar[str] = (
        "Low-rank matrices beside the frozen linear layers; on an NF4 base this is QLoRA."
    )

    def attach(self, model: Any, seed: int) -> Any:
        import torch
        from peft import LoraConfig, TaskType, get_peft_model

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules="all-linear" if self.targets is None else list(self.targets),
            use_rslora=self.rslora,
            task_type=TaskType.CAUSAL_LM,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # peft draws A on the CPU before moving it, so all ranks draw the same
            # its default, autocast_adapter_dtype, keeps A and B in float32
            return get_peft_model(model, config)

    def trainable(self, shape: Any) -> int:
        return sum(self.rank * (d_in + d_out) for name, d_out, d_in in shape.linears if self._adapts(name))

    def check(self, shape: Any, quantize: str | None) -> None:
        names = [name for name, _, _ in shape.linears]
        there = sorted({name.split(".")[-1] for name in names})
        for target in self.targets or ():
            if not any(name == target or name.endswith(f".{target}") for name in names):
                raise InvalidRequest(
                    f"targets: no linear layer of the base is called {target!r}. It has: {', '.join(there)}.",
                    param="adapter.targets",
                )
        if not names:
            raise InvalidRequest("the base has no linear layer that LoRA could adapt.", param="model")

    def _adapts(self, name: str) -> bool:
        if self.targets is None:
            return True
        return any(name == target or name.endswith(f".{target}") for target in self.targets)
