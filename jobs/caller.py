"""Who asks, and with what: the values that every route of the API works with."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends
from fastapi.routing import APIRoute
from pydantic import BaseModel
from sqlalchemy import Engine
from starlette.requests import Request

from jobs import body
from jobs.settings import Settings
from peft_service.errors import InvalidRequest
from peft_service.store import Store

IGNORED_QUERY = {"api-version"}
MODELS: dict[str, type[BaseModel]] = {}
"""Models of request bodies, for the OpenAPI document."""


@dataclass(frozen=True)
class Services:
    """What handlers work with; one per app."""

    settings: Settings
    engine: Engine
    store: Store
    launcher_logs: Callable[[str], str] | None
    """Log of an attempt (`ft-<job>-<n>`) that is still on the cluster."""

    @property
    def incoming(self) -> Path:
        """Where uploads wait on this machine while they are read."""
        return self.settings.data_dir / "incoming"


@dataclass(frozen=True)
class Caller(Services):
    """A request's services and its project: whatever a handler does, it does as this project."""

    project: str


def services_of(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


def caller_with(*maps: str) -> Callable[[Request], Caller]:
    """A dependency that gives the caller.

    Query parameters that the route does not know are refused, so that a typo is never ignored; `maps` are
    those written `name[key]=value`.
    """

    def caller_of(request: Request) -> Caller:
        services = services_of(request)
        _check_query(request, maps)
        return Caller(
            services.settings,
            services.engine,
            services.store,
            services.launcher_logs,
            request.scope["state"]["project"],
        )

    return caller_of


AsCaller = Annotated[Caller, Depends(caller_with())]


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    error: ErrorBody


def _check_query(request: Request, maps: tuple[str, ...]) -> None:
    route = request.scope.get("route")
    if not isinstance(route, APIRoute):
        return
    known = {parameter.alias for parameter in route.dependant.query_params} | IGNORED_QUERY
    seen: set[str] = set()
    for name, value in request.query_params.multi_items():
        body.check_text(name, "the query")
        body.check_text(value, name)
        if name in seen:
            raise InvalidRequest(f"{name[:60]!r} is given twice in the query", param=name[:200])
        seen.add(name)
        if name not in known and not (
            name.partition("[")[0] in maps and (name in maps or name.endswith("]"))
        ):
            raise InvalidRequest(
                body.unknown_key(name, [*known, *maps]), code="unknown_parameter", param=name[:200]
            )


def json_request(model: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route whose JSON body `jobs.body` reads."""
    MODELS[model.__name__] = model
    schema = {"x-model": model.__name__}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def form_request(
    file_field: str, fields: dict[str, dict[str, Any]], required: tuple[str, ...]
) -> dict[str, Any]:
    """`openapi_extra` of a route whose multipart form `jobs.body` reads."""
    properties = {**fields, file_field: {"type": "string", "format": "binary"}}
    schema = {
        "type": "object",
        "properties": properties,
        "required": [*required, file_field],
        "additionalProperties": False,
    }
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
