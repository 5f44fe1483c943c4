"""API keys: one project per key, only the sha256 of a key is stored.

A key has 256 random bits, so a plain fast hash is enough: there is nothing to guess.
"""

import contextlib
import hashlib
import os
import re
import secrets
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, insert, select, update
from sqlalchemy.exc import IntegrityError

from jobs.db import Source, api_keys, projects, reading, writing
from peft_service.errors import InvalidRequest, NotAuthenticated, NotFound
from peft_service.spec import NAME_PATTERN

FIRST_PROJECT = "default"


@dataclass(frozen=True)
class Key:
    """What is known about a key; never the key itself."""

    id: str
    project_id: str
    name: str
    prefix: str
    """Its first characters, to recognise it by."""
    created_at: float
    expires_at: float | None
    revoked_at: float | None


def create(
    source: Source,
    project: str,
    name: str = "",
    *,
    expires_at: float | None = None,
    plaintext: str | None = None,
) -> tuple[Key, str]:
    """A new key for `project`, which is made if it does not exist. Returns the record and, once, the key.

    Raises:
        InvalidRequest: a project name that cannot be a path segment, or an expiry in the past.
    """
    if not re.match(NAME_PATTERN, project) or ".." in project:
        raise InvalidRequest(
            f"{project!r} cannot name a project: letters, digits, '.', '_', '-'", param="project"
        )
    if len(name) > 64:
        raise InvalidRequest("the name of a key has at most 64 characters", param="name")
    now = time.time()
    if expires_at is not None and expires_at <= now:
        raise InvalidRequest("expires_at is in the past", param="expires_at")
    plaintext = plaintext or f"sk-{secrets.token_urlsafe(32)}"
    key = Key(f"key_{secrets.token_hex(12)}", project, name, plaintext[:8], now, expires_at, None)
    with writing(source) as conn:
        _ensure_project(conn, project, now)
        conn.execute(
            insert(api_keys).values(
                id=key.id,
                project_id=project,
                name=name,
                hash=_hash(plaintext),
                prefix=key.prefix,
                created_at=now,
                expires_at=expires_at,
            )
        )
    return key, plaintext


def verify(source: Source, plaintext: str) -> Key:
    """The key's record.

    Raises:
        NotAuthenticated: unknown, revoked or expired.
    """
    with reading(source) as conn:
        row = conn.execute(select(api_keys).where(api_keys.c.hash == _hash(plaintext))).one_or_none()
    if row is None:
        raise NotAuthenticated("this API key is unknown; `peft-service keys create` makes one")
    if row.revoked_at is not None:
        raise NotAuthenticated(
            f"the API key {row.prefix}… was revoked; `peft-service keys create` makes a new one"
        )
    if row.expires_at is not None and row.expires_at <= time.time():
        raise NotAuthenticated(
            f"the API key {row.prefix}… has expired; `peft-service keys create` makes a new one"
        )
    return _key(row)


def listed(source: Source, project: str | None = None) -> list[Key]:
    """Every key, revoked ones too, newest first."""
    query = select(api_keys).order_by(api_keys.c.seq.desc())
    if project is not None:
        query = query.where(api_keys.c.project_id == project)
    with reading(source) as conn:
        return [_key(row) for row in conn.execute(query)]


def revoke(source: Source, key_id: str) -> Key:
    """End a key at once. Revoking it again changes nothing.

    Raises:
        NotFound: no key has this id.
    """
    with writing(source) as conn:
        conn.execute(
            update(api_keys)
            .where(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
            .values(revoked_at=time.time())
        )
        row = conn.execute(select(api_keys).where(api_keys.c.id == key_id)).one_or_none()
    if row is None:
        raise NotFound(f"there is no key {key_id!r}; `peft-service keys list` shows them", param="key")
    return _key(row)


def ensure_first_key(source: Source, data_dir: Path) -> str:
    """The key in `data_dir`/key, made at the first start; valid even if the database was replaced since.

    The file is readable by its owner only. Safe to call from several processes at once.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    path = data_dir / "key"
    plaintext = _read_or_write(path, f"sk-{secrets.token_urlsafe(32)}")
    try:
        verify(source, plaintext)
    except NotAuthenticated:
        with reading(source) as conn:
            known = conn.execute(select(api_keys.c.id).where(api_keys.c.hash == _hash(plaintext))).first()
        if known is not None:  # revoked or expired on purpose: make another instead of reviving it
            path.unlink()
            return ensure_first_key(source, data_dir)
        try:
            create(source, FIRST_PROJECT, "first key", plaintext=plaintext)
        except IntegrityError:
            verify(source, plaintext)  # another process has just stored it
    return plaintext


def _read_or_write(path: Path, plaintext: str) -> str:
    """The file's text; `plaintext`, if there was no file. One writer wins, and nobody sees half a key."""
    if not path.exists():
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".key-") as file:  # made with mode 0600
            file.write(plaintext + "\n")
            file.flush()
            os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(file.name, path)
    return path.read_text().strip()


def _ensure_project(conn: Connection, project: str, now: float) -> None:
    if conn.execute(select(projects.c.id).where(projects.c.id == project)).first() is None:
        try:
            with conn.begin_nested():
                conn.execute(insert(projects).values(id=project, name=project, created_at=now))
        except IntegrityError:
            pass  # another process made it in between


def _hash(plaintext: str) -> str:
    return hashlib.sha256(plaintext.encode("utf-8", "surrogateescape")).hexdigest()


def _key(row: object) -> Key:
    return Key(*(getattr(row, name) for name in Key.__dataclass_fields__))
