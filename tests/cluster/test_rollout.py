"""GRPO on two ranks at every ZeRO stage does what it does in one process: answers, rewards and weights."""

import json

import pytest
import torch

from tests.cluster import rollout_ranks
from tests.methods import bases
from tests.methods.ranks import two


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bases")
    for kind in ("llama", "t5"):
        bases.save(kind, directory / kind)
    return directory


@pytest.fixture(scope="module")
def work(tmp_path_factory, root):
    directory = tmp_path_factory.mktemp("work")
    two("tests.cluster.rollout_ranks", directory, root, 280)
    return directory


@pytest.mark.parametrize("case", rollout_ranks.CASES)
def test_two_ranks_answer_and_learn_as_one_process(work, root, case):
    steps, parameters, _ = rollout_ranks.train(case, root)
    assert any(0 < step["reward"] < 1 for step in steps)
    assert all(step["norm"] > 0 for step in steps)
    for stage in rollout_ranks.STAGES:
        path = work / f"{case}-{stage}.json"
        assert path.exists(), (work / "log-0").read_text()[-3000:]
        told = json.loads(path.read_text())
        assert isinstance(told, list), told
        for mine, theirs in zip(steps, told[0], strict=True):
            assert theirs == pytest.approx(mine, rel=2e-4, abs=2e-6), (stage, mine, theirs)
        assert told[1].keys() == parameters.keys()
        for name, value in parameters.items():
            torch.testing.assert_close(
                torch.tensor(told[1][name]), torch.tensor(value), rtol=0, atol=2e-4, msg=f"{stage} {name}"
            )
