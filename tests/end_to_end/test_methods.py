"""Every method over REST, to a proven artifact and an entry in the catalog that says who can load it.

The suites of methods show what each does right; this shows that each goes the whole way: request, plan,
queue, Ray workers, DeepSpeed, gate, publication. `make test-methods`.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from jobs import demo_data
from jobs.client import Job
from peft_service.errors import InvalidRequest
from peft_service.methods import METHODS, SERVERS
from peft_service.shipped import SHIPPED_ID, path
from peft_service.variants import kind_of
from tests.end_to_end.service import Service, service
from tests.methods import bases, checks

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(5400)]

VARIANTS: dict[str, Any] = {kind_of(variant): variant for variant in METHODS}
KINDS = sorted(
    (kind for kind in VARIANTS if kind in os.environ.get("METHODS_KINDS", ",".join(VARIANTS)).split(",")),
    key=lambda kind: bool(VARIANTS[kind].sources_of),
)
"""Those that need others' adapters last, as their jobs run last. METHODS_KINDS=lora,full takes only some: a
job is most of a minute on two cores."""
SERVED = {"lora", "lora_plus", "lora_fa", "dylora", "delta_lora", "lora_drop", "lorahub"}
"""Methods whose artifact is what vLLM, Ray Serve LLM and LoRAX call an adapter."""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(service, name -> (request, job id)): all are submitted at once, then those that need sources."""
    root = tmp_path_factory.mktemp("methods")
    with service(root / "service") as live:
        submitted: dict[str, tuple[dict[str, Any], str]] = {}
        files: dict[tuple[str, bool, bool], str] = {}

        def file_of(task: str, tasks: bool, ours: bool) -> str:
            """Rows of the demo for the shipped base, a few words for a tiny one."""
            if (task, tasks, ours) not in files:
                if ours and task == "causal_lm":
                    rows = demo_data.training_rows()[:120]
                    rows = [
                        {**row, "task": checks.TASKS[n % 2]} if tasks else row for n, row in enumerate(rows)
                    ]
                else:
                    rows = bases.rows(task, 24, checks.TASKS if tasks else ())
                place = root / f"{task}-{tasks}-{ours}.jsonl"
                place.write_text("".join(json.dumps(row) + "\n" for row in rows))
                files[task, tasks, ours] = live.client.upload(Path(place)).id
            return files[task, tasks, ours]

        trials = {trial.method.kind: trial for trial in reversed(checks.trials(root / "bases"))}

        def submit(kind: str, name: str, references: tuple[str, ...] = ()) -> str:
            variant, trial = VARIANTS[kind], trials[kind]
            ours = trial.base == "llama"
            # On the shipped base everything is the method's own default; a tiny base is too small for that.
            fields = variant.model_fields
            asked = {
                key: value for key, value in variant.small.items() if not ours or fields[key].is_required()
            }
            adapter = {"kind": kind, **{key: _plain(value) for key, value in asked.items()}}
            if references:
                adapter["sources"] = [f"{reference}@1" for reference in references]
            body: dict[str, Any] = {
                "training_file": file_of(trial.task, variant.needs_tasks, ours),
                "name": name,
                "adapter": adapter,
                "training": {"n_epochs": 50, "max_steps": 4, "batch_size": 4, "max_seq_len": 256},
            }
            if ours:
                body["model"] = SHIPPED_ID
            else:
                body["training"]["max_seq_len"] = 64
                body["model"] = f"tiny/{trial.base}"
                body["base"] = {"uri": f"file://{checks.directory_of(trial.base, root / 'bases')}"}
            job = live.client.submit(body)
            submitted[name] = (body, job.id)
            return job.id

        needing = {kind: VARIANTS[kind].sources_of[0] for kind in KINDS if VARIANTS[kind].sources_of}
        most = {
            source: max(len(VARIANTS[kind].small["sources"]) for kind, of in needing.items() if of == source)
            for source in needing.values()
        }
        named = {
            source: [f"source-{source}-{n}".replace("_", "-") for n in range(most[source])] for source in most
        }
        for source, names in named.items():
            for name in names:
                submit(source, name)
        for kind in KINDS:
            if kind not in needing:
                submit(kind, kind.replace("_", "-"))
        for names in named.values():
            for name in names:
                live.succeeded(submitted[name][1])
        for kind, source in needing.items():
            submit(kind, kind.replace("_", "-"), tuple(named[source][: len(VARIANTS[kind].small["sources"])]))
        yield live, submitted


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_of_every_method_ends_with_a_proven_artifact(kind: str, ran: Any, tmp_path: Path) -> None:
    live, submitted = ran
    body, job_id = submitted[kind.replace("_", "-")]
    job: Job = live.succeeded(job_id)
    assert job.adapter is not None
    details = next(each for each in live.client.adapters() if each.job == job_id)
    assert details.method == kind
    pulled = live.client.pull(job.adapter["id"], tmp_path / kind)
    manifest = json.loads((pulled / "manifest.json").read_text())
    assert all(check["passed"] for check in manifest["gate"])
    assert {check["name"] for check in manifest["gate"]} >= {"finite", "logits_equal"}
    said = manifest["compatibility"]
    assert set(said) == set(SERVERS)
    for server, told in said.items():
        assert told["ok"] or len(told["reason"]) > 10, (server, told)
    served = kind in SERVED
    if kind == "increlora":  # in so few steps no rank may have grown: then it is a plain LoRA
        served = not json.loads((pulled / "adapter_config.json").read_text())["rank_pattern"]
    assert said["vllm"]["ok"] == (served or kind in ("full", "loraprune")), said["vllm"]
    assert ("/adapters/" in details.url) == served
    assert body["adapter"]["kind"] == kind


def test_the_service_lists_every_method_with_what_it_can(ran: Any) -> None:
    live: Service = ran[0]
    listed = {method.kind: method for method in live.client.methods()}
    assert set(listed) == set(VARIANTS)
    assert path().exists()
    for method in listed.values():
        assert method.paper.startswith("https://")
        assert method.capabilities["architectures"]


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"kind": "bitfit"}, "bias"),
        ({"kind": "xattn"}, "encoder-decoder"),
        ({"kind": "adalora", "rank": 8, "initial_rank": 8}, "rank"),
        ({"kind": "full", "quantize": True}, "quantize"),
    ],
)
def test_what_cannot_work_is_refused_at_submit(adapter: dict[str, Any], words: str, ran: Any) -> None:
    live, submitted = ran
    any_body = next(body for body, _ in submitted.values() if body["model"] == SHIPPED_ID)
    body = {**any_body, "name": "refused", "adapter": adapter}
    with pytest.raises(InvalidRequest) as refused:
        live.client.submit(body)
    assert words in refused.value.message
