"""The preview over REST, as a page, and on the command line, against the real API."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from jobs import preview as shown
from jobs.cli import app
from jobs.client import Client
from peft_service import store
from peft_service.base_model import fetch_tokenizer
from peft_service.errors import InvalidRequest
from peft_service.spec import Base
from tests import servers
from tests.jobs.service import BASE, Service, serving

HOSTILE = '<script>alert(1)</script>&"\u202e\x1b[2J\x07'
ROWS = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho é"}]},
    {"messages": [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": HOSTILE}]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b\nc"}]},
]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("service")) as running:
        yield running


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[Client]:
    with service.client() as made:
        yield made


@pytest.fixture(scope="module")
def file(client: Client, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return client.upload(path).id


@pytest.fixture(scope="module")
def found(client: Client, file: str) -> dict[str, Any]:
    return client.preview(
        {"model": BASE, "training_file": file, "preview": {"rows": 3, "statistics": True}}
    ).model_dump()


def learned(row: dict[str, Any]) -> str:
    (sequence,) = row["sequences"]
    return "".join(text for text, yes, _, _ in shown.pieces(sequence) if yes)


def test_a_preview_names_what_is_learned(found: dict[str, Any]) -> None:
    assert [row["line"] for row in found["rows"]] == [1, 2, 3]
    assert [learned(row) for row in found["rows"]] == [
        "ho é<|im_end|>",
        f"{HOSTILE}<|im_end|>",
        "b\nc<|im_end|>",
    ]
    assert found["statistics"]["rows"] == 3


def test_pieces_are_the_whole_text_each_character_once(found: dict[str, Any]) -> None:
    for row in found["rows"]:
        (sequence,) = row["sequences"]
        assert "".join(text for text, *_ in shown.pieces(sequence)) == sequence["text"]


def test_nothing_is_started_stored_or_left_behind(service: Service, client: Client, file: str) -> None:
    before = [info.key for info in service.store.list("")]
    client.preview({"model": BASE, "training_file": file, "preview": {"rows": [2]}})
    assert [info.key for info in service.store.list("")] == before
    assert list(client.jobs()) == []
    assert not list((service.settings.data_dir / "incoming").glob("import-*"))


def test_a_named_and_an_inline_template_and_its_limits(client: Client, file: str) -> None:
    body = {"model": BASE, "training_file": file, "preview": {"rows": 1}}
    (row,) = client.preview({**body, "data": {"template": {"name": "chatml"}}}).rows
    assert row["sequences"][0]["text"].startswith("<|im_start|>user\nhi<|im_end|>\n")
    loop = "{% for i in range(99999) %}" * 4 + "{% endfor %}" * 4
    jinja = f"{loop}{{{{ messages }}}}{{% if add_generation_prompt %}}{{% endif %}}"
    with pytest.raises(InvalidRequest) as caught:
        client.preview({**body, "data": {"template": {"jinja": jinja}}})
    assert (caught.value.code, caught.value.param) == ("template_limits", "data.template")
    # Nor does a job with it begin: it is tried on a row when it is submitted.
    job = {name: value for name, value in body.items() if name != "preview"}
    with pytest.raises(InvalidRequest) as caught:
        client.preflight({**job, "data": {"template": {"jinja": jinja}}})
    assert caught.value.code == "template_limits"
    refusing = "{{ messages[9].content }}{% if add_generation_prompt %}{% endif %}"
    with pytest.raises(InvalidRequest, match="first row"):
        client.preflight({**job, "data": {"template": {"jinja": refusing}}})


def test_a_mapping_is_previewed_as_it_is_trained(client: Client, tmp_path: Path) -> None:
    (tmp_path / "qa.csv").write_text("question,reply\n" + "one and one?,two\n" * 10)
    file = client.upload(tmp_path / "qa.csv").id
    columns = {"prompt": "question", "completion": "reply"}
    body = {"model": BASE, "training_file": file, "data": {"columns": columns}, "preview": {"rows": 2}}
    rows = client.preview(body).rows
    assert len(rows) == 2
    assert rows[0]["sequences"][0]["text"] == "one and one?two"
    assert learned(rows[0]).startswith("two")


@pytest.mark.parametrize(
    ("preview", "param"),
    [
        ({"rows": 0}, "preview.rows"),
        ({"rows": 101}, "preview.rows"),
        ({"rows": [0]}, "preview.rows[0]"),
        ({"rows": []}, "preview.rows"),
        ({"row": 3}, "preview.row"),
        ({"source": 1}, "preview.source"),
        ({"statistics": "yes"}, "preview.statistics"),
        ("all", "preview"),
    ],
)
def test_what_is_refused(preview: Any, param: str, client: Client, file: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.preview({"model": BASE, "training_file": file, "preview": preview})
    assert caught.value.param == param


def test_a_jobs_own_mistakes_are_said_as_at_submit(client: Client, file: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.preview({"model": BASE, "training_file": file, "data": {"template": {"name": "chatlm"}}})
    assert "chatml" in caught.value.message


# ----------------------------------------------------------------------------------------------- the page


class Page(HTMLParser):
    """What a browser would make of it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.learned, self.text, self._inside = "", "", False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._inside = tag == "i" and "y" in (dict(attrs).get("class") or "").split()

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        self.text += data
        self.learned += data if self._inside else ""


def test_the_page_needs_nothing_else_and_runs_nothing(service: Service, file: str) -> None:
    headers = {"authorization": f"Bearer {service.key}", "accept": "text/html"}
    body = {"model": BASE, "training_file": file, "preview": {"rows": 3, "statistics": True}}
    answer = httpx.post(f"{service.url}/v1/preview", json=body, headers=headers, timeout=120)
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    page = Page(answer.text)
    assert not set(page.tags) & {"script", "img", "link", "iframe", "a", "object", "form"}
    assert {name for name, _ in page.attributes} == {"lang", "charset", "class", "title"}
    assert "<script>alert(1)</script>" in page.learned
    assert "\x1b" not in answer.text
    assert "\u202e" not in answer.text
    assert page.learned.startswith("ho é<|im_end|>")


def test_a_page_shows_problems_and_what_happened() -> None:
    problem = {"line": 4, "path": "messages", "code": "x", "message": "<b>", "hint": "h", "excerpt": ""}
    row = {"line": 4, "file": "a.jsonl", "happened": {"dropped": 1}, "lost_tokens": 9, "problems": [problem]}
    page = Page(shown.page({"rows": [{**row, "sequences": []}], "statistics": None, "warnings": ["w"]}, "t"))
    for words in ("a.jsonl, line 4", "dropped", "9 tokens are lost", "x at messages: <b> (h)", "w"):
        assert words in page.text


# ------------------------------------------------------------------------------------------- the terminal


def test_without_colours_what_is_learned_is_between_marks(found: dict[str, Any]) -> None:
    out = StringIO()
    shown.show(found, Console(file=out, width=100))
    text = out.getvalue()
    assert "«ho é<|im_end|>»" in text
    assert "«b⏎\nc<|im_end|>»" in text
    assert text.count("«") == text.count("»") == 3
    assert "\x1b" not in text
    assert "\\u001b[2J" in text


def test_with_colours_what_is_learned_is_green(found: dict[str, Any]) -> None:
    out = StringIO()
    shown.show(found, Console(file=out, width=100, force_terminal=True, color_system="standard"))
    text = out.getvalue()
    green = "".join(re.findall(r"\x1b\[(?:7;)?32m(.*?)\x1b\[0m", text))
    assert green.startswith("ho é<|im_end|>")
    assert "\x1b[7;32m<|im_end|>\x1b[0m" in text
    assert "\x1b[2muser\x1b[0m" in text, "what is only read is dim"
    assert "31m" not in text, "red is what was cut away"
    assert "«" not in text
    assert "\x1b[2J" not in text


def test_the_command_uploads_and_shows(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFT_SERVICE_URL", service.url)
    monkeypatch.setenv("PEFT_SERVICE_API_KEY", service.key)
    monkeypatch.setenv("PEFT_SERVICE_DATA_DIR", str(service.settings.data_dir))
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    result = CliRunner().invoke(app, ["preview", str(path), "--model", BASE, "--line", "3", "--line", "1"])
    assert result.exit_code == 0, result.output
    assert "line 1: " in result.stdout
    assert "line 2: " not in result.stdout
    assert "«ho é<|im_end|>»" in result.stdout
    assert "learned" in result.stdout
    page = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["preview", str(path), "--model", BASE, "--html", str(page)])
    assert result.exit_code == 0, result.output
    assert page.read_text().startswith("<!doctype html>")


# ---------------------------------------------------------------------------------------- the tokenizer only


@pytest.mark.s3
def test_a_base_in_a_bucket_is_tokenised_without_its_weights(
    s3_swift: servers.SwiftServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_service import shipped

    for name, value in s3_swift.env().items():
        monkeypatch.setenv(name, value)
    bucket = store.open_store(f"s3://{s3_swift.bucket()}")
    for path in shipped.path().iterdir():
        bucket.put_file(f"base/{path.name}", path)
    directory = fetch_tokenizer(Base(id="a/b", uri=f"{bucket.url}/base"), tmp_path)
    names = {path.name for path in directory.iterdir()}
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert not [name for name in names if "safetensors" in name]
