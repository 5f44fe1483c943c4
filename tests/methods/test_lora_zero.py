"""LoRA methods that read gradients, hook them or tie parameters: two ranks of ZeRO 0, 2, 3 do what one
does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.methods import checks
from tests.methods.lora_ranks import STAGES, run, trials

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]
TRIALS = trials()


@pytest.fixture(scope="module")
def work(root, tmp_path_factory):
    directory = tmp_path_factory.mktemp("zero")
    for trial in TRIALS.values():
        checks.directory_of(trial.base, root)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    processes = []
    for rank in (0, 1):
        with (directory / f"log-{rank}").open("wb") as log:
            command = [
                sys.executable,
                "-m",
                "tests.methods.lora_ranks",
                str(directory),
                str(root),
                str(rank),
                "2",
            ]
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
    try:
        for process in processes:
            process.wait(timeout=1000)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return directory


@pytest.fixture(scope="module")
def alone(root):
    """By name: what one process with torch's own optimizer does."""
    torch.set_num_threads(1)
    return {name: run(trial, root) for name, trial in TRIALS.items()}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", TRIALS)
def test_two_ranks_do_what_one_does(name, stage, work, alone):
    path = work / f"{name}-{stage}-0.safetensors"
    assert path.exists(), "\n".join(log.read_text()[-3000:] for log in sorted(work.glob("log-*")))
    ranks, wanted = [load_file(work / f"{name}-{stage}-{rank}.safetensors") for rank in (0, 1)], alone[name]
    for key, value in ranks[0].items():
        assert torch.equal(value, ranks[1][key]), f"{key}: the ranks differ"
    found = ranks[0]
    assert found.keys() == wanted.keys()
    torch.testing.assert_close(found["losses"], wanted["losses"], rtol=2e-4, atol=0)
    gradients = [key for key in wanted if key.startswith("gradient.")]
    assert any(wanted[key].any() for key in gradients)
    for key in gradients:
        scale = float(wanted[key].abs().max())
        assert float((found[key] - wanted[key]).abs().max()) <= 2e-3 * scale + 1e-7, key
    for key in wanted:
        if key.endswith((".learning", ".resting", "state.ranks")):
            assert torch.equal(found[key], wanted[key]), key
        elif key.startswith("param."):
            assert float((found[key] - wanted[key]).abs().max()) < 5e-3, key
