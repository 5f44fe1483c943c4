"""Packing: lines that are full, rows that never see one another, and the curve of a run without it."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_service.batches import Batch, layout, microbatches
from peft_service.errors import InvalidRequest
from peft_service.objectives.sft import SFT
from peft_service.packing import PACKABLE, balanced, best_fit
from peft_service.tokenised import Tokenised

PAD = 2
CAPACITY = 64


def rows(count: int, seed: int = 0, longest: int = 40, sequences: int = 1) -> Tokenised:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, longest, count * sequences)
    ids = generator.integers(3, 99, int(lengths.sum())).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    mask = (generator.random(len(ids)) < 0.6).astype(np.uint8)
    mask[offsets[:-1]] = 0
    mask[offsets[1:] - 1] = 1
    return Tokenised(ids, mask, offsets, np.arange(count) + 1, sequences=sequences)


def decoder(kind: str):
    """A tiny random decoder of this type, with room for CAPACITY positions."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 99, "max_position_embeddings": 128,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "attention_dropout": 0.0,
    }  # fmt: skip
    if kind == "gpt2":
        common = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 99}
        common |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    if kind in ("gpt_neox", "phi3"):
        common.pop("head_dim")
    config = AutoConfig.for_model(kind, **common)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data.normal_(std=0.3)
    return model.eval()


@given(st.lists(st.integers(1, 100), max_size=60), st.integers(1, 5))
@settings(deadline=None)
def test_every_row_is_in_one_line_that_holds_it(lengths, multiple):
    for bins in (best_fit(lengths, 100), balanced(lengths, 100, multiple)):
        assert sorted(index for bin in bins for index in bin) == list(range(len(lengths)))
        assert all(bins)
        assert all(sum(lengths[index] for index in bin) <= 100 for bin in bins)
    least = -(-sum(lengths) // 100)
    assert len(best_fit(lengths, 100)) <= 11 / 9 * least + 1 or max(lengths) > 50


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 4), st.integers(1, 4), st.booleans()
)
@settings(deadline=None)
def test_a_layout_gives_every_rank_as_many_microbatches_and_all_rows_once(lengths, world, microbatch, packed):
    ranks = [layout(lengths, rank, world, microbatch, CAPACITY if packed else None) for rank in range(world)]
    assert len({len(parts) for parts in ranks}) == 1
    lines = [line for parts in ranks for part in parts for line in part]
    assert sorted(row for line in lines for row in line) == list(range(len(lengths)))
    assert all(len(part) <= microbatch for parts in ranks for part in parts)


def test_lines_are_full_on_lengths_as_they_are():
    """Log-normal lengths, as those of instruction data: median 180 tokens, some of 2,000."""
    generator = random.Random(0)
    lengths = [min(2048, max(8, int(generator.lognormvariate(5.2, 0.8)))) for _ in range(20_000)]
    bins = best_fit(lengths, 2048)
    assert sum(lengths) / (len(bins) * 2048) > 0.99
    # A step at a time, and every line as wide as the widest of its step.
    used = slots = 0
    for start in range(0, len(lengths), 64):
        some = lengths[start : start + 64]
        sizes = [sum(some[index] for index in bin) for bin in balanced(some, 2048, 2)]
        used, slots = used + sum(sizes), slots + len(sizes) * max(sizes)
    assert used / slots > 0.97


@pytest.mark.parametrize("kind", PACKABLE)
def test_no_row_sees_its_neighbour(kind):
    """Other tokens in one row of a line change nothing in the others, to the bit; and a row in a line says
    what it says alone."""
    data, model = rows(6), decoder(kind)
    (batch,) = microbatches(data, range(6), 0, 1, 8, PAD, "cpu", capacity=CAPACITY)
    assert batch.tokens_BT.shape[0] < 6, "nothing is packed: the test is empty"
    with torch.no_grad():
        logits = model(**batch.inputs).logits
        for number in range(6):
            mine_BT = batch.sequence_BT == number
            changed = dataclasses.replace(batch, tokens_BT=batch.tokens_BT.clone())
            changed.tokens_BT[mine_BT] = (changed.tokens_BT[mine_BT] + 17) % 90 + 3
            other = model(**changed.inputs).logits
            assert torch.equal(other[~mine_BT], logits[~mine_BT])
            assert not torch.equal(other[mine_BT], logits[mine_BT])
            row = batch.rows[number]
            alone = model(input_ids=torch.from_numpy(data.row(row)[0].astype(np.int64))[None]).logits[0]
            torch.testing.assert_close(logits[mine_BT], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_loss_and_gradients_are_those_without_packing(world):
    data, model = rows(9, 1), decoder("llama")

    def total(capacity: int | None, microbatch: int) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        loss = 0.0
        for rank in range(world):
            for batch in microbatches(data, range(9), rank, world, microbatch, PAD, "cpu", capacity=capacity):
                nll, _ = SFT().loss_sum(model, batch)
                nll.backward()
                loss += float(nll.detach())
        return loss, torch.cat([p.grad.flatten() for p in model.parameters()])

    loss, gradients = total(None, 9)
    for microbatch in (1, 3):
        packed, others = total(CAPACITY, microbatch)
        assert packed == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(others, gradients, rtol=1e-3, atol=1e-4)


def test_sequences_of_a_pair_stay_together_and_are_numbered_in_turn():
    data = rows(5, 2, longest=20, sequences=2)
    (batch,) = microbatches(data, range(5), 0, 1, 8, PAD, "cpu", capacity=CAPACITY)
    assert int(batch.sequence_BT.max()) == 9
    for place, row in enumerate(batch.rows):
        for part in range(2):
            ids, targets = data.row(row * 2 + part)
            mine_BT = batch.sequence_BT == place * 2 + part
            assert batch.tokens_BT[mine_BT].tolist() == ids.tolist()
            assert (batch.labels_BT[mine_BT] != -100).tolist() == targets.astype(bool).tolist()
            assert batch.positions_BT[mine_BT].tolist() == list(range(len(ids)))


@pytest.mark.parametrize("sequences", [1, 2])
def test_a_rank_without_lines_gets_a_batch_that_teaches_nothing(sequences):
    data = rows(1, 3, sequences=sequences)
    model = decoder("llama")
    (batch,) = microbatches(data, range(1), 1, 2, 1, PAD, "cpu", capacity=CAPACITY)
    assert isinstance(batch, Batch)
    assert int(batch.sequence_BT.max()) == sequences - 1
    loss, _ = SFT().loss_sum(model, batch)
    loss.backward()
    assert float(loss) == 0
    assert all(
        torch.isfinite(p.grad).all() and not p.grad.any() for p in model.parameters() if p.grad is not None
    )


def test_what_cannot_be_packed_is_refused_with_the_reason():
    from peft_service.methods.prompt_tuning import PromptTuning
    from peft_service.methods.tiny_attention import TinyAttention
    from peft_service.packing import admit
    from tests.jobs.rows import spec

    class Shape:
        architecture, model_type = "decoder", "llama"

    packed = spec(training={"packing": True, "learning_rate": 1e-3})
    admit(packed, Shape())
    for change, words in (
        ({"method": PromptTuning(virtual_tokens=4)}, "virtual tokens"),
        ({"method": TinyAttention()}, "look at others"),
    ):
        with pytest.raises(InvalidRequest, match=words) as caught:
            admit(packed.model_copy(update=change), Shape())
        assert caught.value.param == "training.packing"
    Shape.model_type = "opt"
    with pytest.raises(InvalidRequest, match="opt"):
        admit(packed, Shape())
