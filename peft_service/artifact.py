"""Load any artifact of ours on its base, as its users do: adapters, deltas, compositions, whole models.

What lies in the directory tells what it is:

    adapter_config.json     a PEFT adapter (of a type of our own after `import peft_service.tuners`)
    delta_config.json       changed weights (`peft_service.delta`)
    qa_lora_config.json     quantised linear layers in place of the base's (`peft_service.tuners.qa_lora`)
    composite.json          {"format", "parts": ["part-0", …]}: directories, applied in this order; with
                            "rope" (LongLoRA), to a base whose positions are interpolated first
    config.json             a whole transformers model; the base is not needed
    task.json               {"task", "labels"}: the head that the base needs, if any
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_service.errors import InvalidRequest, UnknownBase
from peft_service.tasks import AUTO_CLASSES, CLASSIFYING, IN_BLOCK, Task

if TYPE_CHECKING:
    import torch

TASK = "task.json"
COMPOSITE = "composite.json"
COMPOSITE_FORMAT = "peft-service/composite/1"


def is_model(directory: Path) -> bool:
    """Whether it is a whole model, and no adapter of one."""
    return (directory / "config.json").exists()


def task_of(directory: Path) -> tuple[Task, tuple[str, ...]]:
    """(task, labels) of an artifact."""
    told = json.loads((directory / TASK).read_text())
    return told["task"], tuple(told["labels"])


def write_task(directory: Path, task: Task, labels: tuple[str, ...]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / TASK).write_text(json.dumps({"task": task, "labels": labels}, ensure_ascii=False) + "\n")


def load_base(
    directory: Path,
    task: Task,
    labels: tuple[str, ...] = (),
    *,
    quantize: str | None = None,
    storage: "torch.dtype | None" = None,
    **options: Any,
) -> Any:
    """The base with the head of the task, by plain transformers; `options` go to `from_pretrained`.

    `model.new_head` has the names of the modules that the checkpoint did not have.

    Args:
        quantize: "nf4" holds the linear layers of the blocks in 4 bits; `options["dtype"]` is then what they
            compute in.
        storage: the dtype that packed weights are kept as; bytes, if none is given.

    Raises:
        UnknownBase: transformers puts other weights than the checkpoint's into the body.
    """
    import transformers

    if task in ("sequence_classification", "token_classification"):
        options["id2label"] = dict(enumerate(labels))
        options["label2id"] = {label: index for index, label in enumerate(labels)}
    auto = getattr(transformers, AUTO_CLASSES[task])
    config = transformers.AutoConfig.from_pretrained(
        directory, local_files_only=True, trust_remote_code=False
    )
    made_as = auto._model_mapping.get(type(config), None)
    if made_as is not None and made_as.base_model_prefix == "transformer" and config.model_type != "gpt2":
        # Of some decoders the question answering class has its body under another name than the checkpoint,
        # and transformers would leave it random.
        options["key_mapping"] = {r"^model\.": "transformer."}
    if quantize:
        more = {} if storage is None else {"bnb_4bit_quant_storage": storage}
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantize,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options["dtype"],
            # All outside the blocks. By itself transformers leaves out a head whose last parameter is a
            # weight; a new one with a bias it would hold in four bits, whose values no checkpoint has.
            llm_int8_skip_modules=[rf"(?!.*{IN_BLOCK.pattern}).*"],
            **more,
        )
    model, told = auto.from_pretrained(
        directory,
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **options,
    )
    if quantize:
        import bitsandbytes

        for module in model.modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                # On AVX512-BF16 CPUs the first eval forward repacks the weights in place, and everything that
                # reads them afterwards reads garbage.
                module.support_avx512bf16_for_cpu = False
    model.new_head = _whole_modules(model, told["missing_keys"]) if task in CLASSIFYING else []
    inside = tuple(f"{name}." for name in model.new_head)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    lost = [key for key in told["missing_keys"] if not key.startswith(inside or ("\0",)) and key not in tied]
    if lost:
        raise UnknownBase(f"the base has no weights for {sorted(lost)[0]}, which {task} needs", param="model")
    return model


def _whole_modules(model: Any, missing: Iterable[str]) -> list[str]:
    """The outermost modules, below the body, of which a checkpoint had no parameter."""
    absent = set(missing)
    body = model.base_model_prefix
    found: list[str] = []
    for name, module in model.named_modules():
        own = [f"{name}.{key}" for key, _ in module.named_parameters()]
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and name != body and own and not inside and all(key in absent for key in own):
            found.append(name)
    return [name for name in found if not name.startswith(f"{body}.") or name.endswith("pooler")]


def load(base: Any, directory: Path) -> Any:
    """`base` (a transformers model with the task's head) with the artifact on it, in eval mode.

    Raises:
        InvalidRequest: the directory holds nothing that we know, or a whole model (`load_base` loads that).
    """
    if (directory / COMPOSITE).exists():
        told = json.loads((directory / COMPOSITE).read_text())
        if told.get("format") != COMPOSITE_FORMAT:
            raise InvalidRequest(f"{directory.name}: format {told.get('format')!r}")
        model = base
        if told.get("rope"):
            from peft_service.tuners import longlora

            longlora.interpolate(base, **told["rope"])
        if told.get("vote"):
            from peft_service.tuners import prompt_ensemble

            return prompt_ensemble.load(base, [directory / part for part in told["parts"]], told["vote"])
        for part in told["parts"]:
            # Each goes on the base itself, which earlier parts have changed: as when they were attached.
            base.__dict__.pop("peft_config", None)
            model = load(base, directory / part)
        return model.eval()
    if (directory / "adapter_config.json").exists():
        import peft

        import peft_service.tuners  # noqa: F401 - registers our types

        if json.loads((directory / "adapter_config.json").read_text())["peft_type"] == "XLORA":
            from peft_service.tuners.xlora import load_router

            return load_router(base, directory).eval()
        return peft.PeftModel.from_pretrained(base, str(directory)).eval()
    if (directory / "delta_config.json").exists():
        from peft_service import delta

        delta.apply(base, [delta.load(directory)])
        return base.eval()
    if (directory / "qa_lora_config.json").exists():
        from peft_service.tuners import qa_lora

        return qa_lora.apply(base, directory)
    raise InvalidRequest(
        f"{directory.name} has no adapter_config.json, delta_config.json, qa_lora_config.json "
        "or composite.json"
    )
