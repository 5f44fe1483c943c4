"""What the base itself says to the training data: the log-probabilities that preferences are compared with.

They are computed once a job, before anything is attached to the base, and kept in the store: so every method
can be trained with them (also one that changes the base's weights), no second model is in memory while
training, and a resumed run compares with the very numbers that the first attempt did.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft_service.store import Store
from peft_service.tokenised import Tokenised

ROWS = 256
"""Rows laid out at one time."""


def of_base(
    model: Any,
    data: Tokenised,
    store: Store,
    key: str,
    *,
    rank: int,
    world: int,
    microbatch: int,
    pad_id: int,
    device: Any,
    collate: dict[str, Any],
) -> Tokenised:
    """`data` with its `reference`: what `model` gives the targets of each sequence. Collective."""
    import numpy as np
    import torch
    from safetensors.numpy import load_file, save_file

    from peft_service import batches
    from peft_service.logps import sequence_logps

    with tempfile.TemporaryDirectory(prefix="peft-reference-") as directory:
        path = Path(directory) / "reference.safetensors"
        if told_by_rank_0(rank == 0 and store.info(key) is None):
            found_S = torch.zeros(data.rows * data.sequences, dtype=torch.float32)
            was_training = model.training
            model.eval()
            with torch.no_grad():
                for start in range(0, data.rows, ROWS):
                    rows = list(range(start, min(start + ROWS, data.rows)))
                    for batch in batches.microbatches(
                        data, rows, rank, world, microbatch, pad_id, device, **collate
                    ):
                        if not batch.rows:
                            continue
                        logp_S, _ = sequence_logps(model, batch)
                        numbers = np.asarray(batch.rows)[:, None] * data.sequences + np.arange(data.sequences)
                        found_S[torch.from_numpy(numbers.ravel())] = logp_S.float().cpu()
            model.train(was_training)
            found_S = _summed(found_S, device)
            if rank == 0:
                save_file({"reference": found_S.numpy()}, path)
                store.put_file(key, path)
            told_by_rank_0(True)
        store.download(key, path)
        return replace(data, reference=load_file(path)["reference"])


def told_by_rank_0(said: bool) -> bool:
    """What rank 0 says, on every rank; also a barrier. Collective."""
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return said
    flag = torch.tensor([float(said)])
    if dist.get_backend() == "nccl":
        flag = flag.cuda()
    dist.broadcast(flag, 0)
    return bool(flag.item())


def _summed(values: Any, device: Any) -> Any:
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return values
    there = values.to(device)
    dist.all_reduce(there)
    return there.cpu()
