"""N soft prompts on one frozen base, asked in one batch, and a vote.  Lester et al. 2021, arXiv:2104.08691.

Each row is repeated N times, with another prompt in front each time. With log p_n what prompt n says:

    mean_log_prob   log p = mean_n log p_n, up to its norm
    majority        log of the share of the prompts whose first choice it is; p breaks ties

While it trains, the cross-entropy of the answer is exactly the mean of the N prompts' own: the mean of
log-probabilities sums to less than one, and what is missing goes to one class more, behind all others, which
is never right. So each prompt learns as if alone.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_service.attached import Attached, head_modules
from peft_service.errors import InvalidRequest
from peft_service.tasks import PEFT_TASKS, Task

VOTES = ("mean_log_prob", "majority")
HEAD = "base_model."
"""In front of a head's parameters in the file of a PeftModel with a prompt."""


class Ensemble(nn.Module):
    """A transformers model behind N prompts; `prompts` is (N, P, d)."""

    def __init__(self, base: Any, prompts_NPD: Tensor, vote: str) -> None:
        super().__init__()
        if vote not in VOTES:
            raise InvalidRequest(f"vote is one of {', '.join(VOTES)}, not {vote!r}.", param="adapter.vote")
        self.base = base
        self.prompts = nn.Parameter(prompts_NPD.float())
        self.vote = vote

    @property
    def config(self) -> Any:
        return self.base.config

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        self.base.gradient_checkpointing_enable(*args, **kwargs)

    def enable_input_require_grads(self) -> None:
        """Nothing to do: the prompts are among the inputs of every block."""

    def members(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """log p_n at the row's own tokens, (N, B, …, C), from one forward pass over N·B rows."""
        count, length = self.prompts.shape[:2]
        rows = len(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        words = self.base.get_input_embeddings()(input_ids)
        prompts = self.prompts.to(words.dtype).repeat_interleave(rows, 0)
        given = {
            name: value.repeat(count, *[1] * (value.dim() - 1))
            if torch.is_tensor(value) and value.dim()
            else value
            for name, value in kwargs.items()
        }
        output = self.base(
            inputs_embeds=torch.cat([prompts, words.repeat(count, 1, 1)], 1),
            attention_mask=torch.cat([mask.new_ones(len(prompts), length), mask.repeat(count, 1)], 1),
            **given,
        )
        logits = output.logits.float()
        if logits.dim() == 3 and not self.base.config.is_encoder_decoder:
            logits = logits[:, length:]
        said: Tensor = logits.log_softmax(-1).reshape(count, rows, *logits.shape[1:])
        return said

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import ModelOutput

        said_N = self.members(input_ids, attention_mask, **kwargs)
        mean = said_N.mean(0)
        if self.training:
            return ModelOutput(logits=with_rest(mean))
        return ModelOutput(logits=mean if self.vote == "mean_log_prob" else majority(said_N))


def with_rest(mean_BC: Tensor) -> Tensor:
    """(…, C + 1): log-probabilities that sum to less than one, and the log of what is missing."""
    total = mean_BC.logsumexp(-1, keepdim=True)
    short = total < -1e-6
    rest = torch.where(short, (-torch.expm1(torch.where(short, total, -1.0))).log(), -1e4)
    return torch.cat([mean_BC, rest], -1)


def majority(said_N: Tensor) -> Tensor:
    """log of (votes + p) / (N + 1), p the normalised mean: a vote more always weighs more than p."""
    count, classes = said_N.shape[0], said_N.shape[-1]
    votes = nn.functional.one_hot(said_N.argmax(-1), classes).sum(0)
    return ((votes + said_N.mean(0).softmax(-1)) / (count + 1)).log()


class Ensembled(Attached):
    """Saves every prompt as a peft adapter of its own, with the head beside each, and how they vote."""

    def __init__(self, model: Ensemble, task: Task) -> None:
        super().__init__(model)
        self.task: Task = task

    def save(self, trainable: Mapping[str, Tensor], directory: Path, base: "tuple[str, str | None]") -> None:
        from peft import PromptTuningConfig, TaskType

        from peft_service.artifact import COMPOSITE, COMPOSITE_FORMAT

        ensemble: Any = self.model
        count, length, width = trainable["prompts"].shape
        heads = head_modules(ensemble.base)
        head = {
            HEAD + name.removeprefix("base."): tensor.contiguous()
            for name, tensor in trainable.items()
            if name != "prompts"
        }
        parts = [f"part-{number}" for number in range(count)]
        for part, prompt in zip(parts, trainable["prompts"], strict=True):
            (directory / part).mkdir(parents=True, exist_ok=True)
            config = PromptTuningConfig(
                task_type=TaskType(PEFT_TASKS[self.task]),
                num_virtual_tokens=length,
                token_dim=width,
                num_transformer_submodules=1,
                num_layers=1,
                num_attention_heads=1,
                modules_to_save=heads or None,
                inference_mode=True,
                base_model_name_or_path=base[0],
                revision=base[1],
            )
            config.save_pretrained(directory / part)
            tensors = {"prompt_embeddings": prompt.contiguous(), **head}
            save_file(tensors, directory / part / "adapter_model.safetensors", {"format": "pt"})
        told = {"format": COMPOSITE_FORMAT, "parts": parts, "vote": ensemble.vote}
        (directory / COMPOSITE).write_text(json.dumps(told, indent=2) + "\n")


def load(base: Any, directories: Sequence[Path], vote: str) -> Ensemble:
    """The ensemble of these directories of PROMPT_TUNING on `base`, whose head becomes theirs.

    Raises:
        InvalidRequest: the prompts are not of one shape.
    """
    parts = [load_file(directory / "adapter_model.safetensors") for directory in directories]
    prompts = [part["prompt_embeddings"] for part in parts]
    if len({tuple(prompt.shape) for prompt in prompts}) != 1:
        raise InvalidRequest("the prompts of an ensemble are equally long and wide.")
    parameters = dict(base.named_parameters())
    with torch.no_grad():
        for name, tensor in parts[0].items():
            if name != "prompt_embeddings":
                parameters[name.removeprefix(HEAD)].copy_(tensor)
    made = Ensemble(base, torch.stack(prompts), vote)
    return made.to(next(base.parameters()).device).eval()
