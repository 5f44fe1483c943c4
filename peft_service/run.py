"""One attempt of a job, from its input in the store to a proven adapter and an outcome there.

`prepare` and `conclude` run once, in the driver, on a CPU; `work` runs on every rank in between. They
share nothing but the store, so they may be on different machines. `run_locally` does all of it in one
process.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from peft_service import adapter, artifact, base_model, checkpoint, gate, methods, reference
from peft_service.errors import GateFailed, InvalidRequest, PeftServiceError, RunFailed
from peft_service.methods import Case, Material
from peft_service.metrics import MetricsWriter
from peft_service.objectives.sft import SFT
from peft_service.spec import Base, DataFile, FineTuneSpec, Spec, Training, case_of
from peft_service.store import Store
from peft_service.variants import Frozen

if TYPE_CHECKING:
    import subprocess

    import torch

    from peft_service import batches
    from peft_service.attached import Attached
    from peft_service.batches import Batch
    from peft_service.graders import Allowed
    from peft_service.rendering import Reading
    from peft_service.tokenise import Meaning
    from peft_service.tokenised import Tokenised
    from peft_service.train import Engine, Progress

log = logging.getLogger(__name__)

METHOD_STATE = "method."
"""In front of the names of a method's own state, in a checkpoint."""
CACHE = Path("~/.cache/peft-service/bases")
"""Where bases from s3:// and hf:// are kept between runs, on every machine."""


class Attempt(Frozen):
    """`<run>/input.json`: everything an attempt is told."""

    job: str
    attempt: int
    project: str
    spec: Spec
    plan: dict[str, Any] = Field(default_factory=dict)
    """cluster.plan.Plan as JSON; what is needed of it here comes as arguments."""
    python_graders: Literal["off", "isolated", "trusted"] = "off"
    """Whether graders may run scripts on the workers; the operator's setting."""
    judge_url: str | None = None
    """Where models that judge are asked; its key is in the workers' environment, never here."""

    @property
    def prefix(self) -> str:
        return f"{self.project}/runs/{self.job}/{self.attempt}"


class RunInput(Attempt):
    spec: FineTuneSpec


class Outcome(Frozen):
    """`<run>/outcome.json`: written last. Without it the attempt has died and another may follow."""

    state: Literal["succeeded", "failed", "stopped"]
    error: dict[str, Any] | None = None
    """code, message and param, if it failed."""
    step: int = 0
    trained_tokens: int = 0
    metrics: dict[str, float] = Field(default_factory=dict)
    retryable: bool = False


@dataclass(frozen=True)
class Prepared:
    """What `prepare` found out; plain values, to be sent to the workers."""

    base_directory: str
    """On the driver's machine; others fetch the base themselves."""
    data_key: str
    validation_key: str | None
    rows: int
    steps: int
    target_tokens: int
    statistics: dict[str, Any] = field(default_factory=dict)
    source_rows: tuple[int, ...] = ()
    """Rows of each source of a mixture."""
    forgetting_key: str | None = None


@dataclass(frozen=True)
class WorkResult:
    state: Literal["succeeded", "stopped"]
    step: int
    trained_tokens: int
    metrics: dict[str, float] = field(default_factory=dict)


def prepare(run: RunInput, store: Store, workdir: Path) -> Prepared:
    """Fetch the base, tokenise the files into the store; what is there from another attempt is used again.

    Raises:
        InvalidTrainingFile: rows cannot be trained on; they are listed.
        UnknownBase, RunFailed: the base cannot be used, or is not the one that was registered.
    """
    from peft_service import batches
    from peft_service.tokenise import Meaning

    spec = run.spec
    metrics = MetricsWriter(store, run.prefix)
    metrics.phase("tokenising")
    directory = base_model.fetch(spec.base, CACHE.expanduser())
    is_registered(spec.base, directory)
    shape = base_model.shape_of_directory(directory, spec.base.uri)
    case = case_of(spec, shape)
    methods.admit(spec.method, shape, case)
    tokenizer = tokenizer_of(spec, directory)
    _check_teacher(spec, tokenizer)
    meaning = Meaning(case.task, case.labels, case.tasks, spec.objective.rows)
    shared = _Tokenising(run, store, workdir, tokenizer, shape.vocab)
    key, data, source_rows = shared.of(spec.data.sources, meaning, "training_file")
    validation_key = forgetting_key = None
    if spec.data.validation is not None:
        asked = replace(meaning, items=spec.evaluation is not None)
        validation_key, _, _ = shared.of((spec.data.validation,), asked, "validation_file")
    if spec.data.forgetting is not None:
        plain = Meaning(case.task)
        forgetting_key, _, _ = shared.of((spec.data.forgetting,), plain, "data.forgetting_file")
    for kind, words in (
        ("dropped", "were dropped"),
        ("truncated", "were truncated"),
        ("split", "were split into several rows"),
    ):
        told = data.statistics.get(kind, {"count": 0})
        if told["count"]:
            metrics.message(
                f"{told['count']} rows are longer than {spec.training.max_seq_len} tokens and {words} "
                f"(lines {', '.join(map(str, told['lines'][:20]))})",
                level="warn",
            )
    return Prepared(
        base_directory=str(directory),
        data_key=key,
        validation_key=validation_key,
        rows=data.rows,
        steps=batches.steps_of(data.rows, spec.training),
        target_tokens=data.target_tokens,
        statistics=data.statistics,
        source_rows=source_rows,
        forgetting_key=forgetting_key,
    )


def work(
    run: RunInput,
    prepared: Prepared,
    store: Store,
    workdir: Path,
    build_engine: "Callable[[Attached, Training], Engine]",
    *,
    rank: int,
    world: int,
    device: "torch.device | str",
    precision: str,
    microbatch: int,
    gradient_checkpointing: bool,
    allowed: "Allowed | None" = None,
) -> WorkResult:
    """Train on this rank, from the newest checkpoint of any attempt, and stage the adapter. Collective.

    `allowed` is what graders may use; None: scripts as the attempt says, and no models.

    Raises:
        Diverged: the loss is not finite.
        InvalidTrainingFile: a step has nothing to learn.
    """
    from peft_service.tokenised import Tokenised
    from peft_service.train import Progress, StillEngine, evaluate, fit

    spec = run.spec
    metrics = MetricsWriter(store, run.prefix) if rank == 0 else None
    if metrics:
        metrics.phase("loading")
    directory = Path(prepared.base_directory)
    if not (directory / "config.json").exists():
        directory = base_model.fetch(spec.base, CACHE.expanduser())
    case = case_of(spec, base_model.shape_of_directory(directory, spec.base.uri), prepared.rows)
    model: Any = base_model.load(
        directory,
        precision=precision,
        quantize=spec.base.quantize,
        device=device,
        task=case.task,
        labels=case.labels,
        seed=spec.seed,
    )
    tokenizer = tokenizer_of(spec, directory)
    data = _downloaded(store, prepared.data_key, workdir / f"data-{rank}", Tokenised)
    validation = None
    if prepared.validation_key:
        validation = _downloaded(store, prepared.validation_key, workdir / f"validation-{rank}", Tokenised)
    pad_id = int(
        tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    )
    model.config.pad_token_id = pad_id
    collate = collate_of(case, model)
    if spec.training.packing:
        collate["capacity"] = spec.training.max_seq_len
    material = _material(run, store, workdir, tokenizer, data, pad_id, collate, device, rank)
    if spec.objective.needs_reference:
        if metrics:
            metrics.phase("reading the base's own answers")

        def referred(rows: "Tokenised", key: str) -> "Tokenised":
            return reference.of_base(
                model, rows, store, f"{run.project}/runs/{run.job}/reference-{key.rpartition('/')[2]}",
                rank=rank, world=world, microbatch=microbatch, pad_id=pad_id, device=device, collate=collate,
            )  # fmt: skip

        data = referred(data, prepared.data_key)
        if validation is not None and prepared.validation_key is not None:
            validation = referred(validation, prepared.validation_key)
    prepare = _with_teacher(spec, case, precision, device)
    probe = None
    if prepared.forgetting_key:
        probe = _downloaded(store, prepared.forgetting_key, workdir / f"forgetting-{rank}", Tokenised)

    def remembered(engine: "Engine", attached: "Attached | None" = None) -> float:
        """The loss on what the base can do already."""
        assert probe is not None
        found = evaluate(
            engine, SFT(), probe, microbatch=microbatch, pad_id=pad_id, attached=attached,
            collate=collate_of(case, model),
        )  # fmt: skip
        return found.loss

    before: float | None = None
    if probe is not None:
        from peft_service.attached import Attached as Plain

        still_base = StillEngine(Plain(model), spec.training)
        before = material.decided("forgetting", lambda: remembered(still_base))
    attached = spec.method.attach(model, case, material)
    whole: Any = attached.model.to(device)
    if gradient_checkpointing:
        whole.gradient_checkpointing_enable({"use_reentrant": False})
        whole.enable_input_require_grads()  # the checkpointed blocks begin frozen
    if not spec.method.trains:
        told: dict[str, float] = {}
        if rank == 0:
            still = StillEngine(attached, spec.training)
            if validation is not None:
                found = evaluate(
                    still,
                    spec.objective,
                    validation,
                    microbatch=microbatch,
                    pad_id=pad_id,
                    attached=attached,
                    collate=collate,
                )
                told = {"valid_loss": found.loss, "valid_mean_token_accuracy": found.accuracy}
            _stage(run, store, workdir, still, attached, case, tokenizer, data, pad_id, collate)
        return WorkResult(state="succeeded", step=0, trained_tokens=0, metrics=told)
    engine = build_engine(attached, spec.training)

    start = _resume(run, store, workdir, engine, attached, rank)
    if metrics:
        if start.step:
            metrics.message(f"Resuming from the checkpoint of step {start.step}.")
        metrics.phase("training")

    def save(progress: Progress) -> None:
        state, trainable = engine.state(), engine.trainable()
        state |= {f"{METHOD_STATE}{name}": tensor for name, tensor in attached.state().items()}
        staged = workdir / f"checkpoint-{progress.step}"
        with engine.gathered():
            if metrics is not None:
                staged.mkdir(parents=True, exist_ok=True)
                attached.save(trainable, staged, (spec.base.id, spec.base.revision))
        if metrics is None:
            return
        told = {
            "step": progress.step,
            "trained_tokens": progress.trained_tokens,
            "metrics": dict(progress.metrics or {}),
            "best": None if progress.best is None else [progress.best.step, progress.best.value],
            "stale": progress.stale,
            "seed": spec.seed,
            "world": world,
        }
        # Before the commit: the next attempt starts after this step and will not say these lines again.
        metrics.flush()
        best = progress.best.step if progress.best and spec.training.best_checkpoint else None
        key = checkpoint.save(store, run.prefix, state, told, staged, workdir, best=best)
        metrics.write({"type": "checkpoint", "step": progress.step, "key": key, "metrics": told["metrics"]})
        metrics.flush()

    draw = _draw(spec, data, prepared)
    open_until = contextlib.ExitStack()
    start_id = int(collate["start_id"]) if case.task == "seq2seq_lm" else None
    generating = _generating(
        run, allowed, engine, attached, tokenizer, data, validation, microbatch, pad_id, start_id, open_until
    )
    with open_until:
        fitted = fit(
            engine,
            spec.objective,
            spec.training,
            spec.seed,
            data,
            validation if not spec.objective.generates else None,
            microbatch=microbatch,
            pad_id=pad_id,
            start=start,
            log=metrics.write if metrics else _nothing,
            save=save,
            stop_requested=lambda: store.info(f"{run.prefix}/stop") is not None,
            attached=attached,
            collate=collate,
            draw=draw,
            prepare=prepare,
            rollout=generating.rollout,
            further=generating.measured,
        )
    done = fitted.progress
    result = WorkResult(
        state="succeeded" if fitted.finished else "stopped",
        step=done.step,
        trained_tokens=done.trained_tokens,
        metrics=dict(done.metrics or {}),
    )
    if fitted.finished:
        best = done.best
        if spec.training.best_checkpoint and best is not None and best.step != done.step:
            _load_best(run, store, workdir, engine, attached, rank, best.step)
            if metrics:
                metrics.message(
                    f"The best evaluation was that of step {best.step} ({spec.training.select_by} "
                    f"{best.value:.6g}): its adapter is the result."
                )
        if probe is not None and before is not None:
            after = remembered(engine, attached)
            told_of = {"forgetting_loss_before": before, "forgetting_loss_after": after}
            result = replace(result, metrics={**result.metrics, **told_of})
            if metrics:
                metrics.write({"type": "eval", "step": done.step, **told_of})
        if metrics:
            metrics.phase("exporting")
        _stage(run, store, workdir, engine, attached, case, tokenizer, data, pad_id, collate)
    if metrics:
        metrics.flush()
    return result


def conclude(
    run: RunInput,
    prepared: Prepared,
    store: Store,
    workdir: Path,
    result: WorkResult,
    gate_process: "subprocess.Popen[str] | None" = None,
) -> Outcome:
    """Prove what was staged in a clean process (`gate.ahead`'s, if given), and keep the proof beside it.

    Raises:
        GateFailed: it is not the adapter that was trained; says which check.
    """
    from safetensors.torch import load_file

    from peft_service.tokenise import rows_at
    from peft_service.tokenised import Tokenised

    if result.state == "stopped":
        return Outcome(state="stopped", **_facts(result))
    spec = run.spec
    metrics = MetricsWriter(store, run.prefix)
    metrics.phase("proving")
    staged = workdir / "staged"
    for info in store.list(f"{run.prefix}/adapter/"):
        name = info.key.removeprefix(f"{run.prefix}/adapter/")
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        store.download(info.key, staged / name)
    logits = workdir / "logits.safetensors"
    store.download(f"{run.prefix}/probe.safetensors", logits)
    data = _downloaded(store, prepared.data_key, workdir / "data-of-the-gate", Tokenised)
    base = Path(prepared.base_directory)
    shape = base_model.shape_of_directory(base, spec.base.uri)
    case = case_of(spec, shape, prepared.rows)
    probe = workdir / "probe"
    tensors = load_file(logits)
    taken = data.part(min(gate.PROBE_ROWS, data.rows, prepared.source_rows[0]))
    first = spec.data.training
    parts = _fetched(store, first, workdir)
    gate.write_probe(probe, tensors, rows_at(parts, reading_of(spec, first), taken), taken)
    precision = json.loads(store.get(f"{run.prefix}/staged.json"))["precision"]
    checks = gate.prove(
        staged,
        base,
        probe,
        spec,
        case,
        precision=precision,
        stored=methods.stored(spec.method, shape, case),
        process=gate_process,
    )
    proof = adapter.Proof(
        checks=checks,
        files=adapter.files_of(staged),
        software=adapter.software(),
        trainable_parameters=methods.trainable(spec.method, shape, case),
    )
    store.put(f"{run.prefix}/adapter.json", proof.model_dump_json(indent=1).encode())
    bad = [check for check in checks if not check.passed]
    if bad:
        raise GateFailed(
            "the adapter was trained, but is not published: "
            + "; ".join(f"check {check.name} failed: {check.detail}" for check in bad)
        )
    return Outcome(state="succeeded", **_facts(result))


def write_outcome(store: Store, run: Attempt, outcome: Outcome) -> None:
    store.put(f"{run.prefix}/outcome.json", outcome.model_dump_json().encode())


def run_locally(run: RunInput, store: Store, workdir: Path) -> Outcome:
    """The whole attempt in this process, on the CPU, with torch's own optimizer."""
    from peft_service.train import LocalEngine

    training = run.spec.training
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        prepared = prepare(run, store, workdir)
        result = work(
            run,
            prepared,
            store,
            workdir,
            LocalEngine,
            rank=0,
            world=1,
            device="cpu",
            precision="fp32" if training.precision == "auto" else training.precision,
            microbatch=min(8, training.batch_size) if training.microbatch == "auto" else training.microbatch,
            gradient_checkpointing=training.gradient_checkpointing is True,
        )
        outcome = conclude(run, prepared, store, workdir, result)
    except (RunFailed, InvalidRequest) as error:
        outcome = failed(error)
    write_outcome(store, run, outcome)
    return outcome


def failed(error: PeftServiceError) -> Outcome:
    """The outcome of a run that was itself wrong: trying again would end the same way."""
    return Outcome(state="failed", error={"code": error.code, "message": error.message, "param": error.param})


def _nothing(line: dict[str, Any]) -> None:
    """Where the metrics of ranks other than 0 go."""


def _facts(result: WorkResult) -> dict[str, Any]:
    return {"step": result.step, "trained_tokens": result.trained_tokens, "metrics": result.metrics}


def is_registered(base: Base, directory: Path) -> None:
    """Weights that changed under a job would give an adapter for a model that nobody has.

    Raises:
        RunFailed: they did.
    """
    if base.digest is None or base.uri.startswith("hf://"):  # a Hub base is pinned by its commit
        return
    found = base_model.digest_of_directory(directory)
    if found != base.digest:
        raise RunFailed(
            f"the base {base.id} at {base.uri} has changed since it was registered (digest {found[:12]}, not "
            f"{base.digest[:12]}); register it anew and submit the job again",
            code="base_changed",
        )


def tokenizer_of(spec: FineTuneSpec, directory: Path) -> Any:
    """The base's tokenizer, with the template that the spec puts into it."""
    tokenizer = base_model.load_tokenizer(directory)
    if spec.data.template is not None:
        tokenizer.chat_template = spec.data.template.jinja
    return tokenizer


def reading_of(spec: FineTuneSpec, file: DataFile) -> "Reading":
    from peft_service.rendering import Reading

    data = spec.data
    return Reading(
        columns=file.columns,
        documents=file.documents,
        limit=file.limit,
        train_on=data.train_on,
        eos=data.eos,
        turns=data.turns,
        tools=data.tools,
    )


def _fetched(store: Store, file: DataFile, workdir: Path) -> "list[tuple[str, Path]]":
    """The files of a data set on this machine, with their names."""
    parts = []
    for number, part in enumerate(file.objects):
        local = workdir / f"{file.id}-{number}"
        if not local.exists():
            store.download(part.key, local)
        parts.append((part.name, local))
    return parts


@dataclass(frozen=True)
class _Tokenising:
    """Data sets as tokens, each made once a project: what another attempt or job has made is used again."""

    run: RunInput
    store: Store
    workdir: Path
    tokenizer: Any
    vocab: int

    def of(
        self, files: "Sequence[DataFile]", meaning: "Meaning", param: str
    ) -> "tuple[str, Tokenised, tuple[int, ...]]":
        """(key in the store, rows of all files, rows of each)."""
        from peft_service.tokenised import Tokenised, concatenated

        made = [self._one(file, meaning, param) for file in files]
        rows = tuple(data.rows for _, data in made)
        if len(made) == 1:
            return made[0][0], made[0][1], rows
        digest = hashlib.sha256("".join(key for key, _ in made).encode()).hexdigest()
        key = f"{self.run.project}/runs/{self.run.job}/data-{digest}.safetensors"
        local = self.workdir / f"{param}-together.safetensors"
        if self.store.info(key) is None:
            data = concatenated([data for _, data in made], [file.name or file.id for file in files])
            data.save(local)
            self.store.put_file(key, local)
        else:
            self.store.download(key, local)
        return key, Tokenised.load(local), rows

    def _one(self, file: DataFile, meaning: "Meaning", param: str) -> "tuple[str, Tokenised]":
        from peft_service.tokenise import digest_of, tokenise
        from peft_service.tokenised import Tokenised

        spec = self.run.spec
        training, too_long, reading = spec.training, spec.data.too_long_in(file), reading_of(spec, file)
        digest = digest_of(
            file.sha256, self.tokenizer, file.format, training.max_seq_len, too_long, meaning, reading
        )
        key = tokenised_key(self.run.project, file.sha256, digest)
        local = self.workdir / f"{param}-{digest[:16]}.safetensors"
        if self.store.info(key) is not None:
            self.store.download(key, local)
            return key, Tokenised.load(local)
        parts = _fetched(self.store, file, self.workdir)
        data = tokenise(
            parts, file.format, self.tokenizer, training.max_seq_len, too_long, meaning, reading, param=param
        )
        if data.statistics["max_token_id"] >= self.vocab:
            raise RunFailed(
                f"the tokenizer gives token {data.statistics['max_token_id']}, but the base has only "
                f"{self.vocab} embeddings; tokenizer and weights do not belong together",
                code="tokenizer_mismatch",
                param="model",
            )
        data.save(local)
        self.store.put_file(key, local)
        return key, Tokenised.load(local)


def tokenised_key(project: str, sha256: str, digest: str = "") -> str:
    """Where a data set's tokens are kept; without a digest, the prefix of all that was made of that data."""
    return f"{project}/tokenised/{sha256}/" + (f"{digest}.safetensors" if digest else "")


def _check_teacher(spec: FineTuneSpec, tokenizer: Any) -> None:
    """
    Raises:
        InvalidRequest: the teacher writes in other tokens than the base.
    """
    if spec.teacher is None:
        return
    theirs = base_model.load_tokenizer(base_model.fetch(spec.teacher, CACHE.expanduser()))
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise InvalidRequest(
            f"the teacher {spec.teacher.id} has another vocabulary than {spec.base.id}: a distribution over "
            "its tokens means nothing to the base. Take a teacher of the same family",
            code="teacher_not_applicable",
            param="method",
        )


def _with_teacher(
    spec: FineTuneSpec, case: Case, precision: str, device: Any
) -> "Callable[[Sequence[Batch]], None] | None":
    """What gives every microbatch the teacher; None where there is none."""
    if spec.teacher is None:
        return None
    directory = base_model.fetch(spec.teacher, CACHE.expanduser())
    teacher: Any = base_model.load(
        directory, precision=precision, quantize=spec.teacher.quantize, device=device, task=case.task
    )
    teacher.eval().requires_grad_(False)

    def prepare(parts: "Sequence[Batch]") -> None:
        for batch in parts:
            batch.teacher = teacher

    return prepare


@dataclass(frozen=True)
class _Generating:
    """What a job does with answers that the model writes; None: nothing."""

    rollout: "Callable[[Sequence[int], int], tuple[list[Batch], dict[str, float]]] | None" = None
    measured: "Callable[[], dict[str, float]] | None" = None


def _generating(
    run: RunInput,
    allowed: "Allowed | None",
    engine: "Engine",
    attached: "Attached",
    tokenizer: Any,
    data: "Tokenised",
    validation: "Tokenised | None",
    microbatch: int,
    pad_id: int,
    start_id: int | None,
    open_until: contextlib.ExitStack,
) -> _Generating:
    from peft_service.graders import Allowed, Judge
    from peft_service.objectives.grpo import GRPO
    from peft_service.rollout import evaluate_generation, rollout

    spec, made = run.spec, _Generating()
    objective, evaluation = spec.objective, spec.evaluation
    allowed = allowed or Allowed(python=run.python_graders)
    if isinstance(objective, GRPO):
        judge = open_until.enter_context(Judge(objective.grader, allowed))

        def answered(rows: "Sequence[int]", step: int) -> "tuple[list[Batch], dict[str, float]]":
            return rollout(
                engine, attached, tokenizer, objective, judge, data, data.item, rows, step,
                seed=spec.seed, microbatch=microbatch, pad_id=pad_id, start_id=start_id,
            )  # fmt: skip

        made = replace(made, rollout=answered)
    if evaluation is not None and validation is not None:
        asked, examiner = validation, open_until.enter_context(Judge(evaluation.grader, allowed))

        def measured() -> dict[str, float]:
            told = evaluate_generation(
                engine, attached, tokenizer, examiner, asked, asked.item,
                max_new_tokens=evaluation.max_new_tokens, microbatch=microbatch, pad_id=pad_id,
                temperature=evaluation.temperature, seed=spec.seed, most_rows=evaluation.rows,
            )  # fmt: skip
            return {"valid_score": told.pop("reward")} | {f"valid_{name}": x for name, x in told.items()}

        made = replace(made, measured=measured)
    return made


def _draw(spec: FineTuneSpec, data: "Tokenised", prepared: Prepared) -> "batches.Draw | None":
    """How rows are drawn where not each is taken once an epoch."""
    import numpy as np

    from peft_service import batches

    if spec.data.mixture and all(source.weight is not None for source in spec.data.sources):
        groups = np.repeat(np.arange(len(prepared.source_rows), dtype=np.int32), prepared.source_rows)
        return batches.Draw(groups, tuple(float(source.weight or 0) for source in spec.data.sources))
    if spec.data.task_temperature is not None and data.row_tasks is not None:
        return batches.by_task(np.array(data.row_tasks), spec.data.task_temperature)
    return None


def _downloaded(store: Store, key: str, path: Path, kind: "type[Tokenised]") -> "Tokenised":
    path.parent.mkdir(parents=True, exist_ok=True)
    store.download(key, path)
    return kind.load(path)


def collate_of(case: Case, model: Any) -> dict[str, Any]:
    """How rows of this case are put together for this model: further arguments of `batches.microbatches`."""
    start = model.config.decoder_start_token_id if case.task == "seq2seq_lm" else 0
    decoder = not model.config.is_encoder_decoder and case.task == "sequence_classification"
    return {
        "task": case.task,
        "start_id": int(start or 0),
        "classes": len(case.labels),
        # A decoder classifies by its last token; with virtual tokens in front it is found by place alone.
        "pad_left": decoder and hasattr(model, "score"),
    }


def _material(
    run: RunInput,
    store: Store,
    workdir: Path,
    tokenizer: Any,
    data: "Tokenised",
    pad_id: int,
    collate: dict[str, Any],
    device: Any,
    rank: int,
) -> Material:
    """What the method may read: adapters it starts from, and rows."""
    from peft_service import batches

    spec = run.spec
    sources = []
    for number, source in enumerate(spec.sources):
        directory = workdir / f"source-{rank}-{number}"
        adapter.download(store, source.key, directory)
        sources.append(directory)

    def sample(count: int) -> "list[Batch]":
        rows = batches.order(data.rows, 0, spec.seed)[:count].tolist()
        plain = {name: value for name, value in collate.items() if name != "capacity"}
        return batches.microbatches(data, rows, 0, 1, 1, pad_id, device, **plain)

    def decided(name: str, compute: "Callable[[], Any]") -> Any:
        key = f"{run.project}/runs/{run.job}/decided-{name}.json"
        # Rank 0 alone looks: another rank could look after it has written, and would not wait with it.
        if reference.told_by_rank_0(rank == 0 and store.info(key) is None):
            value = json.dumps(compute()).encode()
            if rank == 0:
                store.put(key, value)
            reference.told_by_rank_0(True)
        return json.loads(store.get(key))

    return Material(
        sources=tuple(sources),
        tokenizer=tokenizer,
        sample=sample,
        objective=spec.objective,
        decided=decided,
    )


def _resume(
    run: RunInput, store: Store, workdir: Path, engine: "Engine", attached: "Attached", rank: int
) -> "Progress":
    """Load the newest whole checkpoint into the engine; rank 0 chooses, since the store may change
    meanwhile."""
    import torch

    from peft_service.train import Best, Progress

    chosen = torch.zeros(2, dtype=torch.int64, device=engine.device)
    found = checkpoint.latest(store, run.project, run.job, attempts=run.attempt) if rank == 0 else None
    if found is not None:
        chosen += torch.tensor([found.attempt, found.step], device=engine.device)
    attempt, step = (int(number) for number in engine.all_sum(chosen))
    if step == 0:
        return Progress()
    if found is None:
        found = checkpoint.open_at(store, run.project, run.job, attempt, step)
    if found is None:
        raise RuntimeError(
            f"checkpoint {step} of attempt {attempt} was there for rank 0 and is not for rank {rank}"
        )
    _load(store, found, workdir / f"resume-{rank}", engine, attached)
    told, best = found.progress, found.progress.get("best")
    return Progress(
        step,
        int(told["trained_tokens"]),
        dict(told["metrics"]),
        best=None if best is None else Best(int(best[0]), float(best[1])),
        stale=int(told.get("stale", 0)),
    )


def _load(
    store: Store, found: checkpoint.Checkpoint, folder: Path, engine: "Engine", attached: "Attached"
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = checkpoint.load(store, found, folder)
    mine = {name: state.pop(name) for name in list(state) if name.startswith(METHOD_STATE)}
    attached.load_state({name.removeprefix(METHOD_STATE): tensor for name, tensor in mine.items()})
    engine.load_state(state)


def _load_best(
    run: RunInput,
    store: Store,
    workdir: Path,
    engine: "Engine",
    attached: "Attached",
    rank: int,
    step: int,
) -> None:
    """Put the parameters of an earlier step into the engine. Collective.

    Raises:
        RunFailed: that checkpoint is gone.
    """
    for attempt in range(run.attempt, 0, -1):
        found = checkpoint.open_at(store, run.project, run.job, attempt, step)
        if found is not None:
            _load(store, found, workdir / f"best-{rank}", engine, attached)
            return
    raise RunFailed(f"the checkpoint of step {step}, the best one, is not in the store any more")


def _stage(
    run: RunInput,
    store: Store,
    workdir: Path,
    engine: "Engine",
    attached: "Attached",
    case: Case,
    tokenizer: Any,
    data: "Tokenised",
    pad_id: int,
    collate: dict[str, Any],
) -> None:
    """Put the artifact, and what the live model says about a few rows, under the run. Collective."""
    import torch
    from safetensors.torch import save_file

    from peft_service import batches

    rows = list(range(min(gate.PROBE_ROWS, data.rows)))
    plain = {name: value for name, value in collate.items() if name != "capacity"}
    (batch,) = batches.microbatches(data, rows, 0, 1, gate.PROBE_ROWS, pad_id, engine.device, **plain)
    batch.extra = attached.inputs(batch)
    inputs = gate.shortened(batch.inputs)
    engine.model.eval()
    with torch.no_grad():  # on every rank: under ZeRO-3 a forward pass is a collective
        outputs = gate.outputs_of(engine.model(**inputs))
    trainable = engine.trainable()
    directory = workdir / "adapter"
    with engine.gathered():
        if engine.rank == 0:
            adapter.stage(attached, trainable, tokenizer, directory, run.spec.base)
    if engine.rank != 0:
        return
    artifact.write_task(directory, case.task, case.labels)
    first = next(iter(outputs.values()))
    probe = {f"input.{name}": tensor for name, tensor in inputs.items()}
    probe |= {f"output.{name}": tensor.float() for name, tensor in outputs.items()}
    save_file({name: t.cpu().contiguous() for name, t in probe.items()}, workdir / "probe.safetensors")
    store.put_file(f"{run.prefix}/probe.safetensors", workdir / "probe.safetensors")
    precision = "bf16" if first.dtype == torch.bfloat16 else "fp32"
    store.put(f"{run.prefix}/staged.json", json.dumps({"precision": precision}).encode())
    for file in adapter.files_of(directory):
        store.put_file(f"{run.prefix}/adapter/{file.path}", directory / file.path)
