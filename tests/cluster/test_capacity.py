"""The capacity is what a real cluster says, or what the operator promises for one that grows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import capacity
from cluster.dashboard import ClusterUnavailable, Dashboard
from tests.cluster.head import Head


@pytest.mark.ray
def test_a_real_cluster_tells_its_nodes(head: Head) -> None:
    nodes = capacity.read(head.dashboard()).nodes
    assert len(nodes) == 1
    assert (nodes[0].cpus, nodes[0].gpus) == (head.cpus, 0)
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    machine = int(meminfo["MemTotal"].split()[0]) * 1024
    assert 0.2 * machine < nodes[0].memory_bytes <= machine


@pytest.mark.ray
def test_the_gcs_address_leads_to_the_same_dashboard(head: Head) -> None:
    # In a process of its own: Ray reads its authentication once per process.
    code = f"from cluster.dashboard import Dashboard; print(Dashboard({head.gcs!r}).url)"
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(head.token), "PATH": "/usr/bin:/bin"}
    seen = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert seen.stdout.strip() == head.url


@pytest.mark.ray
def test_a_wrong_token_is_told_apart_from_silence(head: Head) -> None:
    for dashboard in (Dashboard(head.url), Dashboard(head.url, lambda: "wrong")):
        with pytest.raises(ClusterUnavailable) as caught:
            capacity.read(dashboard)
        assert caught.value.code == "cluster_denied"
        assert "wrong" not in caught.value.message


def test_silence_is_worth_a_retry() -> None:
    with pytest.raises(ClusterUnavailable) as caught:
        capacity.read(Dashboard("http://127.0.0.1:1"))
    assert caught.value.code == "cluster_unavailable"


def test_a_cluster_that_grows_is_planned_for_its_largest_shape() -> None:
    largest = [{"count": 2, "cpus": 96, "gpus": 8, "memory_gib": 1000, "gpu_memory_gib": 80}, {"cpus": 4}]
    seen = capacity.read(Dashboard("http://127.0.0.1:1"), json.dumps(largest))
    assert (len(seen.nodes), seen.cpus, seen.gpus) == (3, 196, 16)
    assert seen.nodes[0].gpu_memory_bytes == 80 * 1024**3
    assert seen.nodes[2].gpu_memory_bytes is None
