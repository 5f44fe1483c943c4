"""`python -m tests.methods.lora_ranks WORK ROOT RANK WORLD`: LoRA methods that read or change gradients, as
one
rank of several; `run` is also what one process does."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.methods.ranks import join, leave

STEPS, RATE = 10, 0.02
STAGES = (0, 2, 3)


def trials():
    from peft_service.methods.adalora import AdaLoRA
    from peft_service.methods.dylora import DyLoRA
    from peft_service.methods.increlora import IncreLoRA
    from peft_service.methods.lora import LoRA
    from peft_service.methods.lora_drop import LoRADrop
    from peft_service.methods.lora_fa import LoRAFA
    from tests.methods.checks import Trial

    small = {"rank": 4, "alpha": 8}
    return {
        "adalora": Trial(AdaLoRA(rank=2, initial_rank=4, alpha=8, interval=2, end=0.8), "llama", "causal_lm"),
        "increlora": Trial(
            IncreLoRA(rank=3, max_rank=6, alpha=6, interval=2, end=0.8, score_rows=20), "llama", "causal_lm"
        ),
        "dylora": Trial(DyLoRA(**small), "llama", "causal_lm"),
        "dylora-frozen": Trial(DyLoRA(**small, frozen=True), "llama", "causal_lm"),
        "lora_fa": Trial(LoRAFA(**small), "llama", "causal_lm"),
        "lora_drop": Trial(LoRADrop(**small, sample_rows=8), "t5", "seq2seq_lm"),
        "pissa": Trial(LoRA(**small, init="pissa"), "llama", "causal_lm"),
    }


def run(trial, root: Path, engine=None) -> dict[str, torch.Tensor]:
    """Losses, every gradient of the fourth step as the engine tells it, the method's state, the
    parameters."""
    from tests.methods.checks import Live

    live = Live(trial, root, steps=STEPS, rate=RATE, engine=engine)
    found = {}
    inner = live.attached.before_update

    def before_update(engine, step):
        if step == 3:
            for name in live.engine.parameters:
                found[f"gradient.{name}"] = engine.gradient(name).detach().float().cpu().clone()
        inner(engine, step)

    live.attached.before_update = before_update
    found["losses"] = torch.tensor([live.step(step) for step in range(STEPS)])
    found |= {f"state.{name}": value.clone() for name, value in live.attached.state().items()}
    found |= {f"param.{name}": value.clone() for name, value in live.engine.trainable().items()}
    if hasattr(live.engine, "close"):
        live.engine.close()
    return found


def main(work: Path, root: Path, rank: int, world: int) -> None:
    join(work, rank, world)
    from cluster.engine import ZeroEngine

    for name, trial in trials().items():
        for stage in STAGES:

            def engine(attached, training, stage=stage):
                return ZeroEngine(attached, training, stage=stage, precision="fp32", persistence_threshold=0)

            found = run(trial, root, engine)
            save_file(
                {key: t.contiguous() for key, t in found.items()}, work / f"{name}-{stage}-{rank}.safetensors"
            )
            torch.distributed.barrier()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
