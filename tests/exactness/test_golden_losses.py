"""The losses are those on record (tests/golden/losses.json)."""

import json

import pytest
import torch

from tests.exactness.golden import FILE, TRIALS, curve
from tests.exactness.live import STEPS, prepare

RELATIVE = 2e-6
"""Another CPU sums in another order. On the one that recorded them, the losses are the same to the bit."""
RECORDED = json.loads(FILE.read_text())


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("golden")
    prepare(directory, TRIALS.values())
    return directory


def test_every_objective_is_on_record():
    assert set(RECORDED) == set(TRIALS)


@pytest.mark.parametrize("name", TRIALS)
def test_the_losses_are_those_on_record(name, work):
    found, wanted = curve(name, work), RECORDED[name]
    assert len(wanted["loss"]) == STEPS
    for key in ("loss", "valid_loss"):
        assert found[key] == pytest.approx(wanted[key], rel=RELATIVE, abs=RELATIVE), key
    # A norm is a sum of squares over gradients that cancel: it loses a digit more.
    assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=10 * RELATIVE)
