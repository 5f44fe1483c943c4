"""ZeRO at every stage, on one rank and two, does what plain torch does in one process: design §7.1, 2, 4, 5.

`tests.cluster.ranks` runs in three processes beside this one (one rank alone, and two ranks), and the oracle
here: LocalEngine on the whole batch at once.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from peft_service.errors import InvalidRequest
from peft_service.train import LocalEngine
from tests.cluster.ranks import ALONE, RESUMED, SCENARIOS, STEPS, TRAINING, Scenario, attached, resumes, run
from tests.tiny import save_tiny_base

TIMEOUT_SECONDS = 800
pytestmark = pytest.mark.timeout(900)  # the first test waits for three processes that import for long

RUNS = [(s, 2) for s in SCENARIOS] + [(s, 1) for s in SCENARIOS if s.name in ALONE]
MOVES = [(s, world) for world in (1, 2) for s in resumes(world) if not s.name.endswith("-again")]
AGAIN = [(s, world) for world in (1, 2) for s in resumes(world) if s.name.endswith("-again")]


def _id(value):
    return value.name if isinstance(value, Scenario) else f"{value}-ranks"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    directory = tmp_path_factory.mktemp("engine")
    save_tiny_base(directory / "base")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    processes = []
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        with (directory / f"log-{rank}-of-{world}").open("wb") as log:
            command = [sys.executable, "-m", "tests.cluster.ranks", str(directory), str(rank), str(world)]
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
    yield directory, processes
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def oracle(work):
    """By (precision, quantize): what LocalEngine makes of whole batches."""
    made = {}

    def of(scenario):
        key = (scenario.precision, scenario.quantize)
        if key not in made:
            plain = Scenario("oracle", 0, *key, microbatch=TRAINING.batch_size)
            engine = LocalEngine(attached(work[0] / "base", plain), TRAINING)
            made[key] = run(engine, plain, work[0])
        return made[key]

    return of


@pytest.fixture(scope="module")
def results(work, oracle):
    directory, processes = work
    for scenario in SCENARIOS:
        oracle(scenario)  # while the ranks are at work
    for process in processes:
        process.wait(timeout=TIMEOUT_SECONDS)
    logs = "\n".join(path.read_text()[-2000:] for path in sorted(directory.glob("log-*")))
    assert (directory / "bf16-3-to-2-w2.safetensors").exists(), logs

    def of(name, world):
        path = directory / f"{name}-w{world}.safetensors"
        with safe_open(path, "pt") as file:
            return load_file(path), file.metadata()

    return of


def _worst(one, other, prefix):
    return max(float((one[k].float() - other[k].float()).abs().max()) for k in one if k.startswith(prefix))


@pytest.mark.parametrize(("scenario", "world"), RUNS, ids=_id)
def test_the_curve_and_the_adapter_are_those_of_one_process(results, oracle, scenario, world):
    result, metadata = results(scenario.name, world)
    wanted = oracle(scenario)
    # bf16: DeepSpeed computes in bf16 with float32 masters, LocalEngine computes the adapter in float32.
    loss, adapter = (1e-4, 1e-4) if scenario.precision == "fp32" else (5e-2, 5e-2)
    assert len(result["loss"]) == STEPS
    torch.testing.assert_close(result["loss"], wanted["loss"], rtol=0, atol=loss)
    torch.testing.assert_close(result["norm"], wanted["norm"], rtol=loss * 10, atol=0)
    assert {name: t.shape for name, t in result.items()} == {name: t.shape for name, t in wanted.items()}
    assert _worst(result, wanted, "adapter.") < adapter
    assert float(result["loss"].diff().abs().max()) > 1e-2, "nothing was learnt: the comparison is empty"
    assert json.loads(metadata["frozen_moved"]) == []


@pytest.mark.parametrize(("scenario", "world"), RUNS, ids=_id)
def test_what_is_not_finite_never_reaches_the_weights(results, scenario, world):
    from_gradient, from_loss = json.loads(results(scenario.name, world)[1]["diverged"])
    assert "gradient norm" in from_gradient
    assert "the loss is nan" in from_loss


@pytest.mark.parametrize(("scenario", "world"), AGAIN, ids=_id)
def test_resuming_is_no_interruption_bit_for_bit(results, scenario, world):
    resumed = results(scenario.name, world)[0]
    uninterrupted = results(scenario.name.removesuffix("-again"), world)[0]
    assert torch.equal(resumed["loss"], uninterrupted["loss"][STEPS // 2 :])
    for name, tensor in resumed.items():
        if name.startswith(("adapter.", "final.")):
            assert torch.equal(tensor, uninterrupted[name]), name


@pytest.mark.parametrize(("scenario", "world"), MOVES, ids=_id)
def test_another_stage_and_another_number_of_ranks_go_on_from_the_same_state(results, scenario, world):
    moved = results(scenario.name, world)[0]
    source, _, other = scenario.resume_from.rpartition("-w")
    stayed = results(source, int(other))[0]
    atol = 1e-5 if scenario.precision == "fp32" else 2e-2
    torch.testing.assert_close(moved["loss"], stayed["loss"][STEPS // 2 :], rtol=0, atol=atol)
    assert _worst(moved, stayed, "adapter.") < atol
    assert int(moved["final.step"]) == STEPS


def test_the_scenarios_that_are_resumed_exist():
    assert set(RESUMED) <= {scenario.name for scenario in SCENARIOS}


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"stage": 0, "precision": "bf16"}, "training.zero_stage"),
        ({"stage": 2, "precision": "fp32", "offload_parameters": True}, "training.offload_parameters"),
        ({"stage": 0, "precision": "fp32", "offload_optimizer": True}, "training.offload_optimizer"),
    ],
)
def test_combinations_that_compute_wrongly_are_refused(options, param):
    from cluster.engine import ZeroEngine

    with pytest.raises(InvalidRequest) as caught:
        ZeroEngine(torch.nn.Linear(2, 2), TRAINING, **options)
    assert caught.value.param == param
