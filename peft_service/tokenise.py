"""Turn validated data into token ids and a mask of targets, with a chat template.

What is trained: the tokens of assistant messages (or of the completion), and the end token after them, which
is how a model learns to stop. Everything else is only read. `rendering.Reading` has what can be chosen
otherwise.

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

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_service.columns import mapped
from peft_service.containers import Record, records
from peft_service.errors import InvalidRequest, InvalidTrainingFile
from peft_service.formats import Example, Format, Problem, format_of, shown
from peft_service.objectives import Rows
from peft_service.rendering import ChatTemplate, Notes, Reading, Text, TooLong, Unteachable
from peft_service.tasks import CLASSIFYING, Task
from peft_service.tokenised import COPY_BYTES, VERSION, Tokenised, Writer
from peft_service.validate import listed

BATCH_CHARACTERS = 1_000_000
"""Encoded at once: enough for the tokenizer's threads, small beside the memory of a worker."""
PARTNERS = 16
"""How many rows further a row without a partner of another prompt looks for one."""


@dataclass(frozen=True)
class Meaning:
    """What the rows are read for."""

    task: Task = "causal_lm"
    labels: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    rows: Rows = "text"
    items: bool = False
    """Keep the rows for graders, beside their tokens."""


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
    report = Notes(too_long, max_seq_len)
    rows = _Rows(tokenizer, meaning, reading, ChatTemplate.of(tokenizer, reading), report)
    with Writer() as writer:
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


def _with_partners(rows: Tokenised, report: "Notes") -> Tokenised:
    """Every row, and behind it its prompt with the answer of a later row that has another prompt.

    What a model says to mismatched pairs tells how far it has moved (KTO, arXiv:2402.01306, section 4.1). A
    partner is a function of the data alone, so that it is the same for every number of workers.
    """

    def split(index: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        ids, mask = rows.row(index)
        at = int(mask.argmax())
        return ids[:at], ids[at:]

    with Writer() as writer:
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
        Unteachable: a validation row has a name that no training row has.
    """
    try:
        return known.index(name or "")
    except ValueError:
        message = f"The {what} {shown(name)} is in no row of the training file." if name else f"No {what}."
        raise Unteachable(f"unknown_{what}", message, f"known are {', '.join(known[:20])}", what) from None


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
    texts: tuple[Text, ...] = ()
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
    template: "ChatTemplate"
    report: Notes

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
            except Unteachable as bad:
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
        """Raises Unteachable where row and template do not go together, or a label cannot be expressed."""
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
    parts: Parts, shape: Format, report: Notes, reading: Reading
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


def _good(line: Record, shape: Format, report: Notes, reading: Reading) -> tuple[Record, Example] | None:
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
    template, shape = ChatTemplate.of(tokenizer, reading), format_of(format)
    for file, (name, path) in enumerate(data):
        for record in records(path, name, documents=reading.documents):
            yes = wanted(record)
            if yes is None:
                break
            if yes:
                report = Notes(too_long, max_seq_len)
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


def _encode(tokenizer: Any, texts: list[Text]) -> Iterator[tuple[_Sequence, bool]]:
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
        """Raises Unteachable where an answer or a label cannot be expressed."""
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
                    raise Unteachable(
                        "answer_not_found", "The answer begins or ends in blanks.", "", "answers"
                    )
            mask[[first, last]] = 1
            return _Sequence(ids, mask, values=(first, last), cuttable=False)
        mask[-1:] = 1
        if example.label is None:
            return _Sequence(ids, mask)
        return _Sequence(ids, mask, values=(_number(example.label, self.labels, "label"),))


def _ids(encoded: Any) -> NDArray[np.int32]:
    return np.array(encoded["input_ids"], dtype=np.int32)
