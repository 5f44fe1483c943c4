"""A plan fits where it says, refuses what no cluster shape can run, and never contradicts itself."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.plan import (
    Capacity,
    Demand,
    Node,
    NodeShape,
    Plan,
    base_bytes,
    fits,
    make_plan,
    most_workers,
    shrink,
)
from peft_service.base_model import ModelShape
from peft_service.errors import DoesNotFit, InvalidRequest
from peft_service.methods.lora import LoRA
from peft_service.spec import Base, Data, DataFile, FineTuneSpec, Resources, Training

GIB = 1024**3


def shape_of(layers: int, hidden: int, vocab: int, ratio: int = 4) -> ModelShape:
    """A Llama-like shape: four square projections and three of the MLP in every layer."""
    square = [(f"layers.{i}.self_attn.{n}_proj", hidden, hidden) for i in range(layers) for n in "qkvo"]
    mlp = [
        (f"layers.{i}.mlp.{name}", out, inner)
        for i in range(layers)
        for name, out, inner in (
            ("gate_proj", ratio * hidden, hidden),
            ("up_proj", ratio * hidden, hidden),
            ("down_proj", hidden, ratio * hidden),
        )
    ]
    linears = tuple(square + mlp)
    parameters = sum(out * inner for _, out, inner in linears) + vocab * hidden + (2 * layers + 1) * hidden
    return ModelShape(
        layers=layers,
        hidden=hidden,
        vocab=vocab,
        linears=linears,
        parameters=parameters,
        bytes=2 * parameters,
        dtype="bfloat16",
        tied=True,
    )


TINY = shape_of(2, 64, 512)
SEVEN_B = shape_of(32, 4096, 32000, ratio=3)
SEVENTY_B = shape_of(80, 8192, 128256, ratio=4)


def spec_of(
    rows: int = 100, quantize: str | None = None, resources: Any = None, **training: Any
) -> FineTuneSpec:
    return FineTuneSpec(
        name="a",
        base=Base.model_validate({"id": "tiny", "uri": "file:///tiny", "quantize": quantize}),
        method=LoRA(),
        data=Data(
            training=DataFile(id="file-1", key="p/files/file-1", sha256="0" * 64, rows=rows, format="chat")
        ),
        training=Training(learning_rate=1e-4, **training),
        resources=Resources(**(resources or {})),
    )


def cpu_nodes(count: int, cpus: float = 2, memory_gib: float = 16) -> Capacity:
    return Capacity(
        nodes=tuple(Node(id=f"n{i}", cpus=cpus, memory_bytes=int(memory_gib * GIB)) for i in range(count))
    )


def gpu_nodes(count: int, gpus: float = 8, gib: float | None = 80) -> Capacity:
    per_gpu = None if gib is None else int(gib * GIB)
    return Capacity(
        nodes=tuple(
            Node(id=f"g{i}", cpus=64, gpus=gpus, memory_bytes=1000 * GIB, gpu_memory_bytes=per_gpu)
            for i in range(count)
        )
    )


# Packing

demands = st.builds(
    Demand,
    workers=st.integers(1, 4),
    cpus=st.sampled_from([0.5, 1.0, 2.0, 3.0]),
    gpus=st.sampled_from([0.0, 0.5, 1.0]),
    memory_bytes=st.integers(0, 8),
)
shapes = st.builds(
    NodeShape,
    cpus=st.sampled_from([1.0, 2.0, 4.0]),
    gpus=st.sampled_from([0.0, 1.0, 2.0]),
    memory_bytes=st.integers(0, 16),
)


def packs(workers: list[tuple[float, float, int]], free: list[list[float]]) -> bool:
    """The oracle: try every worker on every node."""
    if not workers:
        return True
    size, rest = workers[0], workers[1:]
    for node in free:
        if all(have + 1e-9 >= need for have, need in zip(node, size, strict=True)):
            for i, need in enumerate(size):
                node[i] -= need
            if packs(rest, free):
                return True
            for i, need in enumerate(size):
                node[i] += need
    return False


@settings(max_examples=150, deadline=None)
@given(st.lists(demands, min_size=1, max_size=2), st.lists(shapes, max_size=3))
def test_what_is_said_to_fit_can_really_be_placed(wanted: list[Demand], nodes: list[NodeShape]) -> None:
    workers = [(d.gpus, d.cpus, d.memory_bytes) for d in wanted for _ in range(d.workers)]
    possible = packs(workers, [[n.gpus, n.cpus, float(n.memory_bytes)] for n in nodes])
    if fits(wanted, nodes):
        assert possible
    elif len(wanted) == 1:
        assert not possible, "exact for a single gang"


def test_a_gang_fits_as_a_whole_or_not_at_all() -> None:
    two_halves = cpu_nodes(2, cpus=1).nodes
    assert fits([Demand(workers=2, cpus=1, gpus=0, memory_bytes=0)], two_halves)
    assert not fits([Demand(workers=1, cpus=2, gpus=0, memory_bytes=0)], two_halves), (
        "a worker is on one node"
    )
    assert not fits([Demand(workers=3, cpus=1, gpus=0, memory_bytes=0)], two_halves)
    assert most_workers(1, 0, 0, two_halves) == 2
    assert fits([], ())


# Plans


def test_a_tiny_run_takes_one_cpu_worker_in_fp32_and_does_not_shard() -> None:
    plan = make_plan(spec_of(rows=20, batch_size=8, n_epochs=3), TINY, cpu_nodes(1))
    assert (plan.workers, plan.precision, plan.zero_stage, plan.gpus_per_worker) == (1, "fp32", 0, 0)
    assert plan.microbatch * plan.gradient_accumulation >= 8
    assert not plan.gradient_checkpointing
    assert any("steps" in line for line in plan.arithmetic)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_gpus_are_used_where_there_are_any_in_bf16_with_float32_masters() -> None:
    plan = make_plan(spec_of(), SEVEN_B, gpu_nodes(1))
    assert (plan.gpus_per_worker, plan.precision, plan.zero_stage) == (1, "bf16", 1)
    assert plan.memory.device < 80 * GIB


def test_a_base_too_large_for_one_gpu_is_sharded_over_several() -> None:
    plan = make_plan(spec_of(batch_size=16), SEVENTY_B, gpu_nodes(2))
    assert plan.workers > 1
    assert plan.zero_stage == 3
    assert plan.memory.device < 80 * GIB


def test_four_bits_bring_a_large_base_onto_fewer_gpus_with_zero_2() -> None:
    wide = make_plan(spec_of(batch_size=16), SEVENTY_B, gpu_nodes(2))
    narrow = make_plan(spec_of(batch_size=16, quantize="nf4"), SEVENTY_B, gpu_nodes(2))
    assert narrow.workers < wide.workers
    fixed = spec_of(batch_size=16, quantize="nf4", resources={"workers": 4})
    assert make_plan(fixed, SEVENTY_B, gpu_nodes(2)).zero_stage == 2


def test_four_bits_take_about_half_a_byte_a_parameter() -> None:
    packed = sum(out * inner for _, out, inner in SEVEN_B.linears)
    held, state = base_bytes(SEVEN_B, "bf16", "nf4")
    plain, none = base_bytes(SEVEN_B, "bf16", None)
    assert none == 0
    assert plain == 2 * SEVEN_B.parameters
    assert (held + state - 2 * (SEVEN_B.parameters - packed)) / packed == pytest.approx(0.53, abs=0.01)


def test_loading_four_bits_needs_the_whole_base_on_every_gpu_even_at_stage_3() -> None:
    spec = spec_of(quantize="nf4", zero_stage=3, resources={"workers": 8}, max_seq_len=64)
    whole = sum(base_bytes(SEVENTY_B, "bf16", "nf4"))
    assert make_plan(spec, SEVENTY_B, gpu_nodes(1)).memory.device > whole


def test_unknown_gpu_memory_is_not_checked() -> None:
    assert make_plan(spec_of(), SEVENTY_B, gpu_nodes(1, gib=None)).workers == 1


@pytest.mark.parametrize(
    ("training", "resources", "param"),
    [
        ({"precision": "bf16", "zero_stage": 0}, {}, "training.zero_stage"),
        ({"offload_parameters": True, "zero_stage": 2}, {}, "training.offload_parameters"),
        ({"offload_optimizer": True, "zero_stage": 0, "precision": "fp32"}, {}, "training.offload_optimizer"),
        ({}, {"gpus_per_worker": 2}, "resources.gpus_per_worker"),
        ({}, {"gpus_per_worker": 0.5, "workers": 2}, "resources.gpus_per_worker"),
    ],
)
def test_a_contradiction_is_refused_by_name(training: Any, resources: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        make_plan(spec_of(resources=resources, **training), TINY, gpu_nodes(1))
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("resources", "capacity", "param", "largest"),
    [
        ({"workers": 9}, cpu_nodes(2), "resources.workers", {"workers": 4}),
        ({"cpus_per_worker": 3}, cpu_nodes(2), "resources.cpus_per_worker", {"cpus_per_worker": 2}),
        ({"gpus_per_worker": 1}, cpu_nodes(2), "resources.gpus_per_worker", {"gpus_per_worker": 0}),
        ({}, cpu_nodes(2, memory_gib=0.5), "training", {"memory_bytes_per_worker": GIB // 2}),
    ],
)
def test_what_can_never_fit_is_told_the_largest_that_would(
    resources: Any, capacity: Capacity, param: str, largest: dict[str, float]
) -> None:
    with pytest.raises(DoesNotFit) as caught:
        make_plan(spec_of(resources=resources), TINY, capacity)
    assert caught.value.param == param
    for name, value in largest.items():
        assert caught.value.details["largest"][name] == value
        assert f"{value:g}" in caught.value.message or name.startswith(("gpus", "memory"))


def test_the_largest_that_is_named_does_fit() -> None:
    with pytest.raises(DoesNotFit) as caught:
        make_plan(spec_of(resources={"workers": 50}), TINY, cpu_nodes(3))
    workers = caught.value.details["largest"]["workers"]
    assert make_plan(spec_of(resources={"workers": workers}), TINY, cpu_nodes(3)).workers == workers
    with pytest.raises(DoesNotFit):
        make_plan(spec_of(resources={"workers": workers + 1}), TINY, cpu_nodes(3))


def test_a_gpu_that_is_too_small_is_named_with_what_helps() -> None:
    with pytest.raises(DoesNotFit, match="nf4") as caught:
        make_plan(spec_of(), SEVENTY_B, gpu_nodes(1, gpus=1, gib=24))
    assert caught.value.details["largest"]["gpu_memory_bytes"] == 24 * GIB


def test_no_nodes_is_a_refusal_and_no_crash() -> None:
    with pytest.raises(DoesNotFit, match="no nodes"):
        make_plan(spec_of(), TINY, Capacity())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5000),
    batch=st.integers(1, 64),
    workers=st.sampled_from(["auto", 1, 2, 3, 8]),
    microbatch=st.sampled_from(["auto", 1, 3]),
    stage=st.sampled_from(["auto", 1, 2, 3]),
    checkpointing=st.sampled_from(["auto", True, False]),
    quantize=st.sampled_from([None, "nf4"]),
    seq=st.sampled_from([64, 1024]),
    gpu=st.booleans(),
)
def test_every_plan_covers_the_step_obeys_the_user_and_fits(
    rows: int,
    batch: int,
    workers: Any,
    microbatch: Any,
    stage: Any,
    checkpointing: Any,
    quantize: Any,
    seq: int,
    gpu: bool,
) -> None:
    capacity = gpu_nodes(1) if gpu else cpu_nodes(2, cpus=4)
    spec = spec_of(
        rows=rows,
        quantize=quantize,
        resources={"workers": workers},
        batch_size=batch,
        microbatch=microbatch,
        zero_stage=stage,
        gradient_checkpointing=checkpointing,
        max_seq_len=seq,
    )
    plan = make_plan(spec, TINY, capacity)
    assert plan.workers * plan.microbatch * plan.gradient_accumulation >= batch
    assert plan.workers * plan.microbatch * (plan.gradient_accumulation - 1) < batch, "no empty round"
    assert fits([plan.demand], capacity.nodes)
    assert plan.steps >= 1
    assert plan.rows_per_step == batch
    assert workers in ("auto", plan.workers)
    assert stage in ("auto", plan.zero_stage)
    assert checkpointing in ("auto", plan.gradient_checkpointing)
    assert microbatch == "auto" or plan.microbatch <= microbatch


@settings(max_examples=40, deadline=None)
@given(
    stage=st.sampled_from([1, 2, 3]),
    workers=st.sampled_from([2, 4, 8]),
    quantize=st.sampled_from([None, "nf4"]),
)
def test_more_sharding_never_needs_more_memory_for_what_it_shards(
    stage: Any, workers: int, quantize: Any
) -> None:
    def memory(stage: int, workers: int) -> Any:
        spec = spec_of(quantize=quantize, zero_stage=stage, resources={"workers": workers}, max_seq_len=64)
        return make_plan(spec, SEVEN_B, gpu_nodes(1)).memory

    one, many = memory(stage, 1), memory(stage, workers)
    assert many.optimizer == -(-one.optimizer // workers)
    assert many.gradients == (-(-one.gradients // workers) if stage >= 2 else one.gradients)
    assert (many.weights < one.weights) == (stage == 3)


# Elastic


def test_after_a_lost_node_the_run_goes_on_with_the_most_workers_that_fit() -> None:
    spec = spec_of(resources={"workers": 4})
    plan = make_plan(spec, TINY, cpu_nodes(2))
    smaller = shrink(plan, spec, TINY, cpu_nodes(1))
    assert smaller is not None
    assert smaller.workers == 2
    assert (smaller.steps, smaller.rows_per_step) == (plan.steps, plan.rows_per_step), "the same curve"
    assert shrink(plan, spec, TINY, cpu_nodes(2)) == plan, "nothing was lost"
    assert shrink(plan, spec, TINY, Capacity()) is None


def test_a_run_that_is_not_elastic_waits_for_its_node() -> None:
    spec = spec_of(resources={"workers": 4, "elastic": False})
    plan = make_plan(spec, TINY, cpu_nodes(2))
    assert shrink(plan, spec, TINY, cpu_nodes(1)) is None
