"""The unmodified `openai` client against the real API: what our first users do, and what their retries do."""

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, AzureOpenAI, OpenAI
from openai.types.fine_tuning import DpoMethod, ReinforcementMethod
from openai.types.graders import StringCheckGrader
from sqlalchemy import update

from jobs import queue
from jobs.db import jobs, writing
from tests.jobs.serving import BASE, CHAT, Service, serving

STATUSES = {"validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("service")) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: Service) -> OpenAI:
    client = OpenAI(base_url=service.url, api_key=service.keys["a"], max_retries=0)
    client.post("/base_models", body={"id": BASE, "uri": service.base_uri}, cast_to=object)
    return client


@pytest.fixture(scope="module")
def file(client: OpenAI) -> str:
    return client.files.create(file=("train.jsonl", CHAT), purpose="fine-tune").id


def submit(client: OpenAI, file: str, **options: Any) -> Any:
    return client.fine_tuning.jobs.create(model=BASE, training_file=file, **options)


# ---------------------------------------------------------------------------------------------------- files


def test_a_file_comes_back_as_it_was_sent(client: OpenAI) -> None:
    file = client.files.create(
        file=("t.jsonl", CHAT), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert (file.object, file.status, file.bytes, file.filename) == (
        "file",
        "processed",
        len(CHAT),
        "t.jsonl",
    )
    assert file.expires_at == file.created_at + 3600
    assert client.files.retrieve(file.id) == file
    assert client.files.wait_for_processing(file.id).id == file.id
    assert client.files.content(file.id).read() == CHAT
    deleted = client.files.delete(file.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (file.id, "file", True)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_files_are_listed_in_pages_by_order_and_purpose(service: Service) -> None:
    client = OpenAI(base_url=service.url, api_key=service.keys["b"])
    made = [client.files.create(file=(f"{n}.bin", b"x"), purpose="user_data").id for n in range(5)]
    other = client.files.create(file=("t.jsonl", CHAT), purpose="fine-tune").id
    assert [file.id for file in client.files.list(limit=2, order="asc", purpose="user_data")] == made
    assert [file.id for file in client.files.list(limit=2)] == [other, *reversed(made)]
    page = client.files.list(limit=2)
    assert page.has_more is True
    # A client that deletes what it lists goes on behind a file that is gone.
    listed = []
    for each in client.files.list(limit=2, purpose="user_data"):
        client.files.delete(each.id)
        listed.append(each.id)
    assert listed == made[::-1]


def test_every_bad_line_is_reported_and_nothing_is_stored(service: Service, client: OpenAI) -> None:
    before = service.contents()
    lines = [
        b'{"messages": 1}',
        CHAT.splitlines()[0],
        b"{broken",
        b'{"messages": [{"role": "usr", "content": "x"}]}',
    ]
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(file=("bad.jsonl", b"\n".join(lines * 60)), purpose="fine-tune")
    error = refused.value
    assert (error.code, error.param, error.type) == ("invalid_training_file", "file", "invalid_request_error")
    body: Any = error.body
    assert len(body["errors"]) == 100
    assert body["error_count"] >= 180
    assert {1, 3, 4, 5, 7, 8} <= {problem["line"] for problem in body["errors"]}
    assert set(body["errors"][0]) >= {"line", "path", "code", "message", "hint"}
    assert "statistics" in body
    assert "\n" not in body["message"]
    assert "line 1" in body["message"]
    assert service.contents() == before


def test_chunked_upload_in_three_parts(client: OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "big.jsonl"
    path.write_bytes(CHAT * 3)
    upload = client.uploads.upload_file_chunked(
        file=path, mime_type="text/jsonl", purpose="fine-tune", part_size=len(CHAT) + 1
    )
    assert upload.status == "completed"
    assert upload.file is not None
    assert upload.file.filename == "big.jsonl"
    assert client.files.content(upload.file.id).read() == CHAT * 3
    with pytest.raises(openai.ConflictError):
        client.uploads.complete(upload.id, part_ids=["part_x"])


def test_parts_are_joined_in_the_order_that_complete_names(client: OpenAI) -> None:
    half = len(CHAT) // 2
    upload = client.uploads.create(
        bytes=len(CHAT), filename="a.jsonl", mime_type="text/jsonl", purpose="fine-tune"
    )
    assert (upload.status, upload.expires_at - upload.created_at) == ("pending", 3600)
    second = client.uploads.parts.create(upload.id, data=CHAT[half:])
    first = client.uploads.parts.create(upload.id, data=CHAT[:half])
    assert (first.object, first.upload_id) == ("upload.part", upload.id)
    import hashlib

    with pytest.raises(openai.BadRequestError, match="md5"):
        client.uploads.complete(upload.id, part_ids=[first.id, second.id], md5="0" * 32)
    with pytest.raises(openai.BadRequestError, match="bytes"):
        client.uploads.complete(upload.id, part_ids=[first.id])
    with pytest.raises(openai.BadRequestError) as refused:
        client.uploads.complete(upload.id, part_ids=[second.id, first.id])
    assert refused.value.code == "invalid_training_file"
    done = client.uploads.complete(
        upload.id, part_ids=[first.id, second.id], md5=hashlib.md5(CHAT, usedforsecurity=False).hexdigest()
    )
    assert done.file is not None
    assert client.files.content(done.file.id).read() == CHAT


def test_a_cancelled_upload_leaves_nothing(service: Service, client: OpenAI) -> None:
    objects = service.contents()["store"]
    upload = client.uploads.create(bytes=3, filename="a.bin", mime_type="x/y", purpose="user_data")
    client.uploads.parts.create(upload.id, data=b"abc")
    assert service.contents()["store"] != objects
    assert client.uploads.cancel(upload.id).status == "cancelled"
    assert service.contents()["store"] == objects
    with pytest.raises(openai.ConflictError):
        client.uploads.parts.create(upload.id, data=b"abc")


# ----------------------------------------------------------------------------------------------------- jobs


def test_a_job_from_submit_to_its_adapter(service: Service, client: OpenAI, file: str) -> None:
    job = submit(
        client,
        file,
        suffix="helper",
        seed=7,
        metadata={"team": "a b", "run": "1"},
        validation_file=file,
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": "auto", "batch_size": 4}},
        },
        extra_body={"adapter": {"r": 8}, "resources": {"workers": 2}},
    )
    assert job.object == "fine_tuning.job"
    assert (job.status, job.model, job.training_file, job.validation_file) == ("queued", BASE, file, file)
    assert (job.seed, job.metadata, job.error, job.result_files) == (7, {"team": "a b", "run": "1"}, None, [])
    assert job.hyperparameters.n_epochs == 3
    assert job.hyperparameters.batch_size == 4
    assert job.hyperparameters.learning_rate_multiplier == 1
    assert job.method.supervised.hyperparameters.n_epochs == 3
    assert job.adapter["rank"] == 8
    assert job.plan["workers"] == 2
    assert job.user_provided_suffix == "helper"
    assert job._request_id.startswith("req_")
    raw = json.loads(client.fine_tuning.jobs.with_raw_response.retrieve(job.id).text)
    assert {
        *(
            "id",
            "created_at",
            "error",
            "fine_tuned_model",
            "finished_at",
            "hyperparameters",
            "model",
            "object",
        ),
        *(
            "organization_id",
            "result_files",
            "status",
            "trained_tokens",
            "training_file",
            "validation_file",
            "seed",
        ),
        *("estimated_finish", "integrations", "metadata", "method"),
    } <= raw.keys()

    with pytest.raises(openai.ConflictError, match=job.id):
        client.files.delete(file)
    lease = service.run(job.id)
    progress = {"step": 3, "total_steps": 30, "eta_seconds": 60}
    steps = [
        queue.Event(f"Step {n}/30: training loss=1", type="metrics", data={"step": n}) for n in range(30)
    ]
    reached = [(n, f"a/runs/{job.id}/1/checkpoints/step-{n}", {"train_loss": 1 / n}) for n in (5, 10, 15)]
    queue.report(service.engine, lease, part=1, values={"progress": progress}, news=steps, reached=reached)
    running = client.fine_tuning.jobs.retrieve(job.id)
    assert running.status == "running"
    assert abs(running.estimated_finish - time.time() - 60) < 30

    events = list(client.fine_tuning.jobs.list_events(job.id, limit=4))
    assert [event.message for event in events[:2]] == [
        "Step 29/30: training loss=1",
        "Step 28/30: training loss=1",
    ]
    assert len({event.id for event in events}) == len(events) >= 33
    assert events[0].type == "metrics"
    assert events[-1].message == f"Created fine-tuning job: {job.id}"
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=1))
    assert [each.step_number for each in checkpoints] == [15, 10, 5]
    assert checkpoints[0].fine_tuned_model_checkpoint.endswith(":ckpt-step-15")
    assert checkpoints[0].metrics.step == 15

    adapter = service.succeed(lease)
    done = client.fine_tuning.jobs.retrieve(job.id)
    assert done.status == "succeeded"
    assert done.fine_tuned_model == f"ft:tiny--llama-1:a:helper:{job.id[6:14]}"
    assert done.trained_tokens == 123
    assert done.finished_at >= done.created_at
    assert client.files.content(done.result_files[0]).read() == b"step,train_loss\n1,0.5\n"
    assert checkpoints[0].fine_tuned_model_checkpoint == f"{done.fine_tuned_model}:ckpt-step-15"
    model = client.models.retrieve(done.fine_tuned_model)
    assert (model.id, model.object, model.owned_by) == (done.fine_tuned_model, "model", "a")
    assert {model.id for model in client.models.list()} >= {BASE, done.fine_tuned_model}
    with pytest.raises(openai.ConflictError):
        client.fine_tuning.jobs.cancel(job.id)
    assert client.models.delete(done.fine_tuned_model).deleted is True
    assert [info.key for info in service.store.list(adapter.location)] == []
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(done.fine_tuned_model)


PAIRS = "".join(
    json.dumps(
        {
            "input": {"messages": [{"role": "user", "content": f"{n}?"}]},
            "preferred_output": [{"role": "assistant", "content": f"{n}!"}],
            "non_preferred_output": [{"role": "assistant", "content": "no"}],
        }
    )
    + "\n"
    for n in range(20)
).encode()
PROMPTS = "".join(
    json.dumps({"messages": [{"role": "user", "content": f"{n} + 1?"}], "answer": str(n + 1)}) + "\n"
    for n in range(20)
).encode()


def test_a_dpo_job_of_the_client_s_own_types(client: OpenAI) -> None:
    pairs = client.files.create(file=("pairs.jsonl", PAIRS), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=pairs,
        validation_file=pairs,
        method={
            "type": "dpo",
            "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 2, "batch_size": "auto"}},
        },
    )
    method = job.method
    assert method is not None
    assert (method.type, method.supervised, method.reinforcement) == ("dpo", None, None)
    assert isinstance(method.dpo, DpoMethod)
    assert method.dpo.hyperparameters is not None
    assert (method.dpo.hyperparameters.beta, method.dpo.hyperparameters.n_epochs) == (0.2, 2)
    assert method.dpo.hyperparameters.learning_rate_multiplier == 1
    assert client.fine_tuning.jobs.retrieve(job.id).method == method
    extra: Any = job
    assert extra.objective["kind"] == "dpo"
    assert extra.training["learning_rate"] == pytest.approx(2e-4 * 0.05)
    automatic = client.fine_tuning.jobs.create(
        model=BASE, training_file=pairs, method={"type": "dpo", "dpo": {"hyperparameters": {"beta": "auto"}}}
    )
    assert automatic.method is not None
    assert automatic.method.dpo is not None
    assert automatic.method.dpo.hyperparameters is not None
    assert automatic.method.dpo.hyperparameters.beta == 0.1
    with pytest.raises(openai.BadRequestError, match=r"set method\.type to dpo") as refused:
        client.fine_tuning.jobs.create(model=BASE, training_file=pairs, method={"type": "supervised"})
    assert (refused.value.code, refused.value.param) == ("method_required", "method.type")


def test_a_reinforcement_job_of_the_client_s_own_types(client: OpenAI) -> None:
    prompts = client.files.create(file=("prompts.jsonl", PROMPTS), purpose="fine-tune").id
    grader: Any = {
        "type": "string_check",
        "name": "right",
        "input": "{{sample.output_text}}",
        "operation": "eq",
        "reference": "{{item.answer}}",
    }
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=prompts,
        validation_file=prompts,
        method={
            "type": "reinforcement",
            "reinforcement": {
                "grader": grader,
                "hyperparameters": {"compute_multiplier": 0.5, "eval_samples": 5, "eval_interval": 3},
            },
        },
    )
    method = job.method
    assert method is not None
    assert method.type == "reinforcement"
    assert isinstance(method.reinforcement, ReinforcementMethod)
    assert isinstance(method.reinforcement.grader, StringCheckGrader)
    assert method.reinforcement.grader.reference == "{{item.answer}}"
    numbers = method.reinforcement.hyperparameters
    assert numbers is not None
    assert (numbers.eval_samples, numbers.eval_interval, numbers.reasoning_effort) == (5, 3, "default")
    extra: Any = job
    assert extra.objective["group_size"] == 4
    assert extra.evaluation["grader"] == grader
    assert extra.evaluation["rows"] == 5
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.create(model=BASE, training_file=prompts)
    assert refused.value.param == "method.type"


def test_a_method_that_openai_has_no_name_for_goes_through_its_client(client: OpenAI) -> None:
    rows = b"".join(json.dumps({"text": f"text {n}", "score": n / 2}).encode() + b"\n" for n in range(20))
    file = client.files.create(file=("scores.jsonl", rows), purpose="fine-tune").id
    body: Any = {"method": {"type": "Regression", "regression": {"hyperparameters": {"n_epochs": 1}}}}
    job: Any = client.fine_tuning.jobs.create(model=BASE, training_file=file, extra_body=body)
    assert job.objective["kind"] == "regression"
    assert job.method.type == "supervised"
    assert job.method.supervised.hyperparameters.n_epochs == 1


def test_a_loop_that_knows_only_openai_s_words_ends(service: Service, client: OpenAI, file: str) -> None:
    job = submit(client, file)
    seen = []
    for move in ("run", "pause", "resume", "run", "finish", "none"):
        job = client.fine_tuning.jobs.retrieve(job.id)
        seen.append(job.status)
        if job.status not in ("validating_files", "queued", "running", "paused"):
            break
        if move == "run":
            lease = service.run(job.id)
        elif move == "pause":
            assert client.fine_tuning.jobs.pause(job.id).status == "paused"
            queue.stopped(service.engine, job.id, 1)
        elif move == "resume":
            assert client.fine_tuning.jobs.resume(job.id).status == "queued"
        elif move == "finish":
            with writing(service.engine) as conn:
                queue.finish(
                    conn, lease, "failed", error={"code": "adapter_invalid", "message": "no", "param": None}
                )
    assert seen == ["queued", "running", "paused", "queued", "running", "failed"]
    assert (job.error.code, job.error.message, job.error.param) == ("adapter_invalid", "no", None)


def test_cancel_pause_resume_in_every_state(client: OpenAI, file: str) -> None:
    verbs = client.fine_tuning.jobs
    job = submit(client, file)
    assert job.queue["position"] >= 1
    assert verbs.pause(job.id).status == "paused"
    with pytest.raises(openai.ConflictError, match="paused"):
        verbs.pause(job.id)
    assert verbs.resume(job.id).status == "queued"
    cancelled = verbs.cancel(job.id)
    assert cancelled.status == "cancelled"
    assert cancelled.finished_at is not None
    for verb in (verbs.cancel, verbs.pause, verbs.resume):
        with pytest.raises(openai.ConflictError) as refused:
            verb(job.id)
        assert refused.value.response.headers["x-should-retry"] == "false"


def test_a_conflict_is_not_retried(service: Service, client: OpenAI, file: str) -> None:
    job = submit(client, file)
    client.fine_tuning.jobs.cancel(job.id)
    retrying = OpenAI(base_url=service.url, api_key=service.keys["a"], max_retries=5)
    before = time.monotonic()
    with pytest.raises(openai.ConflictError):
        retrying.fine_tuning.jobs.cancel(job.id)
    assert time.monotonic() - before < 0.5  # the first backoff alone is half a second


def test_pages_of_jobs_never_skip_or_repeat(service: Service, file: str, client: OpenAI) -> None:
    made = [submit(client, file, metadata={"test": "pages", "n": str(n)}).id for n in range(7)]
    with writing(service.engine) as conn:  # ties, as jobs of one second are
        conn.execute(update(jobs).where(jobs.c.id.in_(made)).values(created_at=1.0))
    listed = [job.id for job in client.fine_tuning.jobs.list(limit=3, metadata={"test": "pages"})]
    assert listed == made[::-1]
    both = client.fine_tuning.jobs.list(metadata={"test": "pages", "n": "4"})
    assert [job.id for job in both] == [made[4]]
    assert not list(client.fine_tuning.jobs.list(metadata={"test": "pages", "n": "44"}))
    none = client.fine_tuning.jobs.list(extra_query={"metadata": "null"}, limit=100)
    assert not set(made) & {job.id for job in none}
    page = client.fine_tuning.jobs.list(limit=3, metadata={"test": "pages"})
    newer = submit(client, file, metadata={"test": "pages"}).id
    following = page.get_next_page()  # a job that arrives between two pages shifts nothing
    assert [job.id for job in following.data] == made[::-1][3:6]
    submit(client, file, extra_body={"priority": 90})
    client.fine_tuning.jobs.cancel(made[3])
    for job in client.fine_tuning.jobs.list(limit=12).data:
        assert job.queue == client.fine_tuning.jobs.retrieve(job.id).queue
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.list(after="ftjob-none")
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.list_events(newer, after="ftevent-none")


def test_the_same_body_twice_is_two_jobs_and_a_key_makes_it_one(client: OpenAI, file: str) -> None:
    assert submit(client, file).id != submit(client, file).id
    keyed = {"Idempotency-Key": "once"}
    assert submit(client, file, extra_headers=keyed).id == submit(client, file, extra_headers=keyed).id
    with pytest.raises(openai.ConflictError, match="once"):
        submit(client, file, seed=9, extra_headers=keyed)
    with pytest.raises(openai.BadRequestError):
        submit(client, file, extra_headers={"Idempotency-Key": "x" * 256})


class LosesAnswers:
    """Passes a request on and then answers 500 to the client, twice: the network at its worst."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.left = 2

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not self.left or "/files" in scope["path"]:
            await self.app(scope, receive, send)
            return
        self.left -= 1

        async def swallow(message: Any) -> None:
            pass

        await self.app(scope, receive, swallow)
        await send({"type": "http.response.start", "status": 500, "headers": [(b"retry-after-ms", b"1")]})
        await send({"type": "http.response.body", "body": b""})


def test_a_submit_whose_answers_are_lost_makes_one_job(tmp_path: Path) -> None:
    with serving(tmp_path, wrap=LosesAnswers) as service:
        client = OpenAI(base_url=service.url, api_key=service.keys["a"], max_retries=2)
        file = client.files.create(file=("train.jsonl", CHAT), purpose="fine-tune").id
        job = client.fine_tuning.jobs.create(model=service.base_uri, training_file=file)
        assert [each.id for each in client.fine_tuning.jobs.list()] == [job.id]
        lossy = service.server.config.app
        for verb, status in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")):
            lossy.left = 2
            assert getattr(client.fine_tuning.jobs, verb)(job.id).status == status
        lossy.left = 0
        upload = client.uploads.create(bytes=3, filename="a", mime_type="x/y", purpose="user_data")
        part = client.uploads.parts.create(upload.id, data=b"abc")
        lossy.left = 2
        done = client.uploads.complete(upload.id, part_ids=[part.id])
        assert done.status == "completed"
        assert done.file is not None
        assert len(list(client.files.list())) == 2


def test_async_and_azure_clients(service: Service, client: OpenAI, file: str) -> None:
    async def journey() -> None:
        async with AsyncOpenAI(base_url=service.url, api_key=service.keys["a"]) as client:
            made = await client.files.create(file=("t.jsonl", CHAT), purpose="fine-tune")
            content = await client.files.content(made.id)
            assert content.read() == CHAT
            job = await client.fine_tuning.jobs.create(model=BASE, training_file=made.id)
            assert job.status in STATUSES
            assert (await client.fine_tuning.jobs.cancel(job.id)).status == "cancelled"
            events = [event async for event in client.fine_tuning.jobs.list_events(job.id, limit=1)]
            assert events[0].message == "Fine-tuning job cancelled"
            upload = await client.uploads.upload_file_chunked(
                file=CHAT, filename="c", bytes=len(CHAT), mime_type="x/y", purpose="fine-tune", part_size=2000
            )
            assert upload.status == "completed"

    asyncio.run(journey())
    root = service.url.removesuffix("/v1")
    for options in ({}, {"azure_deployment": "any"}):
        azure = AzureOpenAI(
            azure_endpoint=root,
            api_key=service.keys["a"],
            api_version="2025-04-01-preview",
            max_retries=0,
            **options,
        )
        made = azure.files.create(file=("t.jsonl", CHAT), purpose="fine-tune")
        # Azure's clients write -1 for auto.
        job = azure.fine_tuning.jobs.create(
            model=BASE, training_file=made.id, hyperparameters={"n_epochs": -1, "batch_size": -1}
        )
        assert job.hyperparameters.n_epochs == 3
        assert azure.fine_tuning.jobs.retrieve(job.id).id == job.id
        assert BASE in {model.id for model in azure.models.list()}
        assert azure.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    current = OpenAI(base_url=f"{root}/openai/v1", api_key=service.keys["a"], max_retries=0)
    assert current.files.retrieve(file).id == file


def test_a_base_s_name_with_a_slash_is_found_however_it_is_encoded(client: OpenAI, service: Service) -> None:
    assert client.models.retrieve(BASE).id == BASE  # the client sends %2F
    assert client.get(f"/models/{BASE}", cast_to=object)["id"] == BASE  # type: ignore[index]
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete(BASE)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("ft:x:org/team:x:1:ckpt-step-10")


def test_errors_of_the_client(service: Service, client: OpenAI, file: str) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.fine_tuning.jobs.retrieve("ftjob-none")
    error = missing.value
    assert (error.code, error.type) == ("fine_tune_not_found", "invalid_request_error")
    assert error.request_id is not None
    assert error.request_id.startswith("req_")
    assert str(error).startswith("Error code: 404 - no fine-tuning job 'ftjob-none'")
    for key in ("", "sk-wrong", "sk-\u00fc"):
        with pytest.raises((openai.AuthenticationError, UnicodeEncodeError)):
            OpenAI(base_url=service.url, api_key=key or "-", max_retries=0).models.list()
    with pytest.raises(openai.BadRequestError, match="did you mean tiny/llama-1"):
        client.fine_tuning.jobs.create(model="tiny/lama-1", training_file=file)
    with pytest.raises(openai.BadRequestError, match="supervised"):
        submit(client, file, method={"type": "dpo", "dpo": {"hyperparameters": {"beta": "auto"}}})
    with pytest.raises(openai.BadRequestError, match="integrations"):
        submit(client, file, integrations=[{"type": "wandb", "wandb": {"project": "p"}}])
    with pytest.raises(openai.BadRequestError, match="did you mean 'lora_r'"):
        submit(client, file, extra_body={"hyperparameters": {"lora_rr": 3}})
    with pytest.raises(openai.BadRequestError) as refused:
        submit(client, file, extra_body={"resources": {"workers": 1000}})
    assert refused.value.code == "does_not_fit"
    body: Any = refused.value.body
    assert body["largest"]["workers"] >= 1
    assert "1000 workers" in body["message"]
