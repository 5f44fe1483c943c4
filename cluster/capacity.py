"""Capacity: which nodes the training cluster has, read from its dashboard."""

import json
from typing import Any

from cluster.dashboard import Dashboard
from cluster.plan import Capacity, Node

MIB = 1024**2
GIB = 1024**3


def read(dashboard: Dashboard, largest: str | None = None) -> Capacity:
    """The living nodes, biggest first; or, for a cluster that grows on demand, what it may become.

    Args:
        largest: JSON of `settings.cluster_max`. Ray's autoscaler adds nodes only once something asks for
            them, so such a cluster must be planned for its largest shape, not for what is there now.

    Raises:
        ClusterUnavailable: no answer.
    """
    if largest is not None:
        return parse(largest)
    # Without `limit` Ray returns the first 100 nodes, dead ones included.
    answer = dashboard.json("GET", "/api/v0/nodes?detail=true&limit=10000")
    rows = [row for row in answer["data"]["result"]["result"] if row["state"] == "ALIVE"]
    gpu_memory = _gpu_memory(dashboard) if any(row["resources_total"].get("GPU") for row in rows) else {}
    nodes = [_node(row, gpu_memory.get(row["node_id"])) for row in rows]
    return Capacity(nodes=tuple(sorted(nodes, key=lambda node: (-node.gpus, -node.cpus, node.id))))


def parse(largest: str) -> Capacity:
    """`[{"count": 4, "cpus": 96, "gpus": 8, "memory_gib": 1000, "gpu_memory_gib": 80}]` as a Capacity."""
    nodes = []
    for kind, entry in enumerate(json.loads(largest)):
        per_gpu = entry.get("gpu_memory_gib")
        for index in range(entry.get("count", 1)):
            nodes.append(
                Node(
                    id=f"kind{kind}-{index}",
                    cpus=entry["cpus"],
                    gpus=entry.get("gpus", 0),
                    memory_bytes=int(entry.get("memory_gib", 4 * entry["cpus"]) * GIB),
                    gpu_memory_bytes=None if per_gpu is None else int(per_gpu * GIB),
                )
            )
    return Capacity(nodes=tuple(nodes))


def _node(row: dict[str, Any], gpu_memory_bytes: int | None) -> Node:
    resources = row["resources_total"]
    return Node(
        id=row["node_id"],
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        memory_bytes=int(resources.get("memory", 0)),
        gpu_memory_bytes=gpu_memory_bytes,
    )


def _gpu_memory(dashboard: Dashboard) -> dict[str, int]:
    """Bytes of the smallest GPU of each node, by node id; only the agents' summary knows (in MiB)."""
    answer = dashboard.json("GET", "/nodes?view=summary")
    sizes: dict[str, int] = {}
    for node in answer["data"]["summary"]:
        totals = [gpu["memoryTotal"] for gpu in node.get("gpus") or [] if gpu.get("memoryTotal")]
        if totals:
            sizes[node["raylet"]["nodeId"]] = int(min(totals) * MIB)
    return sizes
