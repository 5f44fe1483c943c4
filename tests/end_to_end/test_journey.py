"""The main path on real parts: an unmodified `openai` client, a real run, plain `peft` in another process."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import openai
import pytest

from jobs import demo_data
from peft_service.shipped import SHIPPED_ID, path
from tests.end_to_end.service import PATIENCE, Service

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

HELD_OUT = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import PeftModel
base_dir, adapter_dir, rows_file = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(adapter_dir)
model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()
def loss(model):
    total = count = 0
    for line in open(rows_file):
        messages = json.loads(line)["messages"]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        assert text.startswith(prompt)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        labels = ids.clone(); labels[:, :start] = -100
        with torch.no_grad():
            n = int((labels[:, 1:] != -100).sum())
            total += float(model(input_ids=ids, labels=labels).loss) * n; count += n
    return total / count
before = loss(model)
after = loss(PeftModel.from_pretrained(model, adapter_dir).eval())
print(json.dumps({"before": before, "after": after}))
"""


def test_openai_client_from_upload_to_a_working_adapter(live: Service, tmp_path: Path) -> None:
    """Issue 2, what must hold 2 and 3: the journey, then vanilla transformers + peft in another process."""
    client = openai.OpenAI(base_url=f"{live.running.url}/v1", api_key=live.running.key)
    rows = "".join(json.dumps(row) + "\n" for row in demo_data.training_rows(3)[:160])
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in demo_data.validation_rows(3)[:24]))
    training = client.files.create(file=("rows.jsonl", rows.encode()), purpose="fine-tune")
    assert client.files.wait_for_processing(training.id).status == "processed"
    validation = client.files.create(file=held_out, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=SHIPPED_ID,
        training_file=training.id,
        validation_file=validation.id,
        suffix="journey",
        seed=3,
        metadata={"team": "tests"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 4, "batch_size": 16}},
        },
        extra_body={
            "adapter": {"kind": "lora", "rank": 8},
            "training": {"learning_rate": demo_data.LEARNING_RATE, "max_seq_len": 256},
        },
    )
    deadline = time.monotonic() + PATIENCE
    # The loop that users have: it knows OpenAI's words only.
    while job.status in ("validating_files", "queued", "running") and time.monotonic() < deadline:
        time.sleep(0.5)
        job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", job.error
    assert job.error is None
    assert job.finished_at
    assert (job.trained_tokens or 0) > 0
    assert job.fine_tuned_model
    assert job.fine_tuned_model.startswith("ft:")

    events = list(client.fine_tuning.jobs.list_events(job.id, limit=7))  # several pages
    assert len({event.id for event in events}) == len(events)
    steps = [event.data["step"] for event in events if event.type == "metrics" and "train_loss" in event.data]
    assert steps == sorted(steps, reverse=True)
    assert set(steps) == set(range(1, 41))
    assert list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert any(model.id == job.fine_tuned_model for model in client.models.list())
    assert client.models.retrieve(job.fine_tuned_model).id == job.fine_tuned_model

    csv = client.files.content(job.result_files[0]).read().decode()
    assert csv.splitlines()[0].startswith(
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    )
    assert len(csv.splitlines()) >= 41
    assert len(client.files.content(job.result_files[1]).read()) > 10_000

    pulled = live.client.pull(job.model_extra["adapter"]["id"], tmp_path / "adapter")
    answer = subprocess.run(
        [sys.executable, "-c", HELD_OUT, str(path()), str(pulled), str(held_out)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    losses = json.loads(answer.splitlines()[-1])
    assert losses["after"] < 0.6 * losses["before"], losses
    with pytest.raises(openai.ConflictError):
        client.fine_tuning.jobs.cancel(job.id)


def test_pause_and_resume_change_nothing(live: Service, training_file: str, tmp_path: Path) -> None:
    """Numerics contract 2, through the service: a paused and resumed run gives the same bytes."""
    whole = live.submit(training_file, steps=24, suffix="whole").id
    cut = live.submit(training_file, steps=24, suffix="cut").id
    live.wait_for_step(cut, 5)
    paused = live.client.pause(cut)
    assert paused.status == "paused"
    assert live.client.job(cut).status == "paused"
    assert live.client.resume(cut).status == "queued"
    one = live.weights(live.succeeded(whole), tmp_path / "whole")
    two = live.weights(live.succeeded(cut), tmp_path / "cut")
    assert (live.client.job(cut).attempt or 0) > 1
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


@pytest.mark.long  # cluster and scheduler suites show the same without a service
def test_two_workers_at_zero_3_train_the_same_adapter(
    live: Service, training_file: str, tmp_path: Path
) -> None:
    """Issue 2, what must hold 4, through the service."""
    one = live.submit(training_file, steps=12, resources={"workers": 1}, training={"zero_stage": 0}).id
    two = live.submit(training_file, steps=12, resources={"workers": 2}, training={"zero_stage": 3}).id
    alone = live.weights(live.succeeded(one), tmp_path / "one")
    sharded = live.weights(live.succeeded(two), tmp_path / "two")
    for name in alone:
        assert sharded[name].size > 0
        np.testing.assert_allclose(sharded[name], alone[name], atol=1e-4, err_msg=name)


@pytest.mark.long  # cluster and scheduler suites show the same without a service
def test_cancel_while_running_leaves_no_adapter(live: Service, training_file: str) -> None:
    job_id = live.submit(training_file, steps=200, suffix="cancelled").id
    live.wait_for_step(job_id, 2)
    assert live.client.cancel(job_id).status == "cancelled"
    deadline = time.monotonic() + 60
    while live.processes("cluster.run", job_id) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not live.processes("cluster.run", job_id)
    assert not [adapter for adapter in live.client.adapters() if adapter.job == job_id]
    assert live.client.job(job_id).status == "cancelled"
