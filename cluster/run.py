"""The driver of one attempt: `python -m cluster.run --store URL --run PREFIX`, started by a launcher.

Reads `input.json` under the prefix, and writes `outcome.json` last. A crash, a killed worker or a lost node
ends this process without an outcome: then the scheduler starts the next attempt, which goes on from the
newest checkpoint. So there is one retry mechanism, and Ray Train's own is switched off.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from cluster.plan import Plan
from peft_service import gate
from peft_service.errors import InvalidRequest, PeftServiceError, RunFailed, StoreError
from peft_service.metrics import MetricsWriter
from peft_service.operate import OperationInput
from peft_service.run import (
    Attempt,
    Outcome,
    Prepared,
    RunInput,
    WorkResult,
    conclude,
    failed,
    prepare,
    write_outcome,
)
from peft_service.store import Store, open_store, patient

log = logging.getLogger("cluster.run")

LOG_BYTES = 4 * 1024 * 1024
"""Of the log, the last so many bytes are kept in the store."""
COLLECTIVE_SECONDS = 600
"""How long a rank waits in a collective for the others, beside what a store may keep one of them waiting."""

T = TypeVar("T")


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0: there is an outcome (good or bad). Anything else: there is none, try again."""
    parser = argparse.ArgumentParser(prog="python -m cluster.run", description=__doc__)
    parser.add_argument("--store", required=True, help="URL of the store")
    parser.add_argument("--run", required=True, help="prefix of the attempt in the store")
    parser.add_argument("--patience", type=float, default=900, help="seconds to wait for a silent store")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stdout)
    store = patient(open_store(options.store), options.patience)
    if store.info(f"{options.run}/outcome.json") is not None:
        # A second driver of a finished attempt (Ray may restart one) must not touch what is published.
        log.info("%s has its outcome already; nothing to do", options.run)
        return 0
    told = json.loads(store.get(f"{options.run}/input.json"))
    kind = OperationInput if "operation" in told["spec"] else RunInput
    run: OperationInput | RunInput = kind.model_validate(told)
    if run.prefix != options.run:
        raise InvalidRequest(f"input.json under {options.run} is that of {run.prefix}")
    try:
        if isinstance(run, OperationInput):
            outcome = operate(run, options.store, options.patience)
        else:
            outcome = drive(run, store, options.store, options.patience)
        write_outcome(store, run, outcome)
        log.info("outcome: %s", outcome.model_dump_json())
    except Exception:
        log.exception("the attempt ends without an outcome")  # into the log that is kept, before it is kept
        raise
    finally:
        _keep_log(store, run)
    return 0


def drive(run: RunInput, store: Store, store_url: str, patience: float) -> Outcome:
    """Prepare, train on the cluster, prove. What the run itself got wrong becomes a failed outcome.

    Raises:
        Exception: everything else (a lost worker, a store that stays away): the attempt has no outcome.
    """
    with tempfile.TemporaryDirectory(prefix="peft-") as directory:
        workdir = Path(directory)
        try:
            # Reading base and data needs no cluster, connecting to it needs no data. Ray wants the main
            # thread: it sets the signal handlers that take the workers along when this process is ended.
            preparing = _Background(lambda: prepare(run, store, workdir))
            _connect()
            prepared = preparing.result()
            log.info("prepared: %d rows, %d steps", prepared.rows, prepared.steps)
            MetricsWriter(store, run.prefix).phase("gathering workers")
            with _ended(gate.ahead()) as gate_process:
                result = train(run, prepared, store_url, patience, workdir)
                log.info("workers are done: %s after step %d", result.state, result.step)
                return conclude(run, prepared, store, workdir, result, gate_process)
        except Exception as error:
            own = next(_own_errors(error), None)
            if own is None:
                raise
            log.info("the run failed: %s", own.message)
            return failed(own)


def operate(run: OperationInput, store_url: str, patience: float) -> Outcome:
    """Have an operation done where the plan's memory is: this process may be on a small machine.

    Raises:
        Exception: the task was lost: the attempt has no outcome.
    """
    import ray

    from cluster import worker

    _connect()
    plan = Plan.model_validate(run.plan)
    task = ray.remote(worker.operation).options(
        num_cpus=plan.cpus_per_worker, memory=plan.memory.host, max_retries=0
    )
    config = {"run": run.model_dump(mode="json"), "store": store_url, "patience": patience}
    return Outcome.model_validate(ray.get(task.remote(config)))


def train(run: RunInput, prepared: Prepared, store_url: str, patience: float, workdir: Path) -> WorkResult:
    """Run `cluster.worker.main` on all ranks of the plan, as a gang."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from cluster import worker

    plan = Plan.model_validate(run.plan)
    gpu = plan.gpus_per_worker > 0
    resources: dict[str, float] = {"CPU": plan.cpus_per_worker}
    if gpu:
        resources["GPU"] = plan.gpus_per_worker
    trainer = TorchTrainer(
        worker.main,
        train_loop_config={
            "run": run.model_dump(mode="json"),
            "prepared": dataclasses.asdict(prepared),
            "store": store_url,
            "patience": patience,
        },
        torch_config=TorchConfig(
            backend="nccl" if gpu else "gloo", timeout_s=int(COLLECTIVE_SECONDS + patience)
        ),
        scaling_config=ScalingConfig(num_workers=plan.workers, use_gpu=gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name="ray",
            storage_path=str(workdir),
            # Without the second limit a group that cannot start is tried again for ever.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
    )
    return WorkResult(**trainer.fit().return_value)


def _connect() -> None:
    import ray
    import ray.train.torch

    started = time.monotonic()
    # The cluster of RAY_ADDRESS, which a Ray Job has in its environment; started by hand, one of its own.
    ray.init(log_to_driver=True, logging_level=logging.WARNING)
    log.info("connected to the cluster after %.1f s", time.monotonic() - started)


def _own_errors(error: BaseException) -> Iterator[PeftServiceError]:
    """What the run got wrong, found in whatever Ray wrapped around it; nothing for accidents."""
    if isinstance(error, PeftServiceError):
        if isinstance(error, (RunFailed, InvalidRequest)):
            yield error
        return
    inner: list[Any] = [getattr(error, "_base_exc", None), getattr(error, "cause", None), error.__cause__]
    inner += getattr(error, "worker_failures", {}).values()
    for cause in inner:
        if isinstance(cause, BaseException) and cause is not error:
            yield from _own_errors(cause)


@contextlib.contextmanager
def _ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that does not outlive the block; when this one is killed, its stdin closes and it ends."""
    try:
        yield process
    finally:
        process.kill()
        process.wait()


class _Background(Generic[T]):
    """A function on a daemon thread, so that a signal can end this process while it is at work."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._value: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(function,), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[[], T]) -> None:
        try:
            self._value.append(function())
        except BaseException as error:
            self._error = error

    def result(self) -> T:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value[0]


def _keep_log(store: Store, run: Attempt) -> None:
    """Copy the end of our own output, which Ray has put into a file (the workers' is in it), to the store."""
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        if not stat.S_ISREG(os.fstat(1).st_mode):
            return
        with open("/proc/self/fd/1", "rb") as output:
            output.seek(max(0, os.fstat(1).st_size - LOG_BYTES))
            store.put(f"{run.prefix}/log.txt", output.read())
    except (OSError, StoreError) as error:
        log.warning("the log was not kept: %s", error)


if __name__ == "__main__":
    sys.exit(main())
