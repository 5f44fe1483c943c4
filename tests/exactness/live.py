"""A trial at work on one rank: the loop itself, `train.fit`, with all that `run.work` gives it."""

import hashlib
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peft_service import artifact, base_model, checkpoint, reference, rollout
from peft_service.adapter import files_of
from peft_service.errors import PeftServiceError
from peft_service.graders import Allowed, Judge
from peft_service.methods import Case, Material
from peft_service.run import METHOD_STATE, collate_of
from peft_service.spec import Training
from peft_service.store import FileStore
from peft_service.tasks import Task
from peft_service.train import Best, Engine, LocalEngine, Progress, fit
from tests.exactness import rows
from tests.exactness.trials import Trial
from tests.methods import bases, checks

STEPS, BATCH, SEED, PAD = 6, 5, 11, 2
HALF = STEPS // 2
"""13 rows in steps of 5, 5 and 3: after half of the steps all have been seen once."""


def training_of(trial: Trial) -> Training:
    return Training(
        # A method's own rate hardly moves anything in six steps.
        learning_rate=min(1e-2, max(2e-3, 10 * trial.method.rate())),
        weight_decay=0.1 if trial.method.can.weight_decay else 0.0,
        max_grad_norm=0.5,
        n_epochs=2,
        batch_size=BATCH,
        max_seq_len=rows.MAX_SEQ_LEN,
        checkpoint_steps=HALF,
        # With 1e-8, Adam takes a whole step in the direction of a gradient that is only rounding.
        adam_epsilon=1e-5,
        best_checkpoint=not trial.objective.generates,
        early_stopping_patience=None if trial.objective.generates else 5,
    )


@dataclass
class Told:
    """What came out; plain values, the same on every rank."""

    loss: list[float] = field(default_factory=list)
    norm: list[float] = field(default_factory=list)
    further: list[dict[str, float]] = field(default_factory=list)
    """By step: accuracy, tokens, targets, and what graders said."""
    valid: list[float] = field(default_factory=list)
    progress: dict[str, Any] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    """Of the artifact's files."""
    moved: list[str] = field(default_factory=list)
    """Frozen parameters that are not what they were."""
    diverged: dict[str, Any] = field(default_factory=dict)
    """The error of a poisoned row: class, message, details, the row's line, tensors that moved."""


class Live:
    def __init__(self, trial: Trial, work: Path, store: FileStore, rank: int = 0, world: int = 1) -> None:
        """`work` has `prepare`d bases and data; `store` is this set of processes' own."""
        self.trial, self.work, self.store = trial, work, store
        objective, method, training = trial.objective, trial.method, training_of(trial)
        self.training = training
        found = rows.tokenised(objective, trial.base, trial.task, method.needs_tasks, work / "data")
        self.data, self.validation = found.training, found.validation
        self.case = Case(
            task=trial.task,
            labels=objective.labels(found.labels),
            tasks=rows.TASKS if method.needs_tasks else (),
            steps=STEPS,
            seed=SEED,
            weight_decay=training.weight_decay,
            gradient_checkpointing=trial.checkpointing,
            max_seq_len=rows.MAX_SEQ_LEN,
        )
        model: Any = base_model.load(
            work / "bases" / trial.base,
            precision=trial.precision,
            task=trial.task,
            labels=self.case.labels,
            seed=SEED,
        )
        model.config.pad_token_id = PAD
        for module in model.modules():
            # Of the heads of some models; it is drawn by rank, and would make another curve of every split.
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.collate = collate_of(self.case, model)
        if trial.packing:
            self.collate["capacity"] = rows.MAX_SEQ_LEN
        if objective.needs_reference:
            self.data, self.validation = (
                reference.of_base(
                    model, part, store, f"p/reference/{trial.id}-{name}", rank=rank, world=world,
                    microbatch=trial.microbatch, pad_id=PAD, device="cpu", collate=self.collate,
                )
                for name, part in (("training", self.data), ("validation", self.validation))
            )  # fmt: skip
        self.teacher = (
            _teacher(work, trial.base, trial.task, trial.precision)
            if objective.kind == "distillation"
            else None
        )
        self.tokenizer = bases.tokenizer(trial.base)
        words = model.get_input_embeddings().num_embeddings
        # Encoder-decoders have several modules over one table.
        self.embeddings = [
            module
            for module in model.modules()
            if isinstance(module, nn.Embedding) and module.num_embeddings == words
        ]
        self.attached = method.attach(model, self.case, self._material())
        whole: Any = self.attached.model
        if trial.checkpointing:
            whole.gradient_checkpointing_enable({"use_reentrant": False})
            whole.enable_input_require_grads()
        self.frozen = {
            name: _bits(parameter)
            for name, parameter in whole.named_parameters()
            if not parameter.requires_grad
        }
        self.engine = self._engine()
        self.saved: list[int] = []

    def _engine(self) -> Engine:
        if self.trial.stage is None:
            return LocalEngine(self.attached, self.training)
        from cluster.engine import ZeroEngine

        return ZeroEngine(
            self.attached,
            self.training,
            stage=self.trial.stage,
            precision=self.trial.precision,
            persistence_threshold=0,
        )

    def _material(self) -> Material:
        from peft_service import batches

        plain = {name: value for name, value in self.collate.items() if name != "capacity"}

        def sample(count: int) -> Any:
            some = batches.order(self.data.rows, 0, SEED)[:count].tolist()
            return batches.microbatches(self.data, some, 0, 1, 1, PAD, "cpu", **plain)

        sources = checks.sources(
            checks.Trial(self.trial.method, self.trial.base, self.trial.task), self.work / "bases"
        )
        return Material(
            sources=sources, tokenizer=self.tokenizer, sample=sample, objective=self.trial.objective
        )

    def fit(self, start: Progress | None = None, save: bool = False, stop: Any = lambda: False) -> Told:
        """From `start` to the end, or until `stop`. `save`: the checkpoint after half of the steps is to go
        into the store; of others, it is only noted that they were due."""
        told, objective, trial = Told(), self.trial.objective, self.trial
        names = ("train_mean_token_accuracy", "tokens", "target_tokens", "reward", "completion_tokens")

        def log(line: dict[str, Any]) -> None:
            if line["type"] == "step":
                told.loss.append(line["train_loss"])
                told.norm.append(line["grad_norm"])
                told.further.append({name: line[name] for name in names if name in line})
            else:
                told.valid.append(line["valid_loss"])

        def prepare(parts: Any) -> None:
            for batch in parts:
                batch.teacher = self.teacher

        with ExitStack() as stack:
            roll = None
            if objective.generates:
                judge = stack.enter_context(Judge(objective.grader, Allowed()))

                def roll(step_rows: Any, step: int) -> Any:
                    return rollout.rollout(
                        self.engine, self.attached, self.tokenizer, objective, judge, self.data,
                        self.data.item, step_rows, step, seed=SEED, microbatch=trial.microbatch, pad_id=PAD,
                        start_id=self.collate["start_id"] if trial.task == "seq2seq_lm" else None,
                    )  # fmt: skip

            done = fit(
                self.engine,
                objective,
                self.training,
                SEED,
                self.data,
                None if objective.generates else self.validation,
                microbatch=trial.microbatch,
                pad_id=PAD,
                start=start or Progress(),
                log=log,
                save=lambda progress: self._save(progress, save),
                stop_requested=stop,
                attached=self.attached,
                collate=self.collate,
                prepare=prepare if self.teacher is not None else None,
                rollout=roll,
            )
        told.progress = _told(done.progress)
        return told

    def _save(self, progress: Progress, really: bool) -> None:
        """As `run.work` does it."""
        self.saved.append(progress.step)
        if not really or progress.step != HALF:
            return
        state = self.engine.state()
        state |= {f"{METHOD_STATE}{name}": tensor for name, tensor in self.attached.state().items()}
        with tempfile.TemporaryDirectory() as directory:
            self.artifact(Path(directory) / "artifact")
            if self.engine.rank == 0:
                checkpoint.save(
                    self.store, f"p/runs/{self.trial.id}/1", state, _told(progress),
                    Path(directory) / "artifact", Path(directory),
                )  # fmt: skip

    def resume(self, store: FileStore, job: str, step: int) -> Progress:
        """Go on from a checkpoint that this or another trial has left. Collective; it must be there."""
        found = checkpoint.open_at(store, "p", job, 1, step)
        assert found is not None, (store, job, step)
        with tempfile.TemporaryDirectory() as directory:
            state = checkpoint.load(store, found, Path(directory))
            mine = {name: state.pop(name) for name in list(state) if name.startswith(METHOD_STATE)}
            self.attached.load_state({name.removeprefix(METHOD_STATE): mine[name] for name in mine})
            self.engine.load_state(state)
        told = dict(found.progress)
        best = told.pop("best")
        return Progress(**told, best=None if best is None else Best(*best))

    def artifact(self, directory: Path) -> dict[str, str]:
        """Write it, on rank 0; the sha256 of each file. Collective."""
        trainable = self.engine.trainable()
        with self.engine.gathered():
            if self.engine.rank != 0:
                return {}
            directory.mkdir(parents=True, exist_ok=True)
            self.attached.save(trainable, directory, ("tiny/base", None))
        artifact.write_task(directory, self.case.task, self.case.labels)
        return {
            file.path: hashlib.sha256((directory / file.path).read_bytes()).hexdigest()
            for file in files_of(directory)
        }

    def moved(self) -> list[str]:
        """Frozen parameters that are not bit for bit what they were before training. Collective."""
        changed = []
        for name, parameter in self.attached.model.named_parameters():
            if name in self.frozen:
                with self._whole(parameter):
                    if not torch.equal(_bits(parameter), self.frozen[name]):
                        changed.append(name)
        return changed

    def _whole(self, parameter: nn.Parameter) -> Any:
        if self.trial.stage != 3:
            return ExitStack()
        import deepspeed

        return deepspeed.zero.GatheredParameters([parameter])

    def poisoned(self) -> dict[str, Any]:
        """One row of the second step gets a loss that is no number: what `fit` says, and what moved."""
        from peft_service import batches

        chosen = batches.rows_of_step(1, self.data.rows, self.training, SEED)[3]
        ids, targets = self.data.row(chosen * self.data.sequences)
        if self.trial.task == "seq2seq_lm":
            ids = ids[targets == 0]
        wanted = torch.from_numpy(ids.astype(np.int64))

        def poison(module: Any, args: Any, output: Tensor) -> Tensor | None:
            tokens_BT = args[0]
            if not torch.is_grad_enabled() or tokens_BT.shape[-1] < len(wanted):
                return None
            found_BW = (tokens_BT.unfold(1, len(wanted), 1) == wanted).all(-1)
            return output * float("nan") if found_BW.any() else None

        before = self.engine.trainable()
        handles = [module.register_forward_hook(poison) for module in self.embeddings]
        try:
            self.fit(Progress(step=1))
        except PeftServiceError as error:
            told = {"error": type(error).__name__, "message": error.message, "details": error.details}
        else:
            told = {"error": "none", "message": "", "details": {}}
        finally:
            for handle in handles:
                handle.remove()
        after = self.engine.trainable()
        told["moved"] = [name for name in before if not torch.equal(before[name], after[name])]
        told["line"] = int(self.data.lines[chosen])
        return told

    def close(self) -> None:
        if self.trial.stage is not None:
            self.engine.close()  # type: ignore[attr-defined]


def prepare(work: Path, trials: Any) -> None:
    """The bases, the teacher, adapters to start from and the data, before any process looks for them."""
    (work / "data").mkdir(exist_ok=True)
    for base in {trial.base for trial in trials}:
        if not (work / "bases" / base).exists():
            bases.save(base, work / "bases" / base)
        if not (work / "teachers" / base).exists():
            bases.model(base, seed=1).save_pretrained(work / "teachers" / base)
    for trial in trials:
        rows.tokenised(trial.objective, trial.base, trial.task, trial.method.needs_tasks, work / "data")


@cache
def _teacher(work: Path, base: str, task: Task, precision: str) -> Any:
    model: Any = base_model.load(work / "teachers" / base, task=task, precision=precision)
    return model.eval().requires_grad_(False)


def _told(progress: Progress) -> dict[str, Any]:
    best = progress.best
    return {
        "step": progress.step,
        "trained_tokens": progress.trained_tokens,
        "metrics": dict(progress.metrics or {}),
        "best": None if best is None else [best.step, best.value],
        "stale": progress.stale,
    }


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().contiguous().view(-1).view(torch.uint8)
