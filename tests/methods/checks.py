"""What every method must hold, on every architecture and task it says it works on.

INIT    the first forward pass gives what the base gives, where `can.starts_as_base`
COUNT   exactly `methods.trainable` parameters train, exactly `methods.stored` values are in the artifact
FROZEN  everything else is bit-identical after training
PADDING a row's answers do not depend on the rows beside it
LOAD    the artifact on a fresh base gives the trained model's logits
RESUME  stop + resume = uninterrupted, bit for bit
MERGE   merged = unmerged in float32, where `can.mergeable`
LEARN   the loss of 32 rows falls far
"""

import copy
import math
import tempfile
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from peft_service import artifact, base_model, batches, methods, shipped
from peft_service.errors import InvalidRequest
from peft_service.gate import weights_of
from peft_service.methods import METHODS, Case, Material, Method
from peft_service.methods.prompt_tuning import NOT_MERGEABLE
from peft_service.run import collate_of
from peft_service.spec import Training
from peft_service.tasks import tasks_of
from peft_service.train import LocalEngine, StillEngine, train_step
from peft_service.variants import kind_of
from tests.methods import bases

STEPS, ROWS = 6, 4
TOLERANCE = 2e-5
TASKS = ("one", "two")


@dataclass(frozen=True)
class Trial:
    """One method on one base for one task."""

    method: Method
    base: str
    task: str
    name: str = ""
    """The alias that it was asked for by, where that sets fields."""

    @property
    def id(self) -> str:
        return f"{self.name or self.method.kind}-{self.base}-{self.task}"

    @property
    def tasks(self) -> tuple[str, ...]:
        return TASKS if self.method.needs_tasks else ()


def example(variant: type[Method], alias: str = "") -> Method:
    """The method with its small fields, and what the alias sets."""
    preset = {name: value for name, value in variant.aliases.get(alias, {}).items() if "." not in name}
    try:
        return variant.model_validate({"kind": kind_of(variant), **variant.small, **preset})
    except ValidationError:
        # Under this name the small fields do not go: it has others.
        return variant.model_validate({"kind": kind_of(variant), **preset})


def trials(root: Path) -> list[Trial]:
    """Every method on every architecture and task that it admits; of an architecture the first base that it
    does. Under another name that sets fields: on every architecture, for the first task."""
    found = []
    for variant in METHODS:
        examples = [("", example(variant))]
        for alias in variant.aliases:
            method = example(variant, alias)
            if all(method != other for _, other in examples):
                examples.append((alias, method))
        for alias, method in examples:
            for architecture in ("decoder", "encoder", "encoder_decoder"):
                kinds = [kind for kind in bases.KINDS if bases.ARCHITECTURES[kind] == architecture]
                for task in tasks_of(architecture):
                    trial = next(
                        (
                            trial
                            for kind in kinds
                            if admitted(trial := Trial(method, kind, task, alias), root)
                        ),
                        None,
                    )
                    if trial is not None:
                        found.append(trial)
                    if alias and trial is not None:
                        break
    return found


def admitted(trial: Trial, root: Path) -> bool:
    try:
        methods.admit(trial.method, shape_of(trial.base, root), case_of(trial))
    except InvalidRequest:
        return False
    return True


@lru_cache
def directory_of(kind: str, root: Path) -> Path:
    """The base on disk, made once."""
    if kind == bases.SHIPPED:
        return shipped.path()
    directory = root / kind
    if not (directory / "config.json").exists():
        bases.save(kind, directory)
    return directory


@lru_cache
def shape_of(kind: str, root: Path):
    return base_model.shape_of_directory(directory_of(kind, root))


def case_of(trial: Trial, steps: int = STEPS, seed: int = 0) -> Case:
    return Case(
        task=trial.task,
        labels=bases.labels_of(trial.task, trial.tasks),
        tasks=trial.tasks,
        steps=steps,
        seed=seed,
        max_seq_len=64,
    )


class Live:
    """A trial at work in this process."""

    def __init__(
        self,
        trial: Trial,
        root: Path,
        *,
        steps: int = STEPS,
        rate: float | None = None,
        engine=None,
        quantize: str | None = None,
    ):
        self.trial, self.root = trial, root
        self.directory = directory_of(trial.base, root)
        self.case = case_of(trial, steps).model_copy(update={"quantize": quantize})
        self.data = bases.tokenised(trial.base, trial.task, root, tasks=trial.tasks)
        self.objective = bases.objective_of(trial.task)
        self.training = Training(
            learning_rate=rate or trial.method.rate(), batch_size=ROWS, n_epochs=1000, max_steps=steps
        )
        model = base_model.load(
            self.directory, precision="fp32", quantize=quantize, task=trial.task, labels=self.case.labels,
            seed=self.case.seed,
        )  # fmt: skip
        model.config.pad_token_id = 2
        self.head = {f"{name}." for name in model.new_head}
        self.collate = collate_of(self.case, model)
        self.probe = self.batch(range(6))
        with torch.no_grad():
            self.before = _answers(model, self.probe)
        material = Material(
            sources=sources(trial, root),
            tokenizer=bases.tokenizer(trial.base),
            sample=lambda count: [self.batch([row]) for row in range(min(count, self.data.rows))],
            objective=self.objective,
        )
        self.attached = trial.method.attach(model, self.case, material)
        self.engine = (engine or (LocalEngine if trial.method.trains else StillEngine))(
            self.attached, self.training
        )

    def batch(self, rows, rank: int = 0, world: int = 1, size: int = 100):
        (batch,) = batches.microbatches(self.data, list(rows), rank, world, size, 2, "cpu", **self.collate)
        return batch

    def answers(self) -> dict[str, torch.Tensor]:
        """What the live model says to the probe."""
        return self.said_of(self.probe)

    def said_of(self, batch) -> dict[str, torch.Tensor]:
        """What the live model says to a batch."""
        self.engine.model.eval()
        batch.extra = self.attached.inputs(batch)
        with torch.no_grad():
            said = _answers(self.engine.model, batch)
        self.engine.model.train()
        return said

    def step(self, number: int) -> float:
        rows = batches.rows_of_step(number, self.data.rows, self.training, self.case.seed)
        torch.manual_seed(number)
        parts = batches.microbatches(
            self.data, rows, self.engine.rank, self.engine.world, 2, 2, "cpu", **self.collate
        )
        self.engine.model.train()
        rate = self.training.learning_rate
        return train_step(self.engine, self.objective, parts, rate, self.attached, number).loss

    def loss(self) -> float:
        """Over all rows."""
        from peft_service.train import evaluate

        return evaluate(
            self.engine, self.objective, self.data, microbatch=8, pad_id=2, attached=self.attached,
            collate=self.collate,
        ).loss  # fmt: skip

    def save(self, directory: Path) -> Path:
        trainable = self.engine.trainable()
        with self.engine.gathered():
            if self.engine.rank == 0:
                directory.mkdir(parents=True, exist_ok=True)
                self.attached.save(trainable, directory, ("tiny/base", None))
                artifact.write_task(directory, self.case.task, self.case.labels)
        return directory


def _answers(model, batch) -> dict[str, torch.Tensor]:
    from peft_service.gate import outputs_of

    said = outputs_of(model(**batch.inputs))
    width = batch.tokens_BT.shape[1]
    return {
        name: (tensor[:, -width:] if tensor.ndim >= 2 and _by_token(name, tensor, batch) else tensor).float()
        for name, tensor in said.items()
    }


def _by_token(name: str, tensor: torch.Tensor, batch) -> bool:
    """Whether the second dimension counts tokens, so that virtual ones in front are to be cut."""
    if batch.decoder_BT is not None:
        return False
    return name != "logits" or tensor.ndim == 3


def real(said: dict[str, torch.Tensor], batch) -> torch.Tensor:
    """All answers at real tokens, as one vector."""
    mask = batch.mask_BT.bool()
    parts = []
    for name, tensor in said.items():
        by_token = _by_token(name, tensor, batch) and tensor.shape[1] == mask.shape[1]
        parts.append(tensor[mask].flatten() if by_token else tensor.flatten())
    return torch.cat(parts)


def difference(one, two, batch) -> float:
    return float((real(one, batch) - real(two, batch)).abs().max())


@lru_cache
def _sources(trial: Trial, root: Path, count: int) -> tuple[Path, ...]:
    made = []
    for number in range(count):
        live = Live(trial, root, rate=1e-2)
        for step in range(number, number + 3):
            live.step(step)
        made.append(live.save(Path(tempfile.mkdtemp(prefix=f"{trial.id}-", dir=root))))
    return tuple(made)


def sources(trial: Trial, root: Path) -> tuple[Path, ...]:
    """Trained adapters for a method that starts from some."""
    wanted = getattr(trial.method, "sources", None)
    if not wanted:
        return ()
    kind = trial.method.sources_of[0]
    source = example(next(variant for variant in METHODS if kind_of(variant) == kind))
    if "virtual_tokens" in type(source).model_fields:
        source = source.model_copy(update={"virtual_tokens": trial.method.virtual_tokens})
    return _sources(Trial(source, trial.base, trial.task), root, len(wanted))


def load(live: Live, directory: Path):
    """(model with the artifact, its answers) on a fresh base whose head has other first values."""
    trial = live.trial
    if artifact.is_model(directory):
        model = artifact.load_base(directory, trial.task, live.case.labels, dtype=torch.float32)
    else:
        torch.manual_seed(1234)
        base = artifact.load_base(live.directory, trial.task, live.case.labels, dtype=torch.float32)
        base.config.pad_token_id = 2
        model = artifact.load(base, directory)
    model.config.pad_token_id = 2
    model.eval()
    with torch.no_grad():
        return model, _answers(model, live.probe)


def check_all(trial: Trial, root: Path, directory: Path) -> dict[str, str]:
    """Every check but LEARN; what each has found, or why it does not apply."""
    found: dict[str, str] = {}
    method, can = trial.method, trial.method.can
    live = Live(trial, root)
    attached, shape = live.attached, shape_of(trial.base, root)

    if can.starts_as_base:
        worst = difference(live.answers(), live.before, live.probe)
        assert worst <= TOLERANCE, f"INIT: the first answers differ from the base's by {worst:.1e}"
        found["INIT"] = f"{worst:.0e}"
    else:
        found["INIT"] = f"not promised: {can.why['starts_as_base']}"

    names = {name: p for name, p in attached.model.named_parameters() if p.requires_grad}
    count = sum(p.numel() for p in names.values())
    promised = methods.trainable(method, shape, live.case)
    assert count == promised, f"COUNT: {count} parameters train, the formula says {promised}: {sorted(names)}"
    assert all(p.dtype == torch.float32 for p in names.values())
    frozen = {n: p.detach().clone() for n, p in attached.model.named_parameters() if n not in names}
    start = {name: p.detach().clone() for name, p in names.items()}

    losses = [live.step(number) for number in range(STEPS if method.trains else 0)]
    assert all(map(math.isfinite, losses)), losses
    for name, parameter in attached.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), f"FROZEN: {name} has moved"
    moved = any(not torch.equal(start[name], p) for name, p in names.items())
    assert moved or not method.trains, "nothing has moved"
    found["FROZEN"] = f"{len(frozen)} tensors"

    said = live.answers()
    moved = difference(said, live.before, live.probe)
    assert moved > 0, "training changed nothing"
    live.save(directory)
    weights = weights_of(directory)
    values = sum(t.numel() for name, t in weights.items() if not name.endswith(".index"))
    stored = methods.stored(method, shape, live.case)
    assert stored is None or values == stored, (
        f"COUNT: {values} values in the file, the formula says {stored}"
    )
    found["COUNT"] = f"{count} train, {values} stored"

    worst = 0.0
    for row, number in enumerate(live.probe.rows[:3]):
        alone = live.batch([number])
        mask, width = live.probe.mask_BT[row].bool(), alone.tokens_BT.shape[1]
        for name, tensor in live.said_of(alone).items():
            among = said[name][row]
            by_token = _by_token(name, tensor, alone) and among.shape[0] == mask.shape[0]
            mine = tensor[0][-width:] if by_token else tensor[0]
            beside = among[mask] if by_token else among[: mine.shape[0]]
            worst = max(worst, float((beside - mine).abs().max()))
    assert worst <= TOLERANCE * 5, f"PADDING: a row alone and among longer ones differ by {worst:.1e}"
    found["PADDING"] = f"{worst:.0e}"

    model, again = load(live, directory)
    worst = difference(again, said, live.probe)
    assert worst <= TOLERANCE, f"LOAD: the loaded artifact's answers differ by {worst:.1e}"
    found["LOAD"] = f"{worst:.0e}"
    inputs = {f"input.{name}": tensor.contiguous() for name, tensor in live.probe.inputs.items()}
    outputs = {f"output.{name}": tensor.contiguous() for name, tensor in said.items()}
    save_file(inputs | outputs, directory.parent / f"{directory.name}.probe.safetensors")

    if can.mergeable and hasattr(model, "merge_and_unload"):
        merged = copy.deepcopy(model).merge_and_unload()
        merged.eval()
        with torch.no_grad():
            worst = difference(_answers(merged, live.probe), again, live.probe)
        assert worst <= TOLERANCE * 5, f"MERGE: merged and unmerged differ by {worst:.1e}"
        found["MERGE"] = f"{worst:.0e}"
    elif can.mergeable:
        found["MERGE"] = f"not applicable: a {can.carrier} has nothing to merge"
    else:
        found["MERGE"] = f"not defined: {can.why['mergeable']}"

    if not method.trains:
        return found | {"RESUME": "not applicable: nothing is trained"}
    first = Live(trial, root)
    for number in range(STEPS // 2):
        first.step(number)
    state = {name: tensor.clone() for name, tensor in first.engine.state().items()}
    kept = {name: tensor.clone() for name, tensor in first.attached.state().items()}
    second = Live(trial, root)
    second.attached.load_state(kept)
    second.engine.load_state(state)
    for number in range(STEPS // 2, STEPS):
        second.step(number)
    whole, resumed = live.engine.trainable(), second.engine.trainable()
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), f"RESUME: {name} is another after a resume"
    found["RESUME"] = "bit for bit"
    return found


LONGER = 60
"""Virtual tokens, see `lesson`."""


def lesson(trial: Trial) -> Trial:
    """The trial as it is to learn.

    Virtual tokens change no weight, only what the base's attention mixes in, and on a random base five of
    them take no more than a tenth (T5) or a sixth (LLaMA) off the loss of a written answer. So they learn to
    write on the pretrained base; of encoder-decoders there is none, and there are more of them instead.
    """
    if trial.method.can.why.get("mergeable") != NOT_MERGEABLE:
        return trial
    if trial.task == "causal_lm":
        return replace(trial, base=bases.SHIPPED)
    if trial.task == "seq2seq_lm" and "virtual_tokens" in type(trial.method).model_fields:
        return replace(trial, method=trial.method.model_copy(update={"virtual_tokens": LONGER}))
    return trial


def learns(trial: Trial, root: Path, steps: int = 120) -> tuple[float, float]:
    """(loss at start, loss after the best of three rates)."""
    best, start = math.inf, math.inf
    trial = lesson(trial)
    for factor in (3.0, 10.0, 30.0):
        rate = min(0.3, trial.method.rate() * factor)
        live = Live(trial, root, steps=steps, rate=rate)
        start = live.loss()
        for number in range(steps):
            live.step(number)
        best = min(best, live.loss())
        if best < 0.5 * start:
            break
    return start, best
