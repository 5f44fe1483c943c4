"""A run from peft_service alone: input in the store, proven adapter and outcome in the store."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_service import adapter, base_model, checkpoint, train
from peft_service.attached import Attached
from peft_service.run import Outcome, RunInput, conclude, prepare, run_locally, work
from peft_service.spec import Training
from peft_service.tokenise import tokenise
from peft_service.train import LocalEngine
from tests.peft_service.runs import a_run, chat, metrics, put
from tests.tiny import save_tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base):
    """An uninterrupted run: (run, store, outcome). Others compare with it."""
    directory = tmp_path_factory.mktemp("finished")
    run, store = a_run(directory, base)
    return run, store, run_locally(run, store, directory / "work")


def _weights(store, run, tmp_path):
    path = tmp_path / f"weights-{run.job}-{run.attempt}.safetensors"
    store.download(f"{run.prefix}/adapter/adapter_model.safetensors", path)
    return load_file(path)


def test_a_run_learns_and_leaves_everything_in_the_store(finished):
    run, store, outcome = finished
    assert (outcome.state, outcome.step, outcome.error) == ("succeeded", 9, None)
    assert Outcome.model_validate_json(store.get(f"{run.prefix}/outcome.json")) == outcome
    lines = metrics(store, run)
    phases = [line["phase"] for line in lines if line["type"] == "phase"]
    assert phases == ["tokenising", "loading", "training", "exporting", "proving"]
    steps = [line for line in lines if line["type"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, 10))
    assert steps[-1]["train_loss"] < 0.5 * steps[0]["train_loss"]
    assert sum(line["tokens"] for line in steps) == outcome.trained_tokens
    evals = [line for line in lines if line["type"] == "eval"]
    assert [line["step"] for line in evals] == [3, 6, 9]  # at the end of every epoch
    assert evals[-1]["full_valid_loss"] == outcome.metrics["full_valid_loss"] < evals[0]["full_valid_loss"]
    assert [line["step"] for line in lines if line["type"] == "checkpoint"] == [4, 8, 9]
    assert all(line["time"] > 0 for line in lines)


def test_the_published_adapter_loads_in_plain_peft_and_helps_on_held_out_rows(finished, base, tmp_path):
    run, store, outcome = finished
    record = {
        "id": "adapter_1", "project": "p", "name": "small", "version": 1, "model": "ft:tiny--llama:p:small:1",
        "job": run.job, "attempt": 1, "created_at": 1.0, "spec": run.spec.model_dump(mode="json"), 
        "plan": None,
        "step": outcome.step, "trained_tokens": outcome.trained_tokens, "metrics": outcome.metrics,
    }  # fmt: skip
    target = "p/adapters/tiny--llama/small-v0001-1"
    adapter.publish(store, f"{run.prefix}/adapter", target, record)
    adapter.verify(store, target)
    for info in store.list(f"{target}/"):
        store.download(info.key, tmp_path / info.key.rpartition("/")[2])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny/llama"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "held-out.jsonl").write_bytes(chat(5, 100))
    held_out = tokenise(tmp_path / "held-out.jsonl", "chat", tokenizer, 96)

    def loss():
        total = 0.0
        for row in range(held_out.rows):
            ids, mask = (torch.from_numpy(array.astype("int64")) for array in held_out.row(row))
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0, :-1]
            nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            total += float(nll[mask[1:] == 1].sum())
        return total / held_out.target_tokens

    assert loss() == pytest.approx(outcome.metrics["full_valid_loss"], rel=1e-5)
    with model.disable_adapter():
        assert loss() > 1.3 * outcome.metrics["full_valid_loss"]


def test_a_checkpoint_is_an_adapter_that_can_be_used(finished, base, tmp_path):
    run, store, _ = finished
    for info in store.list(f"{run.prefix}/checkpoints/step-00000004/adapter/"):
        store.download(info.key, tmp_path / info.key.rpartition("/")[2])
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path)
    assert str(base) not in (tmp_path / "adapter_config.json").read_text()


class _Killed(BaseException):
    """Not an Exception: nothing in the code may catch it, as nothing catches a kill -9."""


def _work(run, prepared, store, workdir, engine=LocalEngine, microbatch=2):
    workdir.mkdir(exist_ok=True)
    return work(
        run, prepared, store, workdir, engine, rank=0, world=1, device="cpu", precision="fp32",
        microbatch=microbatch, gradient_checkpointing=False,
    )  # fmt: skip


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_killed_run_goes_on_as_if_nothing_had_happened_bit_for_bit(base, tmp_path, dropout):
    first, store = a_run(tmp_path, base, dropout=dropout)
    prepared = prepare(first, store, tmp_path)

    class Dies(LocalEngine):
        def step(self, learning_rate):
            if self.optimizer.state and next(iter(self.optimizer.state.values()))["step"] == 6:
                raise _Killed
            return super().step(learning_rate)

    with pytest.raises(_Killed):
        _work(first, prepared, store, tmp_path / "dies", Dies)
    second = first.model_copy(update={"attempt": 2})
    result = _work(second, prepared, store, tmp_path / "resumes")
    assert (result.state, result.step) == ("succeeded", 9)
    whole = RunInput(job="whole", attempt=1, project="p", spec=first.spec)
    uninterrupted = _work(whole, prepared, store, tmp_path / "whole")
    assert result == uninterrupted  # tokens and metrics too
    assert [line["step"] for line in metrics(store, second) if line["type"] == "step"] == [5, 6, 7, 8, 9]
    one, other = _weights(store, second, tmp_path), _weights(store, whole, tmp_path)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_stop_checkpoints_at_once_and_the_next_attempt_goes_on(base, tmp_path, finished, monkeypatch):
    monkeypatch.setattr(train, "STOP_POLL_SECONDS", 0.0)
    run, store = a_run(tmp_path, base, checkpoint_steps=100)
    store.put(f"{run.prefix}/stop", b"")
    outcome = run_locally(run, store, tmp_path / "one")
    assert (outcome.state, outcome.step) == ("stopped", 1)
    assert checkpoint.latest(store, "p", "job", attempts=1).step == 1
    again = run.model_copy(update={"attempt": 2})
    prepared = prepare(again, store, tmp_path)
    assert _work(again, prepared, store, tmp_path / "two", microbatch=4).state == "succeeded"
    one, other = _weights(store, again, tmp_path), _weights(finished[1], finished[0], tmp_path / "..")
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_an_attempt_that_died_after_training_only_exports_again(base, tmp_path):
    run, store = a_run(tmp_path, base, n_epochs=1)
    prepared = prepare(run, store, tmp_path)
    _work(run, prepared, store, tmp_path / "one")
    second = run.model_copy(update={"attempt": 2})
    assert _work(second, prepared, store, tmp_path / "two").step == 3
    assert not [line for line in metrics(store, second) if line["type"] == "step"]
    one, other = _weights(store, run, tmp_path), _weights(store, second, tmp_path)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_tokenised_data_is_made_once_a_job(base, tmp_path, monkeypatch):
    run, store = a_run(tmp_path, base)
    first = prepare(run, store, tmp_path)
    monkeypatch.setattr("peft_service.tokenise.tokenise", None)  # a second call would fail
    assert prepare(run.model_copy(update={"attempt": 2}), store, tmp_path) == first


def test_qlora_passes_the_gate_on_the_quantised_base(tmp_path):
    base = save_tiny_base(tmp_path / "base", hidden=64)
    run, store = a_run(tmp_path, base, quantize="nf4", n_epochs=1)
    outcome = run_locally(run, store, tmp_path / "work")
    assert outcome.state == "succeeded", outcome.error


def test_bf16_passes_the_gate(base, tmp_path):
    run, store = a_run(tmp_path, base, precision="bf16", n_epochs=1, gradient_checkpointing=True)
    outcome = run_locally(run, store, tmp_path / "work")
    assert outcome.state == "succeeded", outcome.error


def test_what_the_run_itself_has_wrong_is_a_failed_outcome_that_says_what(base, tmp_path):
    run, store = a_run(tmp_path, base)
    changed = run.spec.base.model_copy(update={"digest": "0" * 64})
    absent = run.spec.base.model_copy(update={"uri": "file:///no/such/base"})
    long = run.spec.training.model_copy(update={"max_seq_len": 8})
    cases = {
        "base_changed": {"base": changed},
        "model_not_available": {"base": absent},
        "invalid_training_file": {"training": long},
    }
    for code, update in cases.items():
        wrong = run.model_copy(update={"spec": run.spec.model_copy(update=update), "job": code})
        outcome = run_locally(wrong, store, tmp_path / code)
        assert (outcome.state, outcome.error["code"]) == ("failed", code)
        assert not list(store.list(f"{wrong.prefix}/adapter"))
    registered = base_model.inspect(f"file://{base}").digest
    prepare(
        run.model_copy(
            update={
                "spec": run.spec.model_copy(
                    update={"base": run.spec.base.model_copy(update={"digest": registered})}
                )
            }
        ),
        store,
        tmp_path,
    )


def test_a_run_that_diverges_says_at_which_step_and_lines(base, tmp_path):
    run, store = a_run(tmp_path, base)
    prepared = prepare(run, store, tmp_path)
    poisoned = []

    class Poisoned(LocalEngine):
        def __init__(self, attached: Attached, training: Training) -> None:
            super().__init__(attached, training)
            attached.model.register_forward_hook(self._poison)

        def _poison(self, module, args, output):
            # The third microbatch of training: the first one of step 2, whose microbatches are of two rows.
            if module.training:
                poisoned.append(1)
                if len(poisoned) == 3:
                    output.logits = output.logits * float("nan")
            return output

    with pytest.raises(Exception, match=r"step 2: the loss is nan, in rows from lines \d+, \d+ of") as caught:
        _work(run, prepared, store, tmp_path / "work", Poisoned)
    assert caught.value.code == "loss_not_finite"
    assert len(caught.value.details["lines"]) == 2


def test_an_adapter_that_is_not_what_was_trained_fails_the_gate(finished, tmp_path):
    run, store, _ = finished
    prepared = prepare(run, store, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    store.download(f"{run.prefix}/adapter/adapter_model.safetensors", path)
    copied = RunInput(job="copied", attempt=1, project="p", spec=run.spec)
    for info in list(store.list(f"{run.prefix}/")):
        if "/adapter/" in info.key or info.key.endswith(("probe.safetensors", "staged.json")):
            store.copy(info.key, info.key.replace("/job/1/", "/copied/1/"))
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name] = tensors[name] + 0.5
    from safetensors.torch import save_file

    save_file(tensors, path)
    store.put_file(f"{copied.prefix}/adapter/adapter_model.safetensors", path)
    result = _result_of(finished)
    with pytest.raises(Exception, match="check logits_equal failed") as caught:
        conclude(copied, prepared, store, tmp_path / "gate", result)
    assert caught.value.code == "adapter_invalid"


def _result_of(finished):
    from peft_service.run import WorkResult

    outcome = finished[2]
    return WorkResult("succeeded", outcome.step, outcome.trained_tokens, outcome.metrics)


def test_a_validation_file_with_bad_rows_is_named_as_such(base, tmp_path):
    run, store = a_run(tmp_path, base)
    bad = put(store, "bad", chat(2).replace(b"assistant", b"user"))
    data = run.spec.data.model_copy(update={"validation": bad})
    wrong = run.model_copy(update={"spec": run.spec.model_copy(update={"data": data})})
    outcome = run_locally(wrong, store, tmp_path / "work")
    assert outcome.error["param"] == "validation_file"
