"""ZeRO 0 = 2 = 3 on two ranks = plain torch on one, for every method on every architecture it admits.

`make test` takes a few methods at stage 3; `make test-methods` (METHODS_ALL=1) everything.
"""

import json

import pytest
from safetensors.torch import load_file

from tests.methods import checks, ranks
from tests.methods.test_conformance import ALL, ROOT, TRIALS

LOSS, LOGITS = 2e-4, 2e-3
"""Relative difference of a step's loss; of a logit, as a share of the largest, after all steps."""
pytestmark = [pytest.mark.timeout(3600)]


HOOKED = ("adalora", "dylora", "lora_fa", "lt_sft", "adapter", "prefix_tuning", "full", "vera")
"""In `make test`: a method of each way of training; each once, at stage 3."""
TRAINED = [trial for trial in TRIALS if trial.method.trains]
CHOSEN = TRAINED if ALL else [trial for trial in TRAINED if trial.method.kind in HOOKED]
STAGES = (0, 2, 3) if ALL else (3,)
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
    ranks.two("tests.methods.ranks", work, ROOT, 3400)
    return work


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
