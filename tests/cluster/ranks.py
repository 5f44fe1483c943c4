"""One rank of the engine tests, run as `python -m tests.cluster.ranks WORK RANK WORLD`.

Every scenario trains a tiny LoRA for a few steps through `train_step`; rank 0 writes what came out to
WORK/<name>-w<world>.safetensors. All scenarios share one process per rank: importing costs more than they do.
"""

import json
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from peft_service import base_model
from peft_service.attached import Attached
from peft_service.batches import Batch
from peft_service.errors import Diverged
from peft_service.methods import Case, Material
from peft_service.methods.lora import LoRA
from peft_service.objectives.sft import IGNORE, SFT
from peft_service.spec import Training
from peft_service.train import Engine, train_step

STEPS = 4
TRAINING = Training(
    learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.5, n_epochs=1, batch_size=5, max_seq_len=64
)


@dataclass(frozen=True)
class Scenario:
    name: str
    stage: int
    precision: str = "fp32"
    quantize: str | None = None
    microbatch: int = 2
    offload_optimizer: bool = False
    offload_parameters: bool = False
    gradient_checkpointing: bool = False
    resume_from: str | None = None
    """File stem of an earlier scenario's state after half of the steps."""


def rows() -> list[tuple[list[int], list[int]]]:
    """(tokens, labels) of STEPS * batch_size rows of uneven length, each with an uneven share of targets."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for row in range(STEPS * TRAINING.batch_size):
        length = int(torch.randint(4, 20, (), generator=generator))
        tokens = torch.randint(3, 300, (length,), generator=generator).tolist()
        hidden = row % 4 + 1 if row % 5 else length - 1
        made.append((tokens, [IGNORE] * hidden + tokens[hidden:]))
    return made


def microbatches(step: int, rank: int, world: int, microbatch: int) -> list[Batch]:
    """This rank's share of a step; the same number on every rank, filled with rows without targets."""
    size = TRAINING.batch_size
    mine = rows()[step * size : (step + 1) * size][rank::world]
    per_rank = -(-size // world)
    mine += [([2], [IGNORE])] * (per_rank - len(mine))
    made = []
    for start in range(0, per_rank, microbatch):
        part = mine[start : start + microbatch]
        length = max(len(tokens) for tokens, _ in part)
        made.append(
            Batch(
                tokens_BT=torch.tensor([tokens + [2] * (length - len(tokens)) for tokens, _ in part]),
                labels_BT=torch.tensor([labels + [IGNORE] * (length - len(labels)) for _, labels in part]),
                mask_BT=torch.tensor(
                    [[1] * len(tokens) + [0] * (length - len(tokens)) for tokens, _ in part]
                ),
            )
        )
    return made


def attached(base: Path, scenario: Scenario) -> Attached:
    model = base_model.load(base, precision=scenario.precision, quantize=scenario.quantize)
    made = LoRA(rank=4).attach(model, Case(), Material())
    if scenario.gradient_checkpointing:
        made.model.gradient_checkpointing_enable({"use_reentrant": False})
        made.model.enable_input_require_grads()
    made.model.train()
    return made


def run(engine: Engine, scenario: Scenario, work: Path) -> dict[str, torch.Tensor]:
    """loss and norm by step, "adapter.<name>", and the "final." and "half." way states."""
    start = 0
    if scenario.resume_from:
        earlier = load_file(_arrived(work / f"{scenario.resume_from}.safetensors"))
        engine.load_state({k.removeprefix("half."): v for k, v in earlier.items() if k.startswith("half.")})
        start = STEPS // 2
    losses, norms, result = [], [], {}
    for step in range(start, STEPS):
        if step == STEPS // 2:
            result |= {f"half.{name}": value for name, value in engine.state().items()}
        parts = microbatches(step, engine.rank, engine.world, scenario.microbatch)
        done = train_step(engine, SFT(), parts, TRAINING.learning_rate / (step + 1))
        losses.append(done.loss)
        norms.append(done.grad_norm)
    result["loss"], result["norm"] = torch.tensor(losses), torch.tensor(norms)
    result |= {f"adapter.{name}": value for name, value in engine.trainable().items()}
    result |= {f"final.{name}": value for name, value in engine.state().items()}
    return result


def _arrived(path: Path) -> Path:
    """`path`, once the processes that run beside this one have written it."""
    deadline = time.monotonic() + 800
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not come"
        time.sleep(0.05)
    return path


def diverges(engine: Engine) -> str:
    """Put a not-a-number in the way of the gradient only, then of the loss; the weights must not notice."""
    before = engine.trainable()
    parts = microbatches(0, engine.rank, engine.world, 2)
    seen = []

    def poison(module, args, output):
        if engine.rank == engine.world - 1:  # one rank's trouble must stop all of them
            output.register_hook(lambda grad: grad * float("nan"))
        return output

    model = getattr(engine.model, "module", engine.model)
    layer = model.base_model.model.model.layers[0].mlp
    for hook in (poison, lambda module, args, output: output * float("nan")):
        handle = layer.register_forward_hook(hook)
        try:
            train_step(engine, SFT(), parts, 1e-2)
        except Diverged as error:
            seen.append(error.message)
        handle.remove()
    after = engine.trainable()
    assert all(torch.equal(before[name], after[name]) for name in before), "the weights moved"
    return json.dumps(seen)


def moved(engine: Engine, base: Path, scenario: Scenario) -> list[str]:
    """Frozen tensors that are not bit for bit those of a base loaded anew."""
    import deepspeed

    fresh = dict(attached(base, scenario).model.named_parameters())
    changed = []
    for name, parameter in engine.model.module.named_parameters():
        if not parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], enabled=scenario.stage == 3):
                if not torch.equal(
                    parameter.view(-1).view(torch.uint8), fresh[name].view(-1).view(torch.uint8)
                ):
                    changed.append(name)
    return changed


FP32 = [Scenario(f"zero{stage}", stage) for stage in range(4)]
SCENARIOS = [
    *FP32,
    Scenario("at-once-3", 3, microbatch=5),
    Scenario("checkpointing", 3, gradient_checkpointing=True),
    Scenario("offload1", 1, offload_optimizer=True),
    Scenario("offload2", 2, offload_optimizer=True, microbatch=1),
    Scenario("offload3", 3, offload_optimizer=True, offload_parameters=True),
    *[Scenario(f"nf4-{stage}", stage, quantize="nf4") for stage in range(4)],
    *[Scenario(f"bf16-{stage}", stage, precision="bf16") for stage in (1, 2, 3)],
    *[Scenario(f"nf4-bf16-{stage}", stage, precision="bf16", quantize="nf4") for stage in (2, 3)],
]


ALONE = ("zero0", "zero1", "zero2", "zero3", "bf16-3")
"""What one rank runs too; two ranks run everything."""
RESUMED = ("zero0", "zero1", "zero2", "zero3", "offload2", "offload3", "bf16-1", "bf16-2", "nf4-3")


def scenarios(world: int) -> list[Scenario]:
    return [scenario for scenario in SCENARIOS if world > 1 or scenario.name in ALONE]


def resumes(world: int) -> list[Scenario]:
    """RESUMED from their own half-way state, then some from that of another stage and number of ranks."""
    other = 3 - world
    return [
        *[
            replace(scenario, name=f"{scenario.name}-again", resume_from=f"{scenario.name}-w{world}")
            for scenario in scenarios(world)
            if scenario.name in RESUMED
        ],
        Scenario("zero2-to-3", 3, resume_from=f"zero2-w{other}"),
        Scenario("zero3-to-1", 1, resume_from=f"zero3-w{other}"),
        Scenario("zero0-to-2", 2, resume_from=f"zero0-w{other}"),
        Scenario("bf16-3-to-2", 2, precision="bf16", resume_from=f"bf16-3-w{other}"),
    ]


def main(work: Path, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
    }
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{work}/rendezvous-{world}", rank=rank, world_size=world
    )
    from cluster.engine import ZeroEngine, prepare_process

    prepare_process()
    for scenario in [*scenarios(world), *resumes(world)]:
        engine = ZeroEngine(
            attached(work / "base", scenario),
            TRAINING,
            stage=scenario.stage,
            precision=scenario.precision,
            offload_optimizer=scenario.offload_optimizer,
            offload_parameters=scenario.offload_parameters,
            persistence_threshold=0,
        )
        result = run(engine, scenario, work)
        metadata = {"frozen_moved": json.dumps(moved(engine, work / "base", scenario))}
        if not scenario.resume_from:
            metadata["diverged"] = diverges(engine)
        engine.close()
        if rank == 0:
            target = work / f"{scenario.name}-w{world}.safetensors"
            save_file(result, target.with_suffix(".partial"), metadata)
            target.with_suffix(".partial").rename(target)
            sys.stdout.write(f"{scenario.name}\n")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads now and then abort at interpreter exit


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
