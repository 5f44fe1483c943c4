"""Plan: what the cluster makes of a spec. Workers, ZeRO stage, precision and microbatch, by arithmetic.

Pure and torch-free, so that the API answers a preflight with the very numbers the scheduler will use.
The result of a run does not depend on its plan (design §7.1); its speed and whether it fits do.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from pydantic import Field

from peft_service import methods
from peft_service.base_model import ModelShape
from peft_service.batches import steps_of
from peft_service.errors import DoesNotFit, InvalidRequest
from peft_service.spec import FineTuneSpec, OperationSpec, case_of
from peft_service.variants import Frozen

Precision = Literal["fp32", "bf16"]
BYTES = {"fp32": 4, "bf16": 2}

NF4_BYTES_PER_PARAMETER = 0.5
"""Two values a byte."""
NF4_QUANT_STATE = 0.03
"""Bytes per parameter of the scales (one per 64 values, themselves in 8 bits); every rank holds them all."""
RUNTIME_BYTES = 1_300_000_000
"""A worker process with its libraries, and its share of the driver: 1.1 to 1.6 GB measured per job."""
DEVICE_CONTEXT_BYTES = 1_000_000_000
"""What a GPU's driver and communication buffers take before the first tensor."""
DEVICE_SHARE = 0.92
"""Of a GPU's memory, what can be planned with; the rest is lost to fragmentation."""
MICROBATCH_WISHED = 4
"""Below this many rows a forward pass wastes a device: gradient checkpointing is the better trade."""
MICROBATCH_MOST = 32
"""Rows of a microbatch are padded to its longest: more rows waste more padding than they save."""


class NodeShape(Frozen):
    """What one machine offers."""

    cpus: float = Field(ge=0)
    gpus: float = Field(0, ge=0)
    memory_bytes: int = Field(ge=0)
    gpu_memory_bytes: int | None = None
    """Of each GPU; None: unknown, and then not checked."""


class Node(NodeShape):
    id: str = ""


class Capacity(Frozen):
    """The living nodes of the training cluster, whatever runs on them."""

    nodes: tuple[Node, ...] = ()

    @property
    def cpus(self) -> float:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        return sum(node.gpus for node in self.nodes)


class Demand(Frozen):
    """A gang: so many workers of this size, all at once."""

    workers: int = Field(ge=1)
    cpus: float
    gpus: float
    memory_bytes: int


class Memory(Frozen):
    """Bytes of one worker, at its peak, by what holds them."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    runtime: int
    device: int
    """Needed on the GPU; 0 when training on the CPU."""
    host: int
    """Needed in the node's memory."""


class Plan(Frozen):
    """One way to run a spec on a cluster. Recorded beside the job, shown by a preflight."""

    workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    zero_stage: Literal[0, 1, 2, 3]
    offload_optimizer: bool
    offload_parameters: bool
    precision: Precision
    microbatch: int
    gradient_accumulation: int
    rows_per_step: int
    steps: int
    gradient_checkpointing: bool
    trainable_parameters: int
    memory: Memory
    arithmetic: tuple[str, ...]
    """The same in words, one line a step of the reasoning."""

    @property
    def demand(self) -> Demand:
        return Demand(
            workers=self.workers,
            cpus=self.cpus_per_worker,
            gpus=self.gpus_per_worker,
            memory_bytes=self.memory.host,
        )


def make_plan(spec: FineTuneSpec, shape: ModelShape, capacity: Capacity) -> Plan:
    """The plan on an empty cluster of this capacity with the fewest workers, then the least sharding.

    Raises:
        DoesNotFit: no shape of this cluster can run it; `details["largest"]` is the largest gang that would.
        InvalidRequest: what the user fixed contradicts itself; `param` names the key.
    """
    gpu = _wants_gpu(spec, capacity)
    precision: Precision = "bf16" if gpu else "fp32"
    if spec.training.precision != "auto":
        precision = spec.training.precision
    _check(spec, precision, gpu)
    nearest: Plan | None = None
    for workers in _worker_counts(spec, capacity, gpu):
        for stage in _stages(spec, workers, precision):
            plan = _with(spec, shape, capacity, workers, stage, precision, gpu)
            if _fits_device(plan, capacity) and fits([plan.demand], capacity.nodes):
                return plan
            nearest = plan
    assert nearest is not None
    raise _does_not_fit(spec, nearest, capacity)


def operation_plan(spec: OperationSpec, shape: ModelShape, capacity: Capacity) -> Plan:
    """An operation's plan: one CPU process that holds the base in float32, changed and unchanged.

    Its gate, a process of its own, holds as much.

    Raises:
        DoesNotFit: no node has that much memory.
    """
    weights = 4 * shape.parameters
    host = 2 * RUNTIME_BYTES + 5 * weights
    plan = Plan(
        workers=1,
        cpus_per_worker=max(1.0, spec.resources.cpus_per_worker),
        gpus_per_worker=0,
        zero_stage=0,
        offload_optimizer=False,
        offload_parameters=False,
        precision="fp32",
        microbatch=1,
        gradient_accumulation=1,
        rows_per_step=0,
        steps=0,
        gradient_checkpointing=False,
        trainable_parameters=0,
        memory=Memory(
            weights=weights,
            gradients=0,
            optimizer=0,
            activations=0,
            logits=0,
            runtime=2 * RUNTIME_BYTES,
            device=0,
            host=host,
        ),
        arithmetic=(
            f"{spec.operation.kind}, without training: one process on a CPU",
            f"base: {_count(shape.parameters)} parameters in float32, {_size(weights)}; five times that at "
            f"most, with the process that proves the result: {_size(host)}",
        ),
    )
    if not fits([plan.demand], capacity.nodes):
        there = max(capacity.nodes, key=lambda node: (node.memory_bytes, node.cpus), default=None)
        has = "there is none" if there is None else _shape_in_words(there.cpus, 0, there.memory_bytes)
        raise DoesNotFit(
            f"this operation needs a node with {_shape_in_words(plan.cpus_per_worker, 0, host)}; the one "
            f"with the most memory: {has}",
            param="operation",
            details={"needed": plan.demand.model_dump()},
        )
    return plan


def shrink(plan: Plan, spec: FineTuneSpec, shape: ModelShape, capacity: Capacity) -> Plan | None:
    """The plan with the most workers, at most `plan.workers`, that this (smaller) capacity can run.

    None when not even one worker fits, or when the spec is not elastic and its own plan does not.
    """
    if _fits_device(plan, capacity) and fits([plan.demand], capacity.nodes):
        return plan
    if not spec.resources.elastic:
        return None
    for workers in range(plan.workers - 1, 0, -1):
        resources = spec.resources.model_copy(
            update={"workers": workers, "gpus_per_worker": plan.gpus_per_worker}
        )
        try:
            return make_plan(spec.model_copy(update={"resources": resources}), shape, capacity)
        except DoesNotFit:
            continue
    return None


def fits(demands: Iterable[Demand], nodes: Sequence[NodeShape]) -> bool:
    """Whether all workers of all `demands` have room on `nodes` at the same time (bin packing).

    First fit, largest first: never says yes to what has no room; exact for a single demand. Among several
    of different sizes it may say no to a puzzle that has a solution, and then a job waits a little longer.
    """
    free = [[node.gpus, node.cpus, float(node.memory_bytes)] for node in nodes]
    wanted = sorted(
        ([demand.gpus, demand.cpus, float(demand.memory_bytes)], demand.workers) for demand in demands
    )
    for size, workers in reversed(wanted):
        for node in free:
            placed = min(workers, _copies(node, size))
            for resource, amount in enumerate(size):
                node[resource] -= placed * amount
            workers -= placed
            if not workers:
                break
        if workers:
            return False
    return True


def most_workers(cpus: float, gpus: float, memory_bytes: int, nodes: Sequence[NodeShape]) -> int:
    """How many workers of this size the nodes hold together."""
    size = [gpus, cpus, float(memory_bytes)]
    return sum(_copies([node.gpus, node.cpus, float(node.memory_bytes)], size) for node in nodes)


def _copies(free: Sequence[float], size: Sequence[float]) -> int:
    """How often `size` goes into `free`. A worker that asks for nothing still counts as one of very many."""
    counts = [int((have + 1e-6) // need) for have, need in zip(free, size, strict=True) if need > 0]
    return max(0, min(counts)) if counts else 1_000_000


def _wants_gpu(spec: FineTuneSpec, capacity: Capacity) -> bool:
    wanted = spec.resources.gpus_per_worker
    return any(node.gpus >= 1 for node in capacity.nodes) if wanted == "auto" else wanted > 0


def _check(spec: FineTuneSpec, precision: Precision, gpu: bool) -> None:
    """Refuse what contradicts itself on any cluster."""
    training, resources = spec.training, spec.resources
    stage, can = training.zero_stage, spec.method.can
    if stage != "auto" and stage not in can.zero_stages:
        able = ", ".join(map(str, can.zero_stages))
        raise InvalidRequest(
            f"{spec.method.kind} does not work with ZeRO stage {stage}: "
            f"{can.why.get('zero_stages', 'it is not defined there')}. It works with {able}.",
            code="method_not_applicable",
            param="training.zero_stage",
        )
    if precision == "bf16" and stage == 0:
        raise InvalidRequest(
            "bf16 with ZeRO stage 0 keeps no float32 copy of the weights and drifts from every other stage; "
            "take zero_stage 1 (the same memory on one worker) or precision fp32",
            param="training.zero_stage",
        )
    if training.offload_parameters and stage not in ("auto", 3):
        raise InvalidRequest(
            f"offload_parameters moves ZeRO-3's shards to CPU memory, but zero_stage is {stage}: "
            "set zero_stage 3 or leave it to the plan",
            param="training.offload_parameters",
        )
    if training.offload_optimizer and stage == 0:
        raise InvalidRequest(
            "offload_optimizer needs zero_stage 1, 2 or 3, but it is 0; leave zero_stage to the plan",
            param="training.offload_optimizer",
        )
    if resources.gpus_per_worker != "auto" and resources.gpus_per_worker > 1:
        raise InvalidRequest(
            f"one worker drives one GPU, but gpus_per_worker is {resources.gpus_per_worker:g}; "
            "ask for more workers instead",
            param="resources.gpus_per_worker",
        )
    several = resources.workers != "auto" and resources.workers > 1
    if gpu and several and resources.gpus_per_worker != "auto" and resources.gpus_per_worker < 1:
        raise InvalidRequest(
            f"{resources.workers} workers cannot share GPUs ({resources.gpus_per_worker:g} each): NCCL wants "
            "a GPU for each rank; take gpus_per_worker 1, or one worker",
            param="resources.gpus_per_worker",
        )


def _worker_counts(spec: FineTuneSpec, capacity: Capacity, gpu: bool) -> Iterator[int]:
    if spec.resources.workers != "auto":
        yield spec.resources.workers
        return
    yield 1
    gpus_each = _gpus_each(spec, gpu)
    if not gpu or gpus_each < 1:
        # More CPU workers never make a run fit: each loads the base once before it can be sharded.
        return
    most = most_workers(spec.resources.cpus_per_worker, gpus_each, 0, capacity.nodes)
    workers = 2
    while workers < most:
        yield workers
        workers *= 2
    if most > 1:
        yield most


def _gpus_each(spec: FineTuneSpec, gpu: bool) -> float:
    wanted = spec.resources.gpus_per_worker
    return float(gpu) if wanted == "auto" else wanted


def _stages(spec: FineTuneSpec, workers: int, precision: Precision) -> tuple[Literal[0, 1, 2, 3], ...]:
    """ZeRO stages to try, least sharding first."""
    if spec.training.zero_stage != "auto":
        return (spec.training.zero_stage,)
    wished: tuple[Literal[0, 1, 2, 3], ...] = (0,)
    if spec.training.offload_parameters:
        wished = (3,)
    elif workers > 1:
        wished = (2, 3)
    elif precision == "bf16" or spec.training.offload_optimizer:
        wished = (1,)
    able = spec.method.can.zero_stages
    return tuple(stage for stage in wished if stage in able) or able[-1:]


def _with(
    spec: FineTuneSpec,
    shape: ModelShape,
    capacity: Capacity,
    workers: int,
    stage: Literal[0, 1, 2, 3],
    precision: Precision,
    gpu: bool,
) -> Plan:
    """The plan for this many workers at this stage, with the largest microbatch that fits (or 1)."""
    training = spec.training
    steps = steps_of(spec.data.rows, training)
    rows_per_worker = math.ceil(training.batch_size / workers)
    trainable = methods.trainable(spec.method, shape, case_of(spec, shape))

    def plan_of(microbatch: int, checkpointing: bool) -> Plan:
        memory = _memory(spec, shape, trainable, workers, stage, precision, gpu, microbatch, checkpointing)
        accumulation = math.ceil(rows_per_worker / microbatch)
        return Plan(
            workers=workers,
            cpus_per_worker=spec.resources.cpus_per_worker,
            gpus_per_worker=_gpus_each(spec, gpu),
            zero_stage=stage,
            offload_optimizer=training.offload_optimizer,
            offload_parameters=training.offload_parameters,
            precision=precision,
            microbatch=microbatch,
            gradient_accumulation=accumulation,
            rows_per_step=training.batch_size,
            steps=steps,
            gradient_checkpointing=checkpointing,
            trainable_parameters=trainable,
            memory=memory,
            arithmetic=(),
        )

    checkpointings: tuple[bool, ...] = (False, True)
    if training.gradient_checkpointing != "auto":
        checkpointings = (training.gradient_checkpointing,)
    elif not spec.method.can.gradient_checkpointing:
        checkpointings = (False,)
    best: Plan | None = None
    for checkpointing in checkpointings:
        for microbatch in _microbatches(spec, rows_per_worker):
            plan = plan_of(microbatch, checkpointing)
            if _fits_device(plan, capacity) and fits([plan.demand], capacity.nodes):
                if best is None or plan.microbatch > best.microbatch:
                    best = plan
                break
        if best is not None and best.microbatch >= min(MICROBATCH_WISHED, rows_per_worker):
            break
    if best is None:
        best = plan_of(min(_microbatches(spec, rows_per_worker)), checkpointings[-1])
    return best.model_copy(update={"arithmetic": _arithmetic(spec, shape, best)})


def _microbatches(spec: FineTuneSpec, rows_per_worker: int) -> list[int]:
    """Sizes to try, largest first."""
    if spec.training.microbatch != "auto":
        return [min(spec.training.microbatch, rows_per_worker)]
    sizes = [min(rows_per_worker, MICROBATCH_MOST)]
    while sizes[-1] > 1:
        sizes.append(math.ceil(sizes[-1] / 2))
    return sizes


def _memory(
    spec: FineTuneSpec,
    shape: ModelShape,
    trainable: int,
    workers: int,
    stage: int,
    precision: Precision,
    gpu: bool,
    microbatch: int,
    checkpointing: bool,
) -> Memory:
    """Peak bytes of one worker.

    Optimizer: Adam keeps two float32 moments, and a float32 copy of every trainable parameter where training
    is in bf16: 8 or 12 bytes. ZeRO shards that from stage 1, gradients from 2, parameters from 3.
    """
    training, width = spec.training, BYTES[precision]
    base, quant_state = base_bytes(shape, precision, spec.base.quantize)
    shards = [workers if stage >= least else 1 for least in (3, 2, 1)]
    largest_layer = max((out * inner for _, out, inner in shape.linears), default=0) * width

    # A teacher is whole on every worker: nothing of it trains, so ZeRO does not shard it.
    teacher = spec.teacher_parameters * width
    held = math.ceil((base + trainable * width) / shards[0]) + quant_state + teacher
    # ZeRO-3 gathers the layer at work and the next; and every rank loads the whole base before it is sharded
    # (transformers switches sharded loading off for quantised models; ours is loaded once, then attached).
    at_work = held + (2 * largest_layer if stage == 3 else 0)
    loading = base + quant_state + teacher
    gradients = math.ceil(trainable * width / shards[1])
    optimizer = math.ceil(trainable * (8 if precision == "fp32" else 12) / shards[2])

    # A row of pairs, or with a mismatched partner, is two sequences; a prompt grows by its answer.
    objective = spec.objective
    sequences = 2 if objective.rows in ("pairs", "unpaired") else 1
    answer = int(getattr(objective, "max_new_tokens", 0)) if objective.generates else 0
    tokens = microbatch * sequences * (training.max_seq_len + answer)
    per_token = sum(out + inner for _, out, inner in shape.linears)
    boundary = shape.layers * shape.hidden
    if checkpointing:
        kept = boundary + math.ceil(per_token / max(1, shape.layers))
    else:
        kept = per_token + 4 * boundary
    activations = tokens * kept * width
    logits = tokens * shape.vocab * (width + 4 + 4)

    on_host = (optimizer if training.offload_optimizer else 0) + (held if training.offload_parameters else 0)
    working = at_work + gradients + optimizer + activations + logits
    device = host = 0
    if gpu:
        resident = working - on_host
        quantized_load = loading if spec.base.quantize else 0
        device = DEVICE_CONTEXT_BYTES + max(resident, quantized_load)
        host = RUNTIME_BYTES + max(loading, on_host)
    else:
        host = RUNTIME_BYTES + max(working, loading + trainable * width)
    return Memory(
        weights=held,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        logits=logits,
        runtime=RUNTIME_BYTES,
        device=device,
        host=host,
    )


def base_bytes(shape: ModelShape, precision: Precision, quantize: str | None) -> tuple[int, int]:
    """Bytes of the frozen weights that ZeRO-3 can shard, and of the quantisation state that it cannot.

    NF4 packs the linear layers; embeddings, norms and the output head stay in `precision`.
    """
    packed = shape.packed_in_4_bits if quantize else 0
    plain = max(0, shape.parameters - packed) * BYTES[precision]
    return plain + math.ceil(packed * NF4_BYTES_PER_PARAMETER), math.ceil(packed * NF4_QUANT_STATE)


def _fits_device(plan: Plan, capacity: Capacity) -> bool:
    """Whether the smallest GPU that such a worker could land on is large enough, as far as known."""
    if plan.gpus_per_worker == 0:
        return True
    sizes = [node.gpu_memory_bytes for node in capacity.nodes if node.gpus >= plan.gpus_per_worker]
    known = [size for size in sizes if size is not None]
    return not known or plan.memory.device <= min(known) * DEVICE_SHARE * min(1.0, plan.gpus_per_worker)


def _arithmetic(spec: FineTuneSpec, shape: ModelShape, plan: Plan) -> tuple[str, ...]:
    training, rows, memory = spec.training, spec.data.rows, plan.memory
    epochs = f"{training.n_epochs} epoch{'s' if training.n_epochs > 1 else ''}"
    cap = f", at most {training.max_steps} steps" if training.max_steps else ""
    held = "NF4 and " + plan.precision if spec.base.quantize else plan.precision
    gpu = plan.gpus_per_worker > 0
    share = 100 * plan.trainable_parameters / max(1, shape.parameters)
    lines = [
        f"{rows} rows, {training.batch_size} a step, {epochs}{cap}: {plan.steps} steps",
        f"{plan.workers} worker{'s' if plan.workers > 1 else ''} x {plan.microbatch} rows x "
        f"{plan.gradient_accumulation} accumulated = one step of {training.batch_size} rows",
        f"ZeRO stage {plan.zero_stage} in {plan.precision} on {'GPU' if gpu else 'CPU'}"
        + (", gradient checkpointing" if plan.gradient_checkpointing else "")
        + (", optimizer offloaded to CPU memory" if plan.offload_optimizer else "")
        + (", parameters offloaded to CPU memory" if plan.offload_parameters else ""),
        f"base: {_count(shape.parameters)} parameters in {held}; "
        f"training {_count(plan.trainable_parameters)} ({share:.2g} %) with {spec.method.kind}",
        f"per worker: weights {_size(memory.weights)} + gradients {_size(memory.gradients)} + Adam "
        f"{_size(memory.optimizer)} + activations {_size(memory.activations)} "
        f"+ logits {_size(memory.logits)} at {plan.microbatch} x {training.max_seq_len} tokens",
    ]
    if gpu:
        lines.append(
            f"peak {_size(memory.device)} on each GPU and {_size(memory.host)} of node memory per worker"
        )
    else:
        lines.append(
            f"peak {_size(memory.host)} per worker, {_size(memory.runtime)} of it the process itself"
        )
    if plan.workers > training.batch_size:
        lines.append(
            f"{plan.workers - training.batch_size} workers get no row in a step of {training.batch_size}: "
            "they only hold shards"
        )
    return tuple(lines)


def _does_not_fit(spec: FineTuneSpec, plan: Plan, capacity: Capacity) -> DoesNotFit:
    needed = plan.demand.model_dump() | {"gpu_memory_bytes": plan.memory.device}
    nodes = capacity.nodes
    each = _shape_in_words(plan.cpus_per_worker, plan.gpus_per_worker, plan.memory.host)
    asked = f"{plan.workers} worker{'s' if plan.workers > 1 else ''} with {each} each"
    most = most_workers(plan.cpus_per_worker, plan.gpus_per_worker, plan.memory.host, nodes)
    roomiest = max(nodes, key=lambda node: (node.gpus, node.cpus, node.memory_bytes), default=None)
    largest: dict[str, float | None] | None = None
    param = "resources"
    if roomiest is None:
        said = f"this run needs {asked}, but the cluster has no nodes"
    elif not _fits_device(plan, capacity):
        sizes = [node.gpu_memory_bytes for node in nodes if node.gpus > 0 and node.gpu_memory_bytes]
        largest = {
            "workers": most_workers(plan.cpus_per_worker, plan.gpus_per_worker, 0, nodes),
            "gpu_memory_bytes": min(sizes),
        }
        param = "training"
        said = (
            f"this run needs {_size(plan.memory.device)} on each of {plan.workers} GPUs, but they have "
            f"{_size(min(sizes))}; a shorter max_seq_len, base.quantize nf4, "
            "offload or more workers make it smaller"
        )
    elif most:
        largest = {
            "workers": most,
            "cpus_per_worker": plan.cpus_per_worker,
            "gpus_per_worker": plan.gpus_per_worker,
        }
        param = "resources.workers"
        said = f"this run needs {asked}, but the whole cluster has room for {most} such"
    else:
        largest = {
            "workers": 1,
            "cpus_per_worker": roomiest.cpus,
            "gpus_per_worker": min(1.0, roomiest.gpus),
            "memory_bytes_per_worker": roomiest.memory_bytes,
        }
        if plan.cpus_per_worker > roomiest.cpus:
            param = "resources.cpus_per_worker"
        elif plan.gpus_per_worker > roomiest.gpus:
            param = "resources.gpus_per_worker"
        else:
            param = "training"
        have = _shape_in_words(roomiest.cpus, roomiest.gpus, roomiest.memory_bytes)
        said = f"this run needs {asked}, but the largest node has {have}"
    return DoesNotFit(said, param=param, details={"needed": needed, "largest": largest})


def _shape_in_words(cpus: float, gpus: float, memory_bytes: int) -> str:
    parts = [f"{cpus:g} CPU{'' if cpus == 1 else 's'}"]
    if gpus:
        parts.append(f"{gpus:g} GPU{'' if gpus == 1 else 's'}")
    return ", ".join([*parts, f"{_size(memory_bytes)} memory"])


def _size(amount: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} TB"


def _count(amount: float) -> str:
    for unit in ("", " k", " M"):
        if amount < 1000:
            return f"{amount:.3g}{unit}"
        amount /= 1000
    return f"{amount:.3g} G"
