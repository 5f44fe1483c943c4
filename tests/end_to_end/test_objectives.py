"""Every objective over REST on real data: the adapter beats its base on held-out rows, by its own measure.

The suites of objectives show that each learns what its formula says; this shows that each goes the whole way,
and that what comes out is better at what it was asked for, measured without this service
(`held_out.py`). `make test-objectives`; needs ../shared/data.
"""

import csv
import gzip
import io
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import openai
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import objectives
from jobs.client import Job
from peft_service import shipped, templates
from tests.data.compared import SHARED
from tests.end_to_end.service import Service, service
from tests.servers import S3Server

pytestmark = [
    pytest.mark.ray,
    pytest.mark.long,
    pytest.mark.timeout(5400),
    pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not beside the repository"),
]

Row = dict[str, Any]
SURE = 4.0
"""The mean difference of a held-out row between adapter and base, over its standard error: by luck alone, one
measurement in 30,000 is as good."""
MATH = "anthropic-evals/interest-in-math.jsonl"
E2E = "e2e/valid.txt"
ASKED = "{question}\nAnswer:"
PAIRS: Row = {
    "prompt": {"text": ASKED},
    "chosen": "answer_matching_behavior",
    "rejected": "answer_not_matching_behavior",
}
GOOD: Row = {"prompt": {"text": ASKED}, "completion": "answer_matching_behavior", "label": {"value": True}}
BAD: Row = {**GOOD, "completion": "answer_not_matching_behavior", "label": {"value": False}}
TOLD: Row = {
    "instruction": {"split": "text", "on": "||", "part": 0},
    "output": {"split": "text", "on": "||", "part": 1},
}
"""A line of E2E, `facts||sentence`, as what is asked and what is answered."""
TEMPLATE: Row = {"name": "chatml"}
IDENTITIES = 20
"""Rows of LLaMA-Factory's identity.json, from its end, that nothing is trained on."""
WARM, TEACHER = "e2e/warm", "e2e/teacher"
"""Bases that are made here: a job's adapter, merged into the shipped base."""
SAYS_YES_OR_NO: Row = {
    "type": "string_check",
    "name": "right",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "operation": "eq",
}


@dataclass(frozen=True)
class Trial:
    """A job, and how its adapter is measured on rows that it has not seen."""

    body: Row
    """Of the request; a `Path` in it is uploaded, and its id put there."""
    measure: str
    """Of held_out.py."""
    rows: list[Row]
    validated: int = 0
    """The first so many of the rows are the job's validation file; 0: all."""
    constant: list[float] = field(default_factory=list)
    """Of each row the score of the best answer that does not look at it: to be beaten as well."""
    told: Row = field(default_factory=dict)
    """More for held_out.py."""
    reports: tuple[str, ...] = ("loss", "accuracy")
    """What the job reports too, and held_out.py computes."""


def statements() -> list[Row]:
    """Of the questions on mathematics: half are rightly answered with Yes, and half with No."""
    return [json.loads(line) for line in (SHARED / MATH).read_text(encoding="utf-8").splitlines()]


@dataclass(frozen=True)
class Sentence:
    """A line of E2E."""

    line: str
    facts: dict[str, str]
    text: str


def sentences() -> tuple[list[Sentence], list[Sentence]]:
    """(most of them, those of every tenth set of facts): no facts are in both."""
    found: dict[str, list[Sentence]] = {}
    for line in (SHARED / E2E).read_text(encoding="utf-8").splitlines():
        told, text = line.split("||")
        facts = dict(map(str.strip, fact.split(" : ")) for fact in told.split("|"))  # type: ignore[misc]
        found.setdefault(told, []).append(Sentence(line, facts, text.strip()))
    parts: tuple[list[Sentence], list[Sentence]] = ([], [])
    for number, same in enumerate(found.values()):
        parts[number % 10 == 0].extend(same)
    return parts


def identities() -> list[Row]:
    """Questions to an assistant about itself, and its answers."""
    text = (SHARED / "llamafactory/identity.json").read_text(encoding="utf-8")
    for placeholder, name in (("{{name}}", "Juno"), ("{{author}}", "the harbour office")):
        text = text.replace(placeholder, name)
    rows: list[Row] = json.loads(text)
    return rows


def spread(rows: list[Any], count: int) -> list[Any]:
    """`count` of the rows, from all over the list."""
    return [rows[number * len(rows) // count] for number in range(min(count, len(rows)))]


def chat(question: str, answer: str) -> Row:
    said = zip(("user", "assistant"), (question, answer), strict=True)
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def as_lines(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def as_parquet(path: Path, rows: list[Row]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def job(kind: str, learned: Path, held_out: Path, *, steps: int, rate: float, **more: Any) -> Row:
    """A request: LoRA on the shipped base in float32. `numbers` and `own` go into the method's own object."""
    own = {"hyperparameters": more.pop("numbers", {}), **more.pop("own", {})}
    return {
        "model": shipped.SHIPPED_ID,
        "training_file": learned,
        "validation_file": held_out,
        "method": {"type": kind, kind: own},
        "seed": 5,
        "adapter": {"kind": "lora", "rank": 8, "alpha": 16},
        "training": {
            "n_epochs": 50, "max_steps": steps, "batch_size": 16, "learning_rate": rate, "max_seq_len": 256,
            "precision": "fp32", "checkpoint_steps": 1000, "eval_steps": 1000, **more.pop("training", {}),
        },
        "resources": {"workers": 1},
        **more,
    }  # fmt: skip


def preferences(root: Path) -> dict[str, Trial]:
    """Which answer is better depends on the statement; the base does not know: it is right in one of two."""
    training, held_out = statements()[:800], statements()[800:]
    files = as_lines(root / "math.jsonl", training), as_lines(root / "math-held-out.jsonl", held_out)
    pairs = [
        {
            "prompt": ASKED.format(**row),
            "chosen": row["answer_matching_behavior"],
            "rejected": row["answer_not_matching_behavior"],
        }
        for row in held_out
    ]
    judged = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for side in ("chosen", "rejected")
        for pair in pairs
    ]
    asked = [{"prompt": pair["prompt"], "answer": pair["chosen"]} for pair in pairs]
    few = as_parquet(root / "math-few.parquet", training[:64])
    data = {"columns": PAIRS}
    made = {
        # Learns that Yes and No are answers, from few rows: the base of `grpo` has to be right at times.
        "warm": Trial(
            job(
                "supervised", few, files[1], steps=20, rate=2e-3,
                data={"columns": {"prompt": {"text": ASKED}, "completion": "answer_matching_behavior"}},
            ),
            "loss",
            [{"prompt": each["prompt"], "completion": each["answer"]} for each in asked],
        ),
        "dpo": Trial(job("dpo", *files, steps=80, rate=1e-3, data=data), "reward_of_ratio", pairs),
        "ipo": Trial(job("ipo", *files, steps=80, rate=1e-3, data=data), "reward_of_ratio", pairs),
        "simpo": Trial(job("simpo", *files, steps=80, rate=1e-3, data=data), "means", pairs),
        "orpo": Trial(job("orpo", *files, steps=80, rate=2e-3, data=data), "means", pairs),
        "cpo": Trial(job("cpo", *files, steps=80, rate=2e-3, data=data), "sums", pairs),
        "reward": Trial(
            job("reward", *files, steps=80, rate=2e-3, data=data),
            "reward",
            pairs,
            told={"labels": ["reward"]},
        ),
        "kto": Trial(
            job(
                "kto", *files, steps=80, rate=1e-3,
                # The same file twice: read as good answers, and as bad ones.
                data={"columns": GOOD, "sources": [{"file": files[0], "columns": BAD}]},
            ),
            "sign_of_ratio",
            judged,
            validated=len(pairs),
        ),
        "grpo": Trial(
            job(
                "reinforcement", *files, steps=40, rate=2e-3, model=WARM,
                own={"grader": SAYS_YES_OR_NO},
                numbers={"max_new_tokens": 4, "group_size": 8},
                data={"columns": {"prompt": {"text": ASKED}, "answer": "answer_matching_behavior"}},
                evaluation={"rows": len(asked)},
            ),
            "answers",
            asked,
            told={"max_new_tokens": 4},
        ),
    }  # fmt: skip
    for name in ("dpo", "ipo", "simpo", "orpo", "cpo", "kto"):
        made[name] = replace(made[name], reports=("accuracy",))
    return {**made, "grpo": replace(made["grpo"], reports=())}


def writing(root: Path) -> dict[str, Trial]:
    """Sentences from facts, a teacher who writes them, and more of Shakespeare."""
    training, held_out = sentences()
    held_out = spread(held_out, 160)
    files = root / "e2e.txt", root / "e2e-held-out.txt"
    for path, part in zip(files, (spread(training, 1600), held_out), strict=True):
        path.write_text("".join(f"{each.line}\n" for each in part), encoding="utf-8")
    asked = [chat(*each.line.split("||")) for each in held_out]
    about = identities()[:-IDENTITIES]
    plays = (SHARED / "tinyshakespeare/input.txt").read_text(encoding="utf-8").split("\n\n")
    parts = root / "plays.txt", root / "plays-held-out.txt"
    texts = [part for part in plays if 100 < len(part) < 500]
    unseen = texts[-150:]
    for path, some in zip(parts, (texts[:1500], unseen), strict=True):
        path.write_text("\n\n".join(some) + "\n", encoding="utf-8")
    return {
        "sft": Trial(
            job(
                "supervised", *files, steps=60, rate=4e-3,
                data={
                    "columns": TOLD,
                    "weight": 3,
                    "sources": [{"file": as_parquet(root / "identity.parquet", about), "weight": 1}],
                    "template": TEMPLATE,
                },
                training={
                    "packing": True, "eval_steps": 30, "best_checkpoint": True, "select_by": "score",
                    "max_seq_len": 512,
                },
                evaluation={
                    "grader": {
                        "type": "text_similarity", "name": "alike", "evaluation_metric": "rouge_l",
                        "input": "{{sample.output_text}}", "reference": "{{item.output}}",
                    },
                    "rows": 16, "max_new_tokens": 48,
                },
            ),
            "loss",
            asked,
        ),
        "pretraining": Trial(
            job(
                "pretraining", *parts, steps=60, rate=2e-3,
                data={"documents": "paragraph", "forgetting_file": as_lines(root / "about.jsonl", about)},
                training={"max_seq_len": 512},
            ),
            "loss",
            [{"text": text} for text in unseen],
        ),
        "distillation": Trial(
            job(
                "distillation", *files, steps=60, rate=4e-3, own={"teacher": TEACHER},
                data={"columns": TOLD, "template": TEMPLATE},
            ),
            "divergence",
            asked,
            told={"temperature": 2.0, "alpha": 0.5},
        ),
    }  # fmt: skip


def reading(root: Path) -> dict[str, Trial]:
    """Heads: what is learned of a text, against what can be said without reading it."""
    training, held_out = sentences()
    training, held_out = spread(training, 1600), spread(held_out, 200)
    slots = sorted({slot for each in training for slot in each.facts} - {"name"})
    asked = [
        {"text": each.text, "labels": sorted(set(each.facts) - {"name"})} for each in (*training, *held_out)
    ]
    learned, unseen = asked[: len(training)], asked[len(training) :]
    usual = {slot for slot in slots if sum(slot in row["labels"] for row in learned) > len(learned) / 2}
    scored = [{"text": each.text, "score": len(each.facts) / 8} for each in (*training, *held_out)]
    mean = statistics.fmean(row["score"] for row in scored[: len(training)])
    tagged = [tags_of(each) for each in (*training, *held_out)]
    names = sorted({tag for row in tagged for tag in row["tags"]})
    questions = [row for each in training for row in questions_of(each)]
    unanswered = [row for each in held_out for row in questions_of(each)[:2]]

    table = list(csv.reader(io.StringIO((SHARED / "banking77/train.csv").read_text(encoding="utf-8"))))
    head, lines = table[0], table[1:]
    classes = sorted({line[1] for line in lines})[::7]
    lines = [line for line in lines if line[1] in classes]
    parts = root / "banking.csv", root / "banking-held-out.csv"
    for path, some in zip(parts, (lines, lines), strict=True):
        with path.open("w", newline="", encoding="utf-8") as out:
            held = path == parts[1]
            csv.writer(out).writerows([head, *(line for n, line in enumerate(some) if (n % 5 == 0) == held)])
    known = [line[1] for n, line in enumerate(lines) if n % 5]
    most = max(classes, key=known.count)
    new = [{"text": line[0], "label": line[1]} for line in lines[::5]]
    return {
        "classification": Trial(
            job(
                "classification", *parts, steps=150, rate=3e-3,
                data={"columns": {"text": "text", "label": "category"}},
                training={
                    "eval_steps": 30, "early_stopping_patience": 2, "best_checkpoint": True,
                    "select_by": "accuracy",
                },
            ),
            "classes",
            new,
            constant=[float(row["label"] == most) for row in new],
            told={"labels": classes},
        ),
        "multi_label": Trial(
            job(
                "multi_label", as_parquet(root / "slots.parquet", learned),
                as_parquet(root / "slots-held-out.parquet", unseen), steps=80, rate=3e-3,
            ),
            "class_sets",
            unseen,
            constant=[
                statistics.fmean((slot in row["labels"]) == (slot in usual) for slot in slots)
                for row in unseen
            ],
            told={"labels": slots},
        ),
        "regression": Trial(
            job(
                "regression", as_lines(root / "counts.jsonl", scored[: len(training)]),
                as_lines(root / "counts-held-out.jsonl", scored[len(training) :]), steps=100, rate=2e-3,
            ),
            "value",
            scored[len(training) :],
            constant=[-((row["score"] - mean) ** 2) for row in scored[len(training) :]],
            told={"labels": ["value"]},
            reports=("loss",),
        ),
        "token_classification": Trial(
            job(
                "token_classification", as_lines(root / "tags.jsonl", tagged[: len(training)]),
                as_lines(root / "tags-held-out.jsonl", tagged[len(training) :]), steps=80, rate=3e-3,
            ),
            "tags",
            tagged[len(training) :],
            constant=[row["tags"].count("O") / len(row["tags"]) for row in tagged[len(training) :]],
            told={"labels": names},
        ),
        "question_answering": Trial(
            job(
                "question_answering", as_lines(root / "questions.jsonl", spread(questions, 1600)),
                as_lines(root / "questions-held-out.jsonl", unanswered), steps=120, rate=3e-3,
            ),
            "spans",
            unanswered,
        ),
    }  # fmt: skip


def tags_of(sentence: Sentence) -> Row:
    """Which fact a word tells, where the sentence has the fact's own words."""
    words = sentence.text.split()
    tags = ["O"] * len(words)
    for slot, told in sentence.facts.items():
        value = told.split()
        for at in range(len(words) - len(value) + 1):
            if words[at : at + len(value)] == value:
                tags[at : at + len(value)] = [slot] * len(value)
    return {"tokens": words, "tags": tags}


def questions_of(sentence: Sentence) -> list[Row]:
    """Where the facts are told, of those whose own words are there once."""
    found = []
    for slot, value in sentence.facts.items():
        places = [match.start() for match in re.finditer(rf"(?<!\S){re.escape(value)}(?!\S)", sentence.text)]
        if len(places) == 1 and value not in ("yes", "no"):
            answer = {"text": [value], "answer_start": places}
            found.append({"question": f"What is the {slot}?", "context": sentence.text, "answers": answer})
    return found


def trials(root: Path) -> dict[str, Trial]:
    """The first is what others need."""
    root.mkdir(parents=True, exist_ok=True)
    return {**preferences(root), **writing(root), **reading(root)}


KINDS = sorted(
    {*objectives.objectives(), "ipo"}
    & set(os.environ.get("OBJECTIVES_KINDS", ",".join((*objectives.objectives(), "ipo"))).split(","))
)
"""OBJECTIVES_KINDS=sft,dpo takes only some: a job is most of a minute on two cores."""
NEEDED = {"grpo": ("warm", WARM), "distillation": ("sft", TEACHER)}
"""Objective -> the job whose adapter, merged into its base, it starts or learns from; the id it gets."""
OPENAI = ("supervised", "dpo", "reinforcement")
"""What OpenAI's own client is used for."""


@dataclass
class Ran:
    live: Service
    root: Path
    trials: dict[str, Trial]
    jobs: dict[str, str] = field(default_factory=dict)
    """Name of a trial -> its job."""
    ids: dict[Path, str] = field(default_factory=dict)
    directories: dict[str, Path] = field(default_factory=lambda: {shipped.SHIPPED_ID: shipped.path()})
    """Of the bases."""

    def submit(self, name: str) -> None:
        """By OpenAI's client, where it knows such a job."""
        body = {**self._uploaded(self.trials[name].body), "name": name.replace("_", "-")}
        if body["method"]["type"] not in OPENAI:
            self.jobs[name] = self.live.client.submit(body).id
            return
        openai_client = openai.OpenAI(base_url=f"{self.live.running.url}/v1", api_key=self.live.running.key)
        known = {
            key: body.pop(key) for key in ("model", "training_file", "validation_file", "seed", "method")
        }
        self.jobs[name] = openai_client.fine_tuning.jobs.create(**known, extra_body=body).id

    def _uploaded(self, part: Any) -> Any:
        if isinstance(part, dict):
            return {key: self._uploaded(value) for key, value in part.items()}
        if isinstance(part, list):
            return [self._uploaded(value) for value in part]
        if isinstance(part, Path):
            if part not in self.ids:
                self.ids[part] = self.live.client.upload(part).id
            return self.ids[part]
        return part

    def merge(self, name: str, base: str) -> None:
        """Make a base of the shipped one and a job's adapter."""
        adapter = self.live.succeeded(self.jobs[name]).adapter_id
        made = self.live.client.operate({"operation": {"kind": "merge"}, "adapters": [adapter]})
        merged = self.live.succeeded(made.id).adapter_id
        assert merged is not None
        self.directories[base] = self.live.client.pull(merged, self.root / base.replace("/", "-"))
        self.live.client.register_base(base, self.directories[base].as_uri())

    def steps(self, job: Job) -> list[dict[str, float]]:
        """The job's table of metrics."""
        table = b"".join(self.live.client.content(job.result_files[0])).decode()
        return [
            {name: float(value) for name, value in row.items() if value}
            for row in csv.DictReader(io.StringIO(table))
        ]


@pytest.fixture(scope="module")
def bucket(request: pytest.FixtureRequest) -> Iterator[S3Server | None]:
    """A real S3 server that the service is told of; None where none can run."""
    try:
        server: S3Server = request.getfixturevalue("s3_swift")
    except pytest.skip.Exception:
        yield None
        return
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.env().items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, bucket: S3Server | None) -> Iterator[Ran]:
    """All jobs, submitted; those that the others need are done."""
    root = tmp_path_factory.mktemp("objectives")
    made = trials(root / "data")
    if bucket is not None:
        made["pretraining"] = replace(
            made["pretraining"], body={**made["pretraining"].body, "training_file": in_bucket(bucket, root)}
        )
    with service(root / "service") as live:
        jobs = Ran(live, root, made)
        needed = {name: base for kind, (name, base) in NEEDED.items() if kind in KINDS}
        for name in needed:
            jobs.submit(name)
        for name, base in needed.items():
            jobs.merge(name, base)
        for kind in KINDS:
            if kind not in jobs.jobs:
                jobs.submit(kind)
        yield jobs


def in_bucket(server: S3Server, root: Path) -> str:
    """URI of the plays, as two compressed objects below a prefix."""
    name, text = server.bucket(), (root / "data" / "plays.txt").read_text(encoding="utf-8")
    half = text.index("\n\n", len(text) // 2) + 2
    for part, piece in enumerate((text[:half], text[half:])):
        body = gzip.compress(piece.encode())
        server.client().put_object(Bucket=name, Key=f"plays/{part}.txt.gz", Body=body)
    return f"s3://{name}/plays/"


def surely(better: list[float], worse: list[float]) -> float:
    """By how many standard errors the mean of `better` is above that of `worse`, row by row."""
    apart = [one - other for one, other in zip(better, worse, strict=True)]
    return statistics.fmean(apart) / (statistics.stdev(apart) / math.sqrt(len(apart)) + 1e-12)


def measured(trial: Trial, ran: Ran, job: Job, directory: Path, rows: list[Row]) -> dict[str, Any]:
    """What held_out.py says, in a process of its own."""
    assert job.adapter_id is not None
    own = trial.body["method"][trial.body["method"]["type"]]
    told = {
        "measure": trial.measure,
        "base": str(ran.directories[trial.body["model"]]),
        "adapter": str(ran.live.client.pull(job.adapter_id, directory / "adapter")),
        "rows": rows,
        **({"teacher": str(ran.directories[own["teacher"]])} if "teacher" in own else {}),
        **trial.told,
    }
    (directory / "told.json").write_text(json.dumps(told))
    script = Path(__file__).with_name("held_out.py")
    # Jobs run beside it: threads that wait for each other would mostly wait for those.
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(directory / "told.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=one_thread)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_every_objective_has_a_trial(tmp_path: Path) -> None:
    assert set(trials(tmp_path)) - {"warm"} == {*objectives.objectives(), "ipo"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_beats_its_base_on_held_out_rows(
    kind: str, ran: Ran, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    trial = ran.trials[kind]
    job = ran.live.succeeded(ran.jobs[kind])
    found = measured(trial, ran, job, tmp_path, trial.rows)
    summary = {name: statistics.fmean(found[name]) for name in ("base", "adapter")}
    seconds = (job.finished_at or 0) - (job.started_at or 0)
    told_of = {"rows": len(trial.rows), "seconds": seconds, **summary}
    record_property("told", told_of)
    sys.stderr.write(f"{kind}: {json.dumps(told_of)}\n")  # the table of a report: pytest -s
    assert surely(found["adapter"], found["base"]) > SURE, summary
    if trial.constant:
        assert surely(found["adapter"], trial.constant) > SURE, (summary, statistics.fmean(trial.constant))

    # What the job said of its own validation file is what is measured here.
    evaluated = [step for step in ran.steps(job) if "valid_loss" in step or "valid_score" in step]
    told = evaluated[-1]
    training = trial.body["training"]
    if training.get("best_checkpoint"):
        column = "valid_score" if training["select_by"] == "score" else "valid_mean_token_accuracy"
        told = max(evaluated, key=lambda step: step[column])  # the first of equals
    if trial.measure == "answers":
        assert told["valid_score"] == pytest.approx(summary["adapter"], abs=1.01 / len(trial.rows))
    if trial.validated:
        found = measured(trial, ran, job, tmp_path / "validated", trial.rows[: trial.validated])
    columns = {"loss": "valid_loss", "accuracy": "valid_mean_token_accuracy"}
    for name in trial.reports:
        assert told[columns[name]] == pytest.approx(found[name], rel=0.01, abs=0.005), (name, told)


def needs(kind: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(kind not in KINDS, reason=f"the job {kind} was left out")


@needs("sft")
def test_the_job_that_mixes_and_packs_has_learned_both_data_sets_under_the_named_template(
    ran: Ran, tmp_path: Path
) -> None:
    """Packing, a mixture with weights, parquet, a template, graders and the best checkpoint in one job."""
    job = ran.live.succeeded(ran.jobs["sft"])
    assert job.training["packing"] is True
    scores = [step["valid_score"] for step in ran.steps(job) if "valid_score" in step]
    assert len(scores) == 2
    assert 0.1 < max(scores) <= 1, "something of the sentences is right"
    # Of the second source, too, rows that were not trained on.
    asked = [chat(row["instruction"], row["output"]) for row in identities()[-IDENTITIES:]]
    found = measured(ran.trials["sft"], ran, job, tmp_path, asked)
    assert surely(found["adapter"], found["base"]) > SURE
    written = (tmp_path / "adapter" / "chat_template.jinja").read_text()
    assert written.strip() == templates.named(TEMPLATE["name"]).jinja.strip()


@needs("pretraining")
def test_what_the_base_could_do_is_measured_before_and_after(ran: Ran, tmp_path: Path) -> None:
    """By the job on S3 data with a probe of another format, and here once more."""
    job = ran.live.succeeded(ran.jobs["pretraining"])
    reported = {name: value for step in ran.steps(job) for name, value in step.items()}
    asked = [chat(row["instruction"], row["output"]) for row in identities()[:-IDENTITIES]]
    found = measured(ran.trials["pretraining"], ran, job, tmp_path, asked)
    assert reported["forgetting_loss_after"] == pytest.approx(found["loss"], rel=0.01)
    assert reported["forgetting_loss_before"] == pytest.approx(found["base_loss"], rel=0.01)


@needs("classification")
def test_a_job_ends_when_it_no_longer_gets_better(ran: Ran) -> None:
    job = ran.live.succeeded(ran.jobs["classification"])
    steps = ran.steps(job)
    asked = ran.trials["classification"].body["training"]
    told = [step["valid_mean_token_accuracy"] for step in steps if "valid_loss" in step]
    stale = len(told) - 1 - told.index(max(told))
    assert stale <= asked["early_stopping_patience"]
    assert steps[-1]["step"] == asked["max_steps"] or stale == asked["early_stopping_patience"]
