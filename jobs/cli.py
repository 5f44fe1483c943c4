"""peft-service: the command line. Every command is a few lines around the client.

Modules are imported where they are used: `peft-service --help` and the client commands answer at once, and
only the commands that run the service itself load it.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from peft_service.errors import InvalidRequest, PeftServiceError, RunFailed

if TYPE_CHECKING:
    from rich.console import Console

    from jobs.client import Client, Job

EXIT_CODES = (
    "Exit codes: 0 done; 1 the job failed or was cancelled; 2 wrong usage, or the request was refused; "
    "3 the service cannot be reached or is in trouble; 4 not found, or no permission; 130 interrupted."
)
JSON_WANTED = "peft_service.json"


class _Commands(TyperGroup):
    """Every error of the service becomes one sentence on stderr and an exit code, never a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PeftServiceError as error:
            _complain(error, as_json=bool(ctx.meta.get(JSON_WANTED)))
            raise typer.Exit(exit_code(error)) from None
        except BrokenPipeError:
            raise  # `peft-service jobs | head`: click ends quietly
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            _complain(
                InvalidRequest(f"{where}{error.strerror or error}"), as_json=bool(ctx.meta.get(JSON_WANTED))
            )
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune models on your own Ray cluster.",
    epilog=EXIT_CODES,
)
files_app = typer.Typer(
    help="Uploaded files: list, upload, show, download, delete.", invoke_without_command=True
)
keys_app = typer.Typer(
    help="API keys, in the database itself: list, create, revoke.", invoke_without_command=True
)
app.add_typer(files_app, name="files")
app.add_typer(keys_app, name="keys")


def exit_code(error: PeftServiceError) -> int:
    if isinstance(error, RunFailed):
        return 1
    if error.status in (401, 403, 404):
        return 4
    if error.status == 429 or error.status >= 500:
        return 3
    return 2


def _remember(ctx: typer.Context, wanted: bool) -> bool:
    """`meta` is one for all nested contexts, so the group knows how to write an error."""
    if wanted:
        ctx.meta[JSON_WANTED] = True
    return wanted


Json = Annotated[
    bool, typer.Option("--json", callback=_remember, help="Machine-readable output, errors too.")
]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of a job: ftjob-…")]

# ------------------------------------------------------------------------------------------------ the service


@app.command()
def up(
    port: Annotated[int | None, typer.Option(help="Port of the REST API; 0 takes a free one.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where database, store, key and logs live.")] = None,
    as_json: Json = False,
) -> None:
    """Start the service here: Ray (or join PEFT_SERVICE_RAY_ADDRESS), the API and the scheduler."""
    from jobs import up as service
    from jobs.settings import load

    running = service.up(load(port=port, data_dir=data_dir), say=_note)
    if as_json:
        from dataclasses import asdict

        _json(asdict(running))
        return
    print(f"The service {'is up' if running.started else 'was up already'} at {running.url}")
    print(f"API key: {running.key}")
    print(f"  export OPENAI_BASE_URL={running.url}/v1 OPENAI_API_KEY={running.key}")
    print(f"Ray dashboard: {running.dashboard}")


@app.command()
def down(
    data_dir: Annotated[Path | None, typer.Option(help="As it was given to `up`.")] = None,
    as_json: Json = False,
) -> None:
    """Stop exactly what `up` started. Queued jobs stay queued, running ones go on at the next `up`."""
    from jobs import up as service
    from jobs.settings import load

    stopped = service.down(load(data_dir=data_dir))
    if as_json:
        _json({"stopped": stopped})
    else:
        print("The service is down." if stopped else "No service was running here.")


@app.command()
def demo(
    data_dir: Annotated[Path, typer.Option(help="Where the demo keeps its service.")] = Path(
        ".peft-service-demo"
    ),
    seed: Annotated[int, typer.Option(help="Of the generated data and of the run.")] = 0,
    as_json: Json = False,
) -> None:
    """One real job from REST request to a proven adapter, with the same prompts before and after."""
    from dataclasses import asdict

    from rich.console import Console

    from jobs import demo as the_demo

    report = the_demo.run(data_dir, Console(stderr=as_json), seed=seed)
    if as_json:
        _json({**asdict(report), "better": report.better})
    raise typer.Exit(0 if report.better else 1)


@app.command()
def migrate(as_json: Json = False) -> None:
    """Bring the database of PEFT_SERVICE_DATABASE_URL up to date (`up` does it by itself)."""
    _database()
    if as_json:
        _json({"migrated": True})
    else:
        print("The database is up to date.")


@app.command("serve-config")
def serve_config(as_json: Json = False) -> None:
    """Print the Ray Serve config that `up` deploys, for `serve deploy` or a RayService."""
    from jobs import serve
    from jobs.settings import load

    config = serve.config(load())
    if as_json:
        _json(config)
        return
    import yaml

    print(yaml.safe_dump(config, sort_keys=False), end="")


# ------------------------------------------------------------------------------------------------------ data


@files_app.callback()
def files(ctx: typer.Context, as_json: Json = False) -> None:
    if ctx.invoked_subcommand is not None:
        return
    with _client() as client:
        found = list(client.files())
    if as_json:
        _json([file.model_dump() for file in found])
        return
    rows = [(f.id, f.filename, f.purpose, f"{f.bytes:,}", f.status, _when(f.created_at)) for f in found]
    _table(("id", "name", "purpose", "bytes", "status", "created"), rows)


@files_app.command("upload")
def files_upload(
    path: Annotated[
        Path, typer.Argument(help="JSONL, JSON, CSV, TSV, Parquet, Arrow or text, also .gz, .zst.")
    ],
    purpose: Annotated[str, typer.Option()] = "fine-tune",
    as_json: Json = False,
) -> None:
    """Upload a file; every bad line is reported."""
    with _client() as client:
        file = client.upload(path, purpose)
    if as_json:
        _json(file.model_dump())
    else:
        print(file.id)


@files_app.command("import")
def files_import(
    uri: Annotated[
        str, typer.Argument(help="s3://bucket/prefix-or-glob, file:///…, hf://datasets/org/name or https://…")
    ],
    as_json: Json = False,
) -> None:
    """Bring a data set from where it lies; the same data is brought once, and checked like an upload."""
    with _client() as client:
        file = client.import_file(uri)
    if as_json:
        _json(file.model_dump())
    else:
        print(file.id)


@files_app.command("show")
def files_show(file_id: Annotated[str, typer.Argument(metavar="FILE")], as_json: Json = False) -> None:
    """Everything that is known about a file."""
    with _client() as client:
        _details(client.file(file_id).model_dump(), as_json)


@files_app.command("download")
def files_download(
    file_id: Annotated[str, typer.Argument(metavar="FILE")],
    to: Annotated[Path | None, typer.Argument(help="Default: standard output.")] = None,
    as_json: Json = False,
) -> None:
    """The bytes of a file, for example the metrics of a job (its first result file)."""
    with _client() as client:
        if to is None:
            for chunk in client.content(file_id):
                sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
            return
        size = 0
        with to.open("wb") as out:
            for chunk in client.content(file_id):
                size += out.write(chunk)
    if as_json:
        _json({"path": str(to), "bytes": size})
    else:
        print(f"{to} ({size:,} bytes)")


@files_app.command("delete")
def files_delete(file_id: Annotated[str, typer.Argument(metavar="FILE")], as_json: Json = False) -> None:
    """Delete a file."""
    with _client() as client:
        client.delete_file(file_id)
    if as_json:
        _json({"id": file_id, "deleted": True})
    else:
        print(f"{file_id} is deleted.")


@app.command()
def models(
    bases: Annotated[
        bool, typer.Option("--bases", help="Base models only, with what is known of them.")
    ] = False,
    methods: Annotated[
        bool, typer.Option("--methods", help="The fine-tuning methods and their fields.")
    ] = False,
    objectives: Annotated[
        bool, typer.Option("--objectives", help="What a job can minimise, and the data each needs.")
    ] = False,
    register: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="ID URI", help="Register a base of your own: file://, s3:// or hf://."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Models that a job may start from, and those that jobs have made."""
    bases = bases or register is not None
    with _client() as client:
        if register is not None:
            client.register_base(*register)
        if methods:
            found: list[Any] = list(client.methods())
        elif objectives:
            found = list(client.objectives())
        elif bases:
            found = list(client.base_models())
        else:
            found = list(client.models())
    if as_json:
        _json([item.model_dump() for item in found])
    elif methods:
        by_family = sorted(found, key=lambda item: (item.family, item.kind))
        _table(
            ("method", "family", "models", "4 bits", "what"),
            [
                (
                    item.kind,
                    item.family,
                    ", ".join(name.replace("_", "-") for name in item.capabilities.get("architectures", [])),
                    "yes" if item.capabilities.get("nf4") else "no",
                    item.summary,
                )
                for item in by_family
            ],
        )
    elif objectives:
        _table(
            ("objective", "names", "formats", "what", "better is"),
            [
                (item.kind, ", ".join(item.names), ", ".join(item.formats), item.summary, item.measure)
                for item in found
            ],
        )
    elif bases:
        rows = [(item.id, f"{item.parameters:,}", item.context_length, item.uri) for item in found]
        _table(("id", "parameters", "context", "uri"), rows)
    else:
        _table(("id", "owner", "created"), [(m.id, m.owned_by, _when(m.created)) for m in found])


# ------------------------------------------------------------------------------------------------------ jobs

File = Annotated[
    str,
    typer.Argument(
        metavar="FILE", help="A data file, the id of an uploaded one (file-…), or s3://, hf://, …"
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option("--model", "-m", help="A base (`peft-service models`), or its file://, s3:// or hf:// URI."),
]
Validation = Annotated[str | None, typer.Option(help="Held-out file, as FILE is given.")]
Name = Annotated[str | None, typer.Option(help="The adapter's name in the catalog; its versions count up.")]
Method = Annotated[str | None, typer.Option(help="lora, qlora, … (`peft-service models --methods`).")]
Objective = Annotated[
    str | None,
    typer.Option(help="supervised, dpo, kto, … (`peft-service models --objectives`). Default: by the file."),
]
Rank = Annotated[int | None, typer.Option(help="Of the method.")]
Alpha = Annotated[float | None, typer.Option(help="Of the method.")]
Quantize = Annotated[str | None, typer.Option(help="nf4 holds the base in 4 bits.")]
Epochs = Annotated[int | None, typer.Option()]
MaxSteps = Annotated[
    int | None, typer.Option(help="Stop after so many steps even if the epochs are not over.")
]
BatchSize = Annotated[int | None, typer.Option(help="Rows per step, over all workers.")]
LearningRate = Annotated[float | None, typer.Option()]
MaxSeqLen = Annotated[int | None, typer.Option(help="Tokens per row.")]
ZeroStage = Annotated[int | None, typer.Option(min=0, max=3, help="Default: the plan chooses.")]
Precision = Annotated[str | None, typer.Option(help="fp32 or bf16.")]
Workers = Annotated[int | None, typer.Option(help="Default: the plan chooses.")]
GpusPerWorker = Annotated[float | None, typer.Option(help="0 trains on the CPU.")]
Seed = Annotated[int | None, typer.Option()]
Priority = Annotated[int | None, typer.Option(help="Higher goes first.")]
Column = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=COLUMN", help="Where a key of the rows comes from: prompt=question. Repeat it."
    ),
]
Template = Annotated[
    str | None, typer.Option(help="A chat template by its name, or a Jinja file. Default: the tokenizer's.")
]
Metadata = Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="May be repeated.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any key of the request: training.warmup_ratio=0.1. May be repeated.",
    ),
]
Request = Annotated[
    Path | None, typer.Option(help="JSON file with the request; the other options win over it.")
]


@app.command()
def plan(
    file: File,
    model: ModelName = None,
    validation: Validation = None,
    name: Name = None,
    method: Method = None,
    objective: Objective = None,
    column: Column = None,
    template: Template = None,
    rank: Rank = None,
    alpha: Alpha = None,
    quantize: Quantize = None,
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    max_seq_len: MaxSeqLen = None,
    zero_stage: ZeroStage = None,
    precision: Precision = None,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = None,
    seed: Seed = None,
    priority: Priority = None,
    metadata: Metadata = None,
    set_: Set = None,
    request: Request = None,
    as_json: Json = False,
) -> None:
    """What a job would be: workers, ZeRO stage, memory, steps, and the arithmetic. Nothing is started."""
    given = dict(locals())
    with _client() as client:
        body = _body(client, given)
        answer = client.preflight(body)
    if as_json:
        _json(answer.model_dump())
        return
    chosen = answer.plan or {}
    _details({key: value for key, value in chosen.items() if key not in ("arithmetic", "memory")}, False)
    print()
    for line in answer.arithmetic:
        print(line)
    for key, why in answer.reasons.items():
        print(f"{key}: {why}")
    for warning in answer.warnings:
        _note(f"warning: {warning}")
    _note(
        f"nothing was started; `peft-service submit {body['training_file']} --model {body['model']} …` does"
    )


@app.command()
def preview(
    file: File,
    model: ModelName = None,
    line: Annotated[
        list[int] | None, typer.Option(help="A line to look at. May be repeated; without it, --rows.")
    ] = None,
    rows: Annotated[int, typer.Option(help="How many rows from the beginning.")] = 3,
    statistics: Annotated[
        bool, typer.Option(help="Also tokenise all rows, and show what they amount to.")
    ] = True,
    objective: Objective = None,
    column: Column = None,
    template: Template = None,
    max_seq_len: MaxSeqLen = None,
    set_: Set = None,
    request: Request = None,
    html: Annotated[Path | None, typer.Option(help="Write a page for a browser here instead.")] = None,
    as_json: Json = False,
) -> None:
    """Rows as training sees them: the text, the tokens, and in green what is learned. Nothing is started."""
    given = dict.fromkeys((*PLACES, "metadata", "validation")) | dict(locals())
    with _client() as client:
        body = _body(client, given)
        body["preview"] = {"rows": line or rows, "statistics": statistics}
        if html is not None:
            html.write_text(client.preview_page(body), encoding="utf-8")
            print(html)
            return
        found = client.preview(body)
    if as_json:
        _json(found.model_dump())
        return
    from jobs.preview import show

    show(found.model_dump(), _console())
    for warning in found.warnings:
        _note(f"warning: {warning}")


@app.command()
def submit(
    file: File,
    model: ModelName = None,
    validation: Validation = None,
    name: Name = None,
    method: Method = None,
    objective: Objective = None,
    column: Column = None,
    template: Template = None,
    rank: Rank = None,
    alpha: Alpha = None,
    quantize: Quantize = None,
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    max_seq_len: MaxSeqLen = None,
    zero_stage: ZeroStage = None,
    precision: Precision = None,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = None,
    seed: Seed = None,
    priority: Priority = None,
    metadata: Metadata = None,
    set_: Set = None,
    request: Request = None,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Stay, and show the job until it ends.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Upload FILE if it is a path, and start a fine-tuning job on it."""
    given = dict(locals())
    with _client() as client:
        job = client.submit(_body(client, given))
        if watch:
            if not as_json:
                _note(f"{job.id} is {job.status}")
            _watch(client, job.id, as_json)
        elif as_json:
            _json(job.model_dump())
        else:
            print(job.id)
            _note(f"{job.status}; `peft-service watch {job.id}` shows it")


@app.command("jobs")
def jobs_(
    job_id: Annotated[str | None, typer.Argument(metavar="[JOB]", help="One job, in full.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Newest so many.")] = 20,
    metadata: Metadata = None,
    as_json: Json = False,
) -> None:
    """The newest jobs, or one of them in full."""
    from itertools import islice

    with _client() as client:
        if job_id is not None:
            _details(client.job(job_id).model_dump(), as_json)
            return
        found = list(islice(client.jobs(_pairs(metadata, "--metadata")), limit))
    if as_json:
        _json([job.model_dump() for job in found])
        return
    from jobs.watch import numbers, waiting_for

    rows = []
    for job in found:
        known = numbers(job)
        at = f"{known['step']}/{known.get('total_steps', '?')}" if known.get("step") else ""
        loss = f"{known['train_loss']:.3f}" if known.get("train_loss") is not None else ""
        why = (job.error or {}).get("message", "") if job.final else waiting_for(job)
        rows.append(
            (job.id, job.status, job.model, at, loss, _when(job.created_at), job.fine_tuned_model or why)
        )
    _table(("id", "status", "base", "step", "loss", "created", ""), rows)


@app.command()
def watch(job_id: JobId, as_json: Json = False) -> None:
    """Show a job until it ends. Leaving with Ctrl-C does not cancel it."""
    with _client() as client:
        _watch(client, job_id, as_json)


@app.command()
def logs(
    job_id: JobId,
    attempt: Annotated[int | None, typer.Option(min=1, help="Default: the newest.")] = None,
    events: Annotated[bool, typer.Option("--events", help="The job's events, oldest first.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends.")] = False,
    as_json: Json = False,
) -> None:
    """What an attempt prints on the cluster, or the events of the job."""
    with _client() as client:
        if not follow and not events and as_json:
            _json({"job": job_id, "log": client.log(job_id, attempt)})
            return
        try:
            printed = ""
            for update in client.follow(job_id):
                if not events:
                    text = client.log(job_id, attempt)
                    # Another attempt begins another log.
                    new = text.removeprefix(printed) if text.startswith(printed) else text
                    printed = text
                    print(new, end="", flush=True)
                for event in update.events if events else ():
                    if as_json:
                        _json_line(event.model_dump())
                    else:
                        print(f"{_when(event.created_at)}  {event.level:5}  {event.message}", flush=True)
                if not follow:
                    return
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


@app.command()
def cancel(job_id: JobId, as_json: Json = False) -> None:
    """End a job for good; nothing of it is published."""
    _change("cancel", job_id, as_json)


@app.command()
def pause(job_id: JobId, as_json: Json = False) -> None:
    """Stop a job at its next step and keep a checkpoint."""
    _change("pause", job_id, as_json)


@app.command()
def resume(job_id: JobId, as_json: Json = False) -> None:
    """Put a paused job back into the queue."""
    _change("resume", job_id, as_json)


# -------------------------------------------------------------------------------------------------- adapters


@app.command()
def adapters(
    name: Annotated[
        str | None, typer.Argument(help="Only the versions of this name, or one: name@3.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Only those of this base.")] = None,
    as_json: Json = False,
) -> None:
    """The catalog: every adapter that passed its checks."""
    with _client() as client:
        if name is not None and ("@" in name or name.startswith(("adapter_", "ft:", "ftjob-"))):
            _details(client.adapter(name).model_dump(), as_json)
            return
        found = list(client.adapters(name=name, base=base))
    if as_json:
        _json([adapter.model_dump() for adapter in found])
        return
    rows = [(a.reference, a.method, a.base, f"{a.bytes:,}", _when(a.created_at), a.job, a.url) for a in found]
    _table(("adapter", "method", "base", "bytes", "created", "job", "where"), rows)


@app.command()
def pull(
    adapter: Annotated[str, typer.Argument(help="Name, name@version or id of an adapter, or a job: ftjob-…")],
    directory: Annotated[
        Path | None, typer.Argument(help="Must not exist. Default: NAME-vVERSION here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Download an adapter and prove every byte against its manifest."""
    with _client() as client:
        found = client.adapter(adapter)
        target = directory or Path(f"{found.name}-v{found.version}")
        client.pull(found.id, target)
    if as_json:
        _json(
            {"id": found.id, "name": found.name, "version": found.version, "directory": str(target.resolve())}
        )
    else:
        print(target)
        _note(f"{found.name}@{found.version}: every checksum is right")


@app.command()
def operate(
    kind: Annotated[
        str | None, typer.Argument(help="merge, combine, convert, … Without it: what there is.")
    ] = None,
    adapters: Annotated[
        list[str] | None, typer.Argument(metavar="[ADAPTER]...", help="Names, name@version or ids.")
    ] = None,
    name: Name = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A field of the operation: rank=8. May be repeated."),
    ] = None,
    priority: Priority = None,
    metadata: Metadata = None,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Stay, and show the job until it ends.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make something of published adapters without training: a merged model, a LoRA, a weighted sum."""
    with _client() as client:
        if kind is None:
            found = list(client.operations())
            if as_json:
                _json([item.model_dump() for item in found])
                return
            rows = [
                (f"{item.kind} {way['name']}".strip(), "yes" if way["exact"] else "no", way["summary"])
                for item in found
                for way in ({"name": "", "exact": item.exact, "summary": item.summary}, *item.ways)
            ]
            _table(("operation", "exact", "what"), rows)
            return
        if not adapters:
            raise InvalidRequest(
                f"{kind} of which adapters? `peft-service adapters` lists them", param="adapters"
            )
        body: dict[str, Any] = {"operation": {"kind": kind}, "adapters": adapters}
        for path, text in _pairs(set_, "--set").items():
            _put(body["operation"], path, _value(text))
        pairs = _pairs(metadata, "--metadata")
        given = {"name": name, "priority": priority, "metadata": pairs or None}
        job = client.operate({**body, **{key: value for key, value in given.items() if value is not None}})
        if watch:
            _watch(client, job.id, as_json)
        elif as_json:
            _json(job.model_dump())
        else:
            print(job.id)
            _note(f"{job.status}; `peft-service watch {job.id}` shows it")


# ------------------------------------------------------------------------------------------------------ keys


@keys_app.callback()
def keys(ctx: typer.Context, as_json: Json = False) -> None:
    if ctx.invoked_subcommand is None:
        _list_keys(as_json)


@keys_app.command("list")
def keys_list(as_json: Json = False) -> None:
    """Every key: its project and state, never the key itself."""
    _list_keys(as_json)


def _list_keys(as_json: bool) -> None:
    from dataclasses import asdict

    from jobs import keys as the_keys

    found = the_keys.listed(_database())
    if as_json:
        _json([asdict(key) for key in found])
        return
    rows = [
        (key.id, key.project_id, key.name, f"{key.prefix}…", _when(key.created_at), _state_of(key))
        for key in found
    ]
    _table(("id", "project", "name", "key", "created", "state"), rows)


@keys_app.command("create")
def keys_create(
    project: Annotated[str, typer.Option(help="Made if it does not exist.")] = "default",
    name: Annotated[str, typer.Option(help="To know it by.")] = "",
    days: Annotated[float | None, typer.Option(help="It ends after so many days. Default: never.")] = None,
    as_json: Json = False,
) -> None:
    """Make a key. It is shown once."""
    import time
    from dataclasses import asdict

    from jobs import keys as the_keys

    ends = time.time() + days * 86400 if days is not None else None
    key, plaintext = the_keys.create(_database(), project, name, expires_at=ends)
    if as_json:
        _json({**asdict(key), "key": plaintext})
    else:
        print(plaintext)
        _note(f"{key.id} for project {project}; it is not shown again")


@keys_app.command("revoke")
def keys_revoke(
    key_id: Annotated[str, typer.Argument(metavar="KEY", help="key_…")], as_json: Json = False
) -> None:
    """End a key at once."""
    from dataclasses import asdict

    from jobs import keys as the_keys

    key = the_keys.revoke(_database(), key_id)
    if as_json:
        _json(asdict(key))
    else:
        print(f"{key.id} ({key.prefix}…) is revoked.")


# -------------------------------------------------------------------------------------------- what they share


def _client() -> "Client":
    from jobs.client import connect

    return connect()


def _database() -> Any:
    """The database of the settings, its schema up to date."""
    from sqlalchemy.exc import SQLAlchemyError

    from jobs import db
    from jobs.settings import load

    settings = load()
    settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        db.migrate(settings.database_url)
        return db.connect(settings.database_url)
    except SQLAlchemyError as error:
        said = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise PeftServiceError(
            f"the database of PEFT_SERVICE_DATABASE_URL cannot be used: {said}", code="database_unavailable"
        ) from None


PLACES = {
    "name": "name",
    "method": "adapter.kind",
    "objective": "method.type",
    "rank": "adapter.rank",
    "alpha": "adapter.alpha",
    "quantize": "base.quantize",
    "epochs": "training.n_epochs",
    "max_steps": "training.max_steps",
    "batch_size": "training.batch_size",
    "learning_rate": "training.learning_rate",
    "max_seq_len": "training.max_seq_len",
    "zero_stage": "training.zero_stage",
    "precision": "training.precision",
    "workers": "resources.workers",
    "gpus_per_worker": "resources.gpus_per_worker",
    "seed": "seed",
    "priority": "priority",
}
"""Where in the request an option goes."""


def _body(client: "Client", given: dict[str, Any]) -> dict[str, Any]:
    """The request for these options. Files that are paths are uploaded, once all else is well formed."""
    body = _read_request(given["request"])
    for option, path in PLACES.items():
        if given[option] is not None:
            value = given[option]
            _put(body, path, int(value) if isinstance(value, float) and value.is_integer() else value)
    for path, text in _pairs(given["set_"], "--set").items():
        _put(body, path, _value(text))
    for key, column in _pairs(given["column"], "--column").items():
        value = _value(column) if column.lstrip().startswith("{") else column
        body.setdefault("data", {}).setdefault("columns", {})[key] = value
    if given["template"] is not None:
        file = Path(given["template"])
        _put(body, "data.template", {"jinja": file.read_text()} if file.is_file() else {"name": str(file)})
    metadata = _pairs(given["metadata"], "--metadata")
    if metadata:
        body["metadata"] = {**body.get("metadata", {}), **metadata}
    if given["model"] is not None:
        body["model"] = given["model"]
    if "model" not in body:
        raise InvalidRequest(
            "which base? give --model; `peft-service models --bases` lists them", param="model"
        )
    paths = {"training_file": given["file"], "validation_file": given["validation"]}
    for key, file in paths.items():
        if file is not None:
            body[key] = file if _is_known(file) else client.upload(Path(file)).id
    return body


def _is_known(file: str) -> bool:
    """Whether the service finds it by this name: an id, or a URI."""
    return "://" in file or (file.startswith("file-") and not Path(file).exists())


def _read_request(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        body = json.loads(path.read_text())
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}", param="request") from None
    except ValueError as error:
        raise InvalidRequest(f"{path} is not JSON: {error}", param="request") from None
    if not isinstance(body, dict):
        raise InvalidRequest(f"{path} holds no JSON object", param="request")
    return body


def _put(body: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        body = body.setdefault(parent, {})
        if not isinstance(body, dict):
            raise InvalidRequest(f"{path} cannot be set: {parent} is no object", param=path)
    body[last] = value


def _pairs(given: Sequence[str] | None, option: str) -> dict[str, str]:
    pairs = {}
    for pair in given or ():
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise InvalidRequest(f"{option} {pair!r} is not KEY=VALUE", param=option)
        pairs[key] = value
    return pairs


def _value(text: str) -> Any:
    """JSON where it is JSON (numbers, true, lists), else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _change(verb: str, job_id: str, as_json: bool) -> None:
    with _client() as client:
        job = getattr(client, verb)(job_id)
    if as_json:
        _json(job.model_dump())
    else:
        print(f"{job.id} is {job.status}.")


def _watch(client: "Client", job_id: str, as_json: bool) -> None:
    """Follow the job and leave with the exit code of its end."""
    try:
        job = _follow(client, job_id, as_json)
    except KeyboardInterrupt:
        _note(f"\nyou left; {job_id} goes on. `peft-service watch {job_id}` shows it again, `cancel` ends it")
        raise typer.Exit(130) from None
    raise typer.Exit(0 if job.status == "succeeded" else 1)


def _follow(client: "Client", job_id: str, as_json: bool) -> "Job":
    if as_json:
        for update in client.follow(job_id):
            for event in update.events:
                _json_line(event.model_dump())
            job = update.job
        _json_line(job.model_dump())
        return job
    from jobs.watch import duration, follow, sparkline

    console = _console()
    job, history = follow(client.follow(job_id), console)
    if job.status != "succeeded":
        reason = (job.error or {}).get("message") or job.status_reason or "no reason was given"
        _note(f"{job.id} {'was cancelled' if job.status == 'cancelled' else f'failed: {reason}'}")
        return job
    took = f" in {duration(job.finished_at - job.created_at)}" if job.finished_at else ""
    console.print(f"[green]{job.id} succeeded{took}[/]  {job.fine_tuned_model or ''}", highlight=False)
    series = history.losses()
    if series:
        console.print(f"loss {series[0]:.3f} {sparkline(series)} {series[-1]:.3f}", highlight=False)
    console.print(f"`peft-service pull {job.id}` downloads the adapter", highlight=False)
    return job


def _complain(error: PeftServiceError, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": error.body()}, ensure_ascii=False), file=sys.stderr)
        return
    print(f"peft-service: {error.message}", file=sys.stderr)
    lines = error.details.get("errors") or []
    for line in lines[:10]:
        where = f"line {line.get('line')}" + (f", {line['path']}" if line.get("path") else "")
        hint = f" ({line['hint']})" if line.get("hint") else ""
        print(f"  {where}: {line.get('message')}{hint}", file=sys.stderr)
    count = error.details.get("error_count", len(lines))
    if count > 10:
        print(f"  … and {count - 10} more", file=sys.stderr)


def _console() -> "Console":
    from rich.console import Console

    return Console()


def _json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def _json_line(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, default=str), flush=True)


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    cells = [tuple("" if cell is None else str(cell) for cell in row) for row in rows]
    if not sys.stdout.isatty():
        # Nothing is folded to a width in a pipe: `peft-service jobs | grep` must see whole lines.
        widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
        for row in (tuple(columns), *cells):
            print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=None, pad_edge=False, header_style="dim")
    for column in table.columns:
        column.overflow = "fold"
    for row in cells:
        table.add_row(*map(Text, row))
    _console().print(table)


def _details(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _json(values)
        return
    width = max(map(len, values), default=0)
    for key, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        if value is not None:
            print(f"{key:{width}}  {text}")


def _when(seconds: float | None) -> str:
    import time

    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _state_of(key: Any) -> str:
    import time

    if key.revoked_at is not None:
        return f"revoked {_when(key.revoked_at)}"
    if key.expires_at is None:
        return "valid"
    return f"{'expired' if key.expires_at <= time.time() else 'valid until'} {_when(key.expires_at)}"


def main() -> None:
    """The entry point of the `peft-service` script."""
    app()


if __name__ == "__main__":
    main()
