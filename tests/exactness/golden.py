"""Losses on record, at full precision; `python -m tests.exactness.golden` writes tests/golden/losses.json.

A change of numerics then shows in the difference of that file, and is a commit of its own with the reason.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from peft_service.store import FileStore
from tests.exactness.live import Live, prepare
from tests.exactness.trials import KINDS, OTHERS, Trial

FILE = Path(__file__).parents[1] / "golden" / "losses.json"
TRIALS = {name: Trial(objective, name=name) for name, objective in (KINDS | OTHERS).items()}
"""LoRA on the tiny LLaMA, float32, torch alone, whole batches."""


def curve(name: str, work: Path) -> dict[str, Any]:
    """What is on record of an objective: by step its loss and gradient norm, and the evaluations' losses."""
    told = Live(TRIALS[name], work, FileStore((work / "golden").as_uri())).fit()
    return {"loss": told.loss, "grad_norm": told.norm, "valid_loss": told.valid}


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        prepare(Path(directory), TRIALS.values())
        found = {name: curve(name, Path(directory)) for name in TRIALS}
    FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
