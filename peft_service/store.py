"""The object store: files and S3-compatible buckets behind one small interface with the same promises.

What every store promises (`tests/peft_service/test_store.py` runs one suite on all of them):

- An object appears whole or not at all: a reader never sees half of an upload, however it ended.
- What is written can be read back at once, and has reached the disk (file://) or the server's promise (s3://).
- Memory stays constant: only `put` and `get` hold a whole object.
- Errors are the classes of `peft_service.errors`; `StoreUnavailable` is the only one worth a retry,
  and `patient()` does that retry.

What no store promises: `if_absent` as a lock. It is atomic on file://, on AWS and for single PUTs on Ceph.
But OpenStack Swift lets several of a tight race win, and Ceph ignores the condition when a multipart upload
completes. So a commit is decided in the database; `if_absent` is defence in depth.
"""

import contextlib
import errno
import logging
import os
import random
import re
import secrets
import shutil
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from peft_service.errors import (
    InvalidRequest,
    ObjectExists,
    ObjectNotFound,
    StoreDenied,
    StoreError,
    StoreUnavailable,
)

CHUNK = 1024 * 1024
"""Bytes per chunk of a stream, at most."""

RESERVED = ".tmp"
"""Folder of a file store where uploads are written before they are moved to their key."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ObjectInfo:
    key: str
    size: int
    """Bytes."""
    modified: float
    """Unix seconds; whole seconds on S3."""
    version: str = field(default="", compare=False)
    """Another one for other content: the ETag on S3, which one server may write differently in a listing."""


class Store(Protocol):
    """Objects under keys like `a/b/c` (see `check_key`), below one URL.

    Every method may raise StoreDenied and StoreUnavailable; what else it raises is said with it. A store may
    be used by several threads, after a fork, and may be pickled.
    """

    @property
    def url(self) -> str: ...

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        """Write one object, replacing what was there. Raises ObjectExists if `if_absent` and it is there."""

    def put_file(self, key: str, path: Path, *, if_absent: bool = False) -> None:
        """`put` of a file's bytes, streamed."""

    def get(self, key: str) -> bytes:
        """The whole object. Raises ObjectNotFound."""

    def read(self, key: str, start: int = 0, size: int | None = None) -> Iterator[bytes]:
        """Chunks of at most 1 MiB, from byte `start`, at most `size` bytes; nothing past the end.

        Raises ObjectNotFound at the call, not at the first chunk, so that a caller can still answer 404.
        """

    def download(self, key: str, path: Path) -> None:
        """Write the object to `path`, which appears whole or not at all. Raises ObjectNotFound."""

    def info(self, key: str) -> ObjectInfo | None: ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object whose key starts with the string `prefix`, sorted by key, fetched a page at a time."""

    def copy(self, source: str, target: str) -> None:
        """Copy without moving bytes through this process where the store can. Raises ObjectNotFound."""

    def delete(self, key: str) -> None:
        """Remove; an object that is not there is removed already."""

    def presign(self, key: str, seconds: int, filename: str | None = None) -> str | None:
        """A URL from which anyone can GET the object for `seconds` (at most 7 days), saved as `filename`.

        None: this store has no HTTP of its own. The object need not exist.
        """


def open_store(url: str) -> Store:
    """The store at `file:///dir` or `s3://bucket/prefix`. Opens no connection and creates nothing.

    S3 credentials and endpoint come from boto3's own chain (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`,
    `AWS_ENDPOINT_URL`, a profile, an instance role), never from the URL.
    """
    if url.startswith("file://"):
        return FileStore(url)
    if url.startswith("s3://"):
        return S3Store(url)
    raise InvalidRequest(
        f"store URL {_without_password(url)!r} is neither file:///directory nor s3://bucket/prefix",
        param="store_url",
    )


def check_key(key: str) -> str:
    """`key` itself, if every store can hold it under exactly this name.

    Raises:
        InvalidRequest: the key could leave the store, or could not be kept by one of the stores.
    """
    reason = _reason_against(key)
    if reason:
        raise InvalidRequest(
            f"object key {key!r} {reason}; a key is segments joined by '/', like 'runs/7/log.txt'",
            param="key",
        )
    return key


def _reason_against(key: str) -> str | None:
    if not key:
        return "is empty"
    try:
        encoded = key.encode()
    except UnicodeEncodeError:
        return "is not valid Unicode"
    if len(encoded) > 900:  # S3 allows 1024 with the store's own prefix
        return f"is {len(encoded)} bytes long, more than 900"
    if "\\" in key or any(ord(character) < 32 or ord(character) == 127 for character in key):
        return "contains a backslash or a control character"
    for segment in key.split("/"):
        if segment in ("", ".", ".."):
            return f"has the segment {segment!r}"
        if segment == RESERVED:
            return f"has the reserved segment {segment!r}"
        if len(segment.encode()) > 255:  # the limit of a file name
            return "has a segment longer than 255 bytes"
    return None


def _check_prefix(prefix: str) -> str:
    # A string prefix may end anywhere in a key: it is good if some key is it or starts with it.
    if prefix and _reason_against(prefix) and _reason_against(prefix + "x"):
        raise InvalidRequest(f"no object key can start with {prefix!r}", param="prefix")
    return prefix


def _check_range(start: int, size: int | None) -> None:
    if start < 0 or (size is not None and size < 0):
        raise InvalidRequest(f"cannot read {size} bytes from byte {start}: both must be at least 0")


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//…@", text)


class FileStore:
    """A directory. Objects are plain files, so other programs can read an adapter where it lies.

    A write goes to `<root>/.tmp/`, is fsynced, and is then renamed (or, with `if_absent`, linked) to its key;
    the folder is fsynced too. So the order of writes survives a power loss: whoever sees the manifest that
    was written last also sees the files it names. The root must be one filesystem with hard links.

    Unlike S3, a file system cannot hold both `a` and `a/b`: the second is a StoreError.
    """

    def __init__(self, url: str) -> None:
        path = urllib.parse.unquote(url.removeprefix("file://"))
        if not url.startswith("file:///") or "\0" in path:
            raise InvalidRequest(
                f"store URL {_without_password(url)!r} needs an absolute directory: file:///directory",
                param="store_url",
            )
        self.root = Path(os.path.normpath(path))
        self.url = self.root.as_uri()

    def __repr__(self) -> str:
        return f"FileStore({self.url!r})"

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        with self._writing(key, if_absent) as file:
            file.write(data)

    def put_file(self, key: str, path: Path, *, if_absent: bool = False) -> None:
        with path.open("rb") as source, self._writing(key, if_absent) as file:
            shutil.copyfileobj(source, file, CHUNK)

    def get(self, key: str) -> bytes:
        path = self._path(key)
        with self._errors(key):
            return path.read_bytes()

    def read(self, key: str, start: int = 0, size: int | None = None) -> Iterator[bytes]:
        _check_range(start, size)
        path = self._path(key)
        with self._errors(key):
            file = path.open("rb", buffering=0)
        return self._chunks(key, file, start, size)

    def _chunks(self, key: str, file: IO[bytes], start: int, size: int | None) -> Iterator[bytes]:
        with file, self._errors(key):
            file.seek(start)
            while chunk := file.read(CHUNK if size is None else min(CHUNK, size)):
                if size is not None:
                    size -= len(chunk)
                yield chunk

    def download(self, key: str, path: Path) -> None:
        _save(self.read(key), path)

    def info(self, key: str) -> ObjectInfo | None:
        path = self._path(key)
        try:
            with self._errors(key):
                stat = path.stat()
        except ObjectNotFound:
            return None
        version = f"{stat.st_mtime_ns}-{stat.st_ino}-{stat.st_size}"
        return ObjectInfo(key, stat.st_size, stat.st_mtime, version) if path.is_file() else None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        folder, _, _ = _check_prefix(prefix).rpartition("/")
        return self._walk(folder + "/" if folder else "", prefix)

    def _walk(self, folder: str, prefix: str) -> Iterator[ObjectInfo]:
        with self._errors(folder):
            try:
                with os.scandir(self.root / folder) as found:
                    # "a-b" sorts before "a/": a folder has to sort with its slash to give the order of keys.
                    names = sorted(
                        entry.name + "/" if entry.is_dir(follow_symlinks=False) else entry.name
                        for entry in found
                        if entry.name != RESERVED
                    )
            except (FileNotFoundError, NotADirectoryError):
                return
        for name in names:
            key = folder + name
            if name.endswith("/"):
                if key.startswith(prefix) or prefix.startswith(key):
                    yield from self._walk(key, prefix)
            elif key.startswith(prefix) and not _reason_against(key):
                info = self.info(key)
                if info:  # else it was deleted since
                    yield info

    def copy(self, source: str, target: str) -> None:
        path = self._path(source)
        check_key(target)
        with self._errors(source):
            original = path.open("rb")
        if source == target:
            original.close()
            return
        with original, self._writing(target, if_absent=False) as file:
            shutil.copyfileobj(original, file, CHUNK)

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            with self._errors(key):
                path.unlink()
        except ObjectNotFound:
            return
        # An empty folder would make its name unusable as a key.
        for folder in path.parents:
            if folder == self.root:
                break
            try:
                folder.rmdir()
            except OSError:
                break

    def presign(self, key: str, seconds: int, filename: str | None = None) -> str | None:
        check_key(key)
        return None

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    @contextlib.contextmanager
    def _writing(self, key: str, if_absent: bool) -> Iterator[IO[bytes]]:
        """A file to write; it becomes the object when the block ends, and vanishes if the block raises."""
        target = self._path(key)
        waiting = self.root / RESERVED
        temporary = waiting / secrets.token_hex(8)
        with self._errors(key):
            try:
                if not waiting.is_dir():
                    _make_folder(waiting)
                _remove_abandoned(waiting)
                with temporary.open("xb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                self._move(temporary, target, key, if_absent)
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink()

    def _move(self, temporary: Path, target: Path, key: str, if_absent: bool) -> None:
        while True:
            try:
                _make_folder(target.parent)
                if target.is_dir():
                    raise IsADirectoryError(errno.EISDIR, "is a folder", str(target))
                if if_absent:
                    os.link(temporary, target)
                else:
                    os.replace(temporary, target)
                _sync_folder(target.parent)
                return
            except FileNotFoundError:
                if not temporary.exists():
                    raise
                continue  # a delete removed the folder, empty at that moment, after we had made it
            except (NotADirectoryError, IsADirectoryError):
                raise StoreError(
                    f"cannot write {key!r} to {self.url}: one of its parts is both a folder and an object; "
                    "a file store cannot hold both, choose another key",
                    code="key_conflict",
                ) from None
            except FileExistsError:
                raise ObjectExists(f"{key!r} already exists in {self.url}; it was left as it is") from None

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise ObjectNotFound(f"there is no object {key!r} in {self.url}") from error
        except PermissionError as error:
            raise StoreDenied(
                f"no permission for {key!r} in {self.url}: {error.strerror}; "
                "give the user this process runs as read and write access to that directory"
            ) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                advice = "free some space there"
            else:
                advice = "check the disk or the mount"
            raise StoreUnavailable(f"{key!r} in {self.url}: {error.strerror or error}; {advice}") from error


def _make_folder(folder: Path) -> None:
    """mkdir -p that survives a power loss. Raises NotADirectoryError if a part of it is a file."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        try:
            each.mkdir(exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(errno.ENOTDIR, "is a file", str(each)) from None
        _sync_folder(each.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(waiting: Path) -> None:
    """Remove what writers that were killed left behind, so that it does not fill the disk."""
    long_ago = time.time() - 24 * 3600
    for path in waiting.iterdir():
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < long_ago:
                path.unlink()


def _save(chunks: Iterable[bytes], path: Path) -> None:
    """Write `chunks` to the local file `path`, which appears whole or not at all."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


class S3Store:
    """A bucket, or the part of it below a prefix, on AWS or any S3-compatible server.

    The client is made when it is first needed, once in each process: a forked child must not talk on its
    parent's connections, and a pickled store is nothing but its URL.
    """

    page_size = 1000
    """Keys per page of a listing, the most that S3 gives."""
    part_size = 8 * 1024 * 1024
    """Bytes per part of an upload, at least: a larger file is sent in several parts (S3 allows 10,000)."""
    copy_size = 1024**3
    """A larger object is copied in parts of this many bytes. S3 asks for parts above 5 GiB only; but a server
    may answer when all is copied, and one request has to fit into the read timeout."""

    def __init__(self, url: str) -> None:
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        prefix = prefix.rstrip("/")
        if not url.startswith("s3://") or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{2,254}", bucket):
            raise InvalidRequest(
                f"store URL {_without_password(url)!r} is not s3://bucket/prefix; endpoint and "
                "credentials come from AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
                param="store_url",
            )
        self.bucket = bucket
        self._root = check_key(prefix) + "/" if prefix else ""
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._made: tuple[int, Any] | None = None
        self._bucket_seen = False

    def __repr__(self) -> str:
        return f"S3Store({self.url!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Store, (self.url,)

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        place, condition = self._place(key), {"IfNoneMatch": "*"} if if_absent else {}
        try:
            with self._errors(key) as client:
                client.put_object(**place, Body=data, **condition)
        except ObjectExists as error:
            # botocore tries again by itself: then what exists may be what the first try wrote.
            if not (_retried(error) and self.get(key) == data):
                raise

    def put_file(self, key: str, path: Path, *, if_absent: bool = False) -> None:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= self.part_size:
                self.put(key, file.read(), if_absent=if_absent)
                return
            parts = _parts(size, max(self.part_size, -(-size // 10_000)))

            def send(client: Any, where: dict[str, Any], start: int, end: int) -> str:
                data = os.pread(file.fileno(), end - start, start)
                if len(data) != end - start:
                    raise InvalidRequest(f"{path} became shorter while it was uploaded to {key!r}")
                return str(client.upload_part(**where, Body=data)["ETag"])

            self._in_parts(key, parts, send, if_absent)

    def get(self, key: str) -> bytes:
        place = self._place(key)
        with self._errors(key) as client, contextlib.closing(client.get_object(**place)["Body"]) as body:
            return bytes(body.read())

    def read(self, key: str, start: int = 0, size: int | None = None) -> Iterator[bytes]:
        _check_range(start, size)
        place = self._place(key)
        if size == 0:  # an HTTP range cannot be empty
            if self.info(key) is None:
                raise ObjectNotFound(f"there is no object {key!r} in {self.url}")
            return iter(())
        if start or size is not None:
            place["Range"] = f"bytes={start}-" if size is None else f"bytes={start}-{start + size - 1}"
        try:
            with self._errors(key) as client:
                body = client.get_object(**place)["Body"]
        except StoreError as error:
            if _response(error).get("HTTPStatusCode") == 416:  # it starts after the end
                return iter(())
            raise
        return self._chunks(key, body)

    def _chunks(self, key: str, body: Any) -> Iterator[bytes]:
        with self._errors(key), contextlib.closing(body):
            while chunk := body.read(CHUNK):
                yield chunk

    def download(self, key: str, path: Path) -> None:
        _save(self.read(key), path)

    def info(self, key: str) -> ObjectInfo | None:
        place = self._place(key)
        try:
            with self._errors(key) as client:
                head = client.head_object(**place)
        except ObjectNotFound:
            # The answer to a HEAD has no body, so it does not say whether it is the bucket that is missing.
            if not self._bucket_seen:
                with self._errors("") as client:
                    client.head_bucket(Bucket=self.bucket)
                self._bucket_seen = True
            return None
        return ObjectInfo(key, head["ContentLength"], _seconds(head["LastModified"]), head.get("ETag", ""))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return self._pages(_check_prefix(prefix))

    def _pages(self, prefix: str) -> Iterator[ObjectInfo]:
        with self._errors(prefix) as client:
            pages = iter(
                client.get_paginator("list_objects_v2").paginate(
                    Bucket=self.bucket,
                    Prefix=self._root + prefix,
                    PaginationConfig={"PageSize": self.page_size},
                )
            )
        while True:
            with self._errors(prefix):
                page = next(pages, None)
            if page is None:
                return
            for found in page.get("Contents", ()):
                key = found["Key"].removeprefix(self._root)
                if not _reason_against(key):  # as the "folder/" that a web console makes
                    modified = _seconds(found["LastModified"])
                    yield ObjectInfo(key, found["Size"], modified, found.get("ETag", ""))

    def copy(self, source: str, target: str) -> None:
        origin, place = self._place(source), self._place(target)
        info = self.info(source)
        if info is None:
            raise ObjectNotFound(f"there is no object {source!r} in {self.url}")
        if source == target:
            return
        if info.size <= self.copy_size:
            with self._errors(source) as client:
                client.copy_object(**place, CopySource=origin)
            return

        def send(client: Any, where: dict[str, Any], start: int, end: int) -> str:
            copied = client.upload_part_copy(
                **where, CopySource=origin, CopySourceRange=f"bytes={start}-{end - 1}"
            )
            return str(copied["CopyPartResult"]["ETag"])

        self._in_parts(target, _parts(info.size, max(self.copy_size, -(-info.size // 10_000))), send)

    def delete(self, key: str) -> None:
        place = self._place(key)
        with contextlib.suppress(ObjectNotFound), self._errors(key) as client:
            client.delete_object(**place)

    def presign(self, key: str, seconds: int, filename: str | None = None) -> str | None:
        if not 1 <= seconds <= 7 * 24 * 3600:
            raise InvalidRequest(f"a presigned URL is valid for 1 s to 7 days, not for {seconds} s")
        parameters = self._place(key)
        if filename is not None:
            parameters["ResponseContentDisposition"] = attachment(filename)
        with self._errors(key) as client:
            return str(client.generate_presigned_url("get_object", Params=parameters, ExpiresIn=seconds))

    def _place(self, key: str) -> dict[str, Any]:
        return {"Bucket": self.bucket, "Key": self._root + check_key(key)}

    def _in_parts(
        self,
        key: str,
        parts: Sequence[tuple[int, int]],
        send: Callable[[Any, dict[str, Any], int, int], str],
        if_absent: bool = False,
    ) -> None:
        """A multipart upload: `send` puts one part, bytes start to end, and returns its ETag.

        The object appears with the last request. Parts of an upload that could not be aborted (the server was
        gone) stay invisible but take space: give the bucket a lifecycle rule for incomplete uploads.
        """
        place = self._place(key)
        if if_absent:
            self._refuse_existing(key)
        with self._errors(key) as client:
            where = place | {"UploadId": client.create_multipart_upload(**place)["UploadId"]}
        try:
            with self._errors(key), ThreadPoolExecutor(4, "store-part") as pool:

                def send_one(numbered: tuple[int, tuple[int, int]]) -> dict[str, Any]:
                    number, (start, end) = numbered
                    tag = send(client, where | {"PartNumber": number}, start, end)
                    return {"PartNumber": number, "ETag": tag}

                sent = list(pool.map(send_one, enumerate(parts, 1)))
            if if_absent:
                self._refuse_existing(key)  # again, because Ceph ignores the condition of the next request
            with self._errors(key):
                condition = {"IfNoneMatch": "*"} if if_absent else {}
                client.complete_multipart_upload(**where, MultipartUpload={"Parts": sent}, **condition)
        except BaseException:
            with contextlib.suppress(StoreError), self._errors(key):
                client.abort_multipart_upload(**where)
            raise

    def _refuse_existing(self, key: str) -> None:
        if self.info(key) is not None:
            raise ObjectExists(f"{key!r} already exists in {self.url}; it was left as it is")

    def _client(self) -> Any:
        made = self._made
        if made is None or made[0] != os.getpid():
            import boto3  # here, because it takes longer than the CLI may
            from botocore.config import Config

            settings: dict[str, Any] = {
                "connect_timeout": 5,
                "read_timeout": 60,
                "max_pool_connections": 32,
                "retries": {"mode": "standard", "total_max_attempts": 3},
                "tcp_keepalive": True,
                # boto3's own default sends checksums as trailers, which some S3-compatible servers refuse.
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
            }
            session = boto3.session.Session()  # its own: the default session is not safe under threads
            try:
                # With an endpoint of its own boto3 puts the bucket into the path, unless told otherwise.
                client = session.client("s3", config=Config(**settings))
            except ValueError as error:
                raise StoreDenied(f"cannot use {self.url}: {error}; check AWS_ENDPOINT_URL") from error
            made = self._made = (os.getpid(), client)
        return made[1]

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[Any]:
        """The client; what it raises inside the block becomes one of our errors."""
        from botocore import exceptions
        from botocore.parsers import ResponseParserError

        try:
            yield self._client()
        except exceptions.ClientError as error:
            raise self._meaning(error.response, key) from error
        except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
            raise StoreDenied(
                f"no credentials for {self.url}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "or give this machine a role"
            ) from error
        except (
            exceptions.ConnectionError,
            exceptions.HTTPClientError,
            exceptions.IncompleteReadError,
            exceptions.FlexibleChecksumError,
            exceptions.CredentialRetrievalError,
            exceptions.MetadataRetrievalError,
            ResponseParserError,  # a proxy's error page instead of XML
        ) as error:
            reason = _without_password(str(error))
            if "CERTIFICATE_VERIFY_FAILED" in reason:
                raise StoreDenied(f"{self.url}: {reason}; check AWS_CA_BUNDLE") from error
            raise StoreUnavailable(
                f"{self.url} does not answer ({reason}); check that the server of AWS_ENDPOINT_URL is up"
            ) from error
        except exceptions.BotoCoreError as error:
            reason = _without_password(str(error))
            raise StoreDenied(f"cannot use {self.url}: {reason}; check the AWS_* settings") from error

    def _meaning(self, response: Any, key: str) -> StoreError:
        code = str(response.get("Error", {}).get("Code", ""))
        status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        said = f"{self.url} said {status} {code}"
        if code == "NoSuchBucket" or (status == 404 and not key):
            return StoreDenied(
                f"there is no bucket {self.bucket!r} ({said}); create it or correct the store URL"
            )
        if code == "RequestTimeTooSkewed":
            return StoreDenied(f"{said}: the clocks of this machine and of the server differ; set the clock")
        if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"):
            return StoreDenied(
                f"{said} for {key!r}; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN"
            )
        if status in (301, 307) or code in (
            "AuthorizationHeaderMalformed",
            "IllegalLocationConstraintException",
        ):
            return StoreDenied(f"{said} for {key!r}: the bucket is in another region; set AWS_REGION")
        if status in (401, 403):
            return StoreDenied(
                f"{said} for {key!r}; check that the credentials in AWS_ACCESS_KEY_ID may read, write "
                f"and list the bucket {self.bucket!r}"
            )
        if code in _PASSING or status in (408, 409, 429) or (status >= 500 and status != 501):
            return StoreUnavailable(f"{said} for {key!r}; the server is overloaded or being repaired")
        if status == 404:
            return ObjectNotFound(f"there is no object {key!r} in {self.url}")
        if status == 412:
            return ObjectExists(f"{key!r} already exists in {self.url}; it was left as it is")
        message = response.get("Error", {}).get("Message", "")
        return StoreError(f"{said} for {key!r}: {_without_password(str(message))}")


_PASSING = frozenset(
    (
        "BadDigest",
        "IncompleteBody",
        "NoSuchUpload",
        "RequestTimeout",
        "SlowDown",
        "Throttling",
        "XAmzContentSHA256Mismatch",
    )
)
"""Codes of 4xx answers that the same request may not meet again: broken on the way, or too much at once."""


def _response(error: StoreError) -> dict[str, Any]:
    """What botocore knows of the answer that became `error`."""
    return dict(getattr(error.__cause__, "response", {}).get("ResponseMetadata", {}))


def _seconds(modified: datetime) -> float:
    # A listing may tell milliseconds where a HEAD tells none: the same object must have one time.
    return float(int(modified.timestamp()))


def _retried(error: StoreError) -> bool:
    return bool(_response(error).get("RetryAttempts"))


def _parts(size: int, part: int) -> list[tuple[int, int]]:
    return [(start, min(start + part, size)) for start in range(0, size, part)]


def attachment(filename: str) -> str:
    """A Content-Disposition that makes a browser save the body as `filename` (RFC 6266)."""
    plain = re.sub(r"[^A-Za-z0-9._ -]", "_", filename)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{urllib.parse.quote(filename, safe='')}"


T = TypeVar("T")


def patient(store: Store, seconds: float) -> Store:
    """`store`, with every call that meets StoreUnavailable tried again until it has waited `seconds`.

    For callers that would rather be late than fail: an outage of the store is not the job's fault.
    """
    return _Patient(store, seconds)


class _Patient:
    def __init__(self, store: Store, seconds: float) -> None:
        self.store = store
        self.seconds = seconds
        self._out_since: float | None = None

    def __repr__(self) -> str:
        return f"patient({self.store!r}, {self.seconds})"

    def __reduce__(self) -> tuple[Any, ...]:
        return patient, (self.store, self.seconds)

    @property
    def url(self) -> str:
        return self.store.url

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        def attempt(earlier: bool) -> None:
            try:
                self.store.put(key, data, if_absent=if_absent)
            except ObjectExists:
                # The answer to an earlier try may have been lost after the server had done it.
                if not (earlier and self.store.get(key) == data):
                    raise

        self._try(attempt)

    def put_file(self, key: str, path: Path, *, if_absent: bool = False) -> None:
        def attempt(earlier: bool) -> None:
            try:
                self.store.put_file(key, path, if_absent=if_absent)
            except ObjectExists:
                if not (earlier and _holds(self.store, key, path)):
                    raise

        self._try(attempt)

    def get(self, key: str) -> bytes:
        return self._try(lambda _: self.store.get(key))

    def read(self, key: str, start: int = 0, size: int | None = None) -> Iterator[bytes]:
        _check_range(start, size)
        before = self.info(key)
        if before is None:
            raise ObjectNotFound(f"there is no object {key!r} in {self.url}")
        return self._chunks(before, start, size)

    def _chunks(self, before: ObjectInfo, start: int, size: int | None) -> Iterator[bytes]:
        end = before.size if size is None else min(before.size, start + size)
        waited = _Wait(self.seconds)
        while start < end:
            try:
                for chunk in self.store.read(before.key, start, end - start):
                    start += len(chunk)
                    waited = _Wait(self.seconds)  # progress: the next trouble is a new one
                    yield chunk
                    self._back()
                if start < end:
                    raise StoreUnavailable(f"{before.key!r} in {self.url} ended {end - start} bytes early")
            except StoreUnavailable as error:
                self._out(error, waited)
                # Going on in the middle is right only if it is still the same object.
                now = self.info(before.key)
                if now != before:
                    raise StoreError(
                        f"{before.key!r} in {self.url} was replaced while it was being read; read it again",
                        code="object_changed",
                    ) from error

    def download(self, key: str, path: Path) -> None:
        _save(self.read(key), path)

    def info(self, key: str) -> ObjectInfo | None:
        return self._try(lambda _: self.store.info(key))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        _check_prefix(prefix)
        return self._infos(prefix)

    def _infos(self, prefix: str) -> Iterator[ObjectInfo]:
        last = ""
        waited = _Wait(self.seconds)
        while True:
            try:
                for info in self.store.list(prefix):
                    if info.key > last:  # code points sort like UTF-8
                        last = info.key
                        waited = _Wait(self.seconds)
                        yield info
                self._back()
                return
            except StoreUnavailable as error:
                self._out(error, waited)

    def copy(self, source: str, target: str) -> None:
        self._try(lambda _: self.store.copy(source, target))

    def delete(self, key: str) -> None:
        self._try(lambda _: self.store.delete(key))

    def presign(self, key: str, seconds: int, filename: str | None = None) -> str | None:
        return self.store.presign(key, seconds, filename)

    def _try(self, attempt: Callable[[bool], T]) -> T:
        """`attempt(whether an earlier one failed)`, until it does not raise StoreUnavailable."""
        waited = _Wait(self.seconds)
        while True:
            try:
                result = attempt(waited.times > 0)
            except StoreUnavailable as error:
                self._out(error, waited)
            else:
                self._back()
                return result

    def _out(self, error: StoreUnavailable, waited: "_Wait") -> None:
        if self._out_since is None:
            self._out_since = time.monotonic()
            _log.warning("the store does not answer, trying again for up to %.0f s: %s", self.seconds, error)
        waited.sleep(error)

    def _back(self) -> None:
        since, self._out_since = self._out_since, None
        if since is not None:
            _log.warning("the store answers again after %.1f s: %s", time.monotonic() - since, self.url)


class _Wait:
    """Sleeps twice as long every time, up to 10 s, with jitter: many waiters must not come back at once."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.end = time.monotonic() + seconds
        self.times = 0

    def sleep(self, error: StoreUnavailable) -> None:
        left = self.end - time.monotonic()
        if left <= 0:
            raise StoreUnavailable(
                f"{error.message} (tried {self.times + 1} times in {self.seconds:.0f} s)"
            ) from error
        self.times += 1
        time.sleep(min(left, 10.0, 0.1 * 2**self.times) * random.uniform(0.5, 1.0))


def _holds(store: Store, key: str, path: Path) -> bool:
    """Whether the object has exactly the bytes of the file."""
    info = store.info(key)
    if info is None or info.size != path.stat().st_size:
        return False
    with path.open("rb") as file:
        return all(file.read(len(chunk)) == chunk for chunk in store.read(key))
