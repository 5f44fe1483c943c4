"""`python -m tests.methods.ranks WORK ROOT RANK WORLD`: trials on DeepSpeed ZeRO, as one rank of several.

WORK/trials.json lists [kind, base, task, alias, stages]. Rank 0 writes WORK/<trial>-<stage>.json with the
losses of the steps and what went wrong, and the artifact beside it; both ranks train every trial.
"""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import torch
from safetensors.torch import save_file


def two(module: str, work: Path, root: Path, seconds: float) -> None:
    """Run `python -m module WORK ROOT RANK 2` for both ranks; WORK/log-<rank> has what they say."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    processes = []
    for rank in (0, 1):
        with (work / f"log-{rank}").open("wb") as log:
            command = [sys.executable, "-m", module, str(work), str(root), str(rank), "2"]
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
    try:
        for process in processes:
            process.wait(timeout=seconds)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def join(work: Path, rank: int, world: int) -> None:
    """Become one of the ranks that meet in WORK."""
    torch.set_num_threads(1)
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
    }
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{work}/rendezvous", rank=rank, world_size=world
    )
    from cluster.engine import prepare_process

    prepare_process()


def leave() -> None:
    """End this process."""
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads now and then abort at interpreter exit


def main(work: Path, root: Path, rank: int, world: int) -> None:
    join(work, rank, world)
    from cluster.engine import ZeroEngine
    from peft_service.methods import METHODS
    from peft_service.variants import kind_of
    from tests.methods import checks

    variants = {kind_of(variant): variant for variant in METHODS}
    for kind, base, task, alias, stages in json.loads((work / "trials.json").read_text()):
        trial = checks.Trial(checks.example(variants[kind], alias), base, task, alias)
        for stage in stages:
            name = f"{trial.id}-{stage}"
            told: dict[str, object] = {}
            try:

                def engine(attached, training, stage=stage):
                    return ZeroEngine(
                        attached, training, stage=stage, precision="fp32", persistence_threshold=0
                    )

                live = checks.Live(trial, root, engine=engine)
                told["losses"] = [live.step(number) for number in range(checks.STEPS)]
                said = live.answers()
                live.save(work / name)
                if rank == 0:
                    save_file(
                        {key: tensor.contiguous() for key, tensor in said.items()},
                        work / f"{name}.safetensors",
                    )
                live.engine.close()
            except Exception:
                told["error"] = traceback.format_exc()
            if rank == 0:
                (work / f"{name}.json").write_text(json.dumps(told))
                sys.stdout.write(f"{name} {'bad' if 'error' in told else 'ok'}\n")
                sys.stdout.flush()
            torch.distributed.barrier()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
