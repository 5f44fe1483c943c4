"""What a run would make of some rows: the text, the tokens and which of them are learned, in a process apart.

The rows go the very way that training takes (`tokenise.seen`, `tokenise.tokenise`): what is shown is what is
trained. Templates are programs, of whoever made the base or sent the request. Jinja's sandbox keeps them from
Python's insides, but not from running for ever or writing gigabytes; so they run in a process with limits of
memory, processor time, wall-clock time and output, and without the variables of this one. Whatever ends that
process ends as `template_limits`.

`python -m peft_service.preview` is that process: an order as one line of JSON on stdin (see `Order`), an
answer on stdout. It never imports torch: starting takes two seconds of a processor, twice that with torch.
"""

import contextlib
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from peft_service import errors
from peft_service.base_model import ModelShape
from peft_service.errors import InvalidRequest, PeftServiceError, TooLarge
from peft_service.spec import FineTuneSpec, case_of
from peft_service.variants import Frozen

if TYPE_CHECKING:
    from peft_service.formats import Problem
    from peft_service.rendering import Reading
    from peft_service.tokenise import Meaning, Seen
    from peft_service.tokenised import Tokenised

MAX_ROWS = 100
ROWS_SECONDS = 5.0
"""For the templates of all rows that are shown; reading up to them is not counted."""
STATISTICS_SECONDS = 60.0
START_SECONDS = 60.0
"""For starting, loading a tokenizer and reading, on a busy machine."""
MEMORY_BYTES = 2 << 30
OUTPUT_BYTES = 64 << 20
SHOWN_TOKENS = 100_000
"""Of all rows together; further ones are counted in `tokens_left_out`."""
STATISTICS_ROWS = 20_000
"""A larger file's statistics are those of its beginning, and say so."""
_PASSED_ON = ("PATH", "PYTHONHOME", "LD_LIBRARY_PATH", "HOME", "TMPDIR", "LANG", "LC_ALL")


class Order(Frozen):
    """What is to be looked at."""

    spec: FineTuneSpec
    """Of the job that it would be."""
    shape: ModelShape
    base: str
    """Directory with the base's config, tokenizer and template."""
    source: int = Field(0, ge=0)
    """Which of the spec's data sets."""
    parts: tuple[tuple[str, str], ...]
    """(name, path) of its files."""
    rows: tuple[int, ...] | int = 3
    """Lines, or how many rows from the beginning; 100 at most."""
    statistics: bool = False
    """Also tokenise all rows, 20,000 at most."""


def preview(order: Order) -> dict[str, Any]:
    """Look at the rows, in a process of its own.

    Returns `rows` (with `line`, `file`, what `happened`, `problems`, and `sequences` of `text`, `tokens` and
    `counts`), `statistics` of all rows (or None), and `warnings`.

    Raises:
        InvalidRequest: what training would say; `template_limits` if the process ran out of something.
        TooLarge: the answer has more than 64 MiB.
    """
    seconds = START_SECONDS + ROWS_SECONDS + (STATISTICS_SECONDS if order.statistics else 0)
    with tempfile.TemporaryFile() as complaints:
        child = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env=environment(),
            start_new_session=True,
        )
        assert child.stdin is not None
        assert child.stdout is not None
        clock = threading.Timer(seconds, child.kill)
        clock.start()
        try:
            with contextlib.suppress(BrokenPipeError), child.stdin:
                child.stdin.write(order.model_dump_json().encode() + b"\n")
            written = child.stdout.read(OUTPUT_BYTES + 1)
            if len(written) > OUTPUT_BYTES:
                raise TooLarge(
                    "the preview has more than 64 MiB: ask for fewer rows", code="preview_too_large"
                )
            code = child.wait()
        finally:
            clock.cancel()
            child.kill()
            child.wait()
            child.stdout.close()
        return _answer(written, code, complaints.read() if complaints.seek(0) == 0 else b"")


def environment() -> dict[str, str]:
    """The variables of the process: none with a key in it, and no settings of this service."""
    passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return passed | {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        # Arenas and threads would need address space, which is limited.
        "MALLOC_ARENA_MAX": "2",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def _answer(written: bytes, code: int, complaints: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(written)
    except ValueError:
        answer = None
    if isinstance(answer, dict) and "error" in answer:
        raise _raised(answer)
    if isinstance(answer, dict):
        return answer
    if code < 0:
        raise _limits(f"it was ended by {signal.Signals(-code).name}")
    said = complaints[-2000:].decode(errors="replace").strip()
    raise PeftServiceError(f"the preview ended with {code}: {said}", code="preview_failed")


def _limits(how: str) -> InvalidRequest:
    return InvalidRequest(
        f"the template was stopped ({how}). It may take {ROWS_SECONDS:g} s for the rows that are shown, "
        f"{STATISTICS_SECONDS:g} s for the statistics of all, and {MEMORY_BYTES >> 30} GiB of memory: does "
        "it loop for ever, or write far more than the rows hold?",
        code="template_limits",
        param="data.template",
    )


def _raised(answer: dict[str, Any]) -> PeftServiceError:
    kind = getattr(errors, str(answer.get("class")), PeftServiceError)
    told = dict(answer["error"])
    known = {name: told.pop(name, None) for name in ("message", "code", "param", "type")}
    made: PeftServiceError = kind(
        str(known["message"]), code=known["code"], param=known["param"], details=told
    )
    return made


# ------------------------------------------------------------------------------------- inside the process


class _Clock:
    """The seconds that templates may still take. When they are over, the kernel ends the process."""

    def __init__(self, seconds: float, deadly: bool) -> None:
        self.left, self.deadly = seconds, deadly
        if deadly:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def run(self) -> None:
        if self.deadly:
            signal.setitimer(signal.ITIMER_REAL, max(self.left, 0.001))

    def stop(self) -> None:
        if self.deadly:
            left, _ = signal.setitimer(signal.ITIMER_REAL, 0)
            self.left = left or self.left


def limit(memory: int, seconds: float) -> None:
    """Limits of this process, for ever."""
    for what, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, int(seconds)),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def look(order: Order, *, deadly: bool = False) -> dict[str, Any]:
    """The answer to an order, in this process, which `deadly` limits of time may end.

    Raises:
        InvalidRequest: see `tokenise.tokenise`.
    """
    from peft_service.run import reading_of, tokenizer_of
    from peft_service.tokenise import Meaning, seen

    spec = order.spec
    file = spec.data.sources[order.source]
    tokenizer = tokenizer_of(spec, Path(order.base))
    case = case_of(spec, order.shape)
    meaning = Meaning(case.task, case.labels, case.tasks, spec.objective.rows)
    reading = reading_of(spec, file)
    parts = [(name, Path(path)) for name, path in order.parts]
    special = set(tokenizer.all_special_ids)
    special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    clock = _Clock(ROWS_SECONDS, deadly)
    rows, room = [], SHOWN_TOKENS
    for found in seen(
        parts,
        file.format,
        tokenizer,
        spec.training.max_seq_len,
        spec.data.too_long,
        meaning,
        reading,
        wanted=_wanted(order.rows, clock, len(parts)),
    ):
        clock.stop()
        row = _row(found, parts[found.file][0] if len(parts) > 1 else "", tokenizer, special, meaning, room)
        room -= sum(len(sequence["tokens"]) for sequence in row["sequences"])
        rows.append(row)
    clock.stop()
    statistics, warnings = None, _missing(order.rows, rows)
    if order.statistics:
        clock = _Clock(STATISTICS_SECONDS, deadly)
        clock.run()
        statistics, more = _statistics(order, parts, tokenizer, special, meaning, reading)
        warnings += more
        clock.stop()
    return {"object": "preview", "rows": rows, "statistics": statistics, "warnings": warnings}


def _wanted(rows: tuple[int, ...] | int, clock: _Clock, parts: int) -> Callable[[Any], bool | None]:
    """Which records `seen` is to take; the clock runs while a template has one."""
    taken = 0

    def wanted(record: Any) -> bool | None:
        nonlocal taken
        clock.stop()
        if isinstance(rows, int):
            yes: bool | None = True if taken < rows else None
        else:
            yes = None if record.number > max(rows) else record.number in rows
        if yes and taken >= MAX_ROWS:
            yes = None
        if yes:
            taken += 1
            clock.run()
        return yes

    return wanted


def _missing(rows: tuple[int, ...] | int, found: list[dict[str, Any]]) -> list[str]:
    if isinstance(rows, int):
        return []
    absent = sorted(set(rows) - {row["line"] for row in found})
    return [f"no row begins in line {', '.join(map(str, absent[:20]))}"] if absent else []


def _row(
    seen: "Seen", name: str, tokenizer: Any, special: set[int], meaning: "Meaning", room: int
) -> dict[str, Any]:
    sequences = []
    for index, row in enumerate(seen.rows):
        for place, sequence in enumerate(row.sequences):
            text = row.texts[place].text if row.texts else ""
            shown, text = _tokens(sequence, text, tokenizer, special, meaning.labels, room)
            text, before, after = _own(text, shown)
            room -= len(shown)
            sequences.append(
                {
                    "row": index,
                    "name": ("chosen", "rejected")[place] if len(row.sequences) == 2 else "",
                    "text": text,
                    "before": before,
                    "after": after,
                    "tokens": shown,
                    "tokens_left_out": len(sequence.ids) - len(shown),
                    "counts": {"tokens": len(sequence.ids), "trained": int(sequence.mask.sum())},
                    "label": _label(sequence, row, meaning),
                }
            )
    return {
        "line": seen.record.number,
        "file": name or None,
        "happened": seen.happened,
        "lost_tokens": seen.lost_tokens,
        "problems": [_problem(problem) for problem in seen.problems],
        "sequences": sequences,
    }


def _label(sequence: Any, row: Any, meaning: "Meaning") -> Any:
    """What is learned beside tokens: a class, classes, a number, whether the answer is good."""
    if meaning.rows == "classes" and sequence.values:
        return meaning.labels[sequence.values[0]]
    if row.numbers is None:
        return None
    if meaning.rows == "class_sets":
        return [label for label, yes in zip(meaning.labels, row.numbers, strict=True) if yes]
    return bool(row.numbers[0]) if meaning.rows == "unpaired" else row.numbers[0]


def _tokens(
    sequence: Any, text: str, tokenizer: Any, special: set[int], labels: tuple[str, ...], room: int
) -> tuple[list[dict[str, Any]], str]:
    """(the first `room` tokens, the text that their places are in)."""
    ids = sequence.ids.tolist()[: max(0, room)]
    made, pieces, at = [], [], 0
    for index, number in enumerate(ids):
        if sequence.offsets is None:
            piece = tokenizer.decode([number])
            start, end = at, at + len(piece)
            pieces.append(piece)
        else:
            start, end = map(int, sequence.offsets[index])
            # Byte-level tokenizers may tell the place of a token without the blanks that it begins with.
            blank = at < start or (at == start == end)
            if blank and text[at:start].isspace() and tokenizer.decode([number])[:1].isspace():
                start = at
            piece = text[start:end]
        token = {"id": number, "text": piece, "start": start, "end": end}
        token["trained"] = bool(sequence.mask[index])
        if number in special:
            token["special"] = True
            token["text"] = piece or tokenizer.decode([number])
        if sequence.tags is not None and sequence.tags[index] >= 0:
            token["tag"] = labels[int(sequence.tags[index])]
        made.append(token)
        at = max(at, end)
    return made, text if sequence.offsets is not None else "".join(pieces)


def _own(text: str, tokens: list[dict[str, Any]]) -> tuple[str, int, int]:
    """(the part of the text that the tokens hold, characters before it, and behind it); the tokens' places
    become those in it. A long document is split into many rows, and none shows all of it."""
    start = tokens[0]["start"] if tokens else 0
    start = start if text[:start].strip() else 0
    end = max((token["end"] for token in tokens), default=0)
    end = end if text[end:].strip() or not tokens else len(text)
    for token in tokens:
        token["start"] -= start
        token["end"] -= start
    return text[start:end], start, len(text) - end


def _problem(problem: "Problem") -> dict[str, Any]:
    names = ("line", "path", "code", "message", "hint", "excerpt")
    return {name: getattr(problem, name) for name in names}


def _statistics(
    order: Order,
    parts: list[tuple[str, Path]],
    tokenizer: Any,
    special: set[int],
    meaning: "Meaning",
    reading: "Reading",
) -> tuple[dict[str, Any], list[str]]:
    """Of all rows, and what is worth a warning."""
    from peft_service.batches import steps_of
    from peft_service.tokenise import tokenise

    spec = order.spec
    file, training = spec.data.sources[order.source], spec.training
    complete = file.rows <= STATISTICS_ROWS
    if not complete:
        reading = replace(reading, limit=STATISTICS_ROWS)
    made = tokenise(parts, file.format, tokenizer, training.max_seq_len, spec.data.too_long, meaning, reading)
    found = dict(made.statistics)
    found["trained_share"] = round(found["target_tokens"] / max(1, found["tokens"]), 4)
    found["packing"] = _packing(made, training.max_seq_len)
    ends, twice = _ends(made, tokenizer, special)
    found["last_targets"] = dict(ends.most_common(10))
    learns_to_stop = meaning.rows in ("text", "pairs", "unpaired")
    found["eos_in_targets"] = not ends.get("", 0) if learns_to_stop else None
    found["bos_twice"] = twice
    found["complete"] = complete
    rows = spec.data.rows - file.rows + made.rows if complete else spec.data.rows
    found["steps"] = steps_of(rows, training)
    template = tokenizer.chat_template
    found["template_sha256"] = (
        None
        if template is None
        else hashlib.sha256(
            (template if isinstance(template, str) else json.dumps(template, sort_keys=True)).encode()
        ).hexdigest()
    )
    warnings = []
    if not complete:
        warnings.append(f"the statistics are of the first {STATISTICS_ROWS:,} of {file.rows:,} rows")
    if twice:
        warnings.append(
            f"{twice} rows begin with two {tokenizer.bos_token} tokens: the template writes one and the "
            "tokenizer another"
        )
    if learns_to_stop and ends.get("", 0):
        warnings.append(
            f"{ends['']} of {ends.total()} sequences end without a special token among their targets: a "
            "model learns from those not to stop"
        )
    for kind, words in (
        (
            "unchecked_masks",
            "have a template that changes their text, so that targets were found one way only",
        ),
        ("merged_boundaries", "have a token that holds the end of a prompt and the beginning of an answer"),
        ("trailing_messages", "have messages behind the last answer, which are read by nobody"),
    ):
        if (count := found[kind]["count"]) > 0:
            warnings.append(f"{count} rows {words}")
    return found, warnings


def _packing(made: "Tokenised", capacity: int) -> dict[str, Any]:
    """How full lines of `capacity` tokens become when the rows of the file are packed best-fit."""
    import numpy as np

    from peft_service.packing import best_fit

    lengths = np.diff(made.offsets).tolist()
    lines = len(best_fit(lengths, capacity))
    full = round(sum(lengths) / max(1, lines * capacity), 4)
    return {"lines": lines, "full": full}


def _ends(made: "Tokenised", tokenizer: Any, special: set[int]) -> tuple[Counter[str], int]:
    """(the last target of every sequence if it is a special token, else "" -> how many; rows that begin with
    two BOS)."""
    ends, twice, names = Counter[str](), 0, dict[int, str]()
    for index in range(len(made.offsets) - 1):
        ids, mask = made.row(index)
        where = mask.nonzero()[0]
        last = int(ids[where[-1]]) if len(where) else -1
        if last not in names:
            names[last] = str(tokenizer.convert_ids_to_tokens(last)) if last in special else ""
        ends[names[last]] += 1
        bos = tokenizer.bos_token_id
        twice += bool(len(ids) > 1 and bos is not None and ids[0] == ids[1] == bos)
    return ends, twice


def main() -> None:
    """The process: an order on stdin, its answer on stdout."""
    order = Order.model_validate_json(sys.stdin.buffer.readline())
    seconds = START_SECONDS + ROWS_SECONDS + (STATISTICS_SECONDS if order.statistics else 0)
    # Tokens of all rows are in files, which are mapped, and that is address space too.
    mapped = 8 * sum(os.path.getsize(path) for _, path in order.parts) if order.statistics else 0
    limit(MEMORY_BYTES + mapped, seconds)
    try:
        answer = look(order, deadly=True)
    except MemoryError:
        answer = _told(_limits("it took more memory"))
    except PeftServiceError as error:
        answer = _told(error)
    sys.stdout.write(json.dumps(answer, ensure_ascii=False))
    sys.stdout.flush()
    # Whatever a template has left behind is not waited for.
    os._exit(0)


def _told(error: PeftServiceError) -> dict[str, Any]:
    return {"class": type(error).__name__, "error": error.body()}


if __name__ == "__main__":
    # transformers looks for torch to load it; a tokenizer needs none of it.
    sys.modules["torch"] = None  # type: ignore[assignment]
    main()
