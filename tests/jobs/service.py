"""The real API over real HTTP, in a thread, on SQLite and a directory; no Ray, so nothing trains."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from sqlalchemy import Engine

from cluster.plan import Capacity, Node
from jobs import base_models, keys
from jobs.api import create_app
from jobs.client import Client
from jobs.db import capacity as capacity_table
from jobs.db import connect, migrate, writing
from jobs.settings import Settings, load
from peft_service import catalog, shipped
from peft_service.store import Store, open_store

BASE = shipped.SHIPPED_ID


@dataclass(frozen=True)
class Service:
    url: str
    key: str
    settings: Settings
    engine: Engine
    store: Store

    def client(self, **options: Any) -> Client:
        return Client(self.url, self.key, **options)


@contextmanager
def serving(directory: Path) -> Iterator[Service]:
    """A service in `directory` with one base model, the one that ships."""
    settings = load({"PEFT_SERVICE_DATA_DIR": str(directory / "data")})
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    migrate(settings.database_url)
    engine, store = connect(settings.database_url), open_store(settings.store_url)
    key = keys.ensure_first_key(engine, settings.data_dir)
    base_models.register(engine, (), BASE, shipped.uri())
    cluster = Capacity(nodes=(Node(id="one", cpus=8, memory_bytes=32 << 30),))
    with writing(engine) as conn:
        conn.execute(
            capacity_table.insert().values(id=1, snapshot=cluster.model_dump(), updated_at=time.time())
        )
    config = uvicorn.Config(create_app(settings, engine, store), port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive(), "the API did not start"
        assert time.monotonic() < deadline, "the API did not start in 30 s"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Service(f"http://127.0.0.1:{port}", key, settings, engine, store)
    finally:
        server.should_exit = True
        thread.join(30)
        engine.dispose()


def rows(count: int, **wrong: Any) -> bytes:
    """A training file of `count` chat rows."""
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"what is {n} plus two?"},
                {"role": "assistant", "content": str(n + 2)},
            ]
        }
        for n in range(count)
    ]
    return b"".join(json.dumps({**line, **wrong}).encode() + b"\n" for line in lines)


def publish(service: Service, name: str, version: int, files: dict[str, bytes]) -> catalog.Adapter:
    """An adapter with these files, in the store and in the catalog, as a job that succeeded leaves it."""
    job = "ftjob-" + hashlib.sha256(f"{name}{version}".encode()).hexdigest()[:24]
    location = catalog.location_of(keys.FIRST_PROJECT, BASE, name, version, job)
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {path}\n" for path, data in sorted(files.items()))
    files = {**files, "SHA256SUMS": sums.encode()}
    manifest = {
        "files": [
            {"path": path, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for path, data in files.items()
        ]
    }
    for path, data in files.items():
        service.store.put(f"{location}/{path}", data)
    service.store.put(f"{location}/manifest.json", json.dumps(manifest).encode())
    adapter = catalog.Adapter(
        id=catalog.adapter_id_of(job),
        project_id=keys.FIRST_PROJECT,
        name=name,
        version=version,
        base_id=BASE,
        base_digest=None,
        method="lora",
        job_id=job,
        location=location,
        digest="0" * 64,
        manifest=manifest,
        metrics={},
        bytes=sum(map(len, files.values())),
        created_at=time.time(),
    )
    with writing(service.engine) as conn:
        return catalog.register(conn, adapter)
