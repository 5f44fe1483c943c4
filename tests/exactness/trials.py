"""What is tried: objective × method × base × ranks × ZeRO stage × packing × checkpointing × precision ×
microbatch.

All of that but objective, method and base must change nothing: a trial's `plain` one, on torch alone with
whole batches, says what must come out. `SLICE` is for `make test`; `EVERY` (EXACTNESS_ALL=1) is every
objective at every stage, every method, and every base that an objective runs on.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pydantic import ValidationError

from peft_service import base_model, methods, packing
from peft_service.errors import InvalidRequest
from peft_service.graders.string_check import StringCheck
from peft_service.methods import METHODS, Case, Method
from peft_service.methods.lora import LoRA
from peft_service.objectives import OBJECTIVES, Objective
from peft_service.tasks import Task, has_known_head
from peft_service.variants import kind_of
from tests.exactness import rows
from tests.methods import bases

ALL = bool(os.environ.get("EXACTNESS_ALL"))
WHOLE = 1000
"""A microbatch that holds every step's rows."""
LORA = LoRA(rank=4)
GRADER = StringCheck(
    name="letter", input="{{sample.output_text}}", reference="{{item.wanted}}", operation="ilike"
)
_FIELDS: dict[str, dict[str, Any]] = {
    "reward": {"center_coefficient": 0.01},
    "distillation": {"teacher": "tiny/teacher"},
    # With the distance from the base: its forward pass without the adapter is under ZeRO too.
    "grpo": {"grader": GRADER, "group_size": 4, "max_new_tokens": 6, "beta": 0.05},
}
KINDS = {
    kind_of(variant): variant.model_validate({"kind": kind_of(variant), **_FIELDS.get(kind_of(variant), {})})
    for variant in OBJECTIVES
}
"""Every objective, by its kind."""
SFT = KINDS["sft"]
OTHERS = {
    "dpo-ipo": KINDS["dpo"].model_copy(update={"loss": "ipo", "beta": 0.5}),
    "dpo-robust": KINDS["dpo"].model_copy(update={"loss": "robust", "label_smoothing": 0.1}),
    "cpo-hinge": KINDS["cpo"].model_copy(update={"loss": "hinge"}),
    "distillation-reverse": KINDS["distillation"].model_copy(update={"divergence": "reverse"}),
    "grpo-by-answer": KINDS["grpo"].model_copy(update={"loss_type": "grpo", "scale_rewards": "batch"}),
}
"""Other losses under the same names."""


@dataclass(frozen=True)
class Trial:
    objective: Objective
    method: Method = LORA
    base: str = "llama"
    world: int = 1
    stage: int | None = None
    """Of ZeRO; None: LocalEngine."""
    packing: bool = False
    checkpointing: bool = False
    precision: str = "fp32"
    microbatch: int = WHOLE
    name: str = field(default="", compare=False)
    """Of the objective or method, where their kinds do not tell."""

    @property
    def task(self) -> Task:
        return self.objective.task(bases.ARCHITECTURES[self.base])

    @property
    def id(self) -> str:
        what = self.name or (self.objective.kind if self.method == LORA else self.method.kind)
        engine = "local" if self.stage is None else f"zero{self.stage}"
        flags = "-packed" * self.packing + "-recomputed" * self.checkpointing
        size = "whole" if self.microbatch == WHOLE else f"by{self.microbatch}"
        return f"{what}-{self.base}-w{self.world}-{engine}-{self.precision}-{size}{flags}"

    @property
    def plain(self) -> "Trial":
        """The same on torch alone: what must come out."""
        return Trial(self.objective, self.method, self.base, name=self.name)


@cache
def examples() -> dict[str, Method]:
    """Every method that trains, with its small fields, by its kind or the alias that sets fields."""
    found: dict[str, Method] = {}
    for variant in METHODS:
        kind = kind_of(variant)
        if not variant.trains:
            continue
        for alias in ("", *variant.aliases):
            preset = {k: v for k, v in variant.aliases.get(alias, {}).items() if "." not in k}
            try:
                method = variant.model_validate({"kind": kind, **variant.small, **preset})
            except ValidationError:
                method = variant.model_validate({"kind": kind, **preset})
            if method not in found.values():
                found[alias or kind] = method
    return found


@cache
def admitted() -> dict[str, Method]:
    """Those of `examples` that train a tiny LLaMA to write."""
    with tempfile.TemporaryDirectory() as directory:
        shape = base_model.shape_of_directory(bases.save("llama", Path(directory)))
    found = {}
    for name, method in examples().items():
        case = Case(tasks=rows.TASKS if method.needs_tasks else (), max_seq_len=rows.MAX_SEQ_LEN, steps=6)
        with contextlib.suppress(InvalidRequest):
            methods.admit(method, shape, case)
            found[name] = method
    return found


def packs(objective: Objective, method: Method = LORA, base: str = "llama") -> bool:
    """Whether `packing.admit` lets it through."""
    spec: Any = SimpleNamespace(method=method, objective=objective, training=SimpleNamespace(packing=True))
    shape: Any = SimpleNamespace(architecture=bases.ARCHITECTURES[base], model_type=base)
    try:
        packing.admit(spec, shape)
    except InvalidRequest:
        return False
    return True


def runs_on(objective: Objective, base: str) -> bool:
    """Whether the objective has something to learn on a base of this architecture."""
    architecture = bases.ARCHITECTURES[base]
    task = objective.task(architecture)
    if architecture == "encoder_decoder" and task == "causal_lm":
        return False
    return (architecture != "encoder" or not task.endswith("_lm")) and has_known_head(base, task)


def _slice() -> Iterator[Trial]:
    """Each objective once on two ranks, the options going round; then what else differs."""
    for number, objective in enumerate(KINDS.values()):
        yield Trial(
            objective,
            world=2,
            # Stage 3 takes several times as long as the others.
            stage=3 if number % 4 == 3 else 2,
            packing=packs(objective) and number % 5 > 1,
            checkpointing=number % 5 == 1,
            microbatch=(1, 2, 3)[number % 3],
        )
    yield Trial(SFT, world=2, stage=0, microbatch=2)
    yield Trial(SFT, world=2, stage=2, microbatch=2, precision="bf16")
    yield Trial(SFT, base="t5", world=2, stage=2, microbatch=2)
    yield Trial(KINDS["classification"], base="bert", world=2, stage=2, microbatch=2)
    yield Trial(KINDS["classification"], base="t5", world=2, stage=2, microbatch=1)
    for name, stage in (("adapter", 1), ("lora_plus", 2), ("dylora", 2), ("full", 3)):
        yield Trial(SFT, examples()[name], world=2, stage=stage, microbatch=2, packing=True, name=name)
    yield Trial(KINDS["kto"], world=1, stage=2, microbatch=3, packing=True)


def _every() -> Iterator[Trial]:
    number = 0
    for name, objective in (KINDS | OTHERS).items():
        for world, stages in ((1, (1, 3)), (2, (0, 1, 2, 3)), (4, (2, 3))):
            for stage in stages[:-1] if objective.generates and world != 2 else stages:
                number += 1
                yield Trial(
                    objective,
                    world=world,
                    stage=stage,
                    packing=packs(objective) and number % 2 == 0,
                    checkpointing=number % 3 == 1,
                    microbatch=(1, 2, 3, WHOLE)[number % 4],
                    name=name,
                )
        number += 1
        yield Trial(
            objective,
            world=2,
            stage=1 + number % 3,
            precision="bf16",
            microbatch=2,
            packing=number % 2 == 0 and packs(objective),
            name=name,
        )
        for base in ("bert", "t5", "opt", "bart"):
            if name == objective.kind and runs_on(objective, base):
                number += 1
                yield Trial(
                    objective,
                    base=base,
                    world=2,
                    stage=number % 4,
                    checkpointing=number % 2 == 1,
                    microbatch=(1, 2, 3)[number % 3],
                )
    for place, (name, method) in enumerate(admitted().items()):
        stages = method.can.zero_stages
        yield Trial(
            SFT,
            method,
            world=2,
            stage=stages[place % len(stages)],
            packing=place % 3 > 0 and packs(SFT, method),
            checkpointing=place % 5 == 0 and method.can.gradient_checkpointing,
            microbatch=(1, 2, 3)[place % 3],
            name=name,
        )


def _once(trials: Iterator[Trial]) -> tuple[Trial, ...]:
    return tuple({trial.id: trial for trial in trials}.values())


SLICE = _once(_slice())
EVERY = _once(_every())
TRIALS = _once(iter((*SLICE, *EVERY))) if ALL else SLICE
RESUMED = tuple(
    trial
    for number, trial in enumerate(TRIALS)
    if trial.precision == "fp32"
    and (
        number % 2 == 0 if trial not in SLICE else trial.objective.kind in ("kto", "grpo") or trial.stage == 0
    )
)
"""Those that are interrupted too, and go on from what torch alone has left."""
TWINS = tuple(
    Trial(objective, base=base)
    for objective, base in ((SFT, "llama"), (KINDS["kto"], "llama"), (KINDS["grpo"], "llama"), (SFT, "t5"))
) + (tuple(Trial(SFT, method, name=name) for name, method in admitted().items()) if ALL else ())
"""What another process computes with torch alone, too: it must be the same bytes."""
AGAIN = tuple(trial for trial in SLICE if trial.world == 2 and trial not in RESUMED)
"""What a second set of ranks does once more, for the same bytes; only with EXACTNESS_ALL."""


def sets() -> dict[str, tuple[int, tuple[Trial, ...]]]:
    """Name of a set of rank processes -> (ranks, what they do)."""
    found: dict[str, tuple[int, tuple[Trial, ...]]] = {}
    for world in sorted({trial.world for trial in TRIALS}):
        mine = tuple(trial for trial in TRIALS if trial.world == world)
        found[f"w{world}"] = (world, mine + (TWINS if world == 1 else ()))
    if ALL:
        found["w2-again"] = (2, AGAIN)
    return found
