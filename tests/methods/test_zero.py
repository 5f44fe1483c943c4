"""ZeRO 0 = 2 = 3 on two ranks = plain torch on one, for every method on every architecture it admits.

One task an architecture in `make test`; the whole matrix with `make test-methods` (METHODS_ALL=1).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from peft_service.methods import METHODS
from safetensors.torch import load_file

from tests.methods import checks
from tests.methods.test_conformance import ROOT, TRIALS

STAGES = (0, 2, 3)
LOSS, LOGITS = 2e-4, 2e-3
"""Relative difference of a step's loss; of a logit, as a share of the largest, after all steps."""
pytestmark = [pytest.mark.timeout(3600)]


def _chosen():
    """Of every method its first trial; with METHODS_ALL all of them."""
    if os.environ.get("METHODS_ALL"):
        return TRIALS
    seen, found = set(), []
    for trial in TRIALS:
        if trial.method.kind not in seen:
            seen.add(trial.method.kind)
            found.append(trial)
    return found


CHOSEN = _chosen()
PAIRS = [(t, stage) for t in CHOSEN for stage in STAGES if stage in t.method.can.zero_stages]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """WORK after two ranks have gone through every trial."""
    work = tmp_path_factory.mktemp("zero")
    listed = []
    for trial in CHOSEN:
        checks.directory_of(trial.base, ROOT)
        checks.sources(trial, ROOT)
        stages = [stage for stage in STAGES if stage in trial.method.can.zero_stages]
        listed.append([trial.method.kind, trial.base, trial.task, trial.name, stages])
    (work / "trials.json").write_text(json.dumps(listed))
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    processes = []
    for rank in (0, 1):
        with (work / f"log-{rank}").open("wb") as log:
            command = [sys.executable, "-m", "tests.methods.ranks", str(work), str(ROOT), str(rank), "2"]
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
    try:
        for process in processes:
            process.wait(timeout=3400)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    yield work


@pytest.mark.parametrize(("trial", "stage"), PAIRS, ids=lambda value: getattr(value, "id", value))
def test_sharded_training_is_the_same_training(trial, stage, ran, oracles):
    name = f"{trial.id}-{stage}"
    path = ran / f"{name}.json"
    assert path.exists(), "\n".join(log.read_text()[-3000:] for log in sorted(ran.glob("log-*")))
    told = json.loads(path.read_text())
    assert "error" not in told, told["error"]
    live, losses, said = oracles(trial)
    assert told["losses"] == pytest.approx(losses, rel=LOSS)
    sharded = load_file(ran / f"{name}.safetensors")
    scale = max(1.0, max(float(tensor.abs().max()) for tensor in said.values()))
    assert checks.difference(sharded, said, live.probe) <= LOGITS * scale
    _, loaded = checks.load(live, ran / name)
    assert checks.difference(loaded, sharded, live.probe) <= checks.TOLERANCE * scale


@pytest.fixture(scope="module")
def oracles():
    """By trial: the live model of plain torch, its losses and its answers."""
    made = {}

    def of(trial):
        if trial.id not in made:
            live = checks.Live(trial, ROOT)
            losses = [live.step(number) for number in range(checks.STEPS)]
            made[trial.id] = (live, losses, live.answers())
        return made[trial.id]

    return of


def test_every_method_is_there():
    assert {variant.model_fields["kind"].default for variant in METHODS} == {t.method.kind for t in CHOSEN}
