"""`python -m tests.cluster.rollout_ranks WORK ROOT RANK WORLD`: GRPO on ZeRO, as one rank of several.

`train` is also what one process does.
"""

import json
import sys
import traceback
from pathlib import Path

import numpy as np

from tests.methods.ranks import join, leave

STAGES = (0, 2, 3)
STEPS = 3
CASES = ("lora", "prompt_tuning", "seq2seq")
WANTED = "eaotin"


def train(case: str, root: Path, engine_of=None):
    """(losses and metrics of the steps, the parameters after them)."""
    from peft_service import base_model, rollout
    from peft_service.graders import Allowed, Judge
    from peft_service.graders.string_check import StringCheck
    from peft_service.methods import Case, Material
    from peft_service.methods.lora import LoRA
    from peft_service.methods.prompt_tuning import PromptTuning
    from peft_service.objectives.grpo import GRPO
    from peft_service.spec import Training
    from peft_service.tokenised import Tokenised
    from peft_service.train import LocalEngine, train_step
    from tests.methods import bases

    kind, task = ("t5", "seq2seq_lm") if case == "seq2seq" else ("llama", "causal_lm")
    model = base_model.load(root / kind, precision="fp32", task=task)
    method = PromptTuning(virtual_tokens=3) if case == "prompt_tuning" else LoRA(rank=4)
    attached = method.attach(model, Case(task=task), Material())
    engine = (engine_of or LocalEngine)(attached, Training(learning_rate=0.01))
    generator = np.random.default_rng(0)
    prompts = [generator.integers(10, 90, length).astype(np.int32) for length in (3, 9, 5, 2, 7)]
    ids = np.concatenate(prompts)
    data = Tokenised(
        ids,
        np.zeros(len(ids), np.uint8),
        np.cumsum([0, *map(len, prompts)]).astype(np.int64),
        np.arange(len(prompts)) + 1,
    )
    grader = StringCheck(
        name="s", input="{{sample.output_text}}", reference="{{item.wanted}}", operation="ilike"
    )
    objective = GRPO(grader=grader, group_size=4, max_new_tokens=7, beta=0.05, loss_type="grpo")
    told = []
    with Judge(grader, Allowed()) as judge:
        for step in range(STEPS):
            batches, metrics = rollout.rollout(
                engine, attached, bases.tokenizer(kind), objective, judge, data,
                lambda row: {"wanted": WANTED[row]}, [[0, 1, 2], [3, 4, 1], [2, 0, 3]][step], step,
                seed=5, microbatch=3, pad_id=2 if kind == "llama" else 0,
                start_id=model.config.decoder_start_token_id if kind == "t5" else None,
            )  # fmt: skip
            done = train_step(engine, objective, batches, 0.01, attached, step)
            told.append({"loss": done.loss, "norm": done.grad_norm, "targets": done.target_tokens, **metrics})
    return told, {name: tensor.tolist() for name, tensor in engine.trainable().items()}, engine


def main(work: Path, root: Path, rank: int, world: int) -> None:
    join(work, rank, world)
    from cluster.engine import ZeroEngine

    for case in CASES:
        for stage in STAGES:
            told: object
            try:

                def engine_of(attached, training, stage=stage):
                    return ZeroEngine(
                        attached, training, stage=stage, precision="fp32", persistence_threshold=0
                    )

                steps, parameters, engine = train(case, root, engine_of)
                engine.close()
                told = [steps, parameters]
            except Exception:
                told = traceback.format_exc()
            if rank == 0:
                (work / f"{case}-{stage}.json").write_text(json.dumps(told))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
