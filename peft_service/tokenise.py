"""Turn validated data into token ids and a mask of targets, with a chat template.

What is trained: the tokens of assistant messages (or of the completion), and the end token after them, which
is how a model learns to stop. Everything else is only read. `Reading` has what can be chosen otherwise.

How the targets of a conversation are found. For every trained message i, the template renders the messages
before i with the generation prompt, which is what the model will see when it is asked; and the messages up to
i. The first must be a prefix of the second, and the second of the whole conversation; the difference is what
the model is to say. A second, independent method must agree with it. Where the template marks answers itself
with {% generation %}, those marks; elsewhere one more rendering with a placeholder in every message's place,
which shows what is the template's text and what is a message's: all of a trained message must be a target,
and nothing of an untrained one. If they do not agree, or a rendering is no prefix (templates that rewrite
earlier turns, for example by removing their <think> blocks), training would teach something that serving
never asks: that is an error. A template that changes the messages' own text leaves the first method alone;
such rows are counted in `statistics["unchecked_masks"]`.

How text becomes tokens. A row is tokenised in one go, never prompt and completion apart and glued together:
so its ids are those of the text itself. A token that holds characters of both sides of the boundary (a prompt
that ends with a space, mostly) is a target, since it holds some of the answer; such rows are counted in
`statistics["merged_boundaries"]`. Plain text gets the special tokens that the tokenizer puts around text by
itself (a BOS) and an EOS at its end. A rendered conversation gets nothing but what its template wrote, and an
EOS only if the template ends the last answer with no special token at all.

The first token of a row follows nothing, so it is never a target, whatever it is.

Memory does not depend on the size of the data, but for some numbers a row: what is made goes to files on the
way, and `Tokenised` is a view of a file.
"""

import contextlib
import hashlib
import json
import re
import struct
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from peft_service.columns import Columns, mapped
from peft_service.containers import Record, records
from peft_service.errors import InvalidRequest, InvalidTrainingFile
from peft_service.formats import Example, Format, Problem, clean, format_of, shown
from peft_service.objectives import Rows
from peft_service.tasks import CLASSIFYING, Task
from peft_service.validate import listed

VERSION = 3
"""Of the meaning of the result: part of its digest, so that no cached file outlives a change here."""
TooLong = Literal["error", "drop", "right", "left", "split"]
LISTED = 100
BATCH_CHARACTERS = 1_000_000
"""Encoded at once: enough for the tokenizer's threads, small beside the memory of a worker."""
COPY_BYTES = 16 * 1024**2
PARTNERS = 16
"""How many rows further a row without a partner of another prompt looks for one."""


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
    with _Writer() as writer:
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


class _Writer:
    """Arrays that grow in files: what is made of a data set never has to fit into memory."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._files: dict[str, Any] = {}
        self._width: dict[str, tuple[int, ...]] = {}
        self._lengths, self._item_lengths = array("q"), array("q")

    def __enter__(self) -> "_Writer":
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


@dataclass(frozen=True)
class Meaning:
    """What the rows are read for."""

    task: Task = "causal_lm"
    labels: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    rows: Rows = "text"
    items: bool = False
    """Keep the rows for graders, beside their tokens."""


@dataclass(frozen=True)
class Reading:
    """How rows become text and targets, where it is not as usual."""

    columns: Columns | None = None
    documents: Literal["line", "paragraph", "file"] = "line"
    """What is a document in a plain text file."""
    limit: int | None = None
    """Only so many good rows from the beginning."""
    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    eos: Literal["turn", "last", "all"] = "turn"
    """The end tokens that are targets: after every trained turn, only the last one, or all in the row."""
    turns: Literal["together", "apart"] = "together"
    """apart: a conversation becomes a row for each trained turn, which ends there: for templates that write a
    turn otherwise once more follow."""
    tools: tuple[dict[str, Any], ...] = ()
    """Tools for rows that bring none of their own."""


Parts = Sequence[tuple[str, Path]]
"""Files of a data set with their names, in order."""


def digest_of(
    sha256: str,
    tokenizer: Any,
    format: str,
    max_seq_len: int,
    too_long: TooLong,
    meaning: Meaning | None = None,
    reading: Reading | None = None,
) -> str:
    """64 hex digits that name the result of `tokenise`: the key of its cache in the store."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # What the last call set in passing; not a property of the tokenizer.
    backend.pop("truncation", None)
    backend.pop("padding", None)
    key = {
        "version": VERSION,
        "file": sha256,
        "tokenizer": backend,
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
        "format": format,
        "max_seq_len": max_seq_len,
        "too_long": too_long,
        "meaning": asdict(meaning or Meaning()),
        "reading": asdict(reading or Reading()),
    }
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """A pydantic value among those of the digest."""
    return value.model_dump(mode="json")


def tokenise(
    data: Path | Parts,
    format: str,
    tokenizer: Any,
    max_seq_len: int,
    too_long: TooLong = "error",
    meaning: Meaning | None = None,
    reading: Reading | None = None,
    *,
    param: str = "training_file",
) -> Tokenised:
    """Tokenise every row of a data set with a (fast) transformers tokenizer.

    `too_long` is what happens to a row of more than `max_seq_len` tokens: an error; the row is dropped; its
    end is cut ("right": the end token is lost too) or its beginning ("left"); a document may be "split" into
    rows, of which each begins with the last token of the one before, so that no target is lost. The
    statistics list them.

    Raises:
        InvalidTrainingFile: rows cannot be trained on; all are counted, the first 100 listed by line.
        InvalidRequest: the tokenizer cannot say which characters its tokens stand for.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InvalidRequest(
            f"The tokenizer of the base model ({type(tokenizer).__name__}) gives no character offsets, so "
            "targets cannot be found. Save it with a tokenizer.json (a fast tokenizer).",
            code="tokenizer_not_supported",
            param="model",
        )
    meaning, reading = meaning or Meaning(), reading or Reading()
    parts: Parts = ((data.name, data),) if isinstance(data, Path) else data
    report = _Report(too_long, max_seq_len)
    rows = _Rows(tokenizer, meaning, reading, _Template.of(tokenizer, reading), report)
    with _Writer() as writer:
        lengths = array("q")
        for fitted in rows.of(_examples(parts, format_of(format), report, reading)):
            for sequence in fitted.sequences:
                writer.add("input_ids", sequence.ids)
                writer.add("target_mask", sequence.mask)
                if sequence.tags is not None:
                    writer.add("token_values", sequence.tags)
            writer.lengths(len(sequence.ids) for sequence in fitted.sequences)
            lengths.append(sum(len(sequence.ids) for sequence in fitted.sequences))
            writer.add("lines", np.array([fitted.line.number]))
            if len(parts) > 1:
                writer.add("row_files", np.array([fitted.file]))
            if values := fitted.sequences[0].values:
                writer.add("row_values", np.array([values]))
            if fitted.numbers is not None:
                writer.add("row_numbers", np.array([fitted.numbers]))
            if fitted.task is not None:
                writer.add("row_tasks", np.array([fitted.task]))
            if fitted.item is not None:
                writer.add("items", np.frombuffer(fitted.item, np.uint8))
                writer.item_lengths([len(fitted.item)])
        if report.problem_count:
            raise listed(report.problems, report.problem_count, param)
        if not lengths:
            why = (
                f"all {report.dropped} are longer than {max_seq_len} tokens"
                if report.dropped
                else "there are none"
            )
            raise InvalidTrainingFile(
                f"No rows are left to train on: {why}. Raise max_seq_len, or cut rows with too_long.",
                param=param,
            )
        made = writer.tokenised(
            {},
            2 if meaning.rows == "pairs" else 1,
            _class_tasks(meaning) if meaning.tasks and meaning.labels else None,
        )
    if meaning.rows == "unpaired":
        made = _with_partners(made, report)
    p50, p95 = np.quantile(np.frombuffer(lengths, np.int64), [0.5, 0.95], method="lower")
    largest = max(
        int(made.input_ids[at : at + COPY_BYTES].max()) for at in range(0, len(made.input_ids), COPY_BYTES)
    )
    return replace(
        made,
        statistics={
            "rows": made.rows,
            "tokens": int(np.frombuffer(lengths, np.int64).sum()),
            "target_tokens": int(made.target_tokens),
            "length": {"p50": int(p50), "p95": int(p95), "max": int(max(lengths))},
            "max_token_id": largest,
            "targets_found_by": report.found_by,
            **report.statistics(),
            **({"files": [name for name, _ in parts]} if len(parts) > 1 else {}),
        },
    )


def _with_partners(rows: Tokenised, report: "_Report") -> Tokenised:
    """Every row, and behind it its prompt with the answer of a later row that has another prompt.

    What a model says to mismatched pairs tells how far it has moved (KTO, arXiv:2402.01306, section 4.1). A
    partner is a function of the data alone, so that it is the same for every number of workers.
    """

    def split(index: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        ids, mask = rows.row(index)
        at = int(mask.argmax())
        return ids[:at], ids[at:]

    with _Writer() as writer:
        for index in range(rows.rows):
            ids, mask = rows.row(index)
            prompt, answer = split(index)
            for further in range(1, PARTNERS + 1):
                other_prompt, other = split((index + further) % rows.rows)
                if not np.array_equal(prompt, other_prompt):
                    answer = other
                    break
            room = report.max_seq_len - len(prompt)
            for values, targets in (
                (ids, mask),
                (
                    np.concatenate([prompt, answer[:room]]),
                    np.concatenate([np.zeros(len(prompt), np.uint8), np.ones(len(answer[:room]), np.uint8)]),
                ),
            ):
                writer.add("input_ids", values)
                writer.add("target_mask", targets)
                writer.lengths([len(values)])
        for name in ("lines", "row_tasks", "row_files", "row_numbers"):
            if (found := getattr(rows, name)) is not None:
                writer.add(name, found)
        return writer.tokenised(rows.statistics, 2, rows.class_tasks)


def _number(name: str | None, known: tuple[str, ...], what: str) -> int:
    """
    Raises:
        _Bad: a validation row has a name that no training row has.
    """
    try:
        return known.index(name or "")
    except ValueError:
        message = f"The {what} {shown(name)} is in no row of the training file." if name else f"No {what}."
        raise _Bad(f"unknown_{what}", message, f"known are {', '.join(known[:20])}", what) from None


def _class_tasks(meaning: Meaning) -> NDArray[np.int32]:
    """The task of each class: labels of multi-task rows are `task/label`."""
    by_length = sorted(meaning.tasks, key=len, reverse=True)
    return np.array(
        [
            next((meaning.tasks.index(task) for task in by_length if label.startswith(f"{task}/")), -1)
            for label in meaning.labels
        ],
        dtype=np.int32,
    )


class _Bad(Exception):
    """A row that cannot be trained on, found where its line is not known."""

    def __init__(self, code: str, message: str, hint: str = "", path: str = "") -> None:
        super().__init__(message)
        self.problem = Problem(path, code, message, hint)


@dataclass
class _Report:
    """What happened to rows on the way; the first 100 of each kind by line."""

    too_long: TooLong
    max_seq_len: int
    problems: list[Problem] = field(default_factory=list)
    problem_count: int = 0
    found_by: str = "text"
    counts: dict[str, int] = field(default_factory=dict)
    where: dict[str, list[int]] = field(default_factory=dict)
    lost_tokens: int = 0

    @property
    def dropped(self) -> int:
        return self.counts.get("dropped", 0)

    def note(self, what: str, line: Record) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1
        at = self.where.setdefault(what, [])
        if len(at) < LISTED and at[-1:] != [line.number]:
            at.append(line.number)

    def bad(self, line: Record, problem: Problem) -> None:
        self.problem_count += 1
        if len(self.problems) < LISTED:
            excerpt = clean(line.raw[:400].decode(errors="replace")[:80])
            self.problems.append(
                replace(problem, line=line.number, byte_offset=line.byte_offset, excerpt=excerpt)
            )

    def statistics(self) -> dict[str, Any]:
        kinds = (
            *("dropped", "truncated", "split", "merged_boundaries", "eos_appended", "rewritten_content"),
            *("unchecked_masks", "trailing_messages"),
        )
        made = {
            kind: {"count": self.counts.get(kind, 0), "lines": self.where.get(kind, [])} for kind in kinds
        }
        return {**made, "lost_tokens": self.lost_tokens}


@dataclass(frozen=True)
class _Text:
    """A sequence as text. `spans` are the characters [start, end) that are targets."""

    text: str
    spans: tuple[tuple[int, int], ...]
    plain: bool
    """Plain text: the tokenizer's own special tokens are added. Otherwise the template wrote them."""
    append_eos: bool
    ids: tuple[int, ...] = ()
    """Tokenised by somebody else."""
    targets: tuple[bool, ...] = ()


@dataclass(frozen=True)
class _Sequence:
    """Tokens of a sequence."""

    ids: NDArray[np.int32]
    mask: NDArray[np.uint8]
    values: tuple[int, ...] = ()
    tags: NDArray[np.int32] | None = None
    cuttable: bool = True
    """Whether a row that is too long can lose its end or its beginning."""
    offsets: NDArray[np.int64] | None = None
    """(tokens, 2) the characters [start, end) of the text that each token holds, where that is known."""

    def part(self, kept: slice) -> "_Sequence":
        """The tokens of a slice. Its first one follows nothing, but its mask is as it was."""
        return replace(
            self,
            ids=self.ids[kept],
            mask=self.mask[kept].copy(),
            tags=None if self.tags is None else self.tags[kept],
            offsets=None if self.offsets is None else self.offsets[kept],
        )


@dataclass(frozen=True)
class _Pending:
    """A good row on its way: as text where `texts`, else in `sequences`."""

    line: Record
    file: int
    texts: tuple[_Text, ...] = ()
    sequences: tuple[_Sequence, ...] = ()
    task: int | None = None
    numbers: tuple[float, ...] | None = None
    item: bytes | None = None


@dataclass(frozen=True)
class _Rows:
    """From the files of a data set to rows of tokens; what goes wrong is in the report."""

    tokenizer: Any
    meaning: Meaning
    reading: Reading
    template: "_Template"
    report: _Report

    def of(self, examples: Iterable[tuple[int, Record, Example]]) -> Iterator[_Pending]:
        for batch in _batches(self._pending(examples)):
            texts = [text for row in batch for text in row.texts]
            encoded = iter([]) if not texts else _encode(self.tokenizer, texts)
            for row in batch:
                if row.texts:
                    found = [next(encoded) for _ in row.texts]
                    if any(merged for _, merged in found):
                        self.report.note("merged_boundaries", row.line)
                    row = replace(row, sequences=tuple(sequence for sequence, _ in found))
                yield from self._fitted(row)

    def _pending(self, examples: Iterable[tuple[int, Record, Example]]) -> Iterator[_Pending]:
        meaning = self.meaning
        labelled = Labelled(self.tokenizer, meaning.task, meaning.labels)
        for file, line, example in examples:
            if self.reading.tools and not example.tools and example.messages:
                example = replace(example, tools=self.reading.tools)
            try:
                task = _number(example.task, meaning.tasks, "task") if meaning.tasks else None
                numbers = _numbers(example, meaning)
                item = _item(example, line) if meaning.items else None
                row = _Pending(line, file, task=task, numbers=numbers, item=item)
                for each in self._turns(example):
                    yield self._row(row, each, labelled)
            except _Bad as bad:
                self.report.bad(line, bad.problem)

    def _turns(self, example: Example) -> Iterator[Example]:
        """The row, or with `turns: apart` a row for each of its trained turns."""
        apart = self.reading.turns == "apart" and self.meaning.rows == "text" and sum(example.trained) > 1
        if not apart:
            yield example
            return
        for index, trained in enumerate(example.trained):
            if trained:
                yield replace(
                    example,
                    messages=example.messages[: index + 1],
                    trained=(False,) * index + (True,),
                )

    def _row(self, row: _Pending, example: Example, labelled: "Labelled") -> _Pending:
        """Raises _Bad where the row and the template do not go together, or a label cannot be expressed."""
        meaning, template = self.meaning, self.template
        both = (example, example.rejected) if example.rejected is not None else (example,)
        if meaning.rows == "prompts":
            text = template.question(row.line, example, self.report)
            return replace(row, texts=(text,), item=_item(example, row.line))
        if meaning.task == "seq2seq_lm":
            asked = [template.asked(each) for each in both]
            return replace(row, sequences=tuple(labelled.sequence(example, each) for each in asked))
        if meaning.task not in CLASSIFYING or meaning.rows == "pairs":
            texts = tuple(template.render(row.line, each, self.report) for each in both)
            return replace(row, texts=texts)
        return replace(row, sequences=(labelled.sequence(example, None),))

    def _fitted(self, row: _Pending) -> Iterator[_Pending]:
        """The row cut to length as asked; nothing if it is dropped or wrong; several rows if it is split."""
        report, most = self.report, self.report.max_seq_len
        needs_targets = self.meaning.rows != "prompts"
        length = max(len(sequence.ids) for sequence in row.sequences)
        if length > most and report.too_long == "drop":
            report.note("dropped", row.line)
            report.lost_tokens += sum(len(sequence.ids) for sequence in row.sequences)
            return
        if length > most and report.too_long == "split" and self.meaning.rows == "text":
            report.note("split", row.line)
            (whole,) = row.sequences
            for start in range(0, length - 1, most - 1):
                piece = whole.part(slice(start, start + most))
                piece.mask[0] = 0
                if piece.mask.any():
                    yield replace(row, sequences=(piece,))
            return
        cut = [self._cut(sequence, row.line, needs_targets) for sequence in row.sequences]
        fitted = tuple(sequence for sequence in cut if sequence is not None)
        if len(fitted) == len(cut):
            if length > most:
                report.note("truncated", row.line)
            yield replace(row, sequences=fitted)

    def _cut(self, sequence: _Sequence, line: Record, needs_targets: bool) -> _Sequence | None:
        report, most, length = self.report, self.report.max_seq_len, len(sequence.ids)
        targets = int(sequence.mask.sum())
        if length > most:
            if report.too_long not in ("left", "right") or not sequence.cuttable:
                hint = "raise max_seq_len, shorten the row, or set too_long to drop"
                hint += ", right or left" if sequence.cuttable else ""
                message = f"The row has {length:,} tokens; max_seq_len is {most:,}."
                report.bad(line, Problem("", "too_long", message, hint))
                return None
            kept = slice(0, most) if report.too_long == "right" else slice(length - most, length)
            part = sequence.part(kept)
            if self.meaning.task == "sequence_classification":
                part.mask[-1:] = 1
            elif sequence.tags is None:
                part.mask[0] = 0
            if needs_targets and not part.mask.any():
                message = (
                    f"Cutting the row from {length:,} to {most:,} tokens removes all its {targets:,} targets."
                )
                hint = "shorten its prompt, or raise max_seq_len"
                report.bad(line, Problem("", "no_targets", message, hint))
                return None
            report.lost_tokens += length - most
            return part
        if needs_targets and not targets:
            message = "The row has no token that could be learned from the tokens before it."
            report.bad(line, Problem("", "no_targets", message))
            return None
        return sequence


def _item(example: Example, line: Record) -> bytes:
    """What graders see, as JSON: the row, and of one that has an answer that as `completion`, their
    reference."""
    item = dict(example.item or line.row or {})
    if "completion" not in item and example.messages and example.messages[-1]["role"] == "assistant":
        item["completion"] = example.messages[-1]["content"]
    return json.dumps(item, ensure_ascii=False).encode()


def _numbers(example: Example, meaning: Meaning) -> tuple[float, ...] | None:
    if meaning.rows == "unpaired":
        return (float(bool(example.desirable)),)
    if meaning.rows == "values":
        assert example.value is not None
        return (example.value,)
    if meaning.rows == "class_sets":
        found = [0.0] * len(meaning.labels)
        for label in example.labels or ():
            found[_number(label, meaning.labels, "label")] = 1.0
        return tuple(found)
    return None


def _examples(
    parts: Parts, shape: Format, report: _Report, reading: Reading
) -> Iterator[tuple[int, Record, Example]]:
    """(file, record, example) of every good row; the others go to the report."""
    taken = 0
    for file, (name, path) in enumerate(parts):
        for line in records(path, name, documents=reading.documents):
            if reading.limit is not None and taken >= reading.limit:
                return
            if (good := _good(line, shape, report, reading)) is not None:
                taken += 1
                yield file, *good


def _good(line: Record, shape: Format, report: _Report, reading: Reading) -> tuple[Record, Example] | None:
    """(record, its row in the keys of the format, what it teaches); None: its problems went to the report."""
    row, problems = line.row, list(line.problems)
    if row is not None and reading.columns is not None:
        row, found = mapped(row, reading.columns)
        problems += found
    if row is not None and not problems:
        # The file was validated at upload; whoever calls with another one gets the same report.
        problems = shape.problems(row)
    if row is None or problems:
        for problem in problems:
            report.bad(line, problem)
        return None
    return line._replace(row=row), shape.messages_or_text(row)


@dataclass(frozen=True)
class Seen:
    """One record of a data set, and what became of it."""

    file: int
    """The place of its file among the parts."""
    record: Record
    rows: tuple[_Pending, ...]
    """None where it was dropped or is wrong; several where it was split, or its turns taken apart."""
    happened: dict[str, int]
    """What is counted in the statistics of a data set: `dropped`, `truncated`, `merged_boundaries`, …"""
    lost_tokens: int
    problems: tuple[Problem, ...]


def seen(
    data: Parts,
    format: str,
    tokenizer: Any,
    max_seq_len: int,
    too_long: TooLong = "error",
    meaning: Meaning | None = None,
    reading: Reading | None = None,
    *,
    wanted: Callable[[Record], bool | None],
) -> Iterator[Seen]:
    """Some records by themselves, on the very way that `tokenise` takes all of them.

    Args:
        wanted: whether a record is to be seen; None: neither it nor any further one of its file.
    """
    meaning, reading = meaning or Meaning(), reading or Reading()
    template, shape = _Template.of(tokenizer, reading), format_of(format)
    for file, (name, path) in enumerate(data):
        for record in records(path, name, documents=reading.documents):
            yes = wanted(record)
            if yes is None:
                break
            if yes:
                report = _Report(too_long, max_seq_len)
                good = _good(record, shape, report, reading)
                rows = _Rows(tokenizer, meaning, reading, template, report)
                found = tuple(rows.of([] if good is None else [(file, *good)]))
                yield Seen(file, record, found, report.counts, report.lost_tokens, tuple(report.problems))


def rows_at(parts: Parts, reading: Reading, made: Tokenised) -> list[dict[str, Any]]:
    """The rows, in the keys of their format, that `made` was made of: for looking at them again."""
    files = [0] * made.rows if made.row_files is None else made.row_files.tolist()
    wanted = set(zip(files, made.lines.tolist(), strict=True))
    found = []
    for file, (name, path) in enumerate(parts):
        last = max((line for at, line in wanted if at == file), default=0)
        for line in records(path, name, documents=reading.documents) if last else ():
            if (file, line.number) in wanted and line.row is not None:
                found.append(line.row if reading.columns is None else mapped(line.row, reading.columns)[0])
            if line.number >= last:
                break
    return found


def _batches(rows: Iterator[_Pending]) -> Iterator[list[_Pending]]:
    batch: list[_Pending] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += 100 + sum(len(text.text) for text in row.texts)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Any, texts: list[_Text]) -> Iterator[tuple[_Sequence, bool]]:
    """(tokens, whether one holds characters of both sides of a boundary) of each text, in order."""
    for (plain, given), group in groupby(texts, key=lambda text: (text.plain, bool(text.ids))):
        some = list(group)
        if given:
            for text in some:
                mask = np.array(text.targets, dtype=np.uint8)
                mask[:1] = 0
                yield _Sequence(np.array(text.ids, dtype=np.int32), mask), False
            continue
        encoded = tokenizer(
            [text.text for text in some],
            add_special_tokens=plain,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            padding=False,
            truncation=False,
            verbose=False,
        )
        for text, ids, offsets in zip(some, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            starts_T, ends_T = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
            mask = np.zeros(len(ids), dtype=np.uint8)
            merged = False
            for start, end in text.spans:
                # Byte-level tokenizers may trim blanks from offsets, so that a token of blanks has zero width
                # at its end: it is inside when it ends after `start` and not after `end`.
                inside = (ends_T > start) & ((starts_T < end) | (ends_T <= end))
                mask[inside] = 1
                first = int(inside.argmax()) if inside.any() else 0
                if first and (starts_T[first] < start or 0 < ends_T[first - 1] < start):
                    merged = True
            places = np.stack([starts_T, ends_T], axis=1)
            if text.append_eos:
                if not ids or ids[-1] != tokenizer.eos_token_id:
                    ids, mask = [*ids, tokenizer.eos_token_id], np.append(mask, np.uint8(0))
                    places = np.append(places, [[len(text.text)] * 2], axis=0)
                mask[-1] = 1
            mask[:1] = 0
            yield _Sequence(np.array(ids, dtype=np.int32), mask, offsets=places), merged


@dataclass(frozen=True)
class Labelled:
    """Tokens of rows for every task but writing on: with the special tokens that the tokenizer puts there.

    A word's tag stands at its first token; an answer at its first and last token, or at the row's first token
    if there is none. Of an encoder-decoder's row, source and answer are tokenised apart, each as the model
    gets it.
    """

    tokenizer: Any
    task: Task
    labels: tuple[str, ...]

    def sequence(self, example: Example, asked: tuple[str, str] | None) -> _Sequence:
        """Raises _Bad where an answer or a label cannot be expressed."""
        if asked is not None:
            source = self.tokenizer(asked[0], return_attention_mask=False)["input_ids"]
            answer = self.tokenizer(text_target=asked[1], return_attention_mask=False)["input_ids"]
            if self.tokenizer.eos_token_id is not None and answer[-1:] != [self.tokenizer.eos_token_id]:
                answer = [*answer, self.tokenizer.eos_token_id]
            mask = np.array([0] * len(source) + [1] * len(answer), dtype=np.uint8)
            return _Sequence(np.array([*source, *answer], dtype=np.int32), mask, cuttable=False)
        if self.task == "token_classification":
            found = self.tokenizer(list(example.words), is_split_into_words=True)
            words = found.word_ids()
            tags = np.full(len(words), -100, dtype=np.int32)
            for place, word in enumerate(words):
                if word is not None and (place == 0 or words[place - 1] != word):
                    tags[place] = _number(example.tags[word], self.labels, "label")
            return _Sequence(_ids(found), (tags != -100).astype(np.uint8), tags=tags)
        found = self.tokenizer(example.prompt, example.pair)
        ids = _ids(found)
        mask = np.zeros(len(ids), dtype=np.uint8)
        if self.task == "question_answering":
            assert example.answer is not None
            start, end = example.answer
            first = last = 0
            if end > start:
                first, last = (found.char_to_token(at, sequence_index=1) for at in (start, end - 1))
                if first is None or last is None:
                    raise _Bad("answer_not_found", "The answer begins or ends in blanks.", "", "answers")
            mask[[first, last]] = 1
            return _Sequence(ids, mask, values=(first, last), cuttable=False)
        mask[-1:] = 1
        if example.label is None:
            return _Sequence(ids, mask)
        return _Sequence(ids, mask, values=(_number(example.label, self.labels, "label"),))


def _ids(encoded: Any) -> NDArray[np.int32]:
    return np.array(encoded["input_ids"], dtype=np.int32)


_PLACEHOLDER = re.compile(r"qzPLACE(\d+)HOLDERqz")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass
class _Template:
    """The tokenizer's chat template, and its words for the end of a turn."""

    tokenizer: Any
    reading: Reading
    end_marks: tuple[str, ...]
    """Every special token: the end of a turn is one of them in all templates that have such a mark."""

    @classmethod
    def of(cls, tokenizer: Any, reading: Reading) -> "_Template":
        special = {str(token) for token in tokenizer.all_special_tokens}
        special |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        return cls(tokenizer, reading, tuple(sorted(special)))

    def render(self, line: Record, example: Example, report: _Report) -> _Text:
        """Raises _Bad where the row and the template do not go together."""
        if example.token_ids:
            return self._given(example)
        if example.segments:
            return self._segments(example)
        if example.document is not None:
            self._end_token()
            return _Text(example.document, ((0, len(example.document)),), plain=True, append_eos=True)
        if example.messages and self.tokenizer.chat_template is not None:
            return self._conversation(line, example, report)
        if example.completion is None:
            raise self._no_template()
        self._end_token()
        start = 0 if self.reading.train_on == "all" else len(example.prompt)
        text = example.prompt + example.completion
        return _Text(text, ((start, len(text)),), plain=True, append_eos=True)

    def question(self, line: Record, example: Example, report: _Report) -> _Text:
        """A prompt that the model is to answer, without the answer that the row may have."""
        if example.messages and self.tokenizer.chat_template is not None:
            messages = list(example.messages)
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
            if not messages:
                raise _Bad("no_prompt", "The row has no message before the assistant's.", "", "messages")
            text = self._text(self._said_as(messages), list(example.tools), ask=True)
            return _Text(text, (), plain=False, append_eos=False)
        if not example.prompt:
            raise self._no_template()
        return _Text(example.prompt, (), plain=True, append_eos=False)

    def asked(self, example: Example) -> tuple[str, str]:
        """(what an encoder reads, what its decoder is to write). Raises _Bad."""
        if not example.messages:
            if example.completion is None:
                raise _Bad(
                    "one_answer",
                    "An encoder-decoder learns from a prompt and an answer, and this row has none.",
                    "write prompt and completion strings",
                )
            return example.prompt, example.completion
        *before, last = example.messages
        if not example.trained[-1] or any(example.trained[:-1]):
            message = "An encoder-decoder learns one answer a row: the last message, of the assistant."
            raise _Bad("one_answer", message, "split the conversation, or set weight 0 on earlier answers")
        if self.tokenizer.chat_template is not None:
            return self._text(before, list(example.tools), ask=True), last["content"]
        if len(before) > 1 or example.tools:
            raise self._no_template()
        return before[0]["content"], last["content"]

    def _no_template(self) -> _Bad:
        return _Bad(
            "no_chat_template",
            "The row is a conversation, but the base model's tokenizer has no chat template.",
            "choose the instruction-tuned variant of the base, give a data.template, or write plain prompt "
            "and completion strings",
        )

    def _given(self, example: Example) -> _Text:
        vocab = len(self.tokenizer)
        bad = next((at for at, token in enumerate(example.token_ids) if not 0 <= token < vocab), None)
        if bad is not None:
            raise _Bad(
                "token_out_of_range",
                f"The token {example.token_ids[bad]} is not in the tokenizer, which has {vocab:,}.",
                "tokenise with the base's own tokenizer",
                f"input_ids[{bad}]",
            )
        targets = example.token_targets
        if self.reading.train_on == "all":
            targets = (True,) * len(example.token_ids)
        return _Text("", (), plain=False, append_eos=False, ids=example.token_ids, targets=targets)

    def _segments(self, example: Example) -> _Text:
        text, spans = "", []
        for piece, trained in example.segments:
            if (trained or self.reading.train_on == "all") and piece:
                spans.append((len(text), len(text) + len(piece)))
            text += piece
        return _Text(text, tuple(spans), plain=False, append_eos=False)

    def _end_token(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise _Bad(
                "no_eos_token",
                "The tokenizer has no EOS token, so a model could never learn to stop.",
                "set eos_token in the base's tokenizer_config.json",
            )

    def _said_as(self, messages: list[dict[str, Any]], tools: bool = False) -> list[dict[str, Any]]:
        """Messages in the words that this template knows."""
        jinja = self.tokenizer.get_chat_template(None, [{}] if tools else None)
        made = []
        for message in messages:
            if message["role"] == "developer" and "developer" not in jinja:
                # OpenAI's newer name for system; most templates drop what they do not know.
                message = {**message, "role": "system"}
            if message.get("reasoning_content") and "reasoning_content" not in jinja:
                # Models that reason write it so; templates for others would leave it out in silence.
                message = dict(message)
                reasoning = message.pop("reasoning_content").strip()
                message["content"] = f"<think>\n{reasoning}\n</think>\n\n{message['content']}"
            made.append(message)
        return made

    def _conversation(self, line: Record, example: Example, report: _Report) -> _Text:
        trained, tools = list(example.trained), list(example.tools)
        if self.reading.train_on == "last_assistant":
            last = max((index for index, yes in enumerate(trained) if yes), default=-1)
            trained = [index == last for index in range(len(trained))]
        messages = self._said_as(list(example.messages), bool(tools))
        if any(trained) and messages[-1]["role"] != "assistant" and self.reading.train_on != "all":
            # Nobody learns from what comes after the last answer.
            until = max(index for index, yes in enumerate(trained) if yes) + 1
            messages, trained = messages[:until], trained[:until]
            report.note("trailing_messages", line)
        jinja = self.tokenizer.get_chat_template(None, tools or None)
        whole = self._text(messages, tools)
        self._nothing_dropped(whole, messages, tools)
        ended = whole.rstrip().endswith(self.end_marks)
        if self.reading.train_on == "all":
            append_eos = not ended
            turns = [(0, len(whole))]
            report.found_by = "all tokens"
        else:
            turns = self._turns(line, whole, messages, tools, trained, jinja, report)
            append_eos = trained[-1] and not ended
        if append_eos:
            self._end_token()
            report.note("eos_appended", line)
        return _Text(whole, tuple(turns), plain=False, append_eos=append_eos)

    def _turns(
        self,
        line: Record,
        whole: str,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]],
        trained: list[bool],
        jinja: str,
        report: _Report,
    ) -> list[tuple[int, int]]:
        """The characters of every trained turn, by two methods that agree."""
        spans: list[tuple[int, int]] = []
        for index, yes in enumerate(trained):
            if yes:
                start, end = self._said(whole, messages, tools, index)
                if messages[index]["content"].strip() not in whole[start:end]:
                    report.note("rewritten_content", line)
                spans.append((start, end))
        turns = [(start, self._trimmed(whole, start, end)) for start, end in spans]
        if _GENERATION.search(jinja):
            others = any(
                message["role"] == "assistant" and not yes
                for message, yes in zip(messages, trained, strict=True)
            )
            turns = self._agreed(whole, messages, tools, jinja, spans, turns, others)
            report.found_by = "prefixes and {% generation %}"
        else:
            report.found_by = "prefixes and placeholders"
            contents = self._contents(whole, messages, tools)
            if contents is None:
                report.note("unchecked_masks", line)
            else:
                self._same(whole, turns, contents, trained)
        return self._with_ends(whole, turns)

    def _contents(
        self, whole: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
    ) -> list[tuple[int, int, int]] | None:
        """(message, start, end): the characters of messages' own texts, wherever the template writes them,
        found by rendering placeholders; None: it changes texts, so that nothing can be said."""
        marked = [
            {**message, "content": f"qzPLACE{index}HOLDERqz"} if message["content"].strip() else message
            for index, message in enumerate(messages)
        ]
        try:
            skeleton = self._text(marked, tools)
        except _Bad:
            return None
        # Texts of the template, and between them the numbers of the messages.
        pieces = _PLACEHOLDER.split(skeleton)
        found: list[tuple[int, int, int]] = []
        if not whole.startswith(pieces[0]):
            return None
        at = len(pieces[0])
        for number, following in zip(pieces[1::2], pieces[2::2], strict=True):
            text = messages[int(number)]["content"]
            for candidate in (text, text.strip(), text.rstrip(), text.lstrip()):
                if whole.startswith(candidate, at) and whole.startswith(following, at + len(candidate)):
                    found.append((int(number), at, at + len(candidate)))
                    at += len(candidate) + len(following)
                    break
            else:
                return None
        return found if at == len(whole) else None

    def _same(
        self,
        whole: str,
        turns: list[tuple[int, int]],
        contents: list[tuple[int, int, int]],
        trained: list[bool],
    ) -> None:
        """Raises _Bad where a trained message is nowhere wholly among the targets, or an untrained one is."""
        inside = {
            index
            for index, start, end in contents
            if any(first <= start and end <= last for first, last in turns)
        }
        for index, start, end in contents:
            touched = any(first < end and start < last for first, last in turns)
            if index in inside if trained[index] else not touched:
                continue
            seen = " ".join(shown(whole[first:last], 60) for first, last in turns)
            raise _Bad(
                "masks_disagree",
                f"The message's own text is {shown(whole[start:end], 60)}, which is "
                f"{'not all' if trained[index] else 'partly'} in what follows the generation prompts: "
                f"{seen}.",
                "the template puts messages into another order or place than it asks for them",
                f"messages[{index}]",
            )

    def _with_ends(self, whole: str, turns: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The turns with the end marks that `eos` wants as targets."""
        if self.reading.eos == "last":
            return [(start, self._unended(whole, start, end)) for start, end in turns[:-1]] + turns[-1:]
        if self.reading.eos == "all" and (eos := self.tokenizer.eos_token):
            ends = [(found.start(), found.end()) for found in re.finditer(re.escape(eos), whole)]
            return _merged([*turns, *ends])
        return turns

    def _unended(self, whole: str, start: int, end: int) -> int:
        """The end of a turn without its end mark."""
        said = whole[start:end].rstrip()
        mark = max((mark for mark in self.end_marks if said.endswith(mark)), key=len, default="")
        return start + len(said) - len(mark) if mark else end

    def _text(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], ask: bool = False) -> str:
        """The template's text for these messages; `ask` adds the generation prompt."""
        import jinja2

        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tools=tools or None, tokenize=False, add_generation_prompt=ask
            )
        # A template is a program from the base model: it may end with any error of plain expressions.
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            message = f"The chat template refuses the row: {clean(str(error))[:300]}"
            hint = "the order and kinds of the messages must be such as this base model was made for"
            raise _Bad("template_error", message, hint) from error
        return text

    def _said(
        self, whole: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]], index: int
    ) -> tuple[int, int]:
        """The characters of `whole` that the model says in message `index`."""
        until = whole if index == len(messages) - 1 else self._text(messages[: index + 1], tools)
        if index:
            asked = self._text(messages[:index], tools, ask=True)
            start = len(asked)
        else:
            # Nothing to render before the first message: the generation prompt is found by itself.
            asked = self._text(messages[:1], tools, ask=True)
            header = asked[len(until) :] if asked.startswith(until) else ""
            start = until.find(header) + len(header) if header in until else 0
            asked = until[:start]
        path = f"messages[{index}]"
        if not until.startswith(asked):
            raise _Bad(
                "not_a_prefix",
                "The chat template does not go on from its own generation prompt in this turn: after "
                f"{shown(_tail(asked, until))} it writes {shown(until[_common(asked, until) :], 40)}.",
                "this template cannot be trained on as it is; use one that renders turn after turn",
                path,
            )
        if not whole.startswith(until):
            shared = _common(until, whole)
            raise _Bad(
                "not_a_prefix",
                "The chat template writes this turn otherwise once more messages follow it: "
                f"{shown(until[shared:], 40)} becomes {shown(whole[shared:], 40)}.",
                'set data.turns to "apart" (a row for each turn), or give "weight": 0 to all assistant '
                "messages but the last",
                path,
            )
        return start, len(until)

    def _trimmed(self, whole: str, start: int, end: int) -> int:
        """The end of a turn without the blanks after its end mark: at serving nobody asks for those."""
        said = whole[start:end].rstrip()
        return start + len(said) if said.endswith(self.end_marks) else end

    def _agreed(
        self,
        whole: str,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]],
        jinja: str,
        spans: list[tuple[int, int]],
        turns: list[tuple[int, int]],
        others: bool,
    ) -> list[tuple[int, int]]:
        """The turns, compared with what the template itself marks. `others`: there are untrained answers too.

        Both must start at the same character and end at the same one, blanks after the end mark aside; of
        those the template's choice is taken.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        # apply_chat_template gives these marks only after mapping them to tokens, and loses blanks there.
        texts, marks = render_jinja_template(
            conversations=[messages],
            tools=tools or None,
            chat_template=jinja,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        marked = _merged([(start, end) for start, end in marks[0] if end > start])
        agreed = []
        for (start, end), (_, trimmed) in zip(spans, turns, strict=True):
            inside = [mark for mark in marked if mark[0] < end and mark[1] > start]
            marked = [mark for mark in marked if mark not in inside]
            same = len(inside) == 1 and inside[0][0] == start and texts[0] == whole
            until = inside[0][1] if inside else start
            if not same or not (
                until == trimmed or not whole[min(until, trimmed) : max(until, trimmed)].strip()
            ):
                seen = whole[inside[0][0] : inside[-1][1]] if inside else ""
                raise _Bad(
                    "masks_disagree",
                    f"The template's {{% generation %}} marks {shown(seen, 120)} in a turn, but what follows "
                    f"its generation prompt is {shown(whole[start:trimmed], 120)}.",
                    "{% generation %} must hold the whole answer with its end token, and nothing else",
                )
            agreed.append((start, until))
        if marked and not others:
            seen = whole[marked[0][0] : marked[0][1]]
            raise _Bad("masks_disagree", f"The template's {{% generation %}} marks {shown(seen)}, no answer.")
        return agreed

    def _nothing_dropped(
        self, whole: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
    ) -> None:
        """A template skips in silence what it was not written for: tools, tool messages, unknown roles."""
        for tool in tools:
            name = tool["function"]["name"]
            if name not in whole:
                raise _Bad(
                    "template_drops_tools",
                    f"The base's chat template does not mention the tool {shown(name)}.",
                    "it was made without tools: choose a base that knows them, or remove tools from the rows",
                    "tools",
                )
        for index, message in enumerate(messages):
            for call in message.get("tool_calls", ()):
                name = call["function"]["name"]
                if name not in whole:
                    raise _Bad(
                        "template_drops_tools",
                        f"The base's chat template does not write the call of {shown(name)}.",
                        "choose a base whose template knows tools, or write the call into the content",
                        f"messages[{index}].tool_calls",
                    )
            content = message["content"].strip()
            if content and content not in whole and self._same_without(whole, messages, tools, index):
                raise _Bad(
                    "template_drops_message",
                    f"The base's chat template leaves out this message of the role {message['role']}.",
                    "put the text into a message that the template knows",
                    f"messages[{index}]",
                )

    def _same_without(
        self, whole: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]], index: int
    ) -> bool:
        try:
            return len(messages) > 1 and self._text(messages[:index] + messages[index + 1 :], tools) == whole
        except _Bad:
            return False


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted spans, those that touch made one."""
    made: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if made and start <= made[-1][1]:
            made[-1] = (made[-1][0], max(made[-1][1], end))
        else:
            made.append((start, end))
    return made


def _common(one: str, other: str) -> int:
    """How many first characters two strings share."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))


def _tail(one: str, other: str) -> str:
    """The last characters that two strings share at their start."""
    end = _common(one, other)
    return one[max(0, end - 40) : end]
