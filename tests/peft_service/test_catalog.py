"""The catalog by itself, on both databases. (That jobs end up in it: tests/jobs/test_scheduler.py.)"""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select

from jobs.db import connect, migrate, reading, writing
from peft_service import catalog
from peft_service.catalog import Adapter
from peft_service.errors import Conflict, NotFound, ObjectNotFound
from peft_service.store import Store, open_store

PROJECT = "team"


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    url = (
        f"sqlite:///{tmp_path}/service.sqlite"
        if request.param == "sqlite"
        else request.getfixturevalue("postgres_url")
    )
    migrate(url)
    engine = connect(url)
    yield engine
    engine.dispose()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store((tmp_path / "store").as_uri())


def published(store: Store, number: int, name: str = "helper", version: int = 1, **changes: Any) -> Adapter:
    """An adapter's files in the store, as `adapter.publish` leaves them."""
    hexes = f"{number:08x}" + "0" * 16
    base = changes.pop("base", "org/tiny")
    location = catalog.location_of(PROJECT, base, name, version, f"ftjob-{hexes}")
    weights = f"weights {number}".encode()
    record = {
        "id": f"adapter_{hexes}",
        "project": PROJECT,
        "name": name,
        "version": version,
        "job": f"ftjob-{hexes}",
        "attempt": 1,
        "created_at": 1000.0 + number,
        "step": 4,
        "trained_tokens": 400,
        "metrics": {"train_loss": 0.5},
        "spec": {
            "base": {"id": base, "digest": "d" * 64},
            "method": {"kind": changes.pop("method", "lora"), "rank": 8},
            "objective": {"kind": "sft"},
            "data": {"training": {"id": "file-1", "sha256": "e" * 64}, "validation": None},
            "training": {"learning_rate": 1e-3},
            "seed": 7,
        },
    }
    listed = {
        "path": "adapter_model.safetensors",
        "size": len(weights),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    store.put(f"{location}/adapter_model.safetensors", weights)
    manifest = {"record": record | changes, "files": [listed], "software": {"torch": "2"}}
    store.put(f"{location}/manifest.json", json.dumps(manifest).encode())
    return catalog.read(store, location)


def register(engine: Engine, *adapters: Adapter) -> list[Adapter]:
    with writing(engine) as conn:
        return [catalog.register(conn, adapter) for adapter in adapters]


def test_an_adapter_is_found_by_every_name_it_has(engine: Engine, store: Store) -> None:
    first, second, other = register(
        engine,
        published(store, 1),
        published(store, 2, version=2),
        published(store, 3, name="other"),
    )
    with reading(engine) as conn:
        for reference, found in {
            "helper": second,
            "helper@1": first,
            "helper@v0002": second,
            first.id: first,
            "other": other,
            "ft:org--tiny:Team:helper:00000001": first,
        }.items():
            assert catalog.find(conn, PROJECT, reference) == found
        for reference in (
            "nobody",
            "helper@3",
            "helper@",
            "helper@latest",
            "helper@1²",
            "helper@99999999999999999999",
            "adapter_nothing",
            "ft:org--tiny:Team:other:00000001",
            "ft:",
            "ft::::",
            "help\0er",
            "",
        ):
            with pytest.raises(NotFound):
                catalog.find(conn, PROJECT, reference)
        with pytest.raises(NotFound):
            catalog.find(conn, "another project", first.id)


def test_a_version_is_one_adapter_and_a_job_has_one(engine: Engine, store: Store) -> None:
    (first,) = register(engine, published(store, 1))
    assert register(engine, published(store, 1)) == [first], "twice is once"
    with pytest.raises(Conflict, match="helper@1 of job ftjob-00000001"):
        register(engine, published(store, 2))
    moved = Adapter(**{**vars(first), "version": 2, "location": "elsewhere"})
    with pytest.raises(Conflict):
        register(engine, moved)
    with reading(engine) as conn:
        assert catalog.versions(conn, PROJECT, "helper") == [first]


def test_racing_registrations_of_one_version_leave_one(engine: Engine, store: Store) -> None:
    candidates = [published(store, number) for number in range(4)]
    won: list[str] = []
    barrier = threading.Barrier(4)

    def one(adapter: Adapter) -> None:
        barrier.wait()
        with contextlib.suppress(Conflict):
            won.extend(found.id for found in register(engine, adapter))

    threads = [threading.Thread(target=one, args=(adapter,)) for adapter in candidates]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with reading(engine) as conn:
        assert [row.id for row in conn.execute(select(catalog.adapters))] == won


def test_pages_hold_every_adapter_once_and_can_be_narrowed(engine: Engine, store: Store) -> None:
    made = register(
        engine,
        *(published(store, n, version=n) for n in range(1, 5)),
        published(store, 5, name="other", base="org/big"),
        published(store, 6, name="third", method="vera"),
    )
    with reading(engine) as conn:
        seen: list[Adapter] = []
        more = True
        while more:
            page, more = catalog.page(conn, PROJECT, after=seen[-1].id if seen else None, limit=2)
            seen += page
        assert seen == made[::-1]
        for narrowed, expected in [
            ({"name": "helper"}, made[3::-1]),
            ({"base": "org/big"}, [made[4]]),
            ({"method": "vera"}, [made[5]]),
            ({"job": made[2].job_id}, [made[2]]),
            ({"name": "helper", "base": "org/big"}, []),
        ]:
            assert catalog.page(conn, PROJECT, **narrowed) == (expected, False)
        with pytest.raises(NotFound):
            catalog.page(conn, PROJECT, after="adapter_nothing")
        assert catalog.page(conn, "another project") == ([], False)


def test_a_deleted_adapter_is_gone_but_its_version_stays_taken(engine: Engine, store: Store) -> None:
    first, second = register(engine, published(store, 1), published(store, 2, version=2))
    with writing(engine) as conn:
        assert catalog.delete(conn, PROJECT, second.id, at=5.0).deleted_at == 5.0
        with pytest.raises(NotFound):
            catalog.delete(conn, PROJECT, second.id, at=6.0)
    with reading(engine) as conn:
        assert catalog.find(conn, PROJECT, "helper") == first
        assert catalog.page(conn, PROJECT)[0] == [first]
        assert catalog.versions(conn, PROJECT, "helper") == [first]
        assert catalog.find(conn, PROJECT, second.id).deleted_at == 5.0
        with pytest.raises(NotFound):
            catalog.find(conn, PROJECT, "helper@2")
    with pytest.raises(Conflict):
        register(engine, published(store, 3, version=2))


def test_the_lineage_says_what_an_adapter_was_made_from(store: Store) -> None:
    said = catalog.lineage(published(store, 1))
    assert said["base"] == {"id": "org/tiny", "digest": "d" * 64}
    assert said["data"] == {"training": {"id": "file-1", "sha256": "e" * 64}}
    assert (said["seed"], said["steps"], said["software"]) == (7, 4, {"torch": "2"})


def test_rebuilding_reads_what_is_whole_and_names_what_is_not(engine: Engine, store: Store) -> None:
    made = register(engine, published(store, 2, version=2), published(store, 1))
    store.put(f"{PROJECT}/adapters/org--tiny/half-v0001-00000009/adapter_model.safetensors", b"no manifest")
    broken = f"{PROJECT}/adapters/org--tiny/broken-v0001-00000008"
    store.put(f"{broken}/manifest.json", b'{"record": {}}')
    published(store, 7, name="helper", version=1)  # an impostor: the version is taken
    with writing(engine) as conn:
        conn.execute(catalog.adapters.delete())
        count, problems = catalog.rebuild(conn, store, PROJECT)
        assert count == 2
        assert len(problems) == 2
        assert broken in problems[0]
        assert "helper@1 of job ftjob-00000007" in problems[1]
        found = [catalog.find(conn, PROJECT, reference) for reference in ("helper@2", "helper@1")]
    assert [(a.id, a.manifest, a.digest, a.bytes) for a in found] == [
        (a.id, a.manifest, a.digest, a.bytes) for a in made
    ]


def test_half_an_adapter_is_none(store: Store) -> None:
    with pytest.raises(ObjectNotFound):
        catalog.read(store, f"{PROJECT}/adapters/org--tiny/half-v0001-00000009")
