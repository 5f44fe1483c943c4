"""FineTuneSpec: the only definition of what a run is asked to do.

The same spec gives the same adapter, up to rounding, on one worker or many: so it names an effective
batch and never a microbatch per GPU as its meaning. What the cluster makes of it is `cluster.plan.Plan`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from peft_service.columns import Columns
from peft_service.graders import AnyGrader
from peft_service.methods import AnyMethod, Case
from peft_service.objectives import AnyObjective
from peft_service.objectives.sft import SFT
from peft_service.operations import AnyOperation
from peft_service.tasks import Architecture, Task
from peft_service.variants import Frozen

if TYPE_CHECKING:
    from peft_service.base_model import ModelShape

NAME_PATTERN = r"^[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?$"
"""Names become path segments: no slash, no colon, no leading dot, at most 64 characters."""


class Base(Frozen):
    """The frozen base model."""

    id: str
    """The name it is served under, for example `Qwen/Qwen3-0.6B`; never contains a colon."""
    uri: str
    """Where its safetensors are: `file:///dir`, `s3://bucket/prefix` or `hf://org/name@revision`."""
    revision: str | None = None
    digest: str | None = None
    """sha256 over the names and sizes and contents that identify the weights (see `base_model.digest_of`)."""
    architecture: Architecture = "decoder"
    quantize: Literal["nf4"] | None = None
    """Hold the frozen weights in 4 bits (NF4, double quantisation). This makes LoRA a QLoRA."""


class DataPart(Frozen):
    """One object of a data set."""

    name: str
    """Its file name, which tells containers apart that look alike."""
    key: str
    """Key in the store."""
    sha256: str
    bytes: int = Field(0, ge=0)


class DataFile(Frozen):
    """One data set of the store, already validated: an uploaded file, or several that were brought in."""

    id: str
    key: str
    """Key in the store; of several files, their common prefix."""
    sha256: str
    rows: int = Field(ge=1)
    format: str
    """`kind` of the Format that was detected."""
    labels: tuple[str, ...] = ()
    """Of classification rows or tags, sorted; the label at position i has the number i."""
    tasks: tuple[str, ...] = ()
    """Names of the tasks in a multi-task file, sorted."""
    name: str = ""
    parts: tuple[DataPart, ...] = ()
    """Of several files, in their order."""
    columns: Columns | None = None
    """How its columns become the keys of the format."""
    documents: Literal["line", "paragraph", "file"] = "line"
    """What is one document in a plain text file."""
    limit: int | None = Field(None, ge=1)
    """Only so many good rows from the beginning; `rows` is then at most this."""
    weight: float | None = Field(None, gt=0, le=1e6)
    """Its share of an epoch, in any unit; None: every row once."""

    @property
    def objects(self) -> tuple[DataPart, ...]:
        """Its files in the store."""
        return self.parts or (DataPart(name=self.name, key=self.key, sha256=self.sha256),)


class Template(Frozen):
    """A chat template that replaces the tokenizer's own."""

    name: str | None = None
    """Of `peft_service/templates/`; None: given inline."""
    jinja: str = Field(max_length=65_536)
    sha256: str


class Source(Frozen):
    """A published adapter that a method starts from."""

    reference: str
    """As the request named it: `name@version`, or an adapter's id."""
    id: str
    key: str
    """Prefix in the store."""
    digest: str
    method: str


class Data(Frozen):
    training: DataFile
    mixture: tuple[DataFile, ...] = ()
    """Further data sets that are trained on together with `training`."""
    validation: DataFile | None = None
    too_long: Literal["error", "drop", "right", "left", "split"] = "error"
    """What happens to a row longer than `training.max_seq_len`. Never silent: counted and listed. `split` is
    for documents: nothing of them is lost."""
    task_temperature: float | None = Field(None, gt=0, le=100)
    """Of a multi-task file, draw rows so that a task of n rows has a share of n^(1/T): 1 is by size, large is
    equal. None: every row once an epoch."""
    template: Template | None = None
    """None: the tokenizer's own."""
    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    """What is learned: every assistant message (or the completion), only a row's last one, or all tokens."""
    eos: Literal["turn", "last", "all"] = "turn"
    """Which end tokens are learned: after every trained turn, only a row's last one, or all in the row."""
    turns: Literal["together", "apart"] = "together"
    """`apart` makes a row of each trained turn: for templates that write earlier turns otherwise once more
    follow, as those that remove earlier thinking."""
    tools: tuple[dict[str, Any], ...] = ()
    """Tools for rows of messages that bring none of their own."""
    forgetting: DataFile | None = None
    """Rows of what the base can do already: their loss is measured before and after training."""

    @property
    def sources(self) -> tuple[DataFile, ...]:
        """All that is trained on."""
        return (self.training, *self.mixture)

    @property
    def rows(self) -> int:
        return sum(source.rows for source in self.sources)

    @property
    def labels(self) -> tuple[str, ...]:
        """Of all sources, sorted."""
        return tuple(sorted({label for source in self.sources for label in source.labels}))

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(sorted({task for source in self.sources for task in source.tasks}))

    def too_long_in(self, file: DataFile) -> Literal["error", "drop", "right", "left", "split"]:
        """What happens to a long row of this file: rows of a probe beside documents cannot be split."""
        return "error" if self.too_long == "split" and file.format != "text" else self.too_long


class Training(Frozen):
    """How the parameters move. All values are concrete: "auto" is resolved before a spec exists."""

    n_epochs: int = Field(3, ge=1, le=1000)
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimizer steps even if the epochs are not over."""
    batch_size: int = Field(8, ge=1, le=65536)
    """Rows per optimizer step over all workers."""
    learning_rate: float = Field(gt=0, lt=10)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0, le=1)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    max_seq_len: int = Field(2048, ge=8, le=1_048_576)
    """Tokens per row at most."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    offload_optimizer: bool = False
    offload_parameters: bool = False
    """ZeRO-3 only: parameters wait in CPU memory."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    microbatch: int | Literal["auto"] = Field("auto")
    """Rows per worker per forward pass; the result does not depend on it."""
    packing: bool = False
    """Put rows behind one another instead of padding them, where base, method and objective allow it. It
    changes how a step is computed and not what: no token sees another row, and the curve is the same."""
    checkpoint_steps: int = Field(50, ge=1)
    eval_steps: int | None = Field(None, ge=1)
    """Evaluate on the validation file every so many steps; None: at the end of every epoch."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """End when so many evaluations in a row were not better than the best one. Needs a validation file."""
    early_stopping_threshold: float = Field(0.0, ge=0)
    """By how much an evaluation must be better to count as better."""
    best_checkpoint: bool = False
    """Publish the adapter of the best evaluation instead of the last step's. Needs a validation file."""
    select_by: Literal["loss", "accuracy", "score"] = "loss"
    """What makes an evaluation better: a lower validation loss, more right targets, or a higher mean score of
    the graders in `evaluation`."""

    @field_validator("microbatch")
    @classmethod
    def _microbatch_is_positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError('microbatch must be at least 1, or "auto"')
        return value


class Generation(Frozen):
    """Answers that the model writes to held-out prompts while it trains, and what graders say of them."""

    grader: AnyGrader
    rows: int = Field(32, ge=1, le=10_000)
    """The first so many rows of the validation file are asked."""
    max_new_tokens: int = Field(128, ge=1, le=8192)
    temperature: float = Field(0.0, ge=0, le=2)
    """0: the likeliest token each time."""


class Resources(Frozen):
    """What the user allows the run to take; "auto" leaves it to the plan."""

    workers: int | Literal["auto"] = "auto"
    gpus_per_worker: float | Literal["auto"] = "auto"
    """0 trains on the CPU; "auto" takes one GPU per worker where the cluster has any."""
    cpus_per_worker: float = Field(1, ge=0, le=1024)
    elastic: bool = True
    """After a node is lost, go on with fewer workers instead of waiting for it (same curve, design §7.1)."""

    @field_validator("workers")
    @classmethod
    def _workers_are_positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and not 1 <= value <= 4096:
            raise ValueError('workers must be between 1 and 4096, or "auto"')
        return value


class Spec(Frozen):
    """What every job says; immutable once the job exists."""

    name: str = Field(pattern=NAME_PATTERN)
    """The adapter's name in the catalog; its versions count up."""
    base: Base
    method: AnyMethod
    sources: tuple[Source, ...] = ()
    """The adapters that it starts from, in the order of the request."""
    resources: Resources = Resources()


class OperationSpec(Spec):
    """Something is made from published adapters, without training; `method` is what the result is."""

    operation: AnyOperation
    task: Task = "causal_lm"
    labels: tuple[str, ...] = ()
    """Of a classifying task: what the sources were trained for."""
    resources: Resources = Resources(workers=1, gpus_per_worker=0, elastic=False)


class FineTuneSpec(Spec):
    """One run, fully described."""

    objective: AnyObjective = SFT()
    data: Data
    training: Training
    evaluation: Generation | None = None
    teacher: Base | None = None
    """The model whose distribution is learned, where the objective needs one."""
    teacher_parameters: int = Field(0, ge=0)
    """How large it is: every worker holds all of it."""
    seed: int = Field(0, ge=0, le=2**31 - 1)


def spec_of(told: Mapping[str, Any]) -> FineTuneSpec | OperationSpec:
    """The spec in its JSON form."""
    return (OperationSpec if "operation" in told else FineTuneSpec).model_validate(told)


def case_of(spec: FineTuneSpec, shape: "ModelShape", rows: int | None = None) -> Case:
    """What the method is attached for; `rows` are those that are left of the training file."""
    from peft_service.batches import steps_of

    return Case(
        task=spec.objective.task(shape.architecture),
        labels=spec.objective.labels(spec.data.labels),
        tasks=spec.data.tasks,
        quantize=spec.base.quantize,
        steps=steps_of(spec.data.rows if rows is None else rows, spec.training),
        seed=spec.seed,
        weight_decay=spec.training.weight_decay,
        gradient_checkpointing=spec.training.gradient_checkpointing is True,
        max_seq_len=spec.training.max_seq_len,
    )
