"""LoRAHub: the mix is the weighted sum, the file is one plain LoRA, and the search finds what is there to
find."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel

from peft_service import artifact
from peft_service.errors import InvalidRequest, RunFailed
from peft_service.methods.dora import DoRA
from peft_service.methods.lorahub import LoRAHub
from peft_service.tuners.experts import experts
from peft_service.tuners.lorahub import mixed, searched
from tests.methods import checks
from tests.methods.checks import Live, Trial, directory_of


def base_of(root):
    return artifact.load_base(directory_of("llama", root), "causal_lm", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def made(root, tmp_path_factory):
    """(directory of a mix, its sources, the rows it was judged by, the objective)"""
    trial = Trial(LoRAHub(sources=("a", "b"), rows=8, evaluations=25), "llama", "causal_lm")
    live = Live(trial, root)
    directory = live.save(tmp_path_factory.mktemp("mix") / "a")
    return directory, checks.sources(trial, root), [live.batch([row]) for row in range(8)], live.objective


def test_the_file_is_the_weighted_sum_of_its_sources(root, made):
    """peft's own concatenation of the two, loaded as peft loads them, is the oracle."""
    directory, sources, rows, _ = made
    weights = json.loads((directory / "lorahub.json").read_text())["weights"]
    told = json.loads((directory / "adapter_config.json").read_text())
    assert (told["peft_type"], told["r"], told["lora_alpha"]) == ("LORA", 8, 8)
    oracle = PeftModel.from_pretrained(base_of(root), str(sources[0]), "a")
    oracle.load_adapter(str(sources[1]), "b")
    oracle.add_weighted_adapter(["a", "b"], weights, "mix", combination_type="cat")
    oracle.set_adapter("mix")
    found = artifact.load(base_of(root), directory)
    with torch.no_grad():
        for batch in rows[:3]:
            wanted = oracle.eval()(**batch.inputs).logits
            torch.testing.assert_close(found(**batch.inputs).logits, wanted, rtol=1e-5, atol=1e-5)


def test_the_mix_is_no_worse_than_the_base_or_a_source_on_its_rows(root, made):
    directory, sources, rows, objective = made
    told = json.loads((directory / "lorahub.json").read_text())

    def loss(model):
        targets = sum(int(objective.targets(batch)) for batch in rows)
        with torch.no_grad():
            return sum(float(objective.loss_sum(model, batch)[0]) for batch in rows) / targets

    def penalty(weights):
        return 0.05 * float(np.mean(np.abs(weights)))

    assert loss(artifact.load(base_of(root), directory)) + penalty(told["weights"]) == pytest.approx(
        told["loss"], abs=1e-4
    )
    assert loss(base_of(root)) == pytest.approx(told["of_the_base"], abs=1e-4)
    for place, source in enumerate(sources):
        alone = loss(artifact.load(base_of(root), source)) + penalty([1.0, 0.0])
        assert alone == pytest.approx(told["of_the_sources"][place], abs=1e-4)
    assert told["loss"] < min(told["of_the_base"], *told["of_the_sources"])


def test_factors_are_added_as_the_paper_does(root, made):
    found = experts(base_of(root), made[1])
    one = mixed(found, [0.5, -2.0], "factors")
    sums = mixed(found, [0.5, -2.0], "deltas")
    for name, (a, b) in one.items():
        (a1, b1), (a2, b2) = (expert[name] for expert in found)
        torch.testing.assert_close(b @ a, (0.5 * b1 - 2 * b2) @ (0.5 * a1 - 2 * a2))
        torch.testing.assert_close(sums[name][1] @ sums[name][0], 0.5 * b1 @ a1 - 2 * b2 @ a2)
    name = next(iter(found[0]))
    found[1][name] = (found[1][name][0][:2], found[1][name][1][:, :2])
    with pytest.raises(InvalidRequest, match="compose deltas"):
        mixed(found, [0.5, 0.5], "factors")


def test_the_search_finds_a_known_minimum_and_repeats():
    target = np.array([0.7, -0.4, 0.0, 1.4])

    def loss(weights):
        return float(((np.array(weights) - target) ** 2).sum())

    one, two = (searched(loss, 4, bound=1.5, evaluations=400, seed=3) for _ in range(2))
    assert one == two
    assert np.abs(np.array(one["weights"]) - target).max() < 0.05
    bounded = searched(loss, 4, bound=1.0, evaluations=400, seed=3)["weights"]
    assert bounded[3] == pytest.approx(1.0, abs=0.02)
    assert searched(loss, 4, bound=1.5, evaluations=400, seed=4)["weights"] != one["weights"]


def test_what_cannot_be_mixed_is_refused(root, tmp_path):
    dora = Live(Trial(DoRA(rank=4), "llama", "causal_lm"), root).save(tmp_path / "dora")
    with pytest.raises(InvalidRequest, match="DoRA") as refused:
        experts(base_of(root), [dora])
    assert refused.value.param == "adapter.sources[0]"
    untrained = LoRAHub(sources=("a",), rows=2, evaluations=3, l1=10.0)
    with pytest.raises(RunFailed, match="no mix"):
        Live(Trial(untrained, "llama", "causal_lm"), root)
