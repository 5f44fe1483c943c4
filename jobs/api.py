"""The REST API: OpenAI's fine-tuning and files contract, and our own resources beside it.

`Edge` is the outermost layer, before any route: a request id on every answer, the key, the other prefixes
under which clients know this API, the size of bodies, and the last `except`. Routes are in api_files.py,
api_jobs.py and api_catalog.py. Handlers are plain functions: FastAPI runs them in threads, and they block as
they like.
"""

import asyncio
import contextlib
import logging
import re
import secrets
import time
from collections.abc import Callable
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.security import APIKeyHeader, HTTPBearer
from pydantic import BaseModel, Field
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs import api_catalog, api_files, api_graders, api_jobs, api_operations, api_preview, body, files, keys
from jobs.caller import MODELS, ErrorEnvelope, Services
from jobs.settings import Settings
from peft_service.errors import (
    InvalidRequest,
    NotAuthenticated,
    NotFound,
    ObjectNotFound,
    PeftServiceError,
    StoreUnavailable,
    TooLarge,
)
from peft_service.store import Store

FREE = {"/healthz"}
"""Routes without a key."""
DRAIN_SECONDS = 30
AZURE = re.compile(r"^/openai(?:/deployments/[^/]+)?(?:/v1)?(?=/|$)")

_log = logging.getLogger(__name__)


class Health(BaseModel):
    status: str = Field(examples=["ok"])


def create_app(
    settings: Settings, engine: Engine, store: Store, launcher_logs: Callable[[str], str] | None = None
) -> FastAPI:
    """The ASGI app; the database must be migrated.

    Args:
        launcher_logs: the log of an attempt, by its name on the cluster, while the cluster has it.
    """
    app = FastAPI(
        title="peft-service",
        version="1",
        description="Fine-tuning on your own Ray cluster, with any OpenAI client.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # Two schemas per model, one for reading and one for writing, would double the document for nothing.
        separate_input_output_schemas=False,
    )
    app.state.services = Services(settings, engine, store, launcher_logs)
    security = [
        Depends(HTTPBearer(auto_error=False, scheme_name="key", description="`Authorization: Bearer sk-…`")),
        Depends(APIKeyHeader(name="api-key", auto_error=False, scheme_name="azure-key")),
    ]
    errors: dict[int | str, dict[str, Any]] = {
        code: {"model": ErrorEnvelope, "description": words}
        for code, words in (("4XX", "The request was refused; nothing changed"), ("5XX", "Try again"))
    }
    for part in (api_files, api_jobs, api_preview, api_catalog, api_graders, api_operations):
        app.include_router(part.router, prefix="/v1", dependencies=security, responses=errors)

    @app.get("/healthz", tags=["health"])
    def health() -> Health:
        """The API answers. Needs no key and asks nobody."""
        return Health(status="ok")

    app.add_exception_handler(PeftServiceError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_middleware(Edge, services=app.state.services)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    body.remove_leftovers(app.state.services.incoming, time.time() - 24 * 3600)
    return app


# ---------------------------------------------------------------------------------------------------- edge


class Edge:
    """What every request passes first and every answer last."""

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self.app = app
        self.services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(12)}"
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        started = False
        request = Request(scope)
        incoming = _Body(receive, self._most(request), asked="expect" in request.headers)

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                if message["status"] >= 400:
                    await incoming.drain()
                started = True
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
                if message["status"] == 409:  # the OpenAI client retries a 409 unless it is told not to
                    message["headers"].append((b"x-should-retry", b"false"))
            await send(message)

        try:
            scope["path"] = AZURE.sub("/v1", scope["path"], count=1)
            if "\0" in scope["path"] or "%00" in scope.get("query_string", b"").decode("latin-1"):
                raise InvalidRequest("the URL contains a NUL character")
            if scope["path"] not in FREE:
                key = await run_in_threadpool(keys.verify, self.services.engine, _key_in(request))
                state["project"] = key.project_id
            await self.app(scope, incoming.receive, answer)
        except ClientDisconnect:
            pass
        except Exception as error:
            if started:
                raise  # too late for an envelope: the server closes the connection
            await _answer_to(error, request_id)(scope, receive, answer)

    def _most(self, request: Request) -> int:
        """Bytes that the body of this request may have."""
        if body.media_type(request) != "multipart/form-data":
            return body.MAX_JSON_BYTES
        return max(self.services.settings.max_upload_bytes, files.PART_BYTES) + body.MAX_JSON_BYTES


class _Body:
    """The body of a request on its way in: refused when it is larger than any route would read."""

    def __init__(self, receive: Receive, most: int, asked: bool) -> None:
        """`asked`: the client waits for 100 Continue, which the first read sends; unread, nothing comes."""
        self._receive = receive
        self._most = most
        self._seen = 0
        self._ended = asked

    async def receive(self) -> Message:
        message = await self._receive()
        self._ended = message["type"] != "http.request" or not message.get("more_body")
        self._seen += len(message.get("body", b""))
        if self._seen > self._most:
            raise TooLarge(f"the body of a request has at most {self._most} bytes")
        return message

    async def drain(self) -> None:
        """Read and forget the rest. A connection that is closed while the client still sends is reset, and
        then the client never sees the answer that says what was wrong."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while not self._ended:
                    message = await self._receive()
                    self._ended = message["type"] != "http.request" or not message.get("more_body")


def _key_in(request: Request) -> str:
    """The key of a request: OpenAI's header, or Azure's.

    Raises:
        NotAuthenticated: neither is there.
    """
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and token.strip():
        return token.strip()
    if request.headers.get("api-key", "").strip():
        return request.headers["api-key"].strip()
    raise NotAuthenticated("no API key: send it as the header Authorization: Bearer sk-…")


# -------------------------------------------------------------------------------------------------- errors


def _envelope(
    error: PeftServiceError, status: int | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    return JSONResponse({"error": error.body()}, status or error.status, headers)


def _answer_to(error: Exception, request_id: str) -> Response:
    """The answer when something raised; a surprise is logged with the request id that the client is told."""
    if isinstance(error, StoreUnavailable):
        return _envelope(error, 503, {"retry-after": "2"})
    if isinstance(error, ObjectNotFound):
        _log.error("%s: %s", request_id, error.message)
        return _envelope(NotFound("the bytes of this object are gone from the store", code="content_gone"))
    if isinstance(error, PeftServiceError):
        if error.status >= 500:
            _log.error("%s: %s", request_id, error.message)
        return _envelope(error, headers={"retry-after": "2"} if error.status == 503 else None)
    if isinstance(error, OperationalError):
        _log.error("%s: the database does not answer: %s", request_id, error)
        away = PeftServiceError("the database does not answer; try again", code="database_unavailable")
        return _envelope(away, 503, {"retry-after": "2"})
    _log.error("%s failed", request_id, exc_info=error)
    return _envelope(
        PeftServiceError(f"this is a mistake of the service; its log tells more under {request_id}")
    )


def _on_error(request: Request, error: Exception) -> Response:
    return _answer_to(error, request.scope["state"]["request_id"])


def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    method, path = request.method, body.printable(request.scope["path"])
    if error.status_code == 404:
        paths = list(request.app.openapi()["paths"])
        said = NotFound(
            f"there is no route {method} {path}: {body.nearest(path, paths)}", code="unknown_route"
        )
    elif error.status_code == 405:
        said = NotFound(f"there is no {method} of {path}; see /openapi.json", code="method_not_allowed")
    else:
        said = NotFound(str(error.detail), code="invalid_request")
    return _envelope(said, error.status_code, dict(error.headers or {}))


def _on_validation_error(request: Request, error: Exception) -> Response:
    """Bad query parameters: FastAPI reads no bodies here."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    names = [str(problem["loc"][-1]) for problem in found]
    words = [
        f"{name}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
        for name, problem in zip(names, found, strict=True)
    ]
    return _envelope(InvalidRequest("; ".join(words[:5]), code="invalid_value", param=names[0]))


# ------------------------------------------------------------------------------------------------- OpenAPI


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, with the bodies that `jobs.body` reads and without 422, which is never answered."""
    if app.openapi_schema:
        return app.openapi_schema
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    schemas = document["components"]["schemas"]
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            content = operation.get("requestBody", {}).get("content", {})
            for media in content.values():
                name = media["schema"].pop("x-model", None)
                if name is not None:
                    _add_model(schemas, media["schema"], MODELS[name])
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    app.openapi_schema = document
    return document


def _add_model(schemas: dict[str, Any], target: dict[str, Any], model: type[BaseModel]) -> None:
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(schema.pop("$defs", {}))
    schemas[model.__name__] = schema
    target["$ref"] = f"#/components/schemas/{model.__name__}"
