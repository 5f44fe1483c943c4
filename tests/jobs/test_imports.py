"""Data sets brought from elsewhere: the same data once, checked like an upload, and never from where it must
not come."""

import datetime
import hashlib
import io
import ipaddress
import json
import socket
import ssl
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from jobs import files, https, imports
from jobs.caller import Caller
from jobs.client import Client
from jobs.https import is_public, place_of
from jobs.settings import Settings
from peft_service.errors import (
    InvalidRequest,
    InvalidTrainingFile,
    NotFound,
    NotPermitted,
    PeftServiceError,
    TooLarge,
)
from peft_service.store import open_store
from tests import servers
from tests.jobs.serving import Service, serving


def rows(first: int, count: int = 12) -> bytes:
    lines = [{"prompt": f"{n} and one?", "completion": str(n + 1)} for n in range(first, first + count)]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("service")) as service:
        yield service


@pytest.fixture
def caller(service: Service, tmp_path: Path) -> Callable[..., Caller]:
    def make(project: str = "a", **settings: Any) -> Caller:
        made = Settings(data_dir=service.settings.data_dir, **settings)
        return Caller(made, service.engine, service.store, None, project)

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set of two files of JSON Lines and one table, and a file that is no data."""
    made = tmp_path / "data" / "sums"
    (made / "more").mkdir(parents=True)
    (made / "a.jsonl").write_bytes(rows(0))
    (made / "b.jsonl").write_bytes(rows(100))
    table = "prompt,completion\n" + "".join(f"{n} and one?,{n + 1}\n" for n in range(200, 212))
    (made / "more" / "c.csv").write_text(table)
    (made / "README.md").write_text("# sums")
    return made


def test_a_folder_is_one_file_of_many_parts_and_is_brought_once(
    caller: Callable[..., Caller], folder: Path, service: Service
) -> None:
    asks = caller(data_allow=(str(folder.parent),))
    row = imports.bring(asks, folder.as_uri())
    assert (row.format, row.rows, row.purpose, row.status) == (
        "prompt_completion", 36, "fine-tune", "processed",
    )  # fmt: skip
    assert [part.name for part in row.parts] == ["a.jsonl", "b.jsonl", "more/c.csv"]
    sums = ""
    for part in row.parts:
        data = (folder / part.name).read_bytes()
        assert service.store.get(part.key) == data
        assert part.key.startswith(f"a/files/{row.id}/")
        assert (part.sha256, part.bytes) == (hashlib.sha256(data).hexdigest(), len(data))
        sums += part.sha256 + "\n"
    assert row.sha256 == hashlib.sha256(sums.encode()).hexdigest()
    assert row.bytes == sum(part.bytes for part in row.parts)
    assert row.data.objects == row.parts
    assert row.report is not None
    assert row.report["source"]["uri"] == folder.as_uri()
    assert not list(asks.incoming.glob("import-*"))

    assert imports.bring(asks, folder.as_uri()).id == row.id
    assert imports.bring(caller("b", data_allow=(str(folder.parent),)), folder.as_uri()).id != row.id
    (folder / "b.jsonl").write_bytes(rows(500))
    assert imports.bring(asks, folder.as_uri()).id != row.id


def test_a_pattern_chooses_and_one_file_is_like_an_upload(
    caller: Callable[..., Caller], folder: Path, service: Service
) -> None:
    asks = caller(data_allow=(str(folder.parent),))
    row = imports.bring(asks, f"{folder.as_uri()}/a.jsonl", expires_after=3600)
    assert (row.filename, row.rows) == ("a.jsonl", 12)
    assert row.sha256 == hashlib.sha256(rows(0)).hexdigest()
    assert service.store.get(row.key) == rows(0)
    assert row.expires_at is not None
    both = imports.bring(asks, f"{folder.as_uri()}/*.jsonl")
    assert [part.name for part in both.parts] == ["a.jsonl", "b.jsonl"]


def test_deleting_takes_all_parts_and_the_data_can_come_again(
    caller: Callable[..., Caller], folder: Path, service: Service
) -> None:
    asks = caller(data_allow=(str(folder.parent),))
    row = imports.bring(asks, folder.as_uri())
    files.remove(service.engine, service.store, "a", row.id)
    assert list(service.store.list(f"a/files/{row.id}")) == []
    with pytest.raises(NotFound):
        files.get(service.engine, "a", row.id)
    again = imports.bring(asks, folder.as_uri())
    assert again.id != row.id
    assert service.store.get(again.parts[1].key) == rows(100)
    assert imports.bring(asks, folder.as_uri()).id == again.id


def test_bad_lines_of_all_files_are_in_one_report_and_nothing_is_kept(
    caller: Callable[..., Caller], folder: Path, service: Service
) -> None:
    asks, before = caller(data_allow=(str(folder.parent),)), service.contents()
    (folder / "a.jsonl").write_bytes(rows(0) + b'{"prompt": "x"}\n')
    (folder / "b.jsonl").write_bytes(rows(100) + b"{no json\n")
    with pytest.raises(InvalidTrainingFile) as caught:
        imports.bring(asks, folder.as_uri(), param="data.sources[0].file")
    assert caught.value.details["error_count"] == 2
    assert [error["line"] for error in caught.value.details["errors"]] == [13, 13]
    assert caught.value.param == "data.sources[0].file"
    assert service.contents() == before


def test_two_at_once_are_one_file(caller: Callable[..., Caller], folder: Path, service: Service) -> None:
    asks = caller(data_allow=(str(folder.parent),))
    start, found = threading.Barrier(4), []

    def bring() -> None:
        start.wait(30)
        found.append(imports.bring(asks, folder.as_uri()))

    threads = [threading.Thread(target=bring) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 4
    assert len({row.id for row in found}) == 1
    assert service.store.get(found[0].parts[0].key) == rows(0)


def test_rest_imports_downloads_a_tar_and_deletes(folder: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "other", data_allow=(str(folder.parent),)) as service:
        headers = {"authorization": f"Bearer {service.keys['a']}"}
        with httpx.Client(base_url=service.url, headers=headers, timeout=60) as http:
            answer = http.post("/files/import", json={"uri": folder.as_uri()})
            assert answer.status_code == 200, answer.text
            file = answer.json()
            content = http.get(f"/files/{file['id']}/content")
            assert len(content.content) == int(content.headers["content-length"])
            with tarfile.open(fileobj=io.BytesIO(content.content)) as tar:
                assert tar.getnames() == ["a.jsonl", "b.jsonl", "more/c.csv"]
                member = tar.extractfile("b.jsonl")
                assert member is not None
                assert member.read() == rows(100)
            assert [one["id"] for one in http.get("/files").json()["data"]] == [file["id"]]
            with Client(service.url, service.keys["a"]) as client:
                assert client.import_file(folder.as_uri()).id == file["id"]
                assert b"".join(client.content(file["id"])) == content.content
            assert http.delete(f"/files/{file['id']}").status_code == 200
            assert list(service.store.list("a/files/")) == []
            typo = http.post("/files/import", json={"ur": folder.as_uri()}).json()["error"]
            assert "uri" in typo["message"]


# --------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("uri", "code"),
    [
        ("ftp://host/x", "unknown_source"),
        ("http://host/x", "unknown_source"),
        ("file-0123", "unknown_source"),
        ("file:///etc/passwd", "source_not_readable"),
        ("https://example.com/x.jsonl", "host_not_allowed"),
    ],
)
def test_places_that_nobody_listed(caller: Callable[..., Caller], uri: str, code: str) -> None:
    with pytest.raises((InvalidRequest, NotPermitted)) as caught:
        imports.bring(caller(), uri, param="training_file")
    assert (caught.value.code, caught.value.param) == (code, "training_file")


def test_a_folder_is_not_left_by_dots_or_links(caller: Callable[..., Caller], folder: Path) -> None:
    asks = caller(data_allow=(str(folder),))
    secret = folder.parent / "secret.jsonl"
    secret.write_bytes(rows(0))
    (folder / "link.jsonl").symlink_to(secret)
    for uri in (
        f"{folder.as_uri()}/../secret.jsonl",
        f"{folder.as_uri()}/%2e%2e/secret.jsonl",
        f"{folder.as_uri()}/link.jsonl",
        f"{folder.parent.as_uri()}",
    ):
        with pytest.raises(InvalidRequest):
            imports.bring(asks, uri)
    assert "link.jsonl" not in [part.name for part in imports.bring(asks, folder.as_uri()).parts]


def test_the_services_own_store_is_no_source(
    caller: Callable[..., Caller], service: Service, tmp_path: Path
) -> None:
    asks = caller(data_allow=("/",))
    link = tmp_path / "innocent"
    link.symlink_to(service.settings.data_dir)
    for uri in (
        service.settings.store_url,
        f"{service.settings.store_url}/b/files/*",
        service.settings.data_dir.as_uri(),
        f"{link.as_uri()}/store/b",
        "file:///",
        "file:///*/**/*.jsonl",
    ):
        with pytest.raises(NotPermitted) as caught:
            imports.bring(asks, uri)
        assert caught.value.code == "source_not_allowed"


def test_the_operators_prefixes_hold(caller: Callable[..., Caller]) -> None:
    asks = caller(data_allow=("s3://team/public", "hf://datasets/team/"))
    for uri in ("s3://team/publications/x", "s3://other/x", "hf://datasets/teams/x"):
        with pytest.raises(NotPermitted) as caught:
            imports.bring(asks, uri)
        assert caught.value.code == "source_not_allowed"


def test_too_much_is_refused_before_it_is_copied(caller: Callable[..., Caller], folder: Path) -> None:
    asks = caller(data_allow=(str(folder),), max_source_bytes=1000)
    with pytest.raises(TooLarge) as caught:
        imports.bring(asks, folder.as_uri(), param="uri")
    assert "1,000" in caught.value.message


# --------------------------------------------------------------------------------------------------- s3


@pytest.mark.s3
@pytest.mark.parametrize("kind", ["s3_swift", "s3_ceph"])
def test_a_prefix_of_a_bucket(
    kind: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    caller: Callable[..., Caller],
    service: Service,
) -> None:
    server: servers.S3Server = request.getfixturevalue(kind)
    for name, value in server.env().items():
        monkeypatch.setenv(name, value)
    bucket = open_store(f"s3://{server.bucket()}")
    bucket.put("sets/one/a.jsonl", rows(0))
    bucket.put("sets/one/b.jsonl", rows(100))
    bucket.put("sets/two.jsonl", rows(200))
    row = imports.bring(caller(), f"{bucket.url}/sets/one")
    assert ([part.name for part in row.parts], row.rows) == (["a.jsonl", "b.jsonl"], 24)
    assert b"".join(service.store.get(part.key) for part in row.parts) == rows(0) + rows(100)
    assert imports.bring(caller(), f"{bucket.url}/sets/one").id == row.id
    bucket.put("sets/one/b.jsonl", rows(300))  # as many bytes, another ETag
    changed = imports.bring(caller(), f"{bucket.url}/sets/one")
    assert changed.id != row.id
    assert service.store.get(changed.parts[1].key) == rows(300)
    assert imports.bring(caller(), f"{bucket.url}/**/two.jsonl").rows == 12
    with pytest.raises(InvalidRequest) as caught:
        imports.bring(caller(), f"{bucket.url}/nothing")
    assert caught.value.code == "no_data_files"
    with pytest.raises(InvalidRequest) as caught:
        imports.bring(caller(), "s3://no-such-bucket-anywhere/x")
    assert caught.value.code == "source_not_readable"
    near = replace(caller(), store=open_store(f"{bucket.url}/sets/one-more"))
    assert imports.bring(near, f"{bucket.url}/sets/one").rows == 24  # a name that begins alike is no overlap
    own = replace(caller(), store=open_store(f"{bucket.url}/service"))
    for uri in (bucket.url, f"{bucket.url}/", f"{bucket.url}/service/b/files", f"{bucket.url}/serv*/**"):
        with pytest.raises(NotPermitted):
            imports.bring(own, uri)


# ------------------------------------------------------------------------------------------------- https


class Web(BaseHTTPRequestHandler):
    """A few objects, and what a hostile server does."""

    protocol_version = "HTTP/1.1"
    served: list[str]
    data = rows(0)
    version = '"one"'

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.served.append(f"{self.headers['host']} {self.path}")
        path = self.path.partition("?")[0]
        answers: dict[str, Callable[[], None]] = {
            "/sums.jsonl": lambda: self._send(200, self.data, etag=self.version),
            "/plain.jsonl": lambda: self._send(200, self.data),
            "/moved": lambda: self._send(302, b"", location="/sums.jsonl"),
            "/away": lambda: self._send(302, b"", location="https://example.com/sums.jsonl"),
            "/inward": lambda: self._send(307, b"", location="https://169.254.169.254/latest"),
            "/downgrade": lambda: self._send(302, b"", location=f"http://{self.headers['host']}/sums.jsonl"),
            "/otherport": lambda: self._send(302, b"", location="https://localhost/sums.jsonl"),
            "/circle": lambda: self._send(302, b"", location="/circle"),
            "/login": lambda: self._send(401, b""),
            "/trouble": lambda: self._send(503, b""),
            "/broken.jsonl": lambda: self._send(200, b"{no json\n"),
            "/endless": self._endless,
            "/short": self._short,
        }
        answers.get(path, lambda: self._send(404, b""))()

    def _send(self, code: int, body: bytes, **headers: str) -> None:
        self.send_response(code)
        self.send_header("content-length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"x" * 65536)
        except OSError:
            self.close_connection = True

    def _short(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "1000")
        self.end_headers()
        self.wfile.write(b"{}")
        self.close_connection = True


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of localhost that signs itself, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = folder / "cert.pem", folder / "key.pem"
    cert_file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return cert_file, key_file


@contextmanager
def web_server(folder: Path) -> Iterator[tuple[type[Web], int, Path]]:
    cert, key = certificate(folder)

    class Handler(Web):
        served: list[str] = []  # noqa: RUF012 - one for each server

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Handler, server.server_address[1], cert
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[type[Web], int]]:
    """An https server of the name localhost, whose certificate is trusted."""
    with web_server(tmp_path) as (handler, port, cert):
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
        monkeypatch.setattr(socket, "getaddrinfo", only_version_4(socket.getaddrinfo))
        yield handler, port


def only_version_4(real: Any) -> Any:
    def found(*arguments: Any, **options: Any) -> Any:
        return [entry for entry in real(*arguments, **options) if entry[0] == socket.AF_INET]

    return found


def test_https_is_brought_once_and_again_when_it_changes(
    web: tuple[type[Web], int], caller: Callable[..., Caller], service: Service
) -> None:
    handler, port = web
    asks = caller(data_hosts=(f"localhost:{port}", "127.0.0.1"))
    url = f"https://localhost:{port}/sums.jsonl?version=2"
    row = imports.bring(asks, url)
    assert (row.filename, row.rows, row.format) == ("sums.jsonl", 12, "prompt_completion")
    assert service.store.get(row.key) == rows(0)
    assert handler.served == [
        f"localhost:{port} /sums.jsonl?version=2"
    ]  # the name, though the address was asked
    assert imports.bring(asks, url).id == row.id
    handler.data, handler.version = rows(7), '"two"'
    changed = imports.bring(asks, url)
    assert changed.id != row.id
    assert service.store.get(changed.key) == rows(7)
    plain = f"https://localhost:{port}/plain.jsonl"
    assert imports.bring(asks, plain).id == imports.bring(asks, plain).id
    assert imports.bring(asks, f"https://localhost:{port}/moved").rows == 12


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("away", "redirect_refused"),
        ("inward", "redirect_refused"),
        ("downgrade", "redirect_refused"),
        ("otherport", "redirect_refused"),
        ("circle", "invalid_request"),
        ("login", "source_refused"),
        ("nothing", "source_not_found"),
        ("trouble", "source_unavailable"),
        ("short", "source_unavailable"),
        ("endless", "too_large"),
        ("broken.jsonl", "invalid_training_file"),
    ],
)
def test_what_a_server_may_not_do(
    path: str, code: str, web: tuple[type[Web], int], caller: Callable[..., Caller], service: Service
) -> None:
    handler, port = web
    before = service.contents()
    asks = caller(data_hosts=(f"localhost:{port}", "127.0.0.1"), max_source_bytes=1 << 20)
    with pytest.raises(PeftServiceError) as caught:
        imports.bring(asks, f"https://localhost:{port}/{path}")
    assert caught.value.code == code
    assert all(said.startswith(f"localhost:{port} ") for said in handler.served)
    assert service.contents() == before
    assert not list(asks.incoming.glob("import-*"))


def test_an_announced_size_is_enough_to_refuse(
    web: tuple[type[Web], int], caller: Callable[..., Caller]
) -> None:
    asks = caller(data_hosts=(f"localhost:{web[1]}", "127.0.0.1"), max_source_bytes=100)
    with pytest.raises(TooLarge):
        imports.bring(asks, f"https://localhost:{web[1]}/sums.jsonl")


def test_a_slow_server_meets_a_deadline(web: tuple[type[Web], int]) -> None:
    url, hosts = f"https://localhost:{web[1]}/endless", (f"localhost:{web[1]}", "127.0.0.1")
    with (
        pytest.raises(https.SourceUnavailable) as caught,
        https.opened(url, hosts, most=1 << 40, seconds=0.2) as (_, chunks),
    ):
        for _ in chunks:
            pass
    assert caught.value.code == "source_too_slow"


def test_a_listed_name_of_a_private_address_is_refused(web: tuple[type[Web], int]) -> None:
    handler, port = web
    for hosts in ((f"localhost:{port}",), (f"localhost:{port}", "10.0.0.0/8")):
        with pytest.raises(NotPermitted) as caught:
            place_of(f"https://localhost:{port}/sums.jsonl", hosts)
        assert caught.value.code == "address_not_allowed"
    place = place_of(f"https://localhost:{port}/x", (f"localhost:{port}", "127.0.0.0/8"))
    assert (place.host, place.address) == ("localhost", "127.0.0.1")
    assert handler.served == []


def test_a_name_is_resolved_once_so_that_it_cannot_lead_elsewhere(
    web: tuple[type[Web], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS rebinding: the first answer is good, the second is not; only the first is ever used."""
    answers, real, asked = ["127.0.0.1", "127.0.0.9"], socket.getaddrinfo, []

    def lie(host: Any, port: Any, *arguments: Any, **options: Any) -> Any:
        if host == "localhost":
            asked.append(host)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answers[min(1, len(asked) - 1)], port))]
        return real(host, port, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", lie)
    hosts = (f"localhost:{web[1]}", "127.0.0.1")
    with https.opened(f"https://localhost:{web[1]}/sums.jsonl", hosts, most=1 << 20) as (_, chunks):
        assert b"".join(chunks) == rows(0)
    assert asked == ["localhost"]


def test_a_certificate_of_another_name_is_refused(
    web: tuple[type[Web], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = (f"127.0.0.1:{web[1]}", "127.0.0.1")  # the certificate is localhost's
    with (
        pytest.raises(https.SourceUnavailable),
        https.opened(f"https://127.0.0.1:{web[1]}/sums.jsonl", hosts, most=1 << 20),
    ):
        pass
    assert web[0].served == []


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("224.0.0.1", "255.255.255.255", "198.18.0.1", "240.0.0.1"),
        *("::1", "::", "fe80::1", "fc00::1", "ff02::1"),
    ],
)
def test_addresses_that_are_not_of_the_public_internet(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address",
    ["::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe"],
)
def test_version_6_does_not_hide_a_private_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, 443, 0, 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: answer)
    with pytest.raises(NotPermitted) as caught:
        place_of("https://data.example/x", ("data.example",))
    assert caught.value.code == "address_not_allowed"


def test_public_addresses_are_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.215.14", 443))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: answer)
    place = place_of("https://Data.Example./a/b.jsonl?x=1", ("data.example",))
    assert (place.host, place.port, place.path, place.name) == (
        "data.example", 443, "/a/b.jsonl?x=1", "b.jsonl",
    )  # fmt: skip


@pytest.mark.parametrize(
    "url",
    [
        "https://",
        "https://user:secret@data.example/x",
        "https://data.example:99999/x",
        "https://data.example/a b",
        "https://data.example/\r\nhost: x",
        "https://[::1/x",
    ],
)
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        place_of(url, ("data.example", "data.example:99999"))
    assert "secret" not in caught.value.message


def test_names_of_keys_are_plain() -> None:
    assert imports._plain("../../etc/passwd") == "_.._etc_passwd"
    assert imports._plain("a/b c\n.jsonl") == "a_b_c_.jsonl"
    assert imports._plain("..") == "data"
