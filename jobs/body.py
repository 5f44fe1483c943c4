"""How the bytes of a request become values: strict JSON, forms streamed to disk, errors that name the key.

FastAPI's own reading of bodies is not used: it takes a whole form before it looks at it, lets the last of two
equal keys win, and answers an unknown key without saying which one was meant.
"""

import difflib
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from peft_service.errors import InvalidRequest, TooLarge
from peft_service.spec import NAME_PATTERN

MAX_JSON_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_FIELD_BYTES = 64 << 10
MAX_PARTS = 32
WRITE_BYTES = 1 << 20
"""A form is written to disk in pieces of this size, each in a worker thread."""

Model = TypeVar("Model", bound=BaseModel)


# ---------------------------------------------------------------------------------------------------- JSON


def json_body(model: type[Model]) -> Callable[[Request], Awaitable[Model]]:
    """A dependency that reads the request's JSON object as `model`."""

    async def read(request: Request) -> Model:
        return check(model, await read_object(request))

    return read


async def read_object(request: Request) -> dict[str, Any]:
    """The JSON object in the body.

    Raises:
        InvalidRequest: not JSON by content type, not JSON, not an object, or not storable as text.
        TooLarge: more than 1 MiB.
    """
    kind = media_type(request)
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise InvalidRequest(
            f"the body must be JSON with Content-Type: application/json, not {kind or 'without one'!r}",
            code="unsupported_content_type",
        )
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > MAX_JSON_BYTES:
            raise TooLarge(f"a JSON body has at most {MAX_JSON_BYTES} bytes")
    value = parse(bytes(raw))
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {_json_name(value)}", code="invalid_json")
    return value


def media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def parse(raw: bytes) -> Any:
    """JSON in which every value has one meaning and can be stored by every database.

    Raises:
        InvalidRequest: bad UTF-8, bad JSON, a key twice, NaN, a number out of range, NUL, half a surrogate
            pair, nesting deeper than 32.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"the body is not UTF-8: {error.reason} at byte {error.start}", code="invalid_json"
        ) from None
    if not text.strip():
        raise InvalidRequest("the body is empty; a JSON object is needed", code="invalid_json")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_int=_integer,
            parse_float=_float,
        )
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}",
            code="invalid_json",
        ) from None
    except RecursionError:
        raise InvalidRequest(
            f"the body is nested deeper than {MAX_DEPTH} levels", code="invalid_json"
        ) from None
    _check_storable(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(
            f"key {_shown(twice)} is given twice in one object", code="invalid_json", param=printable(twice)
        )
    return made


def _refuse_constant(name: str) -> Any:
    raise InvalidRequest(f"{name} is not JSON; use a finite number", code="invalid_json")


def _integer(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise InvalidRequest(f"the number {digits[:24]}… is out of range", code="invalid_json")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise InvalidRequest(f"the number {digits[:24]} is out of range", code="invalid_json")
    return value


def _check_storable(value: Any) -> None:
    waiting: list[tuple[Any, str, int]] = [(value, "", 0)]
    while waiting:
        item, path, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise InvalidRequest(f"the body is nested deeper than {MAX_DEPTH} levels", code="invalid_json")
        if isinstance(item, str):
            check_text(item, path)
        elif isinstance(item, dict):
            for key, inner in item.items():
                check_text(key, path)
                waiting.append((inner, f"{path}.{key}" if path else key, depth + 1))
        elif isinstance(item, list):
            waiting.extend((inner, f"{path}[{index}]", depth + 1) for index, inner in enumerate(item))


def check_text(text: str, path: str) -> None:
    """Refuse text that a database cannot hold: PostgreSQL has no NUL, UTF-8 has no lone surrogates."""
    if "\0" in text:
        raise InvalidRequest(f"{path or 'a key'} contains a NUL character", param=printable(path) or None)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(
            f"{printable(path) or 'a key'} contains half of a surrogate pair, which is no character",
            param=printable(path) or None,
        ) from None


def _json_name(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


# ------------------------------------------------------------------------------------------------ checking


def check(
    model: type[Model], value: Mapping[str, Any], where: str = "", written: Mapping[str, str] | None = None
) -> Model:
    """`value` as `model`, without coercion: "3" is not 3 and true is not 1.

    Args:
        where: path of `value` in the request, put before the path of a problem.
        written: path of a key -> the path under which the user wrote it.

    Raises:
        InvalidRequest: every problem with its path; `param` is the first one.
    """
    try:
        return TypeAdapter(model).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise explain(error, model, where, written) from None


def explain(
    error: ValidationError, model: type[BaseModel], where: str = "", written: Mapping[str, str] | None = None
) -> InvalidRequest:
    """The 400 that names each wrong key and says what would be right."""
    problems: dict[str, list[str]] = {}
    seen: dict[str, str] = {}
    unknown: dict[str, list[str]] = {}
    for found in error.errors(include_url=False):
        path, known = _locate(model, found["loc"])
        full = ".".join(part for part in (where, path) if part)
        full = printable((written or {}).get(full, full))
        if found["type"] == "extra_forbidden":
            unknown[full] = known
            continue
        message = found["msg"].removeprefix("Value error, ")
        message = message[0].lower() + message[1:]
        if found["type"] == "missing":
            message = "is required"
        if found["type"] == "string_pattern_mismatch" and found["ctx"]["pattern"] == NAME_PATTERN:
            message = (
                "must be 1 to 64 letters, digits, '.', '_' or '-', with a letter or digit first and last"
            )
        said = problems.setdefault(full, [])
        if message not in said:
            said.append(message)
        if found["type"] not in {"missing", "value_error"} and not isinstance(found["input"], dict | list):
            seen[full] = f", not {_shown(found['input'])}"
    errors = [{"param": path, "message": unknown_key(path, known)} for path, known in unknown.items()]
    errors += [
        {"param": path, "message": f"{path or 'the body'}: {' or '.join(said)}{seen.get(path, '')}"}
        for path, said in problems.items()
    ]
    shown = "; ".join(problem["message"] for problem in errors[:5])
    if len(errors) > 5:
        shown += f"; and {len(errors) - 5} more"
    code = "unknown_parameter" if unknown else "invalid_value"
    return InvalidRequest(
        shown, code=code, param=errors[0]["param"] or None, details={"errors": errors[:100]}
    )


def unknown_key(path: str, known: Iterable[str]) -> str:
    """One sentence about a key that means nothing here."""
    name = re.split(r"\.", path)[-1]
    return f"unknown key {_shown(path)}: {nearest(name, known)}"


def nearest(name: str, known: Iterable[str]) -> str:
    """ "did you mean x?", or the list of what there is."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known are {', '.join(known[:40])}" if known else "nothing is known here"


def _locate(model: Any, location: Sequence[int | str]) -> tuple[str, list[str]]:
    """(path as the user wrote it, keys known at the place of its last element).

    Pydantic puts the branch of a union into a location; a path has only keys and indices.
    """
    path, candidates, known = "", _models_in(model), []
    for element in location:
        if isinstance(element, int):
            path += f"[{element}]"
            continue
        known = sorted({name for candidate in candidates for name in candidate.model_fields})
        inner = [
            candidate.model_fields[element] for candidate in candidates if element in candidate.model_fields
        ]
        if inner:
            path += f".{element}" if path else element
            candidates = [found for info in inner for found in _models_in(info.annotation)]
        elif element == location[-1] and (candidates or not _is_branch(element)):
            path += f".{element}" if path else element
    return path, known


def _is_branch(element: str) -> bool:
    return bool(re.search(r"[\[\]'-]", element)) or element in {"int", "float", "str", "bool", "int-parsing"}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated, list, tuple):
        return [found for argument in get_args(annotation) for found in _models_in(argument)]
    return []


def _shown(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else repr(printable(value))
    return text if len(text) <= 60 else text[:57] + "…"


def printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()[:200]


# ----------------------------------------------------------------------------------------------- multipart


@dataclass(frozen=True)
class Form:
    """A multipart form with exactly one file, which is on disk."""

    fields: dict[str, str]
    filename: str
    path: Path
    bytes: int
    sha256: str


def file_form(
    file_field: str,
    fields: Sequence[str],
    limit: Callable[[Request], int],
    directory: Callable[[Request], Path],
) -> Callable[[Request], AsyncIterator[Form]]:
    """A dependency that streams a form to disk; its file is gone when the response has been sent.

    Args:
        limit: most bytes that the file may have.
        directory: where the file waits. Not the system's /tmp, which may be memory.
    """

    async def read(request: Request) -> AsyncIterator[Form]:
        boundary = _boundary(request)
        most = limit(request)
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > most + MAX_JSON_BYTES:
            raise TooLarge(f"{file_field} has more than the {most} bytes allowed", param=file_field)
        directory(request).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory(request), prefix="upload-") as target:
            reader = _FormReader(boundary, file_field, fields, most, target)
            held = bytearray()
            async for chunk in request.stream():
                held += chunk
                if len(held) >= WRITE_BYTES:
                    await run_in_threadpool(reader.write, bytes(held))
                    held.clear()
            await run_in_threadpool(reader.write, bytes(held))
            yield reader.form(Path(target.name))

    return read


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data":
        raise InvalidRequest(
            f"the body must be multipart/form-data, not {_shown(kind.decode('latin-1'))}",
            code="unsupported_content_type",
        )
    if not options.get(b"boundary"):
        raise InvalidRequest(
            "the header Content-Type of the form names no boundary", code="invalid_multipart"
        )
    return options[b"boundary"]


@dataclass
class _FormReader:
    """Callbacks of the multipart parser: fields into memory (small), the file to `target`."""

    boundary: bytes
    file_field: str
    known: Sequence[str]
    limit: int
    target: Any
    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    size: int = 0
    ended: bool = False
    parts: int = 0

    def __post_init__(self) -> None:
        self.digest = hashlib.sha256()
        self.headers: dict[str, bytes] = {}
        self.header_name, self.header_value = bytearray(), bytearray()
        self.name, self.value = "", bytearray()
        self.sink: BinaryIO | None = None
        try:
            self.parser = MultipartParser(
                self.boundary,
                {
                    "on_part_begin": self.on_part_begin,
                    "on_header_field": lambda data, start, end: self.header_name.extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self.header_value.extend(data[start:end]),
                    "on_header_end": self.on_header_end,
                    "on_headers_finished": self.on_headers_finished,
                    "on_part_data": self.on_part_data,
                    "on_part_end": self.on_part_end,
                    "on_end": self.on_end,
                },
            )
        except FormParserError as error:
            raise InvalidRequest(f"the form cannot be read: {error}", code="invalid_multipart") from None

    def write(self, data: bytes) -> None:
        try:
            self.parser.write(data)
        except FormParserError as error:
            raise InvalidRequest(f"the form cannot be read: {error}", code="invalid_multipart") from None

    def form(self, path: Path) -> Form:
        if not self.ended:
            raise InvalidRequest("the form ends before its closing boundary", code="invalid_multipart")
        if self.filename is None:
            raise InvalidRequest(
                f"the form has no file {self.file_field!r}", param=self.file_field, code="missing_file"
            )
        self.target.flush()
        return Form(self.fields, self.filename, path, self.size, self.digest.hexdigest())

    def on_part_begin(self) -> None:
        self.parts += 1
        if self.parts > MAX_PARTS:
            raise InvalidRequest(f"the form has more than {MAX_PARTS} parts", code="invalid_multipart")
        self.headers = {}
        self.value.clear()

    def on_header_end(self) -> None:
        self.headers[self.header_name.decode("latin-1").strip().lower()] = bytes(self.header_value).strip()
        self.header_name.clear()
        self.header_value.clear()

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self.headers.get("content-disposition", b""))
        if b"name" not in options:
            raise InvalidRequest("a part of the form has no name", code="invalid_multipart")
        encoding = self.headers.get("content-transfer-encoding", b"binary").lower()
        if encoding not in (b"7bit", b"8bit", b"binary"):
            raise InvalidRequest(
                f"a part is encoded as {_shown(encoding.decode('latin-1'))}; send its bytes as they are",
                code="invalid_multipart",
            )
        self.name = _text(options[b"name"], "the name of a part")
        if self.name in self.fields or (self.name == self.file_field and self.filename is not None):
            raise InvalidRequest(
                f"{_shown(self.name)} is given twice in the form", param=printable(self.name)
            )
        if self.name == self.file_field:
            if b"filename" not in options:
                raise InvalidRequest(
                    f"{self.file_field} must be sent as a file, with a filename",
                    param=self.file_field,
                    code="missing_file",
                )
            self.filename = filename_of(_text(options[b"filename"], "the filename"), self.file_field)
        elif self.name not in self.known:
            raise InvalidRequest(
                unknown_key(self.name, [*self.known, self.file_field]),
                code="unknown_parameter",
                param=printable(self.name),
            )

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self.name == self.file_field:
            self.size += end - start
            if self.size > self.limit:
                raise TooLarge(
                    f"{self.file_field} has more than the {self.limit} bytes allowed", param=self.file_field
                )
            piece = memoryview(data)[start:end]
            self.digest.update(piece)
            self.target.write(piece)
        else:
            self.value += data[start:end]
            if len(self.value) > MAX_FIELD_BYTES:
                raise TooLarge(f"{self.name} has more than {MAX_FIELD_BYTES} bytes", param=self.name)

    def on_part_end(self) -> None:
        if self.name != self.file_field:
            self.fields[self.name] = _text(bytes(self.value), self.name)

    def on_end(self) -> None:
        self.ended = True


def _text(raw: bytes, what: str) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidRequest(f"{what} is not UTF-8", code="invalid_multipart") from None
    check_text(text, what)
    return text


def filename_of(name: str, param: str = "filename") -> str:
    """`name`, if it is the name of a file and no path.

    Raises:
        InvalidRequest: empty, longer than 255 bytes, `..`, or with a slash, backslash or control character.
    """
    if not name or len(name.encode()) > 255 or name in {".", ".."} or re.search(r"[/\\\x00-\x1f\x7f]", name):
        raise InvalidRequest(
            f"{_shown(name)} is no file name: 1 to 255 bytes without slashes or control characters",
            code="invalid_filename",
            param=param,
        )
    return name


def remove_leftovers(directory: Path, older_than: float) -> None:
    """Delete what a killed process left in `directory` before the time `older_than`."""
    for path in (*directory.glob("upload-*"), *directory.glob("import-*")):
        try:
            if path.stat().st_mtime >= older_than:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.unlink(path)
        except FileNotFoundError:
            pass  # another replica was faster
