"""Prompts by task: peft's multitask prompts at work, and prompts read from published adapters.

Shapes: P virtual tokens, d width, T tasks, r rank.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from peft_service.attached import Attached
from peft_service.errors import InvalidRequest
from peft_service.methods import Case
from peft_service.tuners import prompts

if TYPE_CHECKING:
    from peft_service.batches import Batch
    from peft_service.methods.mpt import MPT

SPREAD = 0.02
"""Of the ranks behind the first, which make no difference at the start."""


class TaskPrompted(Attached):
    def inputs(self, batch: "Batch") -> dict[str, Any]:
        given = {"task_ids": batch.task_B}
        # An encoder-decoder gets no decoder_input_ids from peft here; from labels it makes the same.
        return given if batch.decoder_BT is None else {**given, "labels": batch.labels_BT}


def attach_mpt(model: Any, case: Case, method: "MPT") -> TaskPrompted:
    """peft's multitask prompt; P* starts as embeddings of random tokens, u_t v_tᵀ near one."""
    from peft import MultitaskPromptTuningConfig

    made = prompts.attach_prompt(
        model,
        case,
        MultitaskPromptTuningConfig,
        num_virtual_tokens=method.virtual_tokens,
        token_dim=prompts.width_of(model),
        num_transformer_submodules=1,
        num_tasks=len(case.tasks),
        num_ranks=method.rank,
    )
    encoder = made.prompt_encoder["default"]
    values = prompts.first_values(model, "vocab", method.virtual_tokens, case.seed, None, None)
    draw = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        encoder.embedding.weight.copy_(values)
        # As peft draws them, u_t v_tᵀ is some 0.0004: no prompt at all, and hardly a gradient. Behind the
        # first rank they are drawn, since equal ones would stay equal.
        u_TPr, v_Trd = encoder.prefix_task_cols, encoder.prefix_task_rows
        for parameter in (u_TPr, v_Trd):
            parameter.copy_(SPREAD * torch.randn(parameter.shape, generator=draw))
        u_TPr[..., 0] = 1.0
        v_Trd[:, 0] = 1.0
    return TaskPrompted(made)


def source_prompts(sources: Sequence[Path], tokens: int, width: int) -> Tensor:
    """The prompts of published adapters: (sources, P, d), float32.

    Raises:
        InvalidRequest: one is no prompt, or of another size; says what it is.
    """
    found = []
    for number, directory in enumerate(sources):
        param = f"adapter.sources[{number}]"
        path = directory / "adapter_config.json"
        kind = json.loads(path.read_text())["peft_type"] if path.exists() else "no PEFT adapter"
        if kind != "PROMPT_TUNING":
            raise InvalidRequest(
                f"{param} is {kind}, and only prompts of prompt_tuning can be started from.", param=param
            )
        prompt = load_file(directory / "adapter_model.safetensors")["prompt_embeddings"].float()
        if prompt.shape != (tokens, width):
            raise InvalidRequest(
                f"{param} has {len(prompt)} virtual tokens of width {prompt.shape[1]}, and this job {tokens} "
                f"of {width}: set virtual_tokens to {len(prompt)}.",
                param="adapter.virtual_tokens",
            )
        found.append(prompt)
    return torch.stack(found)
