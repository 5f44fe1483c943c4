"""`python -m tests.methods.ranks WORK ROOT RANK WORLD`: trials on DeepSpeed ZeRO, as one rank of several.

WORK/trials.json lists [kind, base, task, alias, stages]. Rank 0 writes WORK/<trial>-<stage>.json with the
losses of the steps and what went wrong, and the artifact beside it; both ranks train every trial.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import torch
from safetensors.torch import save_file


def main(work: Path, root: Path, rank: int, world: int) -> None:
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
    from cluster.engine import ZeroEngine, prepare_process
    from peft_service.methods import METHODS
    from peft_service.variants import kind_of
    from tests.methods import checks

    prepare_process()
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
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads now and then abort at interpreter exit


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
