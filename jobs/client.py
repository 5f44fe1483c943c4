"""The typed client of the REST API: the CLI stands on it, and it is the Python SDK.

    from jobs.client import connect

    with connect() as client:  # PEFT_SERVICE_URL and PEFT_SERVICE_API_KEY, or the service that runs here
        file = client.upload(Path("train.jsonl"))
        job = client.submit({"model": "Qwen/Qwen3-0.6B", "training_file": file.id})
        for update in client.follow(job.id):
            print(update.job.status, update.job.progress)
        client.pull(update.job.fine_tuned_model, Path("adapter"))

Every error is one of `peft_service.errors`, as the service raised it. What the service answers beyond the
fields named here is kept and readable as an attribute.
"""

import hashlib
import json
import os
import random
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, ClassVar, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ConfigDict

from jobs.settings import Settings, load
from peft_service import errors
from peft_service.errors import InvalidRequest, NotAuthenticated, NotFound, PeftServiceError

FINAL = ("succeeded", "failed", "cancelled")
RETRIED = (408, 429, 500, 502, 503, 504)
LONGEST_WAIT_SECONDS = 30.0
PART_BYTES = 64 << 20
"""Files larger than four of these go up in parts: a lost connection then costs one part."""
ANSWER_SECONDS = 600
"""An upload is checked line by line before it is answered."""
IMPORT_SECONDS = 7200
"""The service answers when it has brought all of a data set."""


class Unreachable(PeftServiceError):
    """Nothing that answers like this service is at the URL, or it is in trouble; a retry may help."""

    status: ClassVar[int] = 503
    default_code: ClassVar[str] = "service_unreachable"


class Answer(BaseModel):
    """An object of the API. Fields that a newer service adds are kept."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())


class File(Answer):
    id: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    status: str = "processed"


class Job(Answer):
    id: str
    model: str
    status: str
    created_at: int
    training_file: str
    validation_file: str | None = None
    name: str | None = None
    started_at: int | None = None
    finished_at: int | None = None
    estimated_finish: int | None = None
    fine_tuned_model: str | None = None
    trained_tokens: int | None = None
    seed: int | None = None
    error: dict[str, Any] | None = None
    hyperparameters: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    result_files: list[str] = []
    phase: str | None = None
    status_reason: str | None = None
    queue: dict[str, Any] | None = None
    progress: dict[str, Any] | None = None
    plan: dict[str, Any] | None = None
    adapter: dict[str, Any] | None = None
    method: dict[str, Any] | None = None
    objective: dict[str, Any] | None = None
    attempt: int | None = None
    priority: int | None = None

    @property
    def adapter_id(self) -> str | None:
        """Of the adapter it has published, once it has."""
        return (self.adapter or {}).get("id")

    @property
    def final(self) -> bool:
        """Nothing will change it any more."""
        return self.status in FINAL


class Event(Answer):
    id: str
    created_at: int
    level: str
    message: str
    type: str = "message"
    data: dict[str, Any] | None = None


class Checkpoint(Answer):
    id: str
    created_at: int
    step_number: int
    fine_tuned_model_checkpoint: str
    metrics: dict[str, Any] = {}


class Model(Answer):
    id: str
    created: int
    owned_by: str


class BaseInfo(Answer):
    """A base model that jobs may name."""

    id: str
    uri: str
    parameters: int
    context_length: int | None = None


class MethodInfo(Answer):
    """A fine-tuning method; `defaults` and `schema` of its fields are among what the service adds."""

    kind: str
    title: str = ""
    family: str = ""
    paper: str = ""
    summary: str = ""
    capabilities: dict[str, Any] = {}


class ObjectiveInfo(Answer):
    """What a job can minimise; `defaults` and `schema` of its values are among what the service adds."""

    kind: str
    names: list[str] = []
    summary: str = ""
    formula: str = ""
    paper: str = ""
    measure: str = ""
    formats: list[str] = []


class OperationInfo(Answer):
    """Something that can be done to adapters; its `schema` is among what the service adds."""

    kind: str
    exact: bool
    summary: str = ""
    ways: list[dict[str, Any]] = []


class Adapter(Answer):
    id: str
    name: str
    version: int
    reference: str
    """`name@version`"""
    model: str | None = None
    """Its name among the models: `ft:…`."""
    base: str
    method: str
    job: str
    url: str
    """Where it lies in the bucket."""
    digest: str
    metrics: dict[str, Any] = {}
    bytes: int
    created_at: int


class AdapterFile(Answer):
    path: str
    bytes: int
    sha256: str


class Preflight(Answer):
    """What a job would be; nothing was started."""

    plan: dict[str, Any] | None = None
    """None: the cluster has not reported its nodes yet."""
    arithmetic: list[str] = []
    objective: dict[str, Any] = {}
    rows: int | None = None
    steps: int | None = None
    reasons: dict[str, str] = {}
    warnings: list[str] = []


class Preview(Answer):
    """Rows as a job would train on them."""

    rows: list[dict[str, Any]]
    """Each with its line, what happened to it, its problems, and its sequences of tokens."""
    statistics: dict[str, Any] | None = None
    warnings: list[str] = []


@dataclass(frozen=True)
class Update:
    """One look at a job that is being followed."""

    job: Job
    events: list[Event]
    """New since the last look, oldest first."""
    problem: str | None = None
    """Why `job` is the state of an earlier look: the service does not answer just now."""


Kind = TypeVar("Kind", bound=Answer)


def connect(settings: Settings | None = None) -> "Client":
    """The client for the service that the environment names, else for the one that `up` started here.

    Raises:
        Unreachable: no URL is set, and no service was started from this data directory.
        NotAuthenticated: a URL is set, but no key.
    """
    settings = settings or load()
    url, key = settings.url, settings.api_key
    if url is None:
        url = _local_url(settings)
        key_file = settings.data_dir / "key"
        key = key or (key_file.read_text().strip() if key_file.is_file() else None)
        if key is None:
            raise Unreachable(
                f"no service was started from {settings.data_dir}: `peft-service up` starts one there, "
                "PEFT_SERVICE_URL and PEFT_SERVICE_API_KEY name another"
            )
    if key is None:
        raise NotAuthenticated(
            f"no API key for {url}: set PEFT_SERVICE_API_KEY; `peft-service keys create` makes one"
        )
    return Client(url, key)


class Client:
    """Blocking and thread safe. Close it, or use it as a context manager.

    Connection errors, 429 and 5xx are tried again (`retries` times, with backoff and what `retry-after`
    says); a POST carries an Idempotency-Key, so that a retry never makes a second job.
    """

    def __init__(self, url: str, key: str, *, retries: int = 4) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.retries = retries
        self._http = httpx.Client(
            base_url=f"{self.url}/v1/",
            headers={"Authorization": f"Bearer {key}", "User-Agent": "peft-service-client"},
            timeout=httpx.Timeout(30, read=120),
            # A presigned download is a redirect to another host; httpx drops the key on the way there.
            follow_redirects=True,
        )

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------ files

    def upload(self, path: Path, purpose: str = "fine-tune") -> File:
        """Store a file; the service checks every line of it.

        Raises:
            InvalidTrainingFile: `details["errors"]` lists the bad lines (100 at most), `error_count` counts.
        """
        if not path.is_file():
            raise InvalidRequest(f"{path} is not a file", param="file")
        if path.stat().st_size > 4 * PART_BYTES:
            return self._upload_in_parts(path, purpose)
        with path.open("rb") as stream:
            body = self._send_file("files", {"purpose": purpose}, "file", path.name, stream)
        return File.model_validate(body)

    def _upload_in_parts(self, path: Path, purpose: str) -> File:
        size = path.stat().st_size
        upload = self._json(
            "POST",
            "uploads",
            {"bytes": size, "filename": path.name, "mime_type": "text/jsonl", "purpose": purpose},
        )
        parts = []
        with path.open("rb") as stream, tempfile.TemporaryFile() as part:
            for _ in range(0, size, PART_BYTES):
                part.seek(0)
                part.truncate()
                _copy(stream, part, PART_BYTES)
                part.seek(0)
                answer = self._send_file(f"uploads/{upload['id']}/parts", {}, "data", "upload", part)
                parts.append(answer["id"])
        done = self._json("POST", f"uploads/{upload['id']}/complete", {"part_ids": parts})
        return File.model_validate(done["file"])

    def import_file(self, uri: str) -> File:
        """Have the service bring a data set from `s3://`, `file://`, `hf://datasets/…` or `https://`."""

        def request() -> httpx.Request:
            timeout = httpx.Timeout(30, read=IMPORT_SECONDS)
            return self._http.build_request("POST", "files/import", json={"uri": uri}, timeout=timeout)

        return File.model_validate(_object(self._send(request)))

    def files(self, purpose: str | None = None) -> Iterator[File]:
        """Newest first."""
        return self._pages(File, "files", {"purpose": purpose})

    def file(self, file_id: str) -> File:
        return File.model_validate(self._json("GET", f"files/{quote(file_id, safe='')}"))

    def delete_file(self, file_id: str) -> None:
        self._json("DELETE", f"files/{quote(file_id, safe='')}")

    def content(self, file_id: str) -> Iterator[bytes]:
        """The bytes of a file, in chunks."""
        with self._stream(f"files/{quote(file_id, safe='')}/content") as response:
            yield from response.iter_bytes()

    # ------------------------------------------------------------------------------------------------- jobs

    def preflight(self, body: Mapping[str, Any]) -> Preflight:
        """The plan for this job, its arithmetic and what its data is; nothing is started."""
        return Preflight.model_validate(self._json("POST", "preflight", dict(body)))

    def preview(self, body: Mapping[str, Any]) -> Preview:
        """Rows as this job would train on them; `body["preview"]` says which. Nothing is started."""
        return Preview.model_validate(self._json("POST", "preview", dict(body)))

    def preview_page(self, body: Mapping[str, Any]) -> str:
        """`preview` as a page of HTML."""

        def request() -> httpx.Request:
            return self._http.build_request(
                "POST", "preview", json=dict(body), headers={"accept": "text/html"}
            )

        return self._send(request).text

    def submit(self, body: Mapping[str, Any]) -> Job:
        """Create a job; `body` is that of `POST /v1/fine_tuning/jobs`."""
        return Job.model_validate(self._json("POST", "fine_tuning/jobs", dict(body)))

    def jobs(self, metadata: Mapping[str, str] | None = None) -> Iterator[Job]:
        """Newest first."""
        query = {f"metadata[{key}]": value for key, value in (metadata or {}).items()}
        return self._pages(Job, "fine_tuning/jobs", {"limit": 100, **query})

    def job(self, job_id: str) -> Job:
        return Job.model_validate(self._json("GET", _job(job_id)))

    def cancel(self, job_id: str) -> Job:
        return Job.model_validate(self._json("POST", f"{_job(job_id)}/cancel"))

    def pause(self, job_id: str) -> Job:
        return Job.model_validate(self._json("POST", f"{_job(job_id)}/pause"))

    def resume(self, job_id: str) -> Job:
        return Job.model_validate(self._json("POST", f"{_job(job_id)}/resume"))

    def events(self, job_id: str) -> Iterator[Event]:
        """Newest first."""
        return self._pages(Event, f"{_job(job_id)}/events", {"limit": 100})

    def checkpoints(self, job_id: str) -> Iterator[Checkpoint]:
        """Newest first."""
        return self._pages(Checkpoint, f"{_job(job_id)}/checkpoints", {"limit": 100})

    def log(self, job_id: str, attempt: int | None = None) -> str:
        """What an attempt (default: the newest) has printed so far."""
        query = {} if attempt is None else {"attempt": attempt}
        return self._send(lambda: self._http.build_request("GET", f"{_job(job_id)}/logs", params=query)).text

    def follow(self, job_id: str, *, poll: float = 0.5, patience: float = 900) -> Iterator[Update]:
        """Look at a job every `poll` seconds until it is final; every event is seen once.

        A service that is restarted does not end it: the job goes on, and so does this.

        Raises:
            Unreachable: the service has not answered for `patience` seconds.
        """
        job, seen, silent_since = self.job(job_id), "", 0.0
        while True:
            try:
                # The job before its events: when it is final, all its events exist.
                job = self.job(job_id)
                events = self._events_since(job_id, seen)
            except Unreachable as error:
                silent_since = silent_since or time.monotonic()
                if time.monotonic() - silent_since > patience:
                    raise
                yield Update(job, [], error.message)
            else:
                silent_since = 0.0
                seen = events[-1].id if events else seen
                yield Update(job, events)
                if job.final:
                    return
            time.sleep(poll)

    def _events_since(self, job_id: str, seen: str) -> list[Event]:
        new = []
        for event in self.events(job_id):
            if event.id == seen:
                break
            new.append(event)
        return new[::-1]

    # ----------------------------------------------------------------------------------- models and adapters

    def models(self) -> Iterator[Model]:
        """Bases and fine-tuned models that may be named in a request."""
        return self._pages(Model, "models", {})

    def delete_model(self, model: str) -> None:
        self._json("DELETE", f"models/{quote(model, safe='')}")

    def base_models(self) -> Iterator[BaseInfo]:
        return self._pages(BaseInfo, "base_models", {})

    def register_base(self, base_id: str, uri: str) -> BaseInfo:
        """Make the safetensors at `uri` a base that jobs may name; the service looks at them first."""
        return BaseInfo.model_validate(self._json("POST", "base_models", {"id": base_id, "uri": uri}))

    def methods(self) -> Iterator[MethodInfo]:
        return self._pages(MethodInfo, "methods", {})

    def objectives(self) -> Iterator[ObjectiveInfo]:
        return self._pages(ObjectiveInfo, "objectives", {})

    def operations(self) -> Iterator[OperationInfo]:
        return self._pages(OperationInfo, "operations", {})

    def operate(self, body: Mapping[str, Any]) -> Job:
        """Start an operation on adapters; `body` is that of `POST /v1/adapters/operations`."""
        return Job.model_validate(self._json("POST", "adapters/operations", dict(body)))

    def adapters(
        self,
        name: str | None = None,
        *,
        base: str | None = None,
        method: str | None = None,
        job: str | None = None,
    ) -> Iterator[Adapter]:
        """Newest first."""
        query = {"name": name, "base": base, "method": method, "job": job, "limit": 100}
        return self._pages(Adapter, "adapters", query)

    def adapter(self, reference: str) -> Adapter:
        """By id, `name` (its newest version), `name@version`, model name (`ft:…`) or job (`ftjob-…`).

        Raises:
            NotFound
        """
        if reference.startswith("ftjob-"):
            made = self.job(reference)
            if made.adapter_id is None:
                raise NotFound(f"{reference} is {made.status} and has published no adapter", param="adapter")
            reference = made.adapter_id
        return Adapter.model_validate(self._json("GET", f"adapters/{quote(reference, safe='')}"))

    def adapter_files(self, adapter_id: str) -> list[AdapterFile]:
        return list(self._pages(AdapterFile, f"adapters/{quote(adapter_id, safe='')}/files", {}))

    def pull(self, adapter: str, directory: Path, progress: Callable[[int, int], None] | None = None) -> Path:
        """Download an adapter into `directory` and prove every byte; there is all of it, or nothing.

        Args:
            progress: called with bytes so far and bytes in all.

        Raises:
            InvalidRequest: `directory` exists, or the adapter names a file outside of it.
            ChecksumMismatch: a file is not what the manifest says; nothing is left behind.
        """
        if directory.exists():
            raise InvalidRequest(
                f"{directory} exists already; give a directory that does not", param="directory"
            )
        found = self.adapter(adapter)
        files = self.adapter_files(found.id)
        for file in files:
            check_inside(file.path)
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        try:
            done, total = 0, sum(file.bytes for file in files)
            for file in files:
                for size in self._download(found.id, file, staging):
                    done += size
                    if progress is not None:
                        progress(done, total)
            verify(staging)
            staging.chmod(0o755)
            os.rename(staging, directory)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        return directory

    def _download(self, adapter_id: str, file: AdapterFile, directory: Path) -> Iterator[int]:
        target = directory / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        address = f"adapters/{quote(adapter_id, safe='')}/files/{quote(file.path)}"
        digest = hashlib.sha256()
        with self._stream(address) as response, target.open("wb") as out:
            for chunk in response.iter_bytes(1 << 20):
                digest.update(chunk)
                out.write(chunk)
                yield len(chunk)
        if digest.hexdigest() != file.sha256:
            raise ChecksumMismatch(
                f"{file.path} arrived with sha256 {digest.hexdigest()}, "
                f"but {file.sha256} was announced; pull again"
            )

    # --------------------------------------------------------------------------------------------- transport

    def _pages(self, kind: type[Kind], path: str, query: Mapping[str, Any]) -> Iterator[Kind]:
        given = {key: value for key, value in query.items() if value is not None}
        after: str | None = None
        while True:
            page = self._json("GET", path, query={**given, **({"after": after} if after else {})})
            for item in page["data"]:
                yield kind.model_validate(item)
            if not page.get("has_more") or not page["data"]:
                return
            after = page["data"][-1]["id"]

    def _json(
        self, method: str, path: str, body: Any = None, query: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        key = {"Idempotency-Key": uuid.uuid4().hex} if method == "POST" else {}

        def request() -> httpx.Request:
            return self._http.build_request(method, path, json=body, params=query, headers=key)

        response = self._send(request)
        return _object(response)

    def _send_file(
        self, path: str, form: Mapping[str, str], field: str, name: str, stream: IO[bytes]
    ) -> dict[str, Any]:
        key = {"Idempotency-Key": uuid.uuid4().hex}

        def request() -> httpx.Request:
            stream.seek(0)
            return self._http.build_request(
                "POST",
                path,
                data=dict(form),
                files={field: (name, stream, "application/octet-stream")},
                headers=key,
                timeout=ANSWER_SECONDS,
            )

        return _object(self._send(request))

    @contextmanager
    def _stream(self, path: str) -> Iterator[httpx.Response]:
        response = self._send(lambda: self._http.build_request("GET", path), stream=True)
        try:
            yield response
        except httpx.TransportError as error:
            raise Unreachable(f"the download from {self.url} broke off: {error}") from error
        finally:
            response.close()

    def _send(self, request: Callable[[], httpx.Request], *, stream: bool = False) -> httpx.Response:
        """The answer, if it is a success; `request` builds the same request anew for every try."""
        for attempt in range(self.retries + 1):
            try:
                asked = request()
                if attempt:  # the header by which OpenAI's client says it: a repeated cancel is no conflict
                    asked.headers["x-stainless-retry-count"] = str(attempt)
                response = self._http.send(asked, stream=stream)
            except httpx.TransportError as error:
                if attempt == self.retries:
                    raise Unreachable(
                        f"{self.url} cannot be reached ({_reason(error)}); is the service up? "
                        "`peft-service up` starts one here, PEFT_SERVICE_URL names another"
                    ) from error
                time.sleep(_backoff(attempt, None))
                continue
            if response.is_success:
                return response
            response.read()
            response.close()
            again = response.status_code in RETRIED and response.headers.get("x-should-retry") != "false"
            if not again or attempt == self.retries:
                raise error_of(response)
            time.sleep(_backoff(attempt, response.headers.get("retry-after")))
        raise AssertionError("the last try returns or raises")


class ChecksumMismatch(PeftServiceError):
    """What arrived is not what was published."""

    default_code: ClassVar[str] = "checksum_mismatch"


def check_inside(path: str) -> None:
    """Refuse a name that would be written outside of the directory it belongs in.

    Raises:
        InvalidRequest
    """
    parts = PurePosixPath(path).parts
    plain = parts and "\\" not in path and "\0" not in path and ":" not in path
    if not plain or path.startswith("/") or ".." in parts or str(PurePosixPath(path)) != path:
        raise InvalidRequest(f"the adapter names a file {path!r}, which is no plain path inside it; refused")


def verify(directory: Path) -> dict[str, Any]:
    """Prove an adapter's directory against its own manifest.json and SHA256SUMS; returns the manifest.

    Raises:
        ChecksumMismatch: a file is missing, added or changed, or the two lists differ.
    """
    manifest_file = directory / "manifest.json"
    if not manifest_file.is_file():
        raise ChecksumMismatch(f"{directory} has no manifest.json: it is no published adapter")
    manifest: dict[str, Any] = json.loads(manifest_file.read_bytes())
    listed = {file["path"]: file["sha256"] for file in manifest["files"]}
    sums = directory / "SHA256SUMS"
    if sums.is_file():
        lines = (line.split(None, 1) for line in sums.read_text().splitlines() if line.strip())
        for digest, name in lines:
            if listed.setdefault(name.lstrip("*"), digest) != digest:
                raise ChecksumMismatch(f"manifest.json and SHA256SUMS differ about {name}")
    for name, digest in listed.items():
        check_inside(name)
        path = directory / name
        if not path.is_file():
            raise ChecksumMismatch(f"{name} is in the manifest but not in {directory}")
        with path.open("rb") as stream:
            actual = hashlib.file_digest(stream, "sha256").hexdigest()
        if actual != digest:
            raise ChecksumMismatch(f"{name} has sha256 {actual}, but the manifest says {digest}")
    here = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    unknown = here - listed.keys() - {"manifest.json", "SHA256SUMS"}
    if unknown:
        raise ChecksumMismatch(f"{sorted(unknown)[0]} is in {directory} but not in the manifest")
    return manifest


def error_of(response: httpx.Response) -> PeftServiceError:
    """The exception that the service raised, from its envelope."""
    status, request_id = response.status_code, response.headers.get("x-request-id")
    try:
        envelope = response.json()["error"]
        message = str(envelope["message"])
    except (ValueError, KeyError, TypeError):
        known = InvalidRequest if 400 <= status < 500 else Unreachable
        return known(
            f"{response.request.url} answered {status} and not in our format: is a peft-service at this URL?",
            code="unexpected_answer",
        )
    code = envelope.get("code")
    rest = {key: value for key, value in envelope.items() if key not in ("message", "type", "param", "code")}
    if request_id:
        rest["request_id"] = request_id
    return _class_of(status, code)(message, code=code, param=envelope.get("param"), details=rest)


def _class_of(status: int, code: str | None) -> type[PeftServiceError]:
    def tree(kind: type[PeftServiceError]) -> Iterator[type[PeftServiceError]]:
        yield kind
        for below in kind.__subclasses__():
            yield from tree(below)

    known = [kind for kind in tree(PeftServiceError) if kind.__module__ == errors.__name__]
    for kind in known:
        if kind.status == status and kind.default_code == code:
            return kind
    if status >= 500:
        return Unreachable
    return next((kind for kind in known if kind.status == status), InvalidRequest)


def _object(response: httpx.Response) -> dict[str, Any]:
    try:
        value = response.json()
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise Unreachable(
            f"{response.request.url} answered without a JSON object: is a peft-service at this URL?"
        )
    return value


def _reason(error: httpx.TransportError) -> str:
    return str(error) or type(error).__name__


def _backoff(attempt: int, asked: str | None) -> float:
    """Seconds; a quarter of it is random, so that clients that failed together do not return together."""
    try:
        if asked is not None:
            return min(LONGEST_WAIT_SECONDS, max(0.0, float(asked)))
    except ValueError:
        pass  # a date: our service sends seconds
    return min(8.0, 0.25 * 2.0**attempt) * random.uniform(0.75, 1)


def _copy(source: IO[bytes], target: IO[bytes], size: int) -> None:
    while size > 0 and (chunk := source.read(min(size, 1 << 20))):
        target.write(chunk)
        size -= len(chunk)


def _local_url(settings: Settings) -> str:
    """Where `up` said it serves; its port may have been a free one."""
    state = settings.data_dir / "up.json"
    if state.is_file():
        return str(json.loads(state.read_text())["url"])
    return f"http://{settings.host}:{settings.port}"


def _job(job_id: str) -> str:
    return f"fine_tuning/jobs/{quote(job_id, safe='')}"
