"""Soup: the mean of several adapters of one kind, value by value.  AdapterSoup: Chronopoulou et al. 2023,
arXiv:2302.07027; model soups: Wortsman et al. 2022, arXiv:2203.05482."""

import json
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, TypeAdapter

from peft_service.errors import InvalidRequest, RunFailed
from peft_service.methods import AnyMethod, Method
from peft_service.operations import Described, Done, Operation, Weight, Work, method_called

_OF_THE_TRAINING = (
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "init_lora_weights",
    "peft_version",
)
"""Keys of an adapter_config.json in which adapters of one kind may differ."""
_PLAIN = ("LORA", "PROMPT_TUNING")
"""What is left of published adapters where a method has made one of them, and no choice among them."""


class Soup(Operation):
    kind: Literal["soup"] = "soup"
    weights: tuple[Weight, ...] | None = Field(None, min_length=2, max_length=64)
    """One for each adapter, in their order; they are divided by their sum. None: equal."""

    title: ClassVar[str] = "Soup"
    summary: ClassVar[str] = "The mean of adapters of one method and one size, value by value, head included."
    exact: ClassVar[bool] = True
    takes: ClassVar[tuple[int, int]] = (2, 64)

    def check(self, sources: Sequence[Described]) -> None:
        first = sources[0]
        for source in sources:
            if source.config is None:
                raise InvalidRequest(
                    f"{source.reference} is no PEFT adapter but a {source.method}; soup takes the mean of "
                    "adapters: merge them and compare, or give adapters",
                    code="not_an_adapter",
                    param="adapters",
                )
            method = method_called(source.method)
            if method is not None and method.sources_of and source.config.get("peft_type") not in _PLAIN:
                raise InvalidRequest(
                    f"{source.reference} is a {source.method}: it holds other adapters and a way to choose "
                    "among them, and the mean of choices is none. Make the soup of the adapters in it",
                    code="not_an_adapter",
                    param="adapters",
                )
            if other := _differing(first.config or {}, source.config):
                raise InvalidRequest(
                    f"{source.reference} and {first.reference} differ in {other}: a mean needs adapters of "
                    "one kind and size. Of LoRAs, combine takes any",
                    code="invalid_value",
                    param="adapters",
                )
        if self.weights is not None and (len(self.weights) != len(sources) or not sum(self.weights)):
            raise InvalidRequest(
                f"{len(self.weights)} weights with the sum {sum(self.weights):g} for {len(sources)} "
                "adapters: give one for each, with a sum that is not 0",
                code="invalid_value",
                param="operation.weights",
            )

    def makes(self, sources: Sequence[Described]) -> Method:
        made: Method = TypeAdapter(AnyMethod).validate_python(sources[0].record["spec"]["method"])
        return made

    def run(self, work: Work) -> Done:
        import torch
        from safetensors.torch import load_file, save_file

        from peft_service import updates

        weights = self.weights or (1.0,) * len(work.sources)
        files = [load_file(path / "adapter_model.safetensors") for path in work.sources]
        made: dict[str, torch.Tensor] = {}
        for name, first in files[0].items():
            mine = [file.get(name) for file in files]
            if any(tensor is None or tensor.shape != first.shape for tensor in mine):
                raise RunFailed(f"the adapters differ in {name}: there is no mean of them", code="not_alike")
            if not first.is_floating_point():
                if not all(torch.equal(first, tensor) for tensor in mine if tensor is not None):
                    raise RunFailed(
                        f"the adapters differ in {name}, which counts or points to places: there is no mean",
                        code="not_alike",
                    )
                made[name] = first
                continue
            stacked = torch.stack([tensor.double() for tensor in mine if tensor is not None])
            shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
            made[name] = torch.tensordot(shares, stacked, dims=1).to(first.dtype).contiguous()
        if surplus := sorted({name for file in files for name in file} - made.keys()):
            raise RunFailed(
                f"the adapters differ in {surplus[0]}: there is no mean of them", code="not_alike"
            )
        save_file(made, work.out / "adapter_model.safetensors")
        config = json.loads((work.sources[0] / "adapter_config.json").read_text())
        config |= {"base_model_name_or_path": work.base_id, "revision": work.revision}
        (work.out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        inputs, answers = updates.asked(work, work.out)
        return Done({"adapters": float(len(files))}, inputs, answers)


def _differing(one: Any, two: Any) -> str:
    """The first key in which two configurations say other things."""
    for key in sorted({*one, *two}):
        if key in _OF_THE_TRAINING:
            continue
        a, b = (
            sorted(told[key]) if isinstance(told.get(key), list) else told.get(key) for told in (one, two)
        )
        if a != b:
            return str(key)
    return ""
