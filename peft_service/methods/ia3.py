"""(IA)³: learned scales of keys, values and feed-forward activations.  Liu et al. 2022, arXiv:2205.05638."""

import re
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from peft_service.errors import InvalidRequest
from peft_service.methods import Capabilities, Case, Material, Method, adapted, matches

if TYPE_CHECKING:
    from peft_service.attached import Attached
    from peft_service.base_model import ModelShape

KEYS_VALUES = re.compile(
    r"(^|\.)(k_proj|v_proj|key|value|k_lin|v_lin|k|v|key_proj|value_proj|query_key_value|c_attn|qkv_proj|Wqkv)$"
)
"""Layers that make keys or values; where one makes queries too, the whole of its output is scaled."""
FFN_OUTPUT = re.compile(r"(^|\.)(down_proj|wo|fc2|lin2|dense_4h_to_h|fc_out|\d+\.output\.dense|mlp\.c_proj)$")
"""Layers whose input is the inside of a feed-forward network."""


class IA3(Method):
    kind: Literal["ia3"] = "ia3"
    targets: tuple[str, ...] | None = Field(None, min_length=1)
    """Last parts of the names of the layers whose output is scaled; None: those of keys and values."""
    feedforward: tuple[str, ...] | None = None
    """Of the layers whose input is scaled; None: the last ones of the feed-forward networks."""

    learning_rate: ClassVar[float] = 5e-3
    title: ClassVar[str] = "(IA)³"
    family: ClassVar[str] = "scale and shift"
    paper: ClassVar[str] = "https://arxiv.org/abs/2205.05638"
    summary: ClassVar[str] = "Scales keys, values and feed-forward activations by learned vectors."
    formula: ClassVar[str] = "K ← l_k ⊙ K, V ← l_v ⊙ V, FFN: W₂(l_ff ⊙ a); k + k + d_ff values a layer"
    use_when: ClassVar[str] = "A few examples, many tasks: some kilobytes each, and it merges."
    limits: ClassVar[str] = "Little capacity; not served by vLLM unless merged."
    aliases: ClassVar[dict[str, dict[str, Any]]] = {"infused_adapter": {}}
    can: ClassVar[Capabilities] = Capabilities(
        servers=("peft",),
        weight_decay=False,
        why={"weight_decay": "the scales rest at 1 and decay pulls them to 0, which is no base. Set it to 0"},
    )

    def attach(self, model: Any, case: Case, material: Material) -> "Attached":
        import torch
        from peft import IA3Config, TaskType, get_peft_model
        from transformers.pytorch_utils import Conv1D

        from peft_service.attached import Attached, head_modules
        from peft_service.targets import linear_layers, shortest
        from peft_service.tasks import PEFT_TASKS

        modules = dict(model.named_modules())
        outputs, inputs = self._layers(linear_layers(model))
        config = IA3Config(
            target_modules=shortest(model, outputs + inputs),
            feedforward_modules=shortest(model, inputs) if inputs else [],
            fan_in_fan_out=any(isinstance(modules[name], Conv1D) for name in outputs + inputs),
            modules_to_save=head_modules(model) or None,
            task_type=TaskType(PEFT_TASKS[case.task]),
        )
        with torch.random.fork_rng(devices=[]):
            return Attached(get_peft_model(model, config))

    def trainable(self, shape: "ModelShape", case: Case) -> int:
        linears = shape.for_task(case.task).linears
        sizes = {name: (d_out, d_in) for name, d_out, d_in in linears}
        outputs, inputs = self._layers(list(sizes))
        return sum(sizes[name][0] for name in outputs) + sum(sizes[name][1] for name in inputs)

    def check(self, shape: "ModelShape", case: Case) -> None:
        part = shape.for_task(case.task)
        adapted(part, self.targets)
        adapted(part, self.feedforward or None, "adapter.feedforward")
        outputs, inputs = self._layers([name for name, _, _ in part.linears])
        if not outputs and not inputs:
            raise InvalidRequest(
                f"ia3 finds no keys, values or feed-forward layers in this {shape.model_type or 'base'}; "
                "name them "
                "in targets and feedforward.",
                param="adapter.targets",
            )

    def _layers(self, linears: list[str]) -> tuple[list[str], list[str]]:
        """(those whose output is scaled, those whose input is)."""

        def of(named: tuple[str, ...] | None, pattern: re.Pattern[str]) -> list[str]:
            if named is None:
                return [name for name in linears if pattern.search(name)]
            return [name for name in linears if any(matches(name, target) for target in named)]

        inputs = of(self.feedforward, FFN_OUTPUT)
        return [name for name in of(self.targets, KEYS_VALUES) if name not in inputs], inputs
