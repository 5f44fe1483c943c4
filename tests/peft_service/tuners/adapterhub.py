"""Reads AdapterHub's names in the golden files as ours."""

import re

BLOCK = re.compile(r"(.*?\.\d+)\.(.*)")


def place(name: str, kind: str) -> tuple[str, str]:
    """Block and "attention" or "ffn" of an AdapterHub parameter that belongs to a bottleneck or fusion."""
    block, rest = BLOCK.match(name).groups()
    if kind == "t5":
        layer = int(re.match(r"layer\.(\d+)\.", rest).group(1))
        return block, "attention" if layer == 0 else "ffn"
    return block, "attention" if rest.startswith(("attention.", "attention_adapters")) else "ffn"


def ours(name: str) -> tuple[str, str]:
    """The same of one of our parameters."""
    name = name.removeprefix("base_model.model.")
    block, rest = BLOCK.match(name).groups()
    attention = rest.startswith(("attention.", "self_attn.", "layer.0.SelfAttention"))
    return block, "attention" if attention else "ffn"


def bottleneck_part(name: str) -> str:
    """Our name of a parameter within one bottleneck."""
    return {
        "adapter_down.0.weight": "down.weight",
        "adapter_down.0.bias": "down.bias",
        "adapter_up.weight": "up.weight",
        "adapter_up.bias": "up.bias",
    }[re.search(r"adapter_(?:down\.0|up)\.\w+$", name).group(0)]
