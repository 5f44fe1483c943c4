"""The command line, against the real API: output, exit codes, and what it imports."""

import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner, Result

from jobs import queue
from jobs.cli import app
from jobs.client import Client, Event, Job, Update
from jobs.watch import History, follow, plot, sparkline
from tests.jobs.service import BASE, Service, publish, rows, serving

COMMANDS = (
    "up down demo models files plan submit jobs watch logs cancel pause resume adapters operate pull keys "
    "serve-config migrate preview"
)
HEAVY = {"torch", "transformers", "peft", "ray", "deepspeed", "fastapi", "sqlalchemy", "boto3", "numpy"}

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("service")) as running:
        yield running


@pytest.fixture
def run(service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.setenv("PEFT_SERVICE_URL", service.url)
    monkeypatch.setenv("PEFT_SERVICE_API_KEY", service.key)
    monkeypatch.setenv("PEFT_SERVICE_DATA_DIR", str(service.settings.data_dir))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_bytes(rows(12))

    def invoke(*arguments: str, code: int = 0) -> Result:
        result = CliRunner().invoke(app, [*arguments])
        assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
        assert "Traceback" not in result.output
        return result

    return invoke


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with service.client() as made:
        yield made


def finish(service: Service, job: str, state: str) -> None:
    """What the scheduler does at a job's end."""
    lease = queue.claim(service.engine, job, "test", 60)
    assert lease is not None
    values: dict[str, Any] = {"error": {"code": "loss_not_finite", "message": "the loss was nan at step 3"}}
    if state == "succeeded":
        values = {"adapter_id": "adapter_1", "adapter_version": 1, "fine_tuned_model": "ft:a:b:c:1"}
    with queue.writing(service.engine) as conn:
        queue.finish(conn, lease, state, **values)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------- journey


def test_every_command_of_the_design_is_there() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert set(commands) == set(COMMANDS.split())


def test_every_command_has_json_and_a_help_of_one_sentence_or_more() -> None:
    def leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
        yield name, command
        for below, inner in getattr(command, "commands", {}).items():
            yield from leaves(inner, f"{name} {below}")

    for name, command in leaves(get_command(app), "peft-service"):
        assert command.help, name
        if name != "peft-service":
            assert "--json" in {option for given in command.params for option in given.opts}, name


def test_submit_shows_the_job_and_lists_it(run: Run, client: Client) -> None:
    options = "--name sums --rank 4 --epochs 2 --learning-rate 0.001 --metadata team=a"
    warm_up = ("--set", "training.warmup_ratio=0.2")
    made = run("submit", "train.jsonl", "--model", BASE, *options.split(), *warm_up)
    job = client.job(made.stdout.strip())
    assert job.hyperparameters is not None
    assert (job.name, job.hyperparameters["n_epochs"], job.metadata) == ("sums", 2, {"team": "a"})
    assert job.adapter is not None
    assert job.adapter["rank"] == 4
    assert job.training["warmup_ratio"] == 0.2  # type: ignore[attr-defined]
    assert job.id in run("jobs").stdout
    listed = json.loads(run("jobs", "--json", "--metadata", "team=a").stdout)
    assert [found["id"] for found in listed] == [job.id]
    assert json.loads(run("jobs", job.id, "--json").stdout)["id"] == job.id
    assert "sums" in run("jobs", job.id).stdout
    for verb, state in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")):
        assert json.loads(run(verb, job.id, "--json").stdout)["status"] == state
    assert job.id in run("cancel", job.id, code=2).stderr


def test_a_request_from_a_file_with_an_option_over_it(run: Run, tmp_path: Path, client: Client) -> None:
    (tmp_path / "request.json").write_text(
        json.dumps({"model": BASE, "seed": 5, "training": {"batch_size": 2}})
    )
    file = run("files", "upload", "train.jsonl").stdout.strip()
    made = json.loads(run("submit", file, "--request", "request.json", "--seed", "6", "--json").stdout)
    assert (made["training_file"], made["seed"]) == (file, 6)
    assert made["hyperparameters"]["batch_size"] == 2
    client.cancel(made["id"])


def test_plan_says_what_would_be_and_starts_nothing(run: Run, client: Client) -> None:
    before = [job.id for job in client.jobs()]
    shown = run("plan", "train.jsonl", "--model", BASE)
    assert "zero_stage" in shown.stdout
    assert "nothing was started" in shown.stderr
    assert json.loads(run("plan", "train.jsonl", "--model", BASE, "--json").stdout)["plan"]["workers"] >= 1
    assert [job.id for job in client.jobs()] == before


def test_files_up_and_down(run: Run, tmp_path: Path) -> None:
    file = json.loads(run("files", "upload", "train.jsonl", "--json").stdout)["id"]
    assert file in run("files").stdout
    assert file in [found["id"] for found in json.loads(run("files", "--json").stdout)]
    assert json.loads(run("files", "show", file, "--json").stdout)["rows"] == 12
    assert run("files", "download", file).stdout_bytes == rows(12)
    run("files", "download", file, "copy.jsonl")
    assert (tmp_path / "copy.jsonl").read_bytes() == rows(12)
    run("files", "delete", file)
    assert run("files", "show", file, code=4).stderr.startswith("peft-service: ")


def test_models_and_methods(run: Run) -> None:
    assert BASE in run("models").stdout
    assert BASE in run("models", "--bases").stdout
    uri = next(base["uri"] for base in json.loads(run("models", "--bases", "--json").stdout))
    assert "team/own" in run("models", "--register", "team/own", uri).stdout
    assert "no/such" in run("models", "--register", "no/such", "file:///no/such", code=2).stderr
    assert "lora" in [method["kind"] for method in json.loads(run("models", "--methods", "--json").stdout)]
    assert "preference" in run("models", "--objectives").stdout
    known = json.loads(run("models", "--objectives", "--json").stdout)
    assert {"dpo", "kto", "pretraining"} <= {objective["kind"] for objective in known}
    assert all("hyperparameters" in objective["schema"]["properties"] for objective in known)


def test_objective_columns_and_template_are_options(run: Run, tmp_path: Path) -> None:
    rows = "".join(f'{{"q": "{n}?", "a": "{n}!", "b": "no"}}\n' for n in range(20))
    (tmp_path / "pairs.jsonl").write_text(rows)
    columns = ("--column", "prompt=q", "--column", "chosen=a", "--column", 'rejected={"text": "{b}."}')
    said = run(
        "plan",
        "pairs.jsonl",
        "--model",
        BASE,
        "--objective",
        "ipo",
        *columns,
        "--template",
        "chatml",
        "--json",
    )
    told = json.loads(said.stdout)
    assert (told["objective"]["kind"], told["objective"]["loss"], told["rows"]) == ("dpo", "ipo", 20)
    assert (
        "no template"
        in run("plan", "pairs.jsonl", "--model", BASE, *columns, "--template", "chatmm", code=2).stderr
    )


def test_adapters_and_pull(run: Run, service: Service, tmp_path: Path) -> None:
    publish(service, "bot", 1, {"adapter_config.json": b"{}"})
    assert "bot@1" in run("adapters").stdout
    assert json.loads(run("adapters", "bot@1", "--json").stdout)["version"] == 1
    assert run("pull", "bot").stdout.strip() == "bot-v1"
    assert (tmp_path / "bot-v1" / "manifest.json").exists()
    assert "exists already" in run("pull", "bot", code=2).stderr
    assert json.loads(run("pull", "bot@1", "here", "--json").stdout)["directory"] == str(tmp_path / "here")
    run("pull", "nobody", code=4)


def test_keys_open_the_service_until_they_are_revoked(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made = json.loads(run("keys", "create", "--name", "ci", "--days", "1", "--json").stdout)
    monkeypatch.setenv("PEFT_SERVICE_API_KEY", made["key"])
    run("jobs")
    assert "valid until" in next(line for line in run("keys").stdout.splitlines() if made["id"] in line)
    assert made["key"] not in run("keys", "list", "--json").stdout
    run("keys", "revoke", made["id"])
    assert "revoked" in run("jobs", code=4).stderr


# -------------------------------------------------------------------------------------------------- watching


@pytest.mark.parametrize(("state", "code"), [("succeeded", 0), ("failed", 1), ("cancelled", 1)])
def test_watch_ends_with_the_job_and_its_exit_code_says_how(
    run: Run, service: Service, client: Client, state: str, code: int
) -> None:
    job = run(
        "submit", "train.jsonl", "--model", BASE, "--seed", str(1000 + code + len(state))
    ).stdout.strip()
    if state == "cancelled":
        client.cancel(job)
    else:
        finish(service, job, state)
    shown = run("watch", job, code=code)
    words = {"succeeded": "succeeded", "failed": "the loss was nan at step 3", "cancelled": "was cancelled"}
    assert words[state] in shown.stdout + shown.stderr
    lines = [json.loads(line) for line in run("watch", job, "--json", code=code).stdout.splitlines()]
    assert lines[-1]["status"] == state
    assert all(line["object"] == "fine_tuning.job.event" for line in lines[:-1])
    events = run("logs", job, "--events").stdout
    assert all(line["message"] in events for line in lines[:-1])
    assert run("logs", job).stdout == ""


def test_leaving_a_watch_does_not_cancel(run: Run, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Client, job_id: str, **options: Any) -> Iterator[Update]:
        yield Update(self.job(job_id), [])
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "follow", interrupted)
    shown = run("submit", "train.jsonl", "--model", BASE, "--seed", "2000", "--watch", code=130)
    assert "goes on" in shown.stderr
    job = shown.stderr.split()[0]
    assert f"watch {job}" in shown.stderr
    assert client.job(job).status == "queued"
    client.cancel(job)


def job_of(**values: Any) -> Job:
    plain = {"id": "ftjob-1", "model": "m", "created_at": 0, "training_file": "f", "status": "queued"}
    return Job(**{**plain, **values})


def event(step: int, loss: float) -> Event:
    data = {"step": step, "train_loss": loss}
    return Event(id=f"{step} {loss}", created_at=0, level="info", message="Step", type="metrics", data=data)


def updates() -> Iterator[Update]:
    yield Update(job_of(queue={"position": 3}), [])
    yield Update(job_of(status_reason="waits for 2 GPUs; 1 is free"), [])
    yield Update(job_of(status="running", phase="tokenising"), [])
    for step in range(1, 4):
        progress = {"step": step, "total_steps": 3, "train_loss": 4.0 - step}
        progress |= {"tokens_per_second": 1234.5, "eta_seconds": 65.0}
        yield Update(job_of(status="running", phase="training", progress=progress), [event(step, 4.0 - step)])
    yield Update(job_of(status="running", phase="training", progress=progress), [], "the service is away")
    for _ in range(3):
        yield Update(job_of(status="running", phase="proving", progress=progress), [])
    message = Event(id="e9", created_at=0, level="info", message="The job has [successfully] completed")
    yield Update(job_of(status="succeeded", progress=progress), [message])


def test_the_plain_view_says_reason_position_figures_and_messages_once() -> None:
    out = io.StringIO()
    job, history = follow(updates(), Console(file=out, width=60))
    assert job.status == "succeeded"
    assert history.losses() == [3.0, 2.0, 1.0]
    lines = out.getvalue().splitlines()
    assert lines[:-1] == [
        "waiting, number 3 in the queue",
        "waits for 2 GPUs; 1 is free",
        "tokenising",
        "step 1/3  loss 3.000  1,234 tokens/s  1:05 left",
        "step 3/3  loss 1.000  1,234 tokens/s  1:05 left",
        "the service is away",
        "proving",
    ]
    assert lines[-1].endswith("The job has [successfully] completed")


def test_the_terminal_view_shows_the_same_in_a_bar() -> None:
    def slowly() -> Iterator[Update]:
        for update in updates():
            yield update
            time.sleep(0.15)  # the bar is drawn ten times a second, as a terminal sees it

    out = io.StringIO()
    follow(slowly(), Console(file=out, width=120, force_terminal=True, color_system=None))
    text = out.getvalue()
    for words in ("number 3 in the queue", "waits for 2 GPUs", "loss 2.000", "1,234 tokens/s", "1:05 left"):
        assert words in text
    assert "[successfully] completed" in text


def test_a_resumed_attempt_overwrites_the_steps_it_repeats() -> None:
    history = History()
    for step, loss in [(1, 3.0), (2, 2.5), (2, 2.0), (3, 1.0)]:
        history.add(Update(job_of(status="running"), [event(step, loss)]))
    assert history.losses() == [3.0, 2.0, 1.0]


def test_the_time_of_a_phase_is_from_its_first_sight_to_the_next_ones() -> None:
    history = History()
    seen = [
        ("queued", None),
        ("running", None),
        ("running", "training"),
        ("running", "training"),
        ("paused", None),
    ]
    for at, (status, phase) in enumerate(seen):
        history.add(Update(job_of(status=status, phase=phase), []), now=10.0 * at)
    history.add(Update(job_of(status="running", phase="training"), []), now=50.0)
    history.add(Update(job_of(status="cancelled"), []), now=55.0)
    assert history.seconds == {"queued": 10.0, "starting": 10.0, "training": 25.0, "paused": 10.0}


def test_a_curve_is_drawn_from_its_smallest_to_its_largest_value() -> None:
    assert sparkline([3.0, 2.0, 1.0]) == "█▅▁"
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([]) == ""
    assert len(sparkline([float(n) for n in range(1000)], 40)) == 40
    lines = plot([float(n) for n in range(8, 0, -1)], height=4, width=8)
    drawn = [line.split("│")[1].rstrip() for line in lines[:-1]]
    assert drawn == ["█▄", "██▇▃", "████▆▂", "██████▅▁"]
    assert lines[0].startswith("   8.000")
    assert lines[-1].startswith("   1.000")


# ---------------------------------------------------------------------------------------------------- errors


def test_bad_lines_are_listed_with_their_numbers(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b"no json\n" * 30)
    said = run("submit", "bad.jsonl", "--model", BASE, code=2).stderr.splitlines()
    assert said[0].startswith("peft-service: ")
    assert "line 1" in said[1]
    assert len(said) == 12
    assert "20 more" in said[-1]
    as_json = json.loads(run("submit", "bad.jsonl", "--model", BASE, "--json", code=2).stderr)
    assert as_json["error"]["error_count"] == 30


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("submit", "train.jsonl"), 2, "--model"),
        (("submit", "none.jsonl", "--model", BASE), 2, "none.jsonl"),
        (("submit", "train.jsonl", "--model", "no/such"), 2, "no/such"),
        (("submit", "train.jsonl", "--model", BASE, "--metadata", "x"), 2, "KEY=VALUE"),
        (("submit", "train.jsonl", "--model", BASE, "--set", "training.lerning_rate=1"), 2, "learning_rate"),
        (("submit", "train.jsonl", "--model", BASE, "--set", "seed.x=1", "--seed", "1"), 2, "seed"),
        (("submit", "train.jsonl", "--model", BASE, "--request", "nowhere.json"), 2, "nowhere.json"),
        (("submit", "train.jsonl", "--model", BASE, "--request", "train.jsonl"), 2, "not JSON"),
        (("submit", "train.jsonl", "--model", BASE, "--workers", "4000"), 2, "workers"),
        (("watch", "ftjob-none"), 4, "ftjob-none"),
        (("files", "delete", "file-none"), 4, "file-none"),
        (("pull", "ftjob-none"), 4, "ftjob-none"),
        (("nonsense",), 2, "nonsense"),
        (("submit",), 2, "FILE"),
    ],
)
def test_an_error_is_a_sentence_and_an_exit_code(
    run: Run, arguments: tuple[str, ...], code: int, words: str
) -> None:
    said = run(*arguments, code=code)
    assert words in said.stderr
    assert said.stdout == ""


def test_a_service_that_is_away_is_3_and_a_wrong_key_is_4(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_SERVICE_API_KEY", "sk-wrong")
    assert "unknown" in run("jobs", code=4).stderr
    monkeypatch.setenv("PEFT_SERVICE_URL", "http://127.0.0.1:1")
    assert "peft-service up" in run("jobs", code=3).stderr
    assert json.loads(run("jobs", "--json", code=3).stderr)["error"]["code"] == "service_unreachable"
    monkeypatch.setenv("PEFT_SERVICE_ULR", "x")
    assert "PEFT_SERVICE_URL" in run("jobs", code=2).stderr


def test_a_database_that_is_away_is_3(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_SERVICE_DATABASE_URL", "postgresql+psycopg://u:hidden@127.0.0.1:1/x")
    said = run("keys", code=3)
    assert "PEFT_SERVICE_DATABASE_URL" in said.stderr
    assert "hidden" not in said.output


# --------------------------------------------------------------------------------------------------- imports


def test_no_client_command_loads_what_only_the_service_needs(service: Service, tmp_path: Path) -> None:
    """Why the command line answers at once. Real processes: what a command imports it must import itself."""
    script = (
        "import sys, json\n"
        "from jobs.cli import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "print('\\n' + json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))\n"
    )
    environment = {
        "PEFT_SERVICE_URL": service.url,
        "PEFT_SERVICE_API_KEY": service.key,
        "PATH": "/usr/bin:/bin",
    }
    for arguments in (["jobs"], ["models"], ["adapters", "--json"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments],
            env=environment,
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        loaded = set(json.loads(done.stdout.splitlines()[-1]))
        assert "httpx" in loaded
        assert not loaded & HEAVY


def test_help_loads_neither_the_client_nor_the_settings() -> None:
    script = "import sys, jobs.cli; print({'httpx', 'pydantic_settings', 'rich'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def test_the_installed_script_says_its_exit_codes() -> None:
    script = Path(sys.executable).parent / "peft-service"
    done = subprocess.run([str(script), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "Exit codes" in done.stdout
