"""Checkpoints: committed whole or not there; the newest whole one of any attempt is found."""

import json

import pytest
import torch
from safetensors.torch import load_file

from peft_service import checkpoint
from peft_service.store import open_store


@pytest.fixture
def store(tmp_path):
    return open_store(f"file://{tmp_path}/store")


@pytest.fixture
def save(store, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")

    def of(attempt, step):
        state = {"param.w": torch.full((3,), float(step)), "step": torch.tensor(step)}
        told = {"step": step, "trained_tokens": 10 * step, "metrics": {"train_loss": 1 / step}}
        return checkpoint.save(store, f"p/runs/job/{attempt}", state, told, adapter, tmp_path)

    return of


def _latest(store, attempts=9):
    found = checkpoint.latest(store, "p", "job", attempts=attempts)
    return found and (found.attempt, found.step)


def test_what_is_saved_comes_back(store, save, tmp_path):
    key = save(1, 7)
    assert key == "p/runs/job/1/checkpoints/step-00000007"
    found = checkpoint.latest(store, "p", "job", attempts=1)
    assert found.progress == {"step": 7, "trained_tokens": 70, "metrics": {"train_loss": 1 / 7}}
    state = checkpoint.load(store, found, tmp_path)
    assert torch.equal(state["param.w"], torch.full((3,), 7.0))
    assert int(state["step"]) == 7
    path = tmp_path / "x"
    store.download(f"{key}/state.safetensors", path)
    assert load_file(path).keys() == state.keys()


def test_the_newest_of_all_attempts_is_found_and_none_of_later_ones(store, save):
    assert _latest(store) is None
    save(1, 10)
    save(2, 20)
    save(3, 15)
    assert _latest(store) == (2, 20)
    assert _latest(store, attempts=1) == (1, 10)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "adapter/adapter_config.json"])
@pytest.mark.parametrize("damage", ["missing", "shorter", "flipped"])
def test_a_damaged_one_is_passed_over(store, save, name, damage):
    save(1, 10)
    key = save(1, 20)
    data = store.get(f"{key}/{name}")
    if damage == "missing":
        store.delete(f"{key}/{name}")
    else:
        store.put(f"{key}/{name}", data[:-1] if damage == "shorter" else data[:-1] + bytes([data[-1] ^ 1]))
    assert _latest(store) == (1, 10)


@pytest.mark.parametrize("manifest", [None, b"", b"{}", b"[1]", b'{"files": [{"path": "state.json"}]}'])
def test_one_that_was_not_committed_is_passed_over(store, save, manifest):
    save(1, 10)
    key = save(2, 20)
    store.delete(f"{key}/manifest.json")
    if manifest is not None:
        store.put(f"{key}/manifest.json", manifest)
    assert _latest(store) == (1, 10)


class _Dies:
    """A store whose process dies after so many writes and deletions."""

    def __init__(self, store, after):
        self._store, self._left = store, after

    def __getattr__(self, name):
        method = getattr(self._store, name)
        if name not in ("put", "put_file", "delete"):
            return method

        def counted(*args, **kwargs):
            if self._left == 0:
                raise KeyboardInterrupt
            self._left -= 1
            return method(*args, **kwargs)

        return counted


def test_whenever_it_dies_the_newest_committed_one_is_whole(tmp_path):
    """Also while a step is written a second time, and while old ones are removed."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    for after in range(40):
        store = open_store(f"file://{tmp_path}/store-{after}")
        dies = _Dies(store, after)
        committed = []
        try:
            for step in (1, 2, 3, 4, 5):
                state = {"w": torch.tensor([float(step)])}
                checkpoint.save(dies, "p/runs/job/1", state, {"step": step}, adapter, tmp_path)
                committed.append(step)
        except KeyboardInterrupt:
            pass
        found = checkpoint.latest(store, "p", "job", attempts=1)
        # A commit may be done although `save` did not return (it was removing old ones).
        assert (found.step if found else 0) in {max(committed, default=0), max(committed, default=0) + 1}
        if len(committed) == 5:
            break
    else:
        raise AssertionError("it never came to the end")


def test_the_newest_three_are_kept_and_other_attempts_left_alone(store, save):
    save(1, 1)
    for step in (2, 3, 4, 5, 6):
        save(2, step)
    there = {info.key.split("/")[3] + "/" + info.key.split("/")[5] for info in store.list("p/runs/job/")}
    assert there == {"1/step-00000001", *(f"2/step-{step:08d}" for step in (4, 5, 6))}


def test_a_manifest_names_every_file_with_its_size(store, save):
    key = save(1, 1)
    manifest = json.loads(store.get(f"{key}/manifest.json"))
    sizes = {info.key.removeprefix(f"{key}/"): info.size for info in store.list(f"{key}/")}
    assert {f["path"]: f["size"] for f in manifest["files"]} == {
        name: size for name, size in sizes.items() if name != "manifest.json"
    }
