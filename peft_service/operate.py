"""One attempt of an operation on adapters: from manifests in the store to a proven artifact beside them.

As `peft_service.run`, but all of it in one process on the CPU, and there is nothing to resume: an attempt
that dies is followed by one that begins again.
"""

import shutil
from pathlib import Path

from peft_service import adapter, artifact, base_model, gate
from peft_service.errors import GateFailed, InvalidRequest, ObjectNotFound, RunFailed
from peft_service.methods import Case
from peft_service.metrics import MetricsWriter
from peft_service.operations import Work
from peft_service.run import CACHE, Attempt, Outcome, failed, is_registered
from peft_service.spec import OperationSpec
from peft_service.store import Store

OF_THE_ARTIFACT = (
    adapter.WEIGHTS,
    adapter.CONFIG,
    adapter.CARD,
    adapter.SUMS,
    adapter.MANIFEST,
    artifact.TASK,
    artifact.COMPOSITE,
    "delta_config.json",
    "qa_lora_config.json",
    "lorahub.json",
    "config.json",
    "generation_config.json",
)
"""Files of a source that the result has its own of, or none; the others are tokenizer and chat template."""


class OperationInput(Attempt):
    spec: OperationSpec


def operate(run: OperationInput, store: Store, workdir: Path) -> Outcome:
    """Do it, prove what came out in a clean process, and leave the proof beside the staged files.

    What the request itself got wrong, and an error above the user's limit, are a failed outcome.

    Raises:
        Exception: everything else: the attempt has no outcome, and another may follow.
    """
    try:
        return _operated(run, store, workdir)
    except (RunFailed, InvalidRequest) as error:
        return failed(error)


def _operated(run: OperationInput, store: Store, workdir: Path) -> Outcome:
    from safetensors.torch import save_file

    spec = run.spec
    metrics = MetricsWriter(store, run.prefix)
    metrics.phase("loading")
    base = base_model.fetch(spec.base, CACHE.expanduser())
    is_registered(spec.base, base)
    sources = []
    for number, source in enumerate(spec.sources):
        directory = workdir / f"source-{number}"
        try:
            adapter.download(store, source.key, directory)
        except ObjectNotFound as error:
            raise RunFailed(
                f"the adapter {source.reference} was deleted after this job was submitted: {error.message}",
                code="adapter_gone",
            ) from error
        sources.append(directory)
    metrics.phase("operating")
    out = workdir / "out"
    out.mkdir(parents=True)
    done = spec.operation.run(
        Work(
            base=base,
            base_id=spec.base.id,
            revision=spec.base.revision,
            quantize=spec.base.quantize,
            task=spec.task,
            labels=spec.labels,
            sources=tuple(sources),
            out=out,
        )
    )
    for path in sorted(sources[0].iterdir()):
        mine = (
            path.name in OF_THE_ARTIFACT or path.suffix == ".safetensors" or path.name.endswith(".index.json")
        )
        if path.is_file() and not mine:
            shutil.copy(path, out / path.name)
    artifact.write_task(out, spec.task, spec.labels)
    metrics.phase("proving")
    probe = workdir / "probe"
    probe.mkdir()
    told = {f"input.{name}": tensor for name, tensor in done.inputs.items()}
    told |= {f"output.{name}": tensor for name, tensor in done.outputs.items()}
    save_file({name: tensor.contiguous() for name, tensor in told.items()}, probe / "probe.safetensors")
    checks = gate.prove_operation(out, base, probe, Case(task=spec.task, labels=spec.labels))
    files = adapter.files_of(out)
    for file in files:
        store.put_file(f"{run.prefix}/adapter/{file.path}", out / file.path)
    proof = adapter.Proof(checks=checks, files=files, software=adapter.software(), trainable_parameters=0)
    store.put(f"{run.prefix}/adapter.json", proof.model_dump_json(indent=1).encode())
    if bad := [check for check in checks if not check.passed]:
        raise GateFailed(
            "the result is not published: "
            + "; ".join(f"check {check.name} failed: {check.detail}" for check in bad)
        )
    words = ", ".join(f"{name} {value:.3g}" for name, value in sorted(done.facts.items()))
    metrics.message(f"{spec.operation.title}: {words}")
    return Outcome(state="succeeded", metrics=done.facts)
