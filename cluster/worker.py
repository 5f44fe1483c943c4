"""One rank of a run: what Ray Train starts on every worker."""

import contextlib
import dataclasses
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from cluster.plan import Plan
from peft_service.errors import RunFailed
from peft_service.run import Prepared, RunInput, work
from peft_service.store import open_store, patient

JUDGE_KEY = "PEFT_SERVICE_JUDGE_KEY"
"""Variable of a node's environment with the key for models that judge: Ray shows what a job is told."""


def main(config: dict[str, Any]) -> dict[str, Any]:
    """Do this rank's share of the run; the value of rank 0 goes back to the driver.

    An error ends the whole group at once: the other ranks wait in a collective and would never know.
    Everything comes from `config` and the store, for a worker may be on a machine of its own.
    """
    import ray.train
    import ray.train.torch
    import torch

    from cluster import judge
    from cluster.engine import ZeroEngine, prepare_process
    from peft_service.attached import Attached
    from peft_service.spec import Training

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    run, plan = RunInput.model_validate(config["run"]), Plan.model_validate(config["run"]["plan"])
    context = ray.train.get_context()
    torch.set_num_threads(max(1, int(plan.cpus_per_worker)))
    if not plan.gpus_per_worker:
        # On a machine that also serves the API, a request should not wait for a matrix product.
        os.nice(5)
    device = str(ray.train.torch.get_device()) if plan.gpus_per_worker else "cpu"
    prepare_process()

    def build_engine(attached: Attached, training: Training) -> ZeroEngine:
        return ZeroEngine(
            attached,
            training,
            stage=plan.zero_stage,
            precision=plan.precision,
            offload_optimizer=plan.offload_optimizer,
            offload_parameters=plan.offload_parameters,
            device=device,
        )

    with tempfile.TemporaryDirectory(prefix="peft-") as workdir, _told_what_to_do(plan):
        result = work(
            run,
            Prepared(**config["prepared"]),
            patient(open_store(config["store"]), config["patience"]),
            Path(workdir),
            build_engine,
            rank=context.get_world_rank(),
            world=context.get_world_size(),
            device=device,
            precision=plan.precision,
            microbatch=plan.microbatch,
            gradient_checkpointing=plan.gradient_checkpointing,
            allowed=judge.allowed(run.python_graders, run.judge_url, os.environ.get(JUDGE_KEY)),
        )
    return dataclasses.asdict(result)


def operation(config: dict[str, Any]) -> dict[str, Any]:
    """Do an operation on adapters, as one Ray task; the outcome goes back to the driver."""
    from peft_service.operate import OperationInput, operate

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    store = patient(open_store(config["store"]), config["patience"])
    with tempfile.TemporaryDirectory(prefix="peft-") as workdir:
        run = OperationInput.model_validate(config["run"])
        return operate(run, store, Path(workdir)).model_dump(mode="json")


@contextlib.contextmanager
def _told_what_to_do(plan: Plan) -> Any:
    """Running out of GPU memory happens again on every retry, so it is the run's own failure."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunFailed(
            f"out of GPU memory with {plan.microbatch} rows per microbatch at ZeRO stage {plan.zero_stage} "
            f"on {plan.workers} workers ({error}); set training.microbatch lower, gradient_checkpointing "
            "true, base.quantize nf4, or a shorter max_seq_len",
            code="out_of_memory",
        ) from error
