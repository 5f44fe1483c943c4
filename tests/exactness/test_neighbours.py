"""Packed rows never see one another, whatever method is on the base: design §7.3.

`tests/peft_service/test_packing.py` shows it of every architecture without a method; this, of every method
that `packing.admit` lets through, after training, when it is far from doing nothing.
"""

import dataclasses

import pytest
import torch

from peft_service import batches
from peft_service.store import FileStore
from tests.exactness.live import PAD, Live, prepare
from tests.exactness.trials import ALL, SFT, Trial, admitted, examples, packs

SOME = ("lora", "dora", "adapter", "ia3", "ssf", "hadamard", "full")
"""In `make test`: one of each way to change a base."""
METHODS = admitted() if ALL else {name: examples()[name] for name in SOME}
TRIALS = [
    Trial(SFT, method, packing=True, name=name) for name, method in METHODS.items() if packs(SFT, method)
]
ALONE = 1e-4
"""How far a row's logits in a line may be from those alone: other shapes, other order of sums."""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("neighbours")
    prepare(directory, TRIALS)
    return directory


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)
def test_no_row_sees_its_neighbour(trial, work):
    live = Live(trial, work, FileStore((work / "store").as_uri()))
    live.fit()
    live.engine.model.eval()

    def logits(batch):
        batch.extra = live.attached.inputs(batch)
        with torch.no_grad():
            return live.engine.model(**batch.inputs).logits

    def of(rows, **collate):
        (batch,) = batches.microbatches(live.data, rows, 0, 1, 16, PAD, "cpu", **collate)
        return batch

    batch = of(range(6), **live.collate)
    assert len(batch.tokens_BT) < 4, "hardly anything is packed: the test is empty"
    said = logits(batch)
    for place, row in enumerate(batch.rows):
        mine_BT = batch.sequence_BT == place
        changed = dataclasses.replace(batch, tokens_BT=batch.tokens_BT.clone())
        changed.tokens_BT[mine_BT] = (changed.tokens_BT[mine_BT] + 17) % 290 + 3
        other = logits(changed)
        assert torch.equal(other[~mine_BT], said[~mine_BT]), f"{trial.name}: others see row {row}"
        assert not torch.equal(other[mine_BT], said[mine_BT])
        alone = logits(of([row]))
        torch.testing.assert_close(said[mine_BT], alone[0], rtol=ALONE, atol=ALONE)
