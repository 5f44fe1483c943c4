"""Adapter files: peft's own names, whole or not visible, and a gate that says what is wrong with them."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_service import adapter, base_model, gate
from peft_service.errors import GateFailed, ObjectNotFound
from peft_service.methods import Case, Material
from peft_service.methods.lora import LoRA
from peft_service.spec import Base
from peft_service.train import LocalEngine
from tests.peft_service.runs import a_run
from tests.tiny import save_tiny_base

STAGED, TARGET = "p/runs/job/1/adapter", "p/adapters/tiny--llama/small-v0001-abc"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def staged(tmp_path_factory, base):
    """(directory, model, trainable values by name) of an adapter that differs from zero."""
    directory = tmp_path_factory.mktemp("staged")
    run, _ = a_run(directory / "run", base)
    attached = LoRA(rank=4).attach(base_model.load(base, precision="fp32"), Case(), Material())
    engine = LocalEngine(attached, run.spec.training)
    for parameter in engine.parameters.values():
        torch.nn.init.normal_(parameter)
    tokenizer = base_model.load_tokenizer(base)
    adapter.stage(attached, engine.trainable(), tokenizer, directory / "adapter", run.spec.base)
    return directory / "adapter", attached, engine.trainable()


def test_the_weights_are_named_as_peft_names_them(staged, tmp_path):
    directory, attached, trainable = staged
    attached.model.save_pretrained(tmp_path, save_embedding_layers=False)
    theirs, ours = (load_file(path / "adapter_model.safetensors") for path in (tmp_path, directory))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert sum(t.numel() for t in ours.values()) == sum(t.numel() for t in trainable.values())
    assert (directory / "chat_template.jinja").exists()
    assert (directory / "tokenizer.json").exists()


def test_a_tensor_that_was_not_gathered_is_refused(staged, tmp_path, base):
    _, attached, trainable = staged
    tokenizer = base_model.load_tokenizer(base)
    name = sorted(trainable)[3]
    with pytest.raises(GateFailed, match="empty") as caught:
        adapter.stage(
            attached,
            trainable | {name: torch.zeros(0)},
            tokenizer,
            tmp_path / "out",
            Base(id="tiny/llama", uri=f"file://{base}"),
        )
    assert name in caught.value.message


@pytest.fixture
def proven(tmp_path, staged, base):
    """(store, record) with everything that `publish` needs."""
    run, store = a_run(tmp_path, base)
    files = adapter.files_of(staged[0])
    for file in files:
        store.put_file(f"{STAGED}/{file.path}", staged[0] / file.path)
    proof = adapter.Proof(
        checks=(adapter.Check(name="finite", passed=True, detail="all"),),
        files=files,
        software=adapter.software(),
        trainable_parameters=7,
    )
    store.put(f"{STAGED}.json", proof.model_dump_json().encode())
    record = {
        "id": "adapter_1", "project": "p", "name": "small", "version": 1, "model": "ft:x", "job": "job",
        "attempt": 1, "created_at": 1.5, "spec": run.spec.model_dump(mode="json"), "plan": None, "step": 9,
        "trained_tokens": 99, "metrics": {"train_loss": 1.25},
    }  # fmt: skip
    return store, record


def _objects(store, prefix):
    return {info.key.removeprefix(f"{prefix}/"): store.get(info.key) for info in store.list(f"{prefix}/")}


class _Dies:
    """A store whose process dies after so many writes."""

    def __init__(self, store, after):
        self._store, self._left, self.written = store, after, []

    def __getattr__(self, name):
        method = getattr(self._store, name)
        if name not in ("put", "put_file", "copy"):
            return method

        def counted(*args, **kwargs):
            if self._left == 0:
                raise KeyboardInterrupt
            self._left -= 1
            self.written.append(args[1] if name == "copy" else args[0])
            return method(*args, **kwargs)

        return counted


def test_interrupted_anywhere_and_called_again_it_is_published_once_and_whole(proven, tmp_path):
    store, record = proven
    adapter.publish(store, STAGED, TARGET, record)
    wanted = _objects(store, TARGET)
    for after in range(len(wanted)):
        target = f"{TARGET}-{after}"
        with pytest.raises(KeyboardInterrupt):
            adapter.publish(_Dies(store, after), STAGED, target, record)
        with pytest.raises(ObjectNotFound):
            adapter.verify(store, target)  # half an adapter is no adapter
        adapter.publish(store, STAGED, target, record)
        adapter.publish(store, STAGED, target, record)
        adapter.verify(store, target)
        assert _objects(store, target).keys() == wanted.keys()


def test_the_config_follows_the_weights_and_the_manifest_everything(proven):
    store, record = proven
    watched = _Dies(store, 100)
    adapter.publish(watched, STAGED, TARGET, record)
    order = [key.rpartition("/")[2] for key in watched.written]
    assert order.index("adapter_model.safetensors") < order.index("adapter_config.json")
    assert order[-1] == "manifest.json"


def test_the_layout_is_what_servers_and_people_read(proven, tmp_path, base):
    store, record = proven
    manifest = adapter.publish(store, STAGED, TARGET, record)
    objects = _objects(store, TARGET)
    config = json.loads(objects["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["r"]) == ("tiny/llama", 4)
    assert not [
        name for name, data in objects.items() if str(base).encode() in data and name != "manifest.json"
    ]
    assert objects["README.md"].startswith(b"---\nbase_model: ")
    assert manifest["compatibility"]["vllm"]["needs"] == {"max_lora_rank": 8}
    assert {file["path"] for file in manifest["files"]} == objects.keys() - {"manifest.json"}
    for name, data in objects.items():
        (tmp_path / name).write_bytes(data)
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=tmp_path, check=True)


def test_a_byte_that_changed_is_found(proven):
    store, record = proven
    adapter.publish(store, STAGED, TARGET, record)
    key = f"{TARGET}/adapter_model.safetensors"
    data = store.get(key)
    store.put(key, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(GateFailed, match="adapter_model"):
        adapter.verify(store, TARGET)


def test_what_was_not_proven_is_not_published(proven):
    store, record = proven
    store.put(f"{STAGED}/adapter_model.safetensors", b"something else")
    with pytest.raises(GateFailed, match="not the file that the gate checked"):
        adapter.publish(store, STAGED, TARGET, record)
    store.delete(f"{STAGED}.json")
    with pytest.raises(ObjectNotFound):
        adapter.publish(store, STAGED, TARGET, record)
    assert store.info(f"{TARGET}/manifest.json") is None


def test_publishing_does_not_import_torch():
    code = "import sys; from peft_service import adapter; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (lambda t: t.fill_(float("nan")), "finite"),
        (lambda t: t.zero_(), "nonzero"),
    ],
)
def test_the_gate_says_which_check_failed(staged, base, tmp_path, damage, name):
    tensors = load_file(staged[0] / "adapter_model.safetensors")
    for key, tensor in tensors.items():
        if "lora_B" in key:
            damage(tensor)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    checks = gate.checks_of(
        adapter=str(tmp_path), base=str(base), probe=str(tmp_path), precision="fp32", quantize=None,
        format="chat", rows="text", data={"too_long": "error"}, max_seq_len=64, stored=1, case={},
    )  # fmt: skip
    assert next(check.name for check in checks if not check.passed) == name


def test_a_gate_that_was_killed_says_nothing_of_the_adapter(staged, base, tmp_path, monkeypatch):
    run, _ = a_run(tmp_path, base)
    killer = tmp_path / "python"
    killer.write_text(f"#!/bin/sh\nkill -{int(signal.SIGKILL)} $$\n")
    os.chmod(killer, 0o755)
    monkeypatch.setattr(sys, "executable", str(killer))
    with pytest.raises(RuntimeError, match="signal 9"):
        gate.prove(staged[0], base, tmp_path, run.spec, Case(), precision="fp32", stored=1)


def test_the_types_called_peft_s_own_are_those_of_the_installed_peft():
    code = "from peft import PeftType; print(*[kind.value for kind in PeftType])"  # without ours
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert set(told.split()) == adapter._PEFT_TYPES
