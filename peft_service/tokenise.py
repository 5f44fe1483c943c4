"""Turn a validated data file into token ids and a mask of targets, with the tokenizer's own chat template.

What is trained: the tokens of assistant messages (or of the completion), and the end token after them, which
is how a model learns to stop. Everything else is only read.

How the targets of a conversation are found. For every trained message i, the template renders the messages
before i with the generation prompt, which is what the model will see when it is asked; and the messages up to
i. The first must be a prefix of the second, and the second of the whole conversation; the difference is what
the model is to say. Where the template marks this itself with {% generation %}, both answers must be equal.
If they are not, or a rendering is no prefix (templates that rewrite earlier turns, for example by removing
their <think> blocks), training would teach something that serving never asks: that is an error.

How text becomes tokens. A row is tokenised in one go, never prompt and completion apart and glued together:
so its ids are those of the text itself. A token that holds characters of both sides of the boundary (a prompt
that ends with a space, mostly) is a target, since it holds some of the answer; such rows are counted in
`statistics["merged_boundaries"]`. Plain text gets the special tokens that the tokenizer puts around text by
itself (a BOS) and an EOS at its end. A rendered conversation gets nothing but what its template wrote, and an
EOS only if the template ends the last answer with no special token at all.

The first token of a row follows nothing, so it is never a target, whatever it is.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from peft_service.containers.jsonl import CHUNK_BYTES, Line, lines_of, parse_line
from peft_service.errors import InvalidRequest, InvalidTrainingFile
from peft_service.formats import Example, Format, Problem, clean, format_of, shown
from peft_service.tasks import Task
from peft_service.validate import listed

VERSION = 2
"""Of the meaning of the result: part of its digest, so that no cached file outlives a change here."""
TooLong = Literal["error", "drop", "right", "left"]
LISTED = 100
BATCH_CHARACTERS = 1_000_000
"""Encoded at once: enough for the tokenizer's threads, small beside the memory of a worker."""


_ARRAYS = (
    *("input_ids", "target_mask", "offsets", "lines"),
    *("row_values", "token_values", "row_tasks", "class_tasks"),
)


@dataclass(frozen=True)
class Tokenised:
    """The rows of a file, end to end. Row i is `input_ids[offsets[i]:offsets[i + 1]]`."""

    input_ids: NDArray[np.int32]
    target_mask: NDArray[np.uint8]
    """1 where the token is to be predicted from those before it; 0 for the first token of a row."""
    offsets: NDArray[np.int64]
    """(rows + 1,)"""
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
    sequences: int = 1
    row_numbers: NDArray[np.float32] | None = None
    reference: NDArray[np.float32] | None = None
    statistics: dict[str, Any] = field(default_factory=dict)

    def lengths(self, rows: "list[int]") -> NDArray[np.int64]:
        first = np.asarray(rows, dtype=np.int64)[:, None] * self.sequences + np.arange(self.sequences)
        made: NDArray[np.int64] = self.offsets[first + 1] - self.offsets[first]
        return made

    @property
    def rows(self) -> int:
        return len(self.lines)

    @property
    def target_tokens(self) -> int:
        return int(self.target_mask.sum(dtype=np.int64))

    def row(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Ids and target mask of one row (views)."""
        part = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.input_ids[part], self.target_mask[part]

    def row_labels(self, index: int) -> NDArray[np.int32]:
        """The class of a row, or the two ends of its answer."""
        assert self.row_values is not None
        values: NDArray[np.int32] = self.row_values[index]
        return values

    def token_labels(self, index: int) -> NDArray[np.int32]:
        """The tags of a row's tokens."""
        assert self.token_values is not None
        return self.token_values[int(self.offsets[index]) : int(self.offsets[index + 1])]

    def save(self, path: Path) -> None:
        """Write one safetensors file; the statistics are in its metadata."""
        from safetensors.numpy import save_file

        arrays = {name: getattr(self, name) for name in _ARRAYS if getattr(self, name) is not None}
        save_file(arrays, path, metadata={"version": str(VERSION), "statistics": json.dumps(self.statistics)})

    @classmethod
    def load(cls, path: Path) -> "Tokenised":
        from safetensors import safe_open

        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            return cls(**arrays, statistics=json.loads(file.metadata()["statistics"]))


def digest_of(
    sha256: str,
    tokenizer: Any,
    format: str,
    max_seq_len: int,
    too_long: TooLong,
    meaning: "Meaning | None" = None,
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
    }
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def tokenise(
    path: Path,
    format: str,
    tokenizer: Any,
    max_seq_len: int,
    too_long: TooLong = "error",
    meaning: "Meaning | None" = None,
    *,
    param: str = "training_file",
) -> Tokenised:
    """Tokenise every row of a JSONL file with a (fast) transformers tokenizer.

    `too_long` is what happens to a row of more than `max_seq_len` tokens: an error; the row is dropped; its
    end is cut ("right": the end token is lost too) or its beginning ("left"). The statistics list them.

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
    shape = format_of(format)
    template = _Template.of(tokenizer)
    report = _Report(too_long, max_seq_len)
    ids: list[NDArray[np.int32]] = []
    masks: list[NDArray[np.uint8]] = []
    lines: list[int] = []
    row_values: list[tuple[int, ...]] = []
    token_values: list[NDArray[np.int32]] = []
    tasks: list[int] = []
    meaning = meaning or Meaning()
    if meaning.task == "causal_lm":
        for batch in _batches(_rendered(path, shape, template, report)):
            for text, (row_ids, row_mask) in zip(batch, _encode(tokenizer, batch, report), strict=True):
                fitted = _fit(row_ids, row_mask, text.line, report)
                if fitted is not None:
                    ids.append(fitted[0])
                    masks.append(fitted[1])
                    lines.append(text.line.number)
                    if meaning.tasks:
                        tasks.append(_number(text.task, meaning.tasks, "task"))
    else:
        labelled = Labelled(tokenizer, meaning.task, meaning.labels, max_seq_len)
        for line, example in _examples(path, shape, report):
            try:
                asked = template.asked(line, example, report) if meaning.task == "seq2seq_lm" else None
                row = labelled.row(example, asked)
                number = _number(example.task, meaning.tasks, "task") if meaning.tasks else None
            except _Bad as bad:
                report.bad(line, bad.problem)
                continue
            fitted_row = _fit_labelled(row, line, report)
            if fitted_row is None:
                continue
            ids.append(fitted_row.ids)
            masks.append(fitted_row.mask)
            lines.append(line.number)
            row_values.append(fitted_row.values)
            if fitted_row.tags is not None:
                token_values.append(fitted_row.tags)
            if number is not None:
                tasks.append(number)
    if report.problem_count:
        raise listed(report.problems, report.problem_count, param)
    if not ids:
        why = (
            f"all {report.dropped} are longer than {max_seq_len} tokens"
            if report.dropped
            else "there are none"
        )
        raise InvalidTrainingFile(
            f"No rows are left to train on: {why}. Raise max_seq_len, or cut rows with too_long.", param=param
        )
    lengths = np.array([len(row) for row in ids], dtype=np.int64)
    tokenised = Tokenised(
        input_ids=np.concatenate(ids),
        target_mask=np.concatenate(masks),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        lines=np.array(lines, dtype=np.int64),
        row_values=np.array(row_values, dtype=np.int32) if any(row_values) else None,
        token_values=np.concatenate(token_values) if token_values else None,
        row_tasks=np.array(tasks, dtype=np.int32) if tasks else None,
        class_tasks=_class_tasks(meaning) if tasks and meaning.labels else None,
    )
    p50, p95 = np.quantile(lengths, [0.5, 0.95], method="lower")
    return replace(
        tokenised,
        statistics={
            "rows": len(ids),
            "tokens": int(lengths.sum()),
            "target_tokens": tokenised.target_tokens,
            "length": {"p50": int(p50), "p95": int(p95), "max": int(lengths.max())},
            "max_token_id": int(tokenised.input_ids.max()),
            "targets_found_by": report.found_by,
            **report.statistics(),
        },
    )


@dataclass(frozen=True)
class Meaning:
    """What the rows are read for."""

    task: Task = "causal_lm"
    labels: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()


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

    def note(self, what: str, line: Line) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1
        at = self.where.setdefault(what, [])
        if len(at) < LISTED and at[-1:] != [line.number]:
            at.append(line.number)

    def bad(self, line: Line, problem: Problem) -> None:
        self.problem_count += 1
        if len(self.problems) < LISTED:
            excerpt = clean((line.raw or b"")[:400].decode(errors="replace")[:80])
            self.problems.append(
                replace(problem, line=line.number, byte_offset=line.byte_offset, excerpt=excerpt)
            )

    def statistics(self) -> dict[str, Any]:
        kinds = ("dropped", "truncated", "merged_boundaries", "eos_appended", "rewritten_content")
        made = {
            kind: {"count": self.counts.get(kind, 0), "lines": self.where.get(kind, [])} for kind in kinds
        }
        return {**made, "lost_tokens": self.lost_tokens}


@dataclass(frozen=True)
class _Text:
    """A row as text. `spans` are the characters [start, end) that are targets."""

    line: Line
    text: str
    spans: tuple[tuple[int, int], ...]
    plain: bool
    """Plain text: the tokenizer's own special tokens are added. Otherwise the template wrote them."""
    append_eos: bool
    task: str | None = None


def _examples(path: Path, shape: Format, report: _Report) -> Iterator[tuple[Line, Example]]:
    """Every good row of the file; the others go to the report."""
    with path.open("rb") as file:
        for line in lines_of(iter(lambda: file.read(CHUNK_BYTES), b"")):
            if line.raw is not None and not line.raw.strip():
                continue
            row, problems = parse_line(line)
            if row is not None:
                # The file was validated at upload; whoever calls with another one gets the same report.
                problems = shape.problems(row)
            if row is None or problems:
                for problem in problems:
                    report.bad(line, problem)
                continue
            yield line, shape.messages_or_text(row)


def _rendered(path: Path, shape: Format, template: "_Template", report: _Report) -> Iterator[_Text]:
    """Every row of the file as text; rows that cannot be rendered go to the report."""
    for line, example in _examples(path, shape, report):
        try:
            yield replace(template.render(line, example, report), task=example.task)
        except _Bad as bad:
            report.bad(line, bad.problem)


def _batches(texts: Iterator[_Text]) -> Iterator[list[_Text]]:
    batch: list[_Text] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(
    tokenizer: Any, batch: list[_Text], report: _Report
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.uint8]]]:
    """Ids and target mask of each text of the batch, in its order."""
    for plain, group in groupby(batch, key=lambda text: text.plain):
        texts = list(group)
        encoded = tokenizer(
            [text.text for text in texts],
            add_special_tokens=plain,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            padding=False,
            truncation=False,
            verbose=False,
        )
        for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            starts_T, ends_T = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
            mask = np.zeros(len(ids), dtype=np.uint8)
            for start, end in text.spans:
                # Byte-level tokenizers may trim blanks from offsets, so that a token of blanks has zero width
                # at its end: it is inside when it ends after `start` and not after `end`.
                inside = (ends_T > start) & ((starts_T < end) | (ends_T <= end))
                mask[inside] = 1
                first = int(inside.argmax()) if inside.any() else 0
                if first and (starts_T[first] < start or 0 < ends_T[first - 1] < start):
                    report.note("merged_boundaries", text.line)
            if text.append_eos:
                if not ids or ids[-1] != tokenizer.eos_token_id:
                    ids, mask = [*ids, tokenizer.eos_token_id], np.append(mask, np.uint8(0))
                mask[-1] = 1
            mask[:1] = 0
            yield np.array(ids, dtype=np.int32), mask


def _fit(
    ids: NDArray[np.int32], mask: NDArray[np.uint8], line: Line, report: _Report
) -> tuple[NDArray[np.int32], NDArray[np.uint8]] | None:
    """The row cut to length as asked, or None if it is dropped or wrong."""
    most, length = report.max_seq_len, len(ids)
    if length > most:
        if report.too_long == "error":
            hint = "raise max_seq_len, shorten the row, or set too_long to drop, right or left"
            message = f"The row has {length:,} tokens; max_seq_len is {most:,}."
            report.bad(line, Problem("", "too_long", message, hint))
            return None
        if report.too_long == "drop":
            report.note("dropped", line)
            report.lost_tokens += length
            return None
        kept = slice(0, most) if report.too_long == "right" else slice(length - most, length)
        targets = int(mask.sum())
        ids, mask = ids[kept], mask[kept].copy()
        mask[0] = 0
        if not mask.any():
            message = (
                f"Cutting the row from {length:,} to {most:,} tokens removes all its {targets:,} targets."
            )
            report.bad(line, Problem("", "no_targets", message, "shorten its prompt, or raise max_seq_len"))
            return None
        report.note("truncated", line)
        report.lost_tokens += length - most
    if not mask.any():
        message = "The row has no token that could be learned from the tokens before it."
        report.bad(line, Problem("", "no_targets", message))
        return None
    return ids, mask


@dataclass(frozen=True)
class _Row:
    """A labelled row in tokens."""

    ids: NDArray[np.int32]
    mask: NDArray[np.uint8]
    values: tuple[int, ...] = ()
    tags: NDArray[np.int32] | None = None
    cuttable: bool = True
    """Whether a row that is too long can lose its end or its beginning."""


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
    max_seq_len: int

    def row(self, example: Example, asked: tuple[str, str] | None) -> _Row:
        """Raises _Bad where an answer or a label cannot be expressed."""
        if asked is not None:
            source = self.tokenizer(asked[0], return_attention_mask=False)["input_ids"]
            answer = self.tokenizer(text_target=asked[1], return_attention_mask=False)["input_ids"]
            if self.tokenizer.eos_token_id is not None and answer[-1:] != [self.tokenizer.eos_token_id]:
                answer = [*answer, self.tokenizer.eos_token_id]
            mask = np.array([0] * len(source) + [1] * len(answer), dtype=np.uint8)
            return _Row(np.array([*source, *answer], dtype=np.int32), mask, cuttable=False)
        if self.task == "token_classification":
            found = self.tokenizer(list(example.words), is_split_into_words=True)
            words = found.word_ids()
            tags = np.full(len(words), -100, dtype=np.int32)
            for place, word in enumerate(words):
                if word is not None and (place == 0 or words[place - 1] != word):
                    tags[place] = _number(example.tags[word], self.labels, "label")
            return _Row(_ids(found), (tags != -100).astype(np.uint8), tags=tags)
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
            return _Row(ids, mask, values=(first, last), cuttable=False)
        mask[-1:] = 1
        return _Row(ids, mask, values=(_number(example.label, self.labels, "label"),))


def _ids(encoded: Any) -> NDArray[np.int32]:
    return np.array(encoded["input_ids"], dtype=np.int32)


def _fit_labelled(row: _Row, line: Line, report: _Report) -> _Row | None:
    """The row cut to length as asked, or None if it is dropped or wrong."""
    most, length = report.max_seq_len, len(row.ids)
    if length <= most:
        return row
    if report.too_long == "drop":
        report.note("dropped", line)
        report.lost_tokens += length
        return None
    if report.too_long == "error" or not row.cuttable:
        hint = "raise max_seq_len, shorten the row, or set too_long to drop"
        message = f"The row has {length:,} tokens; max_seq_len is {most:,}."
        report.bad(line, Problem("", "too_long", message, hint))
        return None
    kept = slice(0, most) if report.too_long == "right" else slice(length - most, length)
    report.note("truncated", line)
    report.lost_tokens += length - most
    mask = row.mask[kept].copy()
    if row.tags is None:
        mask[-1:] = 1
    return replace(row, ids=row.ids[kept], mask=mask, tags=None if row.tags is None else row.tags[kept])


_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass
class _Template:
    """The tokenizer's chat template, and its words for the end of a turn."""

    tokenizer: Any
    end_marks: tuple[str, ...]
    """Every special token: the end of a turn is one of them in all templates that have such a mark."""

    @classmethod
    def of(cls, tokenizer: Any) -> "_Template":
        special = {str(token) for token in tokenizer.all_special_tokens}
        special |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        return cls(tokenizer, tuple(sorted(special)))

    def render(self, line: Line, example: Example, report: _Report) -> _Text:
        """Raises _Bad where the row and the template do not go together."""
        if example.messages and self.tokenizer.chat_template is not None:
            return self._conversation(line, example, report)
        if example.completion is None:
            raise _Bad(
                "no_chat_template",
                "The row is a conversation, but the base model's tokenizer has no chat template.",
                "choose the instruction-tuned variant of the base, add a chat_template.jinja to the base's "
                "files, or write plain prompt and completion strings",
            )
        self._end_token()
        start = len(example.prompt)
        text = example.prompt + example.completion
        return _Text(line, text, ((start, len(text)),), plain=True, append_eos=True)

    def asked(self, line: Line, example: Example, report: _Report) -> tuple[str, str]:
        """(what an encoder reads, what its decoder is to write). Raises _Bad."""
        if not example.messages:
            assert example.completion is not None
            return example.prompt, example.completion
        *before, last = example.messages
        if not example.trained[-1] or any(example.trained[:-1]):
            message = "An encoder-decoder learns one answer a row: the last message, of the assistant."
            raise _Bad("one_answer", message, "split the conversation, or set weight 0 on earlier answers")
        if self.tokenizer.chat_template is not None:
            return self._text(before, list(example.tools), ask=True), last["content"]
        if len(before) > 1 or example.tools:
            message = "The row is a conversation, but the base model's tokenizer has no chat template."
            raise _Bad("no_chat_template", message, "write prompt and completion strings")
        return before[0]["content"], last["content"]

    def _end_token(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise _Bad(
                "no_eos_token",
                "The tokenizer has no EOS token, so a model could never learn to stop.",
                "set eos_token in the base's tokenizer_config.json",
            )

    def _conversation(self, line: Line, example: Example, report: _Report) -> _Text:
        messages, tools = list(example.messages), list(example.tools)
        jinja = self.tokenizer.get_chat_template(None, tools or None)
        if (
            "developer" not in jinja
        ):  # OpenAI's newer name for system; most templates drop what they do not know
            messages = [
                {**message, "role": "system"} if message["role"] == "developer" else message
                for message in messages
            ]
        whole = self._text(messages, tools)
        self._nothing_dropped(whole, messages, tools)
        spans: list[tuple[int, int]] = []
        for index, trained in enumerate(example.trained):
            if trained:
                start, end = self._said(whole, messages, tools, index)
                if messages[index]["content"].strip() not in whole[start:end]:
                    report.note("rewritten_content", line)
                spans.append((start, end))
        turns = [(start, self._trimmed(whole, start, end)) for start, end in spans]
        report.found_by = "prefixes"
        if _GENERATION.search(jinja):
            others = any(
                message["role"] == "assistant" and not trained
                for message, trained in zip(messages, example.trained, strict=True)
            )
            turns = self._agreed(whole, messages, tools, jinja, spans, turns, others)
            report.found_by = "prefixes and {% generation %}"
        ended = whole.rstrip().endswith(self.end_marks)
        append_eos = bool(example.trained[-1]) and not ended
        if append_eos:
            self._end_token()
            report.note("eos_appended", line)
        return _Text(line, whole, tuple(turns), plain=False, append_eos=append_eos)

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
                'give "weight": 0 to all assistant messages but the last, or write one row for each',
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
