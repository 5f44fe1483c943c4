"""What artifacts add to a base, in numbers: updates by layer, LoRA files from factors, distances of answers.

Shapes: an update ΔW is (d_out, d_in) like the weight it is added to, A is (r, d_in), B is (d_out, r).
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_service import artifact, gate
from peft_service.errors import RunFailed
from peft_service.methods import Case
from peft_service.operations import Done, Work
from peft_service.targets import shortest
from peft_service.tasks import PEFT_TASKS

PROBE_ROWS, PROBE_TOKENS = 4, 32
ADAPTER = "default"
_PREFIX = "base_model.model."


def base_of(work: Work, quantize: str | None = None) -> Any:
    """The base in float32 with the head of the task, from its own files."""
    return gate.load_base(work.base, Case(task=work.task, labels=work.labels), "fp32", quantize)


def probe_of(model: Any, work: Work) -> dict[str, Tensor]:
    """Inputs that every run makes alike: fixed ids from the whole vocabulary, an end at the end of each row.

    Raises:
        RunFailed: the vocabulary has no ordinary token.
    """
    config = model.config.get_text_config()
    told = (config.eos_token_id, config.bos_token_id, model.config.pad_token_id)
    special = {int(id) for ids in told if ids is not None for id in (ids if isinstance(ids, list) else [ids])}
    ordinary = torch.tensor([id for id in range(config.vocab_size) if id not in special])
    if not len(ordinary):
        raise RunFailed("the base's vocabulary has no ordinary token", code="base_unusable")

    def ids(width: int, start: int) -> Tensor:
        return ordinary[(torch.arange(PROBE_ROWS * width) * 7919 + start) % len(ordinary)].view(
            PROBE_ROWS, width
        )

    input_ids = ids(PROBE_TOKENS, 13)
    if config.eos_token_id is not None:  # some encoder-decoders classify by the hidden state there
        end = config.eos_token_id
        input_ids[:, -1] = end[0] if isinstance(end, list) else end
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if work.task == "seq2seq_lm":
        inputs["decoder_input_ids"] = ids(8, 29)
    return inputs


def answers(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the model says to them, in float32 on the CPU."""
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad():
        said = gate.outputs_of(model(**{name: tensor.to(device) for name, tensor in inputs.items()}))
    return {name: tensor.float().cpu() for name, tensor in said.items()}


def asked(
    work: Work, directory: Path, quantize: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(inputs, what the base with this artifact on it answers)."""
    model = artifact.load(base_of(work, quantize), directory)
    inputs = probe_of(model, work)
    return inputs, answers(model, inputs)


def apart(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Largest difference of a logit, as a share of the largest logit (of 1, if all are smaller)."""
    worst = 0.0
    for name, tensor in expected.items():
        scale = max(1.0, float(tensor.abs().max()))
        # Virtual tokens stand in front of the others.
        mine = found[name][:, -tensor.shape[1] :] if tensor.ndim == 3 else found[name]
        worst = max(worst, float((mine - tensor).abs().max()) / scale)
    return worst


def merged(model: Any, directory: Path) -> Any:
    """`model` with the artifact written into its weights: a plain transformers model.

    Raises:
        RunFailed: it cannot be; says why.
    """
    if (directory / artifact.COMPOSITE).exists():
        told = json.loads((directory / artifact.COMPOSITE).read_text())
        if told.get("rope"):
            from peft_service.tuners import longlora

            longlora.interpolate(model, **told["rope"])
        for part in told["parts"]:
            model = merged(model, directory / part)
        return model
    if (directory / "qa_lora_config.json").exists():
        from peft_service.tuners import qa_lora

        return qa_lora.dense(model, directory)
    loaded = artifact.load(model, directory)
    if not (directory / "adapter_config.json").exists():
        return loaded
    try:
        whole = loaded.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        raise RunFailed(f"the adapter cannot be merged: {error}", code="not_mergeable") from error
    whole._hf_peft_config_loaded = False  # or save_pretrained would look for an adapter to save
    return whole.eval()


def rounded(model: Any) -> Any:
    """`model` with parameters as bf16 has them, in float32.

    Not its buffers: no checkpoint has those of rotary positions, and whoever loads one computes them exactly.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


def updates_of(model: Any) -> dict[str, Tensor]:
    """Layer -> ΔW of the adapter on a PeftModel, in float64: what merging adds to its weight.

    Raises:
        RunFailed: it changes something that is no linear layer's weight.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.pytorch_utils import Conv1D

    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        place = name.removeprefix(_PREFIX)
        base = module.get_base_layer()
        if not isinstance(base, nn.Linear | Conv1D):
            raise _no_lora(f"{place} is a {type(base).__name__}, no linear layer")
        # Layer by layer on copies: float64 of a whole model is seldom at hand, and the base stays as it is.
        alone: Any = copy.deepcopy(module).double()
        before = {key: value.detach().clone() for key, value in alone.get_base_layer().named_parameters()}
        try:
            alone.merge(adapter_names=[ADAPTER])
        except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
            raise _no_lora(f"{place} cannot be merged: {error}") from error
        after = {key: value.detach() for key, value in alone.get_base_layer().named_parameters()}
        changed = sorted(key for key, value in after.items() if not torch.equal(value, before[key]))
        if changed not in ([], ["weight"]):
            raise _no_lora(f"it changes {place}.{changed[0]}")
        update = after["weight"] - before["weight"]
        found[place] = update.T if isinstance(base, Conv1D) else update
    if not found:
        raise _no_lora("it changes no layer at all, only what the model reads")
    return found


def _no_lora(reason: str) -> RunFailed:
    return RunFailed(f"no LoRA can be what this adapter is: {reason}", code="not_convertible")


def factors_of(model: Any, adapter: str = ADAPTER) -> dict[str, tuple[Tensor, Tensor, float, float]]:
    """Layer -> (A, B, scaling, alpha) of a LoRA on a PeftModel."""
    from peft.tuners.lora import LoraLayer

    return {
        name.removeprefix(_PREFIX): (
            module.lora_A[adapter].weight.detach().cpu(),
            module.lora_B[adapter].weight.detach().cpu(),
            float(module.scaling[adapter]),
            float(module.lora_alpha[adapter]),
        )
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.lora_A
    }


def relative(error: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> tuple[float, float]:
    """(over all layers, of the worst layer): Frobenius norm of `error` as a share of that of `whole`."""
    norms = {name: (float(error[name].norm()), float(whole[name].norm())) for name in whole}
    total = sum(size**2 for _, size in norms.values()) ** 0.5
    lost = sum(wrong**2 for wrong, _ in norms.values()) ** 0.5
    worst = max((wrong / size for wrong, size in norms.values() if size), default=0.0)
    return (lost / total if total else 0.0), worst


def svd(update: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(A, B, all singular values): B A is the nearest matrix of this rank, padded with zeros if it has less.

    Eckart and Young 1936. The singular values are shared equally between A and B, which are float32: what is
    written to a file, so that errors are those of the file.
    """
    left, values, right = torch.linalg.svd(update.double(), full_matrices=False)
    kept = min(rank, len(values))
    root = values[:kept].sqrt()
    a_RI = torch.zeros(rank, update.shape[1], dtype=torch.float64)
    b_OR = torch.zeros(update.shape[0], rank, dtype=torch.float64)
    a_RI[:kept], b_OR[:, :kept] = root[:, None] * right[:kept], left[:, :kept] * root
    return a_RI.float(), b_OR.float(), values


def measured(
    work: Work, errors: tuple[float, float], inputs: dict[str, Tensor], expected: Mapping[str, Tensor]
) -> Done:
    """What there is to say of a LoRA that was written: `errors` are `relative`'s, `expected` what it should
    answer to `inputs`."""
    said = asked(work, work.out)[1]
    facts = {"update_error": errors[0], "worst_layer_error": errors[1], "logits_error": apart(said, expected)}
    return Done(facts, inputs, said)


def write_lora(
    plain: Any, factors: Mapping[str, tuple[Tensor, Tensor, float]], work: Work, heads: Path | None = None
) -> None:
    """Write a LoRA for the base `plain` into `work.out`: layer -> (A, B, alpha), adding alpha / r * B A.

    `heads`: a directory whose adapter's further trained modules go with it.
    """
    from peft import LoraConfig

    ranks = {name: len(a) for name, (a, _, _) in factors.items()}
    alphas = {name: _whole(alpha) for name, (_, _, alpha) in factors.items()}
    rank = max(ranks.values())
    alpha = next(alphas[name] for name in ranks if ranks[name] == rank)
    saved: list[str] | None = None
    tensors: dict[str, Tensor] = {}
    if heads is not None:
        saved = json.loads((heads / "adapter_config.json").read_text()).get("modules_to_save") or None
        for name, tensor in load_file(heads / "adapter_model.safetensors").items():
            place = name.removeprefix(_PREFIX)
            if any(part in place.split(".") or place.startswith(f"{part}.") for part in saved or ()):
                tensors[name] = tensor
    for name, (a, b, _) in factors.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = a.float().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = b.float().contiguous()
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=shortest(plain, list(factors)),
        rank_pattern={name: r for name, r in ranks.items() if r != rank},
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
        modules_to_save=saved,
        task_type=PEFT_TASKS[work.task],
        base_model_name_or_path=work.base_id,
        revision=work.revision,
        inference_mode=True,
    )
    config.save_pretrained(str(work.out))
    save_file(tensors, work.out / "adapter_model.safetensors")


def _whole(value: float) -> Any:
    return round(value) if value == round(value) else value


def added(model: Any, changes: Mapping[str, Tensor]) -> Any:
    """`model` with these updates in its linear layers' weights."""
    from transformers.pytorch_utils import Conv1D

    with torch.no_grad():
        for name, change in changes.items():
            layer: Any = model.get_submodule(name)
            layer.weight += (change.T if isinstance(layer, Conv1D) else change).to(layer.weight.dtype)
    return model
