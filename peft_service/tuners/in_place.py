"""Methods that change the base's own weights: which train, which are masked, and what is saved of them.

A gradient mask is a hook on the leaf parameter: it works under every ZeRO stage, before ranks are summed. It
must depend on the step and the parameter alone, as microbatches and ranks each apply it on their own. Masked
values have a gradient of exactly zero, so AdamW's moments of them stay zero and, without weight decay, they
keep their bits.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.integrations import gather_params_ctx
from torch import Tensor

from peft_service import delta
from peft_service.attached import Attached, head_modules
from peft_service.delta import Delta

if TYPE_CHECKING:
    from peft_service.train import Engine

_LM_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_layer|final_logits_bias)(\.|$)|^cls\.")
_POOLER = re.compile(r"(^|\.)pooler\.")


def is_in(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def body(model: Any) -> list[str]:
    """Names of the base's own parameters, as `ModelShape.body_parameters` counts them: without the task's
    head, a language model's head and a pooler."""
    return [
        name
        for name, _ in model.named_parameters()
        if not (is_in(name, head_modules(model)) or _LM_HEAD.search(name) or _POOLER.search(name))
    ]


def open_for_training(model: Any, names: Iterable[str]) -> Any:
    """`model` with exactly the parameters `names` and the task's head trainable, all of it in float32.

    Frozen ones too: layers do not mix dtypes of weight and bias. A bf16 engine casts the whole model back,
    with float32 masters of what trains; parameters that ZeRO-3 has cut are left to it for that reason.
    """
    wanted = set(names)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.float()
        parameter.requires_grad_(name in wanted or is_in(name, head_modules(model)))
    return model


class InPlace(Attached):
    """Trains parameters of the transformers model itself; saves them whole, as a delta."""

    def __init__(self, model: Any, kind: str, names: Iterable[str]) -> None:
        super().__init__(open_for_training(model, names))
        self.kind = kind

    def changes(self, trainable: Mapping[str, Tensor]) -> Delta:
        """What has changed: here all that trained."""
        return Delta(dense=dict(trainable))

    def save(self, trainable: Mapping[str, Tensor], directory: Path, base: "tuple[str, str | None]") -> None:
        made = self.changes(trainable)
        made.config = {"method": self.kind, "base_model_name_or_path": base[0], "revision": base[1]}
        delta.save(made, directory)


class WholeModel(InPlace):
    """Saves a transformers checkpoint that needs no base."""

    SHARD = "5GB"

    def save(self, trainable: Mapping[str, Tensor], directory: Path, base: "tuple[str, str | None]") -> None:
        """`trainable` has all parameters, tied ones under one name; buffers are the model's own."""
        import copy

        model: Any = self.model
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        # Buffers of zeros, such as BART's final_logits_bias, transformers makes by itself.
        tensors = {n: t for n, t in model.state_dict().items() if n not in parameters and t.any()}
        tensors |= trainable
        dtype = next(iter(trainable.values())).dtype
        live = model.config
        model.config = copy.deepcopy(live)
        try:
            model.config.use_cache = True  # it was off for training only
            model.config.dtype = dtype
            model.save_pretrained(directory, state_dict=tensors, max_shard_size=self.SHARD)
        finally:
            model.config = live


class ChildF(InPlace):
    """Every step another random part of the gradients: g ⊙ M / p, M ~ Bernoulli(p).  arXiv:2109.05687."""

    def __init__(self, model: Any, kind: str, share: float, seed: int) -> None:
        names = body(model)
        super().__init__(model, kind, names)
        self.share, self.seed, self.step = share, seed, 0
        wanted = set(names)
        for name, parameter in model.named_parameters():
            if name in wanted:
                parameter.register_hook(self._hook(name))

    def before_step(self, step: int) -> None:
        self.step = step

    def _hook(self, name: str) -> Any:
        def hook(gradient: Tensor) -> Tensor:
            return gradient * bernoulli(self.seed, self.step, name, self.share, gradient) / self.share

        return hook


def bernoulli(seed: int, step: int, name: str, share: float, like: Tensor) -> Tensor:
    """The mask of a parameter in a step, bool: one function of its arguments, on every rank."""
    digest = hashlib.sha256(f"child {seed} {step} {name}".encode()).digest()
    generator = torch.Generator(like.device).manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(like.shape, generator=generator, device=like.device) < share


def first_phase(share: float, steps: int) -> int:
    """Steps of a first phase that is to have `share` of them all: one at least, and one is left."""
    return min(max(1, round(share * steps)), max(1, steps - 1))


class Masked(InPlace):
    """Chooses in a first phase which weights train in the second: exactly `share` of `names` (None: of the
    body), over all tensors together. What was not chosen ends with the bits it began with; a sparse delta
    holds the rest. Each phase has a learning-rate schedule of its own, as in the papers' two trainings."""

    def __init__(
        self, model: Any, kind: str, share: float, first_phase: int, names: "list[str] | None" = None
    ) -> None:
        self.names = body(model) if names is None else names
        super().__init__(model, kind, self.names)
        self.share, self.first_phase = share, first_phase
        self.masks: dict[str, Tensor] = {}
        self._placed: dict[str, Tensor] = {}
        wanted = set(self.names)
        for name, parameter in model.named_parameters():
            if name in wanted:
                parameter.register_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def hook(gradient: Tensor) -> Tensor | None:
            if not self.masks:
                return None
            if name not in self._placed:
                self._placed[name] = self.masks[name].to(gradient.device)
            return gradient * self._placed[name]

        return hook

    def scores(self, engine: "Engine") -> dict[str, Tensor]:
        """At the end of the first phase: a float32 CPU tensor for each parameter of the body. Collective."""
        raise NotImplementedError

    def restart(self, state: dict[str, Tensor]) -> None:
        """Change the parameters with which the second phase starts; moments are zero already."""

    def phase(self, step: int, steps: int) -> tuple[int, int]:
        if step < self.first_phase:
            return step, self.first_phase
        return step - self.first_phase, steps - self.first_phase

    def after_update(self, engine: "Engine", step: int) -> None:
        if step != self.first_phase - 1:
            return
        self.masks = chosen(self.scores(engine), self.share)
        state = engine.state()
        for key, tensor in state.items():
            if key.startswith("exp_avg"):
                tensor.zero_()
        state["step"] = torch.zeros((), dtype=torch.int64)
        self.restart(state)
        engine.load_state(state)

    def state(self) -> dict[str, Tensor]:
        return {f"mask.{name}": mask for name, mask in self.masks.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._placed = {}
        self.masks = {
            name.removeprefix("mask."): mask.bool()
            for name, mask in state.items()
            if name.startswith("mask.")
        }

    def changes(self, trainable: Mapping[str, Tensor]) -> Delta:
        dense, sparse = {}, {}
        for name, tensor in trainable.items():
            if name in self.masks:
                index = self.masks[name].flatten().nonzero().flatten()
                if len(index):
                    sparse[name] = (index, tensor.flatten()[index].float())
            elif name in self.names:
                # Stopped in the first phase: nothing has been chosen, and nothing is kept.
                continue
            else:
                dense[name] = tensor
        return Delta(dense, sparse)


class ChildD(Masked):
    """The weights with the largest Fisher information: mean over steps of gradient², read at rate 0."""

    def __init__(self, model: Any, kind: str, share: float, first_phase: int) -> None:
        super().__init__(model, kind, share, first_phase)
        self.fisher: dict[str, Tensor] = {}

    def rate(self, step: int) -> float:
        return 0.0 if step < self.first_phase else 1.0

    def before_update(self, engine: "Engine", step: int) -> None:
        if step >= self.first_phase:
            return
        for name in self.names:
            squared = engine.gradient(name).detach().float().square().cpu()
            self.fisher[name] = self.fisher[name] + squared if name in self.fisher else squared

    def scores(self, engine: "Engine") -> dict[str, Tensor]:
        fisher, self.fisher = self.fisher, {}
        return fisher

    def state(self) -> dict[str, Tensor]:
        return super().state() | {f"fisher.{name}": tensor for name, tensor in self.fisher.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        self.fisher = {
            name.removeprefix("fisher."): tensor.float().clone()
            for name, tensor in state.items()
            if name.startswith("fisher.")
        }


class LotteryTicket(Masked):
    """The weights that full fine-tuning moves most; they start again from the base.  arXiv:2110.07560."""

    def __init__(self, model: Any, kind: str, share: float, first_phase: int, embeddings: bool) -> None:
        left_out = set() if embeddings else {id(p) for p in model.get_input_embeddings().parameters()}
        parameters = dict(model.named_parameters())
        names = [name for name in body(model) if id(parameters[name]) not in left_out]
        super().__init__(model, kind, share, first_phase, names)
        self.base: dict[str, Tensor] = {}
        for name in self.names:
            with gather_params_ctx([parameters[name]], modifier_rank=None):
                self.base[name] = parameters[name].detach().to("cpu", torch.float32, copy=True)

    def scores(self, engine: "Engine") -> dict[str, Tensor]:
        state = engine.state()
        return {name: (state[f"param.{name}"] - self.base[name]).abs() for name in self.names}

    def restart(self, state: dict[str, Tensor]) -> None:
        for name in self.names:
            state[f"param.{name}"] = self.base[name].clone()


def chosen(scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Masks of the round(share · all) largest scores of all tensors together; of equal ones the first."""
    flat = torch.cat([tensor.flatten() for tensor in scores.values()])
    count = max(1, round(share * flat.numel()))
    mask = torch.zeros(flat.numel(), dtype=torch.bool)
    limit = flat.kthvalue(flat.numel() - count + 1).values
    above = flat > limit
    mask |= above
    equal = (flat == limit).nonzero().flatten()
    mask[equal[: count - int(above.sum())]] = True
    found, start = {}, 0
    for name, tensor in scores.items():
        found[name] = mask[start : start + tensor.numel()].view(tensor.shape).clone()
        start += tensor.numel()
    return found
