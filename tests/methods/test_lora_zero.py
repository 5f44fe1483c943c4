"""LoRA methods that read gradients, hook them or tie parameters: two ranks of ZeRO 0, 2, 3 do what one
does."""

import pytest
import torch
from safetensors.torch import load_file

from tests.methods import checks, ranks
from tests.methods.lora_ranks import STAGES, run, trials

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]
TRIALS = trials()


@pytest.fixture(scope="module")
def work(root, tmp_path_factory):
    directory = tmp_path_factory.mktemp("zero")
    for trial in TRIALS.values():
        checks.directory_of(trial.base, root)
    ranks.two("tests.methods.lora_ranks", directory, root, 1000)
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
    found, other = (load_file(work / f"{name}-{stage}-{rank}.safetensors") for rank in (0, 1))
    wanted = alone[name]
    for key, value in found.items():
        assert torch.equal(value, other[key]), f"{key}: the ranks differ"
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
