"""What a run says while it works: numbered parts of JSON lines in the store, for whoever looks after it."""

import json
import time
from typing import Any

from peft_service.store import Store

FLUSH_SECONDS = 1.0


class MetricsWriter:
    """Writes `<run>/metrics/00000001.jsonl` and so on, at most one part a second. Used by one process at a
    time.

    The store that is passed in decides how long an outage is waited out (`store.patient`): training waits
    with it, so that no line is lost and memory stays small.
    """

    def __init__(self, store: Store, run_prefix: str) -> None:
        self._store = store
        self._prefix = f"{run_prefix}/metrics/"
        self._number = sum(1 for _ in store.list(self._prefix))  # the driver has written before the workers
        self._lines: list[str] = []
        self._flushed = 0.0

    def write(self, line: dict[str, Any]) -> None:
        """Add a line, with the time it was said."""
        self._lines.append(json.dumps({**line, "time": time.time()}))
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()

    def phase(self, phase: str) -> None:
        """Say what the run does from now on; seen at once."""
        self.write({"type": "phase", "phase": phase})
        self.flush()

    def message(self, text: str, level: str = "info") -> None:
        self.write({"type": "message", "level": level, "message": text})
        self.flush()

    def flush(self) -> None:
        if not self._lines:
            return
        self._store.put(
            f"{self._prefix}{self._number + 1:08d}.jsonl", ("\n".join(self._lines) + "\n").encode()
        )
        self._number += 1
        self._lines.clear()
        self._flushed = time.monotonic()
