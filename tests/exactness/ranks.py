"""`python -m tests.exactness.ranks WORK SET RANK`: one rank of a set of processes, through all its trials.

Rank 0 writes WORK/SET/<trial>.json, what came out, and <trial>.safetensors, the trained parameters. All
trials of a set share their processes: importing takes longer than they do.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from peft_service import checkpoint
from peft_service.store import FileStore
from tests.exactness.live import HALF, Live
from tests.exactness.trials import ALL, RESUMED, TWINS, Trial, sets

WAIT_SECONDS = 1800
FAILED = "failed"


def left(work: Path, name: str) -> list[Trial]:
    """Trials of a set of which nothing is written yet."""
    return [trial for trial in sets()[name][1] if not (work / name / f"{trial.id}.json").exists()]


class Sets:
    """All sets of processes. In the slice they are at work at once, since they wait for imports; with
    everything one after another, since ranks that share a core wait for one another."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.waiting = list(sets())
        self.running: dict[str, list[subprocess.Popen[bytes]]] = {}

    def __enter__(self) -> "Sets":
        for name in self.waiting[: 1 if ALL else None]:
            self.begin(name)
        return self

    def __exit__(self, *error: object) -> None:
        for process in [process for started in self.running.values() for process in started]:
            process.kill()
            process.wait()

    def begin(self, name: str) -> None:
        """Start all ranks of a set, for what is left of it; WORK/SET/log-<rank> has what they say."""
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        if name in self.waiting:
            self.waiting.remove(name)
        (self.work / name).mkdir(exist_ok=True)
        (self.work / name / "rendezvous").unlink(missing_ok=True)
        self.running[name] = []
        for rank in range(sets()[name][0]):
            command = [sys.executable, "-m", "tests.exactness.ranks", str(self.work), name, str(rank)]
            with (self.work / name / f"log-{rank}").open("ab") as log:
                self.running[name].append(
                    subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
                )

    def finish(self, seconds: float) -> None:
        """Come back when nothing is left, or a set gets no further.

        Raises:
            subprocess.TimeoutExpired: not within so many seconds.
        """
        deadline = time.monotonic() + seconds
        remaining = {name: len(trials) + 1 for name, (_, trials) in sets().items()}
        while self.running or self.waiting:
            if not self.running:
                self.begin(self.waiting[0])
            for name, processes in list(self.running.items()):
                for process in processes:
                    process.wait(timeout=max(0.0, deadline - time.monotonic()))
                del self.running[name]
                # A trial that fails ends its processes; they begin again behind it.
                if 0 < (now := len(left(self.work, name))) < remaining[name]:
                    remaining[name] = now
                    self.begin(name)


def tell(trial: Trial, work: Path, store: FileStore, rank: int, world: int) -> tuple[dict[str, Any], Any]:
    """(what came out, the trained parameters). Collective."""
    live = Live(trial, work, store, rank, world)
    told = live.fit(save=trial in RESUMED)
    trained = live.engine.trainable()
    state = live.engine.state()
    told.sha256 = live.artifact(store.root / "artifacts" / trial.id)
    told.moved = live.moved()
    told.diverged = live.poisoned()
    live.close()
    more: dict[str, Any] = {}
    if trial in RESUMED:
        torch.distributed.barrier()  # rank 0 has saved
        again = Live(trial, work, store, rank, world)
        resumed = again.fit(again.resume(store, trial.id, HALF))
        more["again"] = asdict(resumed) | {"differs": differing(again.engine.state(), state)}
        again.close()
        local = FileStore((work / "local").as_uri())
        arrived(local, trial.plain.id)
        moved = Live(trial, work, store, rank, world)
        from_torch = moved.fit(moved.resume(local, trial.plain.id, HALF))
        more["from_torch"] = asdict(from_torch) | {"apart": apart(moved.engine.trainable(), trained)}
        moved.close()
    return asdict(told) | more, trained


def differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that are not the same bits."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest difference of two sets of tensors."""
    assert {name: t.shape for name, t in one.items()} == {name: t.shape for name, t in other.items()}
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


def arrived(store: FileStore, job: str) -> None:
    """Come back when the tests' own process has written the checkpoint of `job`, or the object FAILED."""
    deadline = time.monotonic() + WAIT_SECONDS
    while checkpoint.open_at(store, "p", job, 1, HALF) is None:
        assert store.info(f"{FAILED}/{job}") is None, f"torch alone fails with {job}"
        assert time.monotonic() < deadline, f"the checkpoint of {job} did not come"
        time.sleep(0.05)


def write(path: Path, told: Mapping[str, Any]) -> None:
    """Whoever is first: the rank at fault, and not those that then miss it."""
    with contextlib.suppress(FileExistsError), path.open("x") as file:
        json.dump(told, file)


def main(work: Path, name: str, rank: int) -> None:
    torch.set_num_threads(1)
    world, trials = sets()[name][0], left(work, name)  # the same for all: they meet below
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
    }
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{work}/{name}/rendezvous", rank=rank, world_size=world
    )
    from cluster.engine import prepare_process

    prepare_process()
    store = FileStore((work / name / "store").as_uri())
    for trial in trials:
        began = time.monotonic()
        trained: dict[str, Tensor] = {}
        try:
            if trial in TWINS:
                live = Live(trial, work, store)
                told = asdict(live.fit())
                told["sha256"] = live.artifact(store.root / "artifacts" / trial.id)
            else:
                told, trained = tell(trial, work, store, rank, world)
        except Exception:
            # The others may wait for this rank for ever: all end, and are started again for what is left.
            write(work / name / f"{trial.id}.json", {"failed": f"rank {rank}: {traceback.format_exc()}"})
            os._exit(1)
        if rank == 0:
            save_file(trained, work / name / f"{trial.id}.safetensors")
            write(work / name / f"{trial.id}.json", told)
        sys.stdout.write(f"{trial.id} {time.monotonic() - began:.1f} s\n")
        sys.stdout.flush()
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads now and then abort at interpreter exit


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
