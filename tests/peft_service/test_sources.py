"""Sources: what is listed is what is downloaded, from real S3 servers, from folders, and from the Hub."""

import hashlib
import json
import re
import threading
import urllib.parse
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_service import sources
from peft_service.errors import InvalidRequest, ObjectNotFound, StoreDenied, StoreError, StoreUnavailable
from peft_service.sources import Item, download, is_source, list_source
from peft_service.store import S3Store, open_store
from tests.servers import S3Server

S3 = [
    pytest.param("s3_swift", marks=pytest.mark.s3, id="swift"),
    pytest.param("s3_ceph", marks=pytest.mark.s3, id="ceph"),
]
FILES = {
    "data/train.jsonl": b'{"a": 1}\n',
    "data/b/part-1.parquet": b"PAR1 one",
    "data/b/c/part-2.parquet": b"PAR1 two, longer",
    "data/b/c/notes.md": b"# no data",
    "data/b/x y ü.csv": b"a,b\n",
    "data/_SUCCESS": b"",
    "data2/other.jsonl": b"{}\n",
    "top.txt": b"text\n",
}
DATA = ["b/c/part-2.parquet", "b/part-1.parquet", "b/x y ü.csv", "train.jsonl"]


@pytest.fixture(params=[pytest.param("file", id="file"), *S3])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a place with FILES in it."""
    if request.param == "file":
        url = (tmp_path / "allowed").as_uri()
    else:
        server: S3Server = request.getfixturevalue(request.param)
        for name, value in server.env().items():
            monkeypatch.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_ENDPOINT_URL_S3"):
            monkeypatch.delenv(name, raising=False)
        url = f"s3://{server.bucket()}/{uuid.uuid4().hex[:8]}"
    store = open_store(url)
    for name, content in FILES.items():
        store.put(name, content)
    return url


@pytest.fixture
def allow(tmp_path: Path) -> list[Path]:
    return [tmp_path / "elsewhere", tmp_path / "allowed"]


def names(uri: str, allow: list[Path]) -> list[str]:
    return [item.name for item in list_source(uri, allow)]


# ------------------------------------------------------------------------------------------------------
# S3 and folders


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("/data", DATA),
        ("/data/", DATA),
        ("/data/train.jsonl", ["train.jsonl"]),
        ("/top.txt", ["top.txt"]),
        ("/data/**/*.parquet", ["b/c/part-2.parquet", "b/part-1.parquet"]),
        ("/data/*/*.parquet", ["b/part-1.parquet"]),
        ("/**/*.jsonl", ["data/train.jsonl", "data2/other.jsonl"]),
        ("/data*/*.jsonl", ["data/train.jsonl", "data2/other.jsonl"]),
        ("/data/b/c/*.md", ["notes.md"]),
        ("/data/b/part-[12].parquet", ["part-1.parquet"]),
        ("/data/b/part-?.parquet", ["part-1.parquet"]),
        ("/data/b/**", ["c/notes.md", "c/part-2.parquet", "part-1.parquet", "x y ü.csv"]),
    ],
)
def test_an_address_means_the_same_files_everywhere(
    address: str, expected: list[str], root: str, allow: list[Path]
) -> None:
    assert names(root + address, allow) == expected


def test_what_is_listed_is_downloaded(root: str, allow: list[Path], tmp_path: Path) -> None:
    items = list_source(root, allow)
    assert [item.name for item in items] == sorted(
        name for name in FILES if not name.endswith(("md", "SUCCESS"))
    )
    for item in items:
        assert item.size == len(FILES[item.name])
        assert item.version
        target = tmp_path / "new" / item.name
        download(item, target, allow)
        assert target.read_bytes() == FILES[item.name]
    assert list_source(root, allow) == items
    left = [path for path in (tmp_path / "new").rglob("*") if path.is_file()]
    assert len(left) == len(items), "temporary files are left"


def test_what_changed_since_it_was_listed_is_refused(root: str, allow: list[Path], tmp_path: Path) -> None:
    (item,) = list_source(root + "/data/train.jsonl", allow)
    open_store(root).put("data/train.jsonl", b'{"a": 2}\n')  # as long as it was
    with pytest.raises(StoreError) as caught:
        download(item, tmp_path / "x", allow)
    assert caught.value.code == "object_changed"
    assert list_source(root + "/data/train.jsonl", allow) != [item]
    open_store(root).delete("data/train.jsonl")
    with pytest.raises(ObjectNotFound):
        download(item, tmp_path / "x", allow)
    assert not (tmp_path / "x").exists()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []


def test_a_source_without_data_is_an_error(root: str, allow: list[Path]) -> None:
    for address in ("/nothing/*.jsonl", "/data/b/c/*.jsonl"):
        with pytest.raises(InvalidRequest) as caught:
            list_source(root + address, allow)
        assert caught.value.code in ("no_data_files", "source_not_found")
        assert caught.value.param == "source"


def test_too_many_files_are_refused(root: str, allow: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest) as caught:
        list_source(root + "/data", allow, limit=3)
    assert caught.value.code == "too_many_files"
    for name in ("MAX_ITEMS", "MAX_LISTED"):
        with monkeypatch.context() as patch:
            patch.setattr(sources, name, 2)
            with pytest.raises(InvalidRequest) as caught:
                list_source(root + "/data", allow)
        assert caught.value.code == "too_many_files"


@pytest.mark.parametrize("server", S3)
def test_a_listing_of_many_pages_is_whole(
    server: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: S3Server = request.getfixturevalue(server)
    for name, value in found.env().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(S3Store, "page_size", 3)
    bucket = found.bucket()
    store = open_store(f"s3://{bucket}")
    for number in range(10):
        store.put(f"p/{number}.jsonl", b"{}\n")
    assert names(f"s3://{bucket}/p/*.jsonl", []) == [f"{number}.jsonl" for number in range(10)]
    assert names(f"s3://{bucket}", []) == [f"p/{number}.jsonl" for number in range(10)]


@pytest.mark.parametrize("server", S3)
def test_wrong_credentials_are_denied(
    server: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: S3Server = request.getfixturevalue(server)
    for name, value in found.env().items():
        monkeypatch.setenv(name, value)
    bucket = found.bucket()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2hunter2")
    with pytest.raises(StoreDenied) as caught:
        list_source(f"s3://{bucket}/x")
    assert "hunter2" not in caught.value.message


def test_only_allowed_folders_are_read(tmp_path: Path) -> None:
    (tmp_path / "allowed").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "x.jsonl").write_text("{}")
    (tmp_path / "allowed" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "allowed" / "link.jsonl").symlink_to(tmp_path / "secret" / "x.jsonl")
    (tmp_path / "allowed" / "good.jsonl").write_text("{}")
    allow = [tmp_path / "allowed"]
    assert names((tmp_path / "allowed").as_uri(), allow) == ["good.jsonl"]
    base = tmp_path.as_uri()
    for address in (
        base,
        base + "/secret",
        base + "/secret/x.jsonl",
        base + "/secret/missing.jsonl",
        base + "/allowed/../secret",
        base + "/allowed/%2e%2e/secret",
        base + "/allowed/link",
        base + "/allowed/link/x.jsonl",
        base + "/allowed/link.jsonl",
        base + "/*/x.jsonl",
        base + "/allowed2",
        "file:///etc/passwd",
        "file:///",
    ):
        with pytest.raises(StoreDenied):
            list_source(address, allow)
        with pytest.raises(StoreDenied):
            list_source(address)
    item = Item("x.jsonl", 2, "1", base + "/secret/x.jsonl")
    with pytest.raises(StoreDenied):
        download(item, tmp_path / "copy", allow)
    linked = Item("x.jsonl", 2, "1", base + "/allowed/link/x.jsonl")
    with pytest.raises(StoreDenied):
        download(linked, tmp_path / "copy", allow)


@pytest.mark.parametrize(
    "uri",
    [
        *("", "x", "https://example.com/x.jsonl", "ftp://x/y", "file://host/x", "file://x", "s3://"),
        *("s3://b/x", "s3://bucket/../x", "s3://bucket/a//b", "s3://bucket/[", "s3://bucket/[]x"),
        *(
            "s3://bucket/**/a/**/b/**/c",
            "s3://bucket/[z-a]",
            "hf://org/name",
            "hf://datasets/",
            "hf://datasets/a/b/c",
        ),
        *("hf://datasets/a/b?split=", "hf://datasets/a/b@", "hf://datasets/../../x"),
    ],
)
def test_a_bad_address_is_refused_before_anything_is_asked(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(InvalidRequest):
        list_source(uri)
    assert is_source(uri) == uri.startswith(("s3:", "file:", "hf:"))


PIECES = st.sampled_from(["a", "b", "ab", "*", "?", "/", "**/", "[ab]", "[!a]", "."])


@given(
    pattern=st.lists(PIECES, min_size=1, max_size=7).map("".join),
    name=st.text("ab/.", min_size=1, max_size=8),
)
@settings(max_examples=1000, deadline=None)
def test_patterns_match_what_a_simple_matcher_matches(pattern: str, name: str) -> None:
    def matches(segments: list[str], parts: list[str]) -> bool:
        if not segments:
            return not parts
        if segments[0] == "**" and len(segments) > 1:
            return any(matches(segments[1:], parts[skip:]) for skip in range(len(parts)))
        return bool(parts) and within(segments[0], parts[0]) and matches(segments[1:], parts[1:])

    def within(segment: str, part: str) -> bool:
        import fnmatch

        return fnmatch.fnmatchcase(part, segment)

    pattern = re.sub(r"(\*\*/)+", "**/", pattern)
    if (
        "//" in pattern + "/"
        or "//" in f"/{name}/"
        or "//" in f"/{pattern}"
        or "**" in pattern.replace("**/", "/")
    ):
        return  # no keys look so
    segments = pattern.split("/")
    if any("**" in segment and segment != "**" for segment in segments) or segments.count("**") > 2:
        return
    assert bool(sources._matcher(pattern).fullmatch(name)) == matches(segments, name.split("/"))


@pytest.mark.timeout(20)
def test_a_pattern_of_many_asterisks_takes_no_time() -> None:
    assert not sources._matcher("*a" * 200 + "*b").fullmatch("a" * 900)
    assert not sources._matcher("**/*a*/**/*b*c").fullmatch("a/" * 400 + "b")


# ------------------------------------------------------------------------------------------------------
# The Hub: a server that speaks the routes of its protocol that listing and downloading need


SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """`repositories[name]`: (files, card)."""

    def __init__(self) -> None:
        self.repositories: dict[str, tuple[dict[str, bytes], dict[str, Any] | None]] = {}
        self.asked: list[str] = []
        self.tokens: list[str | None] = []
        self.status: int | None = None
        self.error_code = ""
        self.shorter = 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.asked.append(self.path)
                if "/org/" in self.path:
                    hub.tokens.append(self.headers.get("Authorization"))
                path = urllib.parse.unquote(self.path.partition("?")[0])
                if hub.status:
                    self.answer(hub.status, b"{}", {"X-Error-Code": hub.error_code})
                elif found := re.fullmatch(r"/api/datasets/(.+?)(?:/revision/(.+))?", path):
                    self.tell(found[1], found[2])
                elif found := re.fullmatch(r"/datasets/(.+)/resolve/([^/]+)/(.+)", path):
                    content = hub.repositories.get(found[1], ({}, None))[0].get(found[3])
                    if content is None or found[2] != SHA:
                        self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
                    else:
                        content = content[: len(content) - hub.shorter]
                        etag = f'"{hashlib.sha256(content).hexdigest()}"'
                        self.answer(200, content, {"ETag": etag, "X-Repo-Commit": SHA})
                else:
                    self.answer(404, b"", {})

            do_HEAD = do_GET

            def tell(self, name: str, revision: str | None) -> None:
                if name not in hub.repositories or revision not in (
                    None,
                    "main",
                    "refs/convert/parquet",
                    SHA,
                ):
                    code = "RepoNotFound" if name not in hub.repositories else "RevisionNotFound"
                    self.answer(404, b"{}", {"X-Error-Code": code})
                    return
                files, card = hub.repositories[name]
                siblings = [
                    {"rfilename": file, "size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
                    for file, content in files.items()
                ]
                told = {"id": name, "sha": SHA, "siblings": siblings, "cardData": card}
                self.answer(200, json.dumps(told).encode(), {"Content-Type": "application/json"})

            def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from huggingface_hub import constants

    made = Hub()
    # What HF_ENDPOINT sets when the library is imported, which it is already.
    monkeypatch.setattr(constants, "ENDPOINT", made.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    yield made
    made.close()


PLAIN = {
    "README.md": b"# Data",
    "loader.py": b"import os",
    "weights.pkl": b"\x80\x04",
    "data/train-00000-of-00002.parquet": b"PAR1 1",
    "data/train-00001-of-00002.parquet": b"PAR1 2",
    "data/test-00000-of-00001.parquet": b"PAR1 3",
    "data/dev.jsonl": b"{}\n",
}


def test_the_files_of_a_split_are_listed_and_downloaded_at_a_commit(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["org/name"] = (PLAIN, None)
    items = list_source("hf://datasets/org/name?split=train")
    assert [item.name for item in items] == [name for name in PLAIN if "train" in name]
    for item in items:
        assert item.uri == f"hf://datasets/org/name@{SHA}/{item.name}"
        assert item.version == hashlib.sha1(PLAIN[item.name]).hexdigest()
        download(item, tmp_path / "down" / item.name)
        assert (tmp_path / "down" / item.name).read_bytes() == PLAIN[item.name]
    assert all(SHA in path for path in hub.asked if "/resolve/" in path)
    assert set(hub.tokens) == {"Bearer hf_secretsecret"}
    assert sorted(path.name for path in (tmp_path / "down").rglob("*") if path.is_file()) == sorted(
        name.rpartition("/")[2] for name in PLAIN if "train" in name
    )
    assert [item.name for item in list_source("hf://datasets/org/name@main?split=validation")] == [
        "data/dev.jsonl"
    ]
    assert [item.name for item in list_source(f"hf://datasets/org/name@{SHA}?split=dev")] == [
        "data/dev.jsonl"
    ]


def test_several_splits_are_never_mixed_in_silence(hub: Hub) -> None:
    hub.repositories["org/name"] = (PLAIN, None)
    with pytest.raises(InvalidRequest) as caught:
        list_source("hf://datasets/org/name")
    assert caught.value.code == "split_missing"
    assert "test, train, validation" in caught.value.message
    with pytest.raises(InvalidRequest) as caught:
        list_source("hf://datasets/org/name?split=trian")
    assert caught.value.code == "split_missing"
    assert 'did you mean "train"?' in caught.value.message
    hub.repositories["org/one"] = ({"a.jsonl": b"", "b.csv": b""}, None)
    for split in ("", "?split=train"):
        assert [item.name for item in list_source("hf://datasets/org/one" + split)] == ["a.jsonl", "b.csv"]


def test_configs_are_those_of_the_card(hub: Hub) -> None:
    files = {f"{config}/{split}.jsonl": b"{}" for config in ("en", "fr") for split in ("train", "held")}
    card = {
        "configs": [
            {
                "config_name": config,
                "data_files": [
                    {"split": "train", "path": f"{config}/tr*.jsonl"},
                    {"split": "held_out", "path": [f"{config}/held.jsonl"]},
                ],
            }
            for config in ("en", "fr")
        ]
    }
    hub.repositories["org/name"] = (files, card)
    for config in ("en", "fr"):
        for split, file in (("train", "train"), ("held_out", "held")):
            found = list_source(f"hf://datasets/org/name:{config}?split={split}")
            assert [item.name for item in found] == [f"{config}/{file}.jsonl"]
    for address in ("hf://datasets/org/name", "hf://datasets/org/name:de"):
        with pytest.raises(InvalidRequest) as caught:
            list_source(address)
        assert caught.value.code == "config_missing"
        assert "en, fr" in caught.value.message
    card["configs"][1]["default"] = True
    assert [item.name for item in list_source("hf://datasets/org/name?split=train")] == ["fr/train.jsonl"]
    # Without a card, a config is a folder.
    hub.repositories["org/name"] = (files, None)
    assert [item.name for item in list_source("hf://datasets/org/name:en?split=train")] == ["en/train.jsonl"]


@pytest.mark.parametrize(
    "card",
    [
        {"configs": 5},
        {"configs": [5, {"config_name": 3}, {"config_name": "x", "data_files": {"a": [1]}}]},
        {"configs": [{"config_name": "x", "data_files": [{"split": 1, "path": 2}, 7]}]},
        {"configs": [{"config_name": "default", "data_files": "*.jsonl"}]},
        {"configs": [{"config_name": "default", "data_dir": "."}]},
    ],
)
def test_a_strange_card_is_no_crash(card: dict[str, Any], hub: Hub) -> None:
    hub.repositories["org/name"] = ({"a.jsonl": b"{}"}, card)
    codes = []
    try:
        codes = [item.name for item in list_source("hf://datasets/org/name")]
    except InvalidRequest as error:
        codes = [error.code]
    assert codes in (["a.jsonl"], ["config_missing"], ["no_data_files"])


def test_scripts_are_never_run_and_names_never_leave_the_folder(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["org/script"] = ({"script.py": b"", "README.md": b""}, None)
    with pytest.raises(InvalidRequest) as caught:
        list_source("hf://datasets/org/script")
    assert caught.value.code == "no_data_files"
    assert "refs/convert/parquet" in caught.value.message
    for name in ("../../up.jsonl", "/etc/x.jsonl", "a/../b.jsonl", "a\\b.jsonl", "nul\0.jsonl"):
        hub.repositories["org/evil"] = ({name: b"{}"}, None)
        with pytest.raises(InvalidRequest):
            list_source("hf://datasets/org/evil")
    for name in ("loader.py", "weights.pkl"):
        with pytest.raises(InvalidRequest):
            download(Item(name, 1, "", f"hf://datasets/org/name@{SHA}/{name}"), tmp_path / "x")


def test_the_hubs_errors_are_ours(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["org/name"] = ({"a.jsonl": b"{}\n"}, None)
    for address in ("hf://datasets/org/missing", "hf://datasets/org/name@missing"):
        with pytest.raises(InvalidRequest) as caught:
            list_source(address)
        assert caught.value.code == "source_not_found"
    (item,) = list_source("hf://datasets/org/name")
    hub.shorter = 1
    with pytest.raises(StoreError):
        download(item, tmp_path / "x")
    hub.shorter = 0
    for status, code, expected in (
        (403, "GatedRepo", StoreDenied),
        (403, "", StoreDenied),
        (500, "", StoreUnavailable),
    ):
        hub.status, hub.error_code = status, code
        with pytest.raises(expected) as failed:
            list_source("hf://datasets/org/name")
        assert "secret" not in failed.value.message
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_is_not_there_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(StoreUnavailable):
        list_source("hf://datasets/org/name")


def test_words_of_splits_are_found_in_names() -> None:
    for name, split in {
        "train.jsonl": "train",
        "data/train-00000-of-00001.parquet": "train",
        "en/validation/0.parquet": "validation",
        "x_dev.csv": "validation",
        "test2.csv": "test",
        "latest.csv": "",
        "contest/a.csv": "",
        "train/test.csv": "test",
    }.items():
        assert sources._split_of(name) == split, name
