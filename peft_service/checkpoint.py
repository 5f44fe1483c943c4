"""Checkpoints in the store: what any engine on any number of ranks can go on from.

`<run>/checkpoints/step-00000010/` holds `state.safetensors` (Engine.state: full-size float32 parameters
and Adam moments by parameter name, and what the method keeps besides), `state.json` (step, tokens, metrics),
`adapter/` (the same weights as an artifact) and, written last, `manifest.json` with the sha256 of each:
without one that holds, it is not there.
There is no generator state: the loop seeds every step from (seed, step, rank).
"""

import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_service.errors import ObjectNotFound
from peft_service.store import Store

if TYPE_CHECKING:
    from torch import Tensor

KEEP = 3
_MANIFEST = re.compile(r"/checkpoints/step-(\d{8})/manifest\.json$")


@dataclass(frozen=True)
class Checkpoint:
    """A committed one whose files are whole."""

    key: str
    """Prefix in the store, without a slash at the end."""
    attempt: int
    step: int
    progress: dict[str, Any]
    """What `save` was given."""


def key_of(run_prefix: str, step: int) -> str:
    return f"{run_prefix}/checkpoints/step-{step:08d}"


def save(
    store: Store,
    run_prefix: str,
    state: "Mapping[str, Tensor]",
    progress: Mapping[str, Any],
    adapter: Path,
    workdir: Path,
    *,
    best: int | None = None,
) -> str:
    """Commit a checkpoint and remove all but the newest three of this attempt and that of step `best`;
    returns its key.

    `progress` needs "step"; `adapter` is a directory with the artifact of now. One rank calls this.
    """
    from safetensors.torch import save_file

    step = int(progress["step"])
    key = key_of(run_prefix, step)
    weights = workdir / "state.safetensors"
    save_file(dict(state), weights)
    described = workdir / "state.json"
    described.write_text(json.dumps(dict(progress), indent=1, sort_keys=True))
    files = {"state.safetensors": weights, "state.json": described}
    found = sorted(path for path in adapter.rglob("*") if path.is_file())
    files |= {f"adapter/{path.relative_to(adapter).as_posix()}": path for path in found}
    store.delete(f"{key}/manifest.json")  # a step that is written again is not there while it is
    listed = []
    for name, path in files.items():
        store.put_file(f"{key}/{name}", path)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        listed.append({"path": name, "size": path.stat().st_size, "sha256": sha256})
    manifest = {"step": step, "created_at": time.time(), "progress": dict(progress), "files": listed}
    store.put(f"{key}/manifest.json", json.dumps(manifest, indent=1).encode())
    weights.unlink()
    for old in _committed(store, run_prefix)[KEEP:]:
        if old == best:
            continue
        _remove(store, key_of(run_prefix, old))
    return key


def latest(store: Store, project: str, job: str, *, attempts: int) -> Checkpoint | None:
    """The newest whole checkpoint of attempts 1 to `attempts`; uncommitted and damaged ones are passed
    over."""
    found = [
        (step, attempt)
        for attempt in range(1, attempts + 1)
        for step in _committed(store, f"{project}/runs/{job}/{attempt}")
    ]
    for step, attempt in sorted(found, reverse=True):
        checkpoint = open_at(store, project, job, attempt, step)
        if checkpoint is not None:
            return checkpoint
    return None


def open_at(store: Store, project: str, job: str, attempt: int, step: int) -> Checkpoint | None:
    """The checkpoint of that attempt and step, or None if it is not whole. Reads all of its bytes."""
    key = key_of(f"{project}/runs/{job}/{attempt}", step)
    try:
        manifest = json.loads(store.get(f"{key}/manifest.json"))
        for file in manifest["files"]:
            sha = hashlib.sha256()
            for chunk in store.read(f"{key}/{file['path']}"):
                sha.update(chunk)
            if sha.hexdigest() != file["sha256"]:
                return None
        return Checkpoint(key, attempt, step, dict(manifest["progress"]))
    except (ObjectNotFound, ValueError, KeyError, TypeError):
        return None


def load(store: Store, checkpoint: Checkpoint, workdir: Path) -> "dict[str, Tensor]":
    """The tensors that `save` was given."""
    from safetensors.torch import load_file

    path = workdir / "resume.safetensors"
    store.download(f"{checkpoint.key}/state.safetensors", path)
    tensors: dict[str, Tensor] = load_file(path)
    path.unlink()
    return tensors


def _committed(store: Store, run_prefix: str) -> list[int]:
    """Steps that have a manifest, newest first."""
    keys = (info.key for info in store.list(f"{run_prefix}/checkpoints/"))
    return sorted((int(found.group(1)) for key in keys if (found := _MANIFEST.search(key))), reverse=True)


def _remove(store: Store, key: str) -> None:
    store.delete(f"{key}/manifest.json")  # first, so that half of it is nothing
    for info in list(store.list(f"{key}/")):
        store.delete(info.key)
