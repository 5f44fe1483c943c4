"""Inputs of small runs: a store with data files in it, and specs that train on them in seconds."""

import hashlib
import json
from pathlib import Path

from peft_service.methods.lora import LoRA
from peft_service.run import RunInput
from peft_service.spec import Base, Data, DataFile, FineTuneSpec, Training
from peft_service.store import open_store

WORDS = ("sky", "sea", "dog", "fox", "river", "town", "sum", "five", "blue", "lazy", "quick")


def chat(rows, start=0):
    """JSONL bytes of short conversations of uneven length."""
    lines = []
    for row in range(start, start + rows):
        word, other = WORDS[row % len(WORDS)], WORDS[(row * 7 + 3) % len(WORDS)]
        messages = [
            {"role": "user", "content": f"name the {word} " * (row % 3 + 1)},
            {"role": "assistant", "content": f"the {other}" + " is blue" * (row % 4)},
        ]
        lines.append(json.dumps({"messages": messages}))
    return ("\n".join(lines) + "\n").encode()


def put(store, name, data, format="chat"):
    store.put(f"p/files/{name}", data)
    return DataFile(
        id=name,
        key=f"p/files/{name}",
        sha256=hashlib.sha256(data).hexdigest(),
        rows=data.count(b"\n"),
        format=format,
    )


def a_run(
    directory: Path, base: Path, *, rows=10, quantize=None, dropout=0.0, attempt=1, job="job", **training
):
    """(RunInput, Store): 3 epochs of `rows` conversations in steps of 4."""
    store = open_store(f"file://{directory}/store")
    settings = {
        "learning_rate": 1e-2,
        "n_epochs": 3,
        "batch_size": 4,
        "max_seq_len": 96,
        "checkpoint_steps": 4,
    }
    spec = FineTuneSpec(
        name="small",
        base=Base(id="tiny/llama", uri=f"file://{base}", quantize=quantize),
        method=LoRA(rank=4, dropout=dropout),
        data=Data(
            training=put(store, "training", chat(rows)), validation=put(store, "validation", chat(5, 100))
        ),
        training=Training(**settings | training),
        seed=3,
    )
    return RunInput(job=job, attempt=attempt, project="p", spec=spec), store


def metrics(store, run):
    lines = []
    for info in store.list(f"{run.prefix}/metrics/"):
        lines += [json.loads(line) for line in store.get(info.key).splitlines()]
    return lines
