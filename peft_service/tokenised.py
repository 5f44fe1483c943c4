"""Rows as tokens: arrays in one file, of which a run sees what it needs; several data sets as one."""

import contextlib
import json
import struct
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

VERSION = 3
"""Of the meaning of the result: part of its digest, so that no cached file outlives a change here."""
COPY_BYTES = 16 * 1024**2
"""Copied at once."""


_ARRAYS: dict[str, tuple[str, type[Any]]] = {
    "offsets": ("I64", np.int64),
    "lines": ("I64", np.int64),
    "item_offsets": ("I64", np.int64),
    "input_ids": ("I32", np.int32),
    "row_values": ("I32", np.int32),
    "token_values": ("I32", np.int32),
    "row_tasks": ("I32", np.int32),
    "row_files": ("I32", np.int32),
    "class_tasks": ("I32", np.int32),
    "row_numbers": ("F32", np.float32),
    "target_mask": ("U8", np.uint8),
    "items": ("U8", np.uint8),
}
"""Name -> type in the file and in memory, wide ones first: so all are aligned in the file."""


@dataclass(frozen=True)
class Tokenised:
    """The rows of a data set, end to end.

    Row i has the `sequences` sequences from `i * sequences` on; sequence s is
    `input_ids[offsets[s]:offsets[s + 1]]`. Of a pair they are the better and the worse answer to one prompt;
    of an unpaired row, the row and its prompt with another row's answer.
    """

    input_ids: NDArray[np.int32]
    target_mask: NDArray[np.uint8]
    """1 where the token is to be predicted from those before it; 0 for the first token of a sequence."""
    offsets: NDArray[np.int64]
    """(rows * sequences + 1,)"""
    lines: NDArray[np.int64]
    """(rows,) the line of the file, from 1, that each row comes from."""
    row_values: NDArray[np.int32] | None = None
    """(rows, 1) the class of a row; (rows, 2) the first and last token of an answer."""
    token_values: NDArray[np.int32] | None = None
    """As long as `input_ids`: the tag of a token, -100 where it has none."""
    row_tasks: NDArray[np.int32] | None = None
    """(rows,) the number of the row's task, in multi-task data."""
    class_tasks: NDArray[np.int32] | None = None
    """(classes,) the number of the task that a class belongs to, in multi-task classification."""
    row_numbers: NDArray[np.float32] | None = None
    """(rows, 1) the number that a row teaches, or whether its answer is good; (rows, classes) 1 for those
    that it belongs to."""
    row_files: NDArray[np.int32] | None = None
    """(rows,) the place in `statistics["files"]` of the file that a row comes from, if there are several."""
    items: NDArray[np.uint8] | None = None
    """JSON of the rows that graders look at; row i's is `items[item_offsets[i]:item_offsets[i + 1]]`."""
    item_offsets: NDArray[np.int64] | None = None
    sequences: int = 1
    statistics: dict[str, Any] = field(default_factory=dict)
    reference: NDArray[np.float32] | None = None
    """(rows * sequences,) log-probability of each sequence's targets under the base. Not in the file: a run
    computes it."""

    @property
    def rows(self) -> int:
        return len(self.lines)

    @property
    def target_tokens(self) -> int:
        step = COPY_BYTES
        parts = range(0, len(self.target_mask), step)
        return sum(int(self.target_mask[at : at + step].sum(dtype=np.int64)) for at in parts)

    def row(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Ids and target mask of one sequence (views)."""
        part = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.input_ids[part], self.target_mask[part]

    def lengths(self, rows: Sequence[int]) -> NDArray[np.int64]:
        """(rows, sequences) tokens of each sequence of these rows."""
        first = np.asarray(rows, dtype=np.int64)[:, None] * self.sequences + np.arange(self.sequences)
        made: NDArray[np.int64] = self.offsets[first + 1] - self.offsets[first]
        return made

    def row_labels(self, index: int) -> NDArray[np.int32]:
        """The class of a row, or the two ends of its answer."""
        assert self.row_values is not None
        values: NDArray[np.int32] = self.row_values[index]
        return values

    def token_labels(self, index: int) -> NDArray[np.int32]:
        """The tags of a row's tokens."""
        assert self.token_values is not None
        return self.token_values[int(self.offsets[index]) : int(self.offsets[index + 1])]

    def item(self, index: int) -> dict[str, Any]:
        """The row that graders look at."""
        assert self.items is not None
        assert self.item_offsets is not None
        raw = self.items[int(self.item_offsets[index]) : int(self.item_offsets[index + 1])]
        found: dict[str, Any] = json.loads(raw.tobytes())
        return found

    def place(self, index: int) -> str:
        """Where a row comes from, in words."""
        line = f"line {int(self.lines[index])}"
        if self.row_files is None:
            return line
        return f"{line} of {self.statistics['files'][int(self.row_files[index])]}"

    def part(self, count: int) -> "Tokenised":
        """The first `count` rows, copied."""
        ends = int(self.offsets[count * self.sequences])
        cut: dict[str, int] = {
            "offsets": count * self.sequences + 1,
            "input_ids": ends,
            "target_mask": ends,
            "token_values": ends,
            "item_offsets": count + 1,
            "items": 0 if self.item_offsets is None else int(self.item_offsets[count]),
            "class_tasks": 0 if self.class_tasks is None else len(self.class_tasks),
        }
        arrays: dict[str, Any] = {
            name: None if values is None else np.array(values[: cut.get(name, count)])
            for name, values in ((name, getattr(self, name)) for name in _ARRAYS)
        }
        return replace(self, **arrays, reference=None)

    def save(self, path: Path) -> None:
        """Write one safetensors file, a piece at a time; the statistics are in its metadata."""
        metadata = {
            "version": str(VERSION),
            "sequences": str(self.sequences),
            "statistics": json.dumps(self.statistics),
        }
        header: dict[str, Any] = {"__metadata__": metadata}
        arrays, at = [], 0
        for name, (kind, dtype) in _ARRAYS.items():
            values = getattr(self, name)
            if values is None:
                continue
            arrays.append(values)
            end = at + values.size * np.dtype(dtype).itemsize
            header[name] = {"dtype": kind, "shape": list(values.shape), "data_offsets": [at, end]}
            at = end
        told = json.dumps(header).encode()
        told += b" " * (-len(told) % 8)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(told)) + told)
            for values in arrays:
                rows = max(1, COPY_BYTES // max(1, values[:1].nbytes))
                for start in range(0, len(values), rows):
                    file.write(np.ascontiguousarray(values[start : start + rows]).tobytes())

    @classmethod
    def load(cls, path: Path) -> "Tokenised":
        """A view of the file: the system reads what is used, and may forget it again."""
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
        metadata = header.pop("__metadata__")
        arrays = {}
        for name, told in header.items():
            begin, end = told["data_offsets"]
            dtype, shape = _ARRAYS[name][1], tuple(told["shape"])
            arrays[name] = (
                np.memmap(path, dtype, "r", offset=8 + size + begin, shape=shape)
                if end > begin
                else np.empty(shape, dtype)
            )
        return cls(
            **arrays,
            sequences=int(metadata.get("sequences", 1)),
            statistics=json.loads(metadata["statistics"]),
        )


def concatenated(parts: Sequence[Tokenised], names: Sequence[str]) -> Tokenised:
    """Several data sets as one, in order; `names` say where a row comes from. All are of one kind."""
    if len(parts) == 1:
        return parts[0]
    with Writer() as writer:
        files: list[str] = []
        for part, name in zip(parts, names, strict=True):
            own = part.statistics.get("files", [])
            shift = np.diff(part.offsets)
            for start in range(0, len(part.input_ids), COPY_BYTES):
                piece = slice(start, start + COPY_BYTES)
                for kind in ("input_ids", "target_mask", "token_values"):
                    if getattr(part, kind) is not None:
                        writer.add(kind, getattr(part, kind)[piece])
            for kind in ("lines", "row_values", "row_tasks", "row_numbers"):
                if getattr(part, kind) is not None:
                    writer.add(kind, getattr(part, kind))
            writer.lengths(shift)
            if part.items is not None and part.item_offsets is not None:
                for start in range(0, len(part.items), COPY_BYTES):
                    writer.add("items", part.items[start : start + COPY_BYTES])
                writer.item_lengths(np.diff(part.item_offsets))
            here = np.zeros(part.rows, np.int32) if part.row_files is None else part.row_files
            writer.add("row_files", here + len(files))
            files += [f"{name}/{inner}" for inner in own] or [name]
        statistics = _together([part.statistics for part in parts]) | {"files": files}
        first = parts[0]
        return writer.tokenised(statistics, first.sequences, first.class_tasks)


def _together(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Statistics of several data sets as one: counts added, lines listed until there are a hundred."""
    made: dict[str, Any] = {}
    for name, value in parts[0].items():
        values = [part.get(name) for part in parts]
        if name == "length":
            # Quantiles of the whole are not known from those of the parts; the largest is.
            made[name] = {key: max(v[key] for v in values if v) for key in value}
        elif isinstance(value, dict) and "count" in value:
            made[name] = {"count": sum(v["count"] for v in values if v), "lines": value["lines"]}
        elif name == "max_token_id":
            made[name] = max(v for v in values if v is not None)
        elif isinstance(value, int):
            made[name] = sum(v for v in values if v is not None)
        else:
            made[name] = value
    return made


class Writer:
    """Arrays that grow in files: what is made of a data set never has to fit into memory."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._files: dict[str, Any] = {}
        self._width: dict[str, tuple[int, ...]] = {}
        self._lengths, self._item_lengths = array("q"), array("q")

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add(self, name: str, values: NDArray[Any]) -> None:
        if name not in self._files:
            file = tempfile.NamedTemporaryFile(prefix="peft-rows-")  # noqa: SIM115 - ends with the stack
            self._files[name] = self._stack.enter_context(file)
            self._width[name] = values.shape[1:]
        self._files[name].write(np.ascontiguousarray(values, dtype=_ARRAYS[name][1]).tobytes())

    def lengths(self, values: Iterable[int]) -> None:
        self._lengths.extend(map(int, values))

    def item_lengths(self, values: Iterable[int]) -> None:
        self._item_lengths.extend(map(int, values))

    @property
    def sequences(self) -> int:
        return len(self._lengths)

    def tokenised(
        self, statistics: dict[str, Any], sequences: int, class_tasks: NDArray[np.int32] | None
    ) -> Tokenised:
        arrays: dict[str, Any] = {"class_tasks": class_tasks}
        for name, file in self._files.items():
            file.flush()
            dtype = np.dtype(_ARRAYS[name][1])
            # The file has no name any more when this writer ends; the mapping keeps it.
            flat = np.memmap(file.name, dtype, "r") if file.tell() else np.empty(0, dtype)
            arrays[name] = flat.reshape(-1, *self._width[name])
        arrays["offsets"] = _offsets(self._lengths)
        if self._item_lengths:
            arrays["item_offsets"] = _offsets(self._item_lengths)
        return Tokenised(**arrays, sequences=sequences, statistics=statistics)


def _offsets(lengths: "array[int]") -> NDArray[np.int64]:
    made = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(np.frombuffer(lengths, dtype=np.int64), out=made[1:])
    return made
