"""One or more configurations of every tuner, and the architectures each is for."""

from dataclasses import dataclass
from typing import Any

from peft_service.tuners.adapter_fusion import AdapterFusionConfig
from peft_service.tuners.bottleneck import BottleneckConfig
from peft_service.tuners.hadamard import HadamardConfig
from peft_service.tuners.mtl_lora import MTLLoRAConfig
from peft_service.tuners.pasta import PastaConfig
from peft_service.tuners.ssf import SSFConfig
from peft_service.tuners.tiny_attention import TinyAttentionConfig
from tests.peft_service.tuners.bases import KINDS


@dataclass(frozen=True)
class Case:
    name: str
    config: type
    options: dict[str, Any]
    kinds: tuple[str, ...] = KINDS
    merges: tuple[str, ...] = ()
    """Kinds of base that it can be merged into."""

    def make(self, **more: Any) -> Any:
        return self.config(**self.options | more)


CASES = (
    *(
        Case(f"bottleneck-{placement}", BottleneckConfig, {"placement": placement, "bottleneck_size": 4})
        for placement in ("houlsby", "pfeiffer", "parallel")
    ),
    Case("ssf", SSFConfig, {}, merges=KINDS),
    Case("ssf-all", SSFConfig, {"shift": "all"}, merges=("bert", "bart", "gpt2")),
    Case("hadamard", HadamardConfig, {}, merges=("bert", "bart", "gpt2")),
    Case("tiny_attention", TinyAttentionConfig, {}),
    Case("tiny_attention-experts", TinyAttentionConfig, {"size": 4, "heads": 2, "experts": 3}),
    Case("mtl_lora", MTLLoRAConfig, {"rank": 2}),
    Case("pasta", PastaConfig, {"token_ids": list(range(5, 40)), "vectors": 3}),
    Case("pasta-id", PastaConfig, {"token_ids": list(range(5, 40)), "index_by": "id"}, ("llama",)),
    *(
        Case(
            f"adapter_fusion-{placement}",
            AdapterFusionConfig,
            {"placement": placement, "bottleneck_size": 4, "members": ["one", "two", "three"]},
            kinds,
        )
        for placement, kinds in (("pfeiffer", KINDS), ("houlsby", ("llama",)), ("parallel", ("bert",)))
    ),
)
PAIRS = [(case, kind) for case in CASES for kind in case.kinds]
IDS = [f"{case.name}-{kind}" for case, kind in PAIRS]
