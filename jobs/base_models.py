"""The base models that jobs may name: an id, where the safetensors are, and what they look like.

Bases are shared by all projects: they are the team's weights, not a user's.
"""

import difflib
import hashlib
import os
import re
import time
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import insert, select, update
from sqlalchemy.exc import IntegrityError

from jobs.db import Source, base_models, reading, writing
from jobs.queue import Page
from peft_service.base_model import ModelShape, inspect
from peft_service.errors import Conflict, InvalidRequest, NotFound, NotPermitted, UnknownBase
from peft_service.spec import Base

ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$"
"""A base id is a request's `model` and a folder of the bucket: no colon (a model server splits there)."""
SCHEMES = ("file://", "s3://", "hf://")


@dataclass(frozen=True)
class BaseRow:
    seq: int
    """0: not registered yet."""
    id: str
    uri: str
    revision: str | None
    digest: str | None
    shape: dict[str, Any]
    info: dict[str, Any]
    """architecture, license, has_chat_template, context_length"""
    created_at: float

    @property
    def base(self) -> Base:
        return Base(id=self.id, uri=self.uri, revision=self.revision, digest=self.digest)

    @property
    def model_shape(self) -> ModelShape:
        return ModelShape.model_validate(self.shape)


def register(
    source: Source,
    allow: tuple[str, ...],
    id: str,
    uri: str,
    revision: str | None = None,
    *,
    move: bool = False,
) -> BaseRow:
    """Inspect the base at `uri` and keep it under `id`. Again with the same URI: look at it anew.

    Args:
        move: the id may belong to another URI, which is then replaced. For the operator only: what a base is
            called is what all projects rely on.

    Raises:
        InvalidRequest: an id or URI that cannot be, or UnknownBase.
        NotPermitted: the operator allows other places only.
        Conflict: the id belongs to another URI.
    """
    check_id(id)
    uri = checked_uri(uri, revision, allow)
    there = _find(source, id)
    if there is not None and there.uri != uri and not move:
        raise _taken(there, uri)
    return keep(source, _inspected(id, uri), again=True, move=move)


def resolve(
    source: Source, allow: tuple[str, ...], model: str, uri: str | None = None, revision: str | None = None
) -> BaseRow:
    """The base that a request means by `model` (an id or a URI), with `base.uri` and `base.revision`.

    A base that is named by its URI and not yet registered is inspected only: `keep` registers it, once the
    request has been found good.

    Raises:
        UnknownBase: neither registered nor readable; the message names close matches.
    """
    if "://" in model:
        if uri is not None and uri != model:
            raise InvalidRequest("model and base.uri name different places: give one URI", param="base.uri")
        wanted = checked_uri(model, revision, allow, "model")
        with reading(source) as conn:
            row = conn.execute(
                select(base_models).where(base_models.c.uri == wanted).order_by(base_models.c.seq).limit(1)
            ).one_or_none()
        if row is not None:
            return measured(source, BaseRow(**row._mapping))
        id = id_of(wanted)
        if _find(source, id) is not None:  # the same name elsewhere
            id = f"{id[:100]}-{hashlib.sha256(wanted.encode()).hexdigest()[:8]}"
        return _inspected(id, wanted)
    there = _find(source, model)
    if there is None and uri is not None:
        return _inspected(check_id(model), checked_uri(uri, revision, allow, "base.uri"))
    if there is None:
        raise UnknownBase(f"model {model[:100]!r} is not available: {_close(source, model)}", param="model")
    if uri is not None and checked_uri(uri, revision, allow, "base.uri") != there.uri:
        raise _taken(there, uri)
    if uri is None and revision is not None and revision not in (there.revision, _revision_in(there.uri)):
        raise InvalidRequest(
            f"model {model!r} is registered at revision {there.revision or 'none'}; name another by its URI, "
            "hf://org/name@revision",
            param="base.revision",
        )
    return measured(source, there)


def keep(source: Source, row: BaseRow, *, again: bool = False, move: bool = False) -> BaseRow:
    """Register what `resolve` found; `again` replaces what is known about the same URI, `move` the URI too.

    Raises:
        Conflict: the id was given to another URI meanwhile.
    """
    if row.seq and not again:
        return row
    values = {name: getattr(row, name) for name in ("revision", "digest", "shape", "info")}
    with writing(source) as conn:
        there = _find(conn, row.id)
        if there is None:
            try:
                with conn.begin_nested():
                    conn.execute(
                        insert(base_models).values(
                            id=row.id, uri=row.uri, created_at=row.created_at, **values
                        )
                    )
            except IntegrityError:  # another request has just registered this id
                there = get(conn, row.id)
        if there is not None and there.uri != row.uri and not move:
            raise _taken(there, row.uri)
        if there is not None and again:
            conn.execute(update(base_models).where(base_models.c.id == row.id).values(uri=row.uri, **values))
        return get(conn, row.id)


def measured(source: Source, row: BaseRow) -> BaseRow:
    """`row` with everything in its shape that today's methods ask for.

    A base that an earlier release registered was measured for fewer things: it is looked at anew, once. One
    that cannot be read now, or is another by now, stays as it is: the job will say so.
    """
    if row.shape.keys() >= ModelShape.model_fields.keys():
        return row
    try:
        found = _inspected(row.id, row.uri)
    except UnknownBase:
        return row
    if found.digest != row.digest:
        return row
    with writing(source) as conn:
        conn.execute(update(base_models).where(base_models.c.id == row.id).values(shape=found.shape))
    return replace(row, shape=found.shape)


def get(source: Source, id: str) -> BaseRow:
    """
    Raises:
        NotFound: no base has this id; the message names close matches.
    """
    row = _find(source, id)
    if row is None:
        raise NotFound(
            f"no base model {id[:100]!r}: {_close(source, id)}", code="model_not_found", param="model"
        )
    return row


def page(source: Source, *, after: str | None = None, limit: int | None = None) -> Page[BaseRow]:
    """Newest first; `limit` None: all of them."""
    query = select(base_models).order_by(base_models.c.seq.desc())
    if after is not None:
        query = query.where(base_models.c.seq < get(source, after).seq)
    if limit is not None:
        query = query.limit(limit + 1)
    with reading(source) as conn:
        rows = [BaseRow(**row._mapping) for row in conn.execute(query)]
    return Page(rows, False) if limit is None else Page(rows[:limit], len(rows) > limit)


def check_id(id: str) -> str:
    if len(id) > 128 or not re.match(ID_PATTERN, id) or ".." in id:
        raise InvalidRequest(
            f"{id[:100]!r} cannot name a base: segments of letters, digits, '.', '_' and '-' joined by '/', "
            "at most 128 characters, no colon",
            param="id",
        )
    return id


def checked_uri(uri: str, revision: str | None, allow: tuple[str, ...], param: str = "uri") -> str:
    """`uri` in its one spelling, with the revision inside.

    Raises:
        InvalidRequest: another scheme, or a revision where there are none.
        NotPermitted: the operator's BASE_MODELS_ALLOW does not name it.
    """
    if not uri.startswith(SCHEMES):
        raise InvalidRequest(
            f"base URI {uri[:200]!r} must be file:///directory, s3://bucket/prefix or hf://org/name@revision",
            code="model_not_available",
            param=param,
        )
    scheme, rest = uri.split("://", 1)
    if scheme == "file":
        if not rest.startswith("/"):
            raise InvalidRequest(f"{uri[:200]!r} needs an absolute directory: file:///directory", param=param)
        rest = "/" + os.path.normpath(rest).lstrip("/")  # so that ".." cannot walk out of an allowed prefix
    rest = rest.rstrip("/") or rest
    if revision is not None:
        if scheme != "hf":
            raise InvalidRequest(f"only hf:// has revisions, not {uri[:200]!r}", param="revision")
        if "@" in rest and rest.rsplit("@", 1)[1] != revision:
            raise InvalidRequest(f"{uri[:200]!r} names another revision than {revision!r}", param="revision")
        rest = f"{rest.rsplit('@', 1)[0]}@{revision}"
    uri = f"{scheme}://{rest}"
    if allow and not any(_below(uri, prefix) for prefix in allow):
        raise NotPermitted(
            f"base URI {uri[:200]!r} is not allowed here; allowed are {', '.join(allow)}",
            code="base_not_allowed",
            param=param,
        )
    return uri


def id_of(uri: str) -> str:
    """The id under which a URI used directly is registered: `org/name` for hf://, else the last segment."""
    scheme, rest = uri.split("://", 1)
    rest = rest.split("@")[0] if scheme == "hf" else rest
    name = rest if scheme == "hf" else rest.rstrip("/").rsplit("/", 1)[-1]
    name = re.sub(r"[^A-Za-z0-9._/-]+|\.{2,}", "-", name).strip("._-/")
    parts = [part.strip("._-") or "x" for part in name.split("/")]
    return "/".join(parts)[:128].rstrip("._-/")


def _below(uri: str, prefix: str) -> bool:
    """Whether `uri` is `prefix` or lies under it; `hf://org/na` is not under `hf://org/n`."""
    if not uri.startswith(prefix):
        return False
    return prefix.endswith("/") or len(uri) == len(prefix) or uri[len(prefix)] in "/@"


def _find(source: Source, id: str) -> BaseRow | None:
    with reading(source) as conn:
        row = conn.execute(select(base_models).where(base_models.c.id == id)).one_or_none()
    return None if row is None else BaseRow(**row._mapping)


def _taken(there: BaseRow, uri: str) -> Conflict:
    return Conflict(
        f"base {there.id!r} is registered as {there.uri}, not {uri[:200]}: "
        "register the other under an id of its own",
        code="base_exists",
        param="id",
    )


def _revision_in(uri: str) -> str | None:
    return uri.rsplit("@", 1)[1] if uri.startswith("hf://") and "@" in uri else None


def _close(source: Source, id: str) -> str:
    ids = [row.id for row in page(source).items]
    near = difflib.get_close_matches(id, ids, n=3, cutoff=0.4)
    if near:
        return f"did you mean {' or '.join(near)}?"
    if ids:
        return f"registered are {', '.join(sorted(ids)[:20])}"
    return "none is registered yet; POST /v1/base_models, or name a file://, s3:// or hf:// URI"


def _inspected(id: str, uri: str) -> BaseRow:
    try:
        info = inspect(uri)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OSError) as error:
        # Whatever somebody has put there: a config.json can hold anything of any type.
        raise UnknownBase(f"{uri} cannot be read as a model: {error!r}"[:500], param="model") from error
    facts = info.model_dump(include={"architecture", "license", "has_chat_template", "context_length"})
    return BaseRow(
        0, id, uri, info.revision, info.digest, info.shape.model_dump(mode="json"), facts, time.time()
    )
