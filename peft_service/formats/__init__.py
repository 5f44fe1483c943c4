"""What a line of a data file looks like. One file a format; nothing else in the code knows its keys.

A format recognises its rows, says everything that is wrong with one, and turns a good one into an `Example`.
Formats know no tokenizer: `peft_service.tokenise` decides what an example's tokens are.

Which format a row is of. `detect` asks the formats in the order of their `rank`, those with the most telling
keys first, and takes the first that claims the row:

    preference            chosen, rejected; preferred_output, chosen_messages and their partners
    question_answering    context and answers
    token_classification  tokens and tags
    tokens, segments      input_ids; segments
    unpaired              kto_tag, or a label that is true or false beside a completion, messages or an output
    multi_label           a text, or two, and labels
    regression            a text, or two, and score, value or a label with a fraction
    classification        a text, or two, and a label
    sharegpt              conversations
    instruction           instruction and output
    prompt_completion     completion
    chat                  messages, of which one is an assistant's
    prompts               prompt, or messages without an answer
    text                  text

A row without a key that its format needs is of no known format (a column mapping may make it one), unless the
rows before it have shown what the file is: then that key is missing, and that is an error.
"""

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from typing import Any, ClassVar, NoReturn

from peft_service.variants import Frozen, variants_of

MAX_DEPTH = 64
"""Objects and arrays inside one another. Deeper rows are attacks: they end renderers by recursion."""
MAX_PROBLEMS_PER_ROW = 100


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong in a data file. A format says what, `validate` adds on which line."""

    path: str
    """Where in the row, for example `messages[3].content`; empty: the row itself."""
    code: str
    message: str
    hint: str = ""
    line: int = 0
    """Counts from 1."""
    byte_offset: int = 0
    """Of the line's first byte; of the offending byte where the line is not UTF-8 or not JSON."""
    excerpt: str = ""
    file: str = ""
    """In a data set of several files, the one that has the line."""

    def __str__(self) -> str:
        where = ", ".join(filter(None, [self.file, f"line {self.line}" if self.line else "", self.path]))
        return (f"{where}: " if where else "") + self.message + (f" ({self.hint})" if self.hint else "")


@dataclass(frozen=True, slots=True)
class Example:
    """What a row teaches: messages for a template, plain text, or both (then the template goes first)."""

    messages: tuple[dict[str, Any], ...] = ()
    """As a chat template takes them: content is a string, the arguments of a tool call are an object."""
    trained: tuple[bool, ...] = ()
    """For each message, whether its tokens are targets. Only assistant messages ever are."""
    tools: tuple[dict[str, Any], ...] = ()
    prompt: str = ""
    completion: str | None = None
    """None: the row means something only through a chat template."""
    pair: str | None = None
    """The second of two texts, of which `prompt` is the first."""
    label: str | None = None
    words: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    """One for each of `words`."""
    answer: tuple[int, int] | None = None
    """Characters [start, end) of `pair`; start == end: there is no answer."""
    task: str | None = None
    """In multi-task data."""
    document: str | None = None
    """Plain text of which every token is learned (continued pre-training)."""
    rejected: "Example | None" = None
    """Of a preference: the same prompt with the worse answer; this example is the better one."""
    desirable: bool | None = None
    """Of an unpaired preference: whether the answer is a good one."""
    labels: tuple[str, ...] | None = None
    """Of a row that belongs to any number of classes, also none."""
    value: float | None = None
    """The number that a regression learns."""
    token_ids: tuple[int, ...] = ()
    """A row that somebody else has tokenised."""
    token_targets: tuple[bool, ...] = ()
    """One for each of `token_ids`."""
    segments: tuple[tuple[str, bool], ...] = ()
    """(text, whether it is learned), put together without anything in between."""
    item: dict[str, Any] | None = None
    """Of a prompt without an answer: the whole row, for the graders."""


class Format(Frozen):
    """A record shape. Instances are stateless."""

    kind: str

    keys: ClassVar[tuple[str, ...]]
    """Every key that means something in a row."""
    rank: ClassVar[int]
    """`detect` asks formats with lower ranks first: those whose keys are the most telling."""
    sample: ClassVar[str]
    """A good line, for hints and documents."""
    dialects: ClassVar[tuple[str, ...]] = ()
    """Good lines in the other ways of writing this format."""
    siblings: ClassVar[tuple[str, ...]] = ()
    """Keys of other formats that a typo here may have meant: {"text", "lable"} is no plain text."""
    keeps_columns: ClassVar[bool] = False
    """Whether all other columns of a row are kept too."""

    def detect(self, row: dict[str, Any]) -> bool:
        """Whether a row claims to be of this format, however wrong it may be otherwise."""
        raise NotImplementedError

    def fits(self, row: dict[str, Any]) -> bool:
        """Whether a row of a file that is known to be of this format belongs to it, however wrong it may be.

        Wider than `detect`, where a row that misses a key would be taken for another format's.
        """
        return self.detect(row)

    def check(self, row: dict[str, Any]) -> Iterator[Problem]:
        """Yield everything that is wrong with the keys it knows. Never raises, whatever JSON can hold."""
        raise NotImplementedError

    def doubts(self, row: dict[str, Any]) -> Iterator[Problem]:
        """What is worth a look in a row that has no problems."""
        return iter(())

    def messages_or_text(self, row: dict[str, Any]) -> Example:
        """The example in a row that has no problems."""
        raise NotImplementedError

    def roles(self, row: dict[str, Any]) -> Iterable[str]:
        """The role of every message of a good row, for statistics."""
        return ()

    def labels(self, row: dict[str, Any]) -> Iterable[str]:
        """The classes or tags in a good row."""
        return ()

    def ignored(self, row: dict[str, Any]) -> list[str]:
        """Columns of a row that are read by nobody."""
        return [] if self.keeps_columns else [key for key in row if key not in self.keys]

    def problems(self, row: dict[str, Any]) -> list[Problem]:
        """All problems of a row; of one with more than 100, the last one says that the rest is not listed."""
        found = list(islice(chain(self._columns(row), self.check(row)), MAX_PROBLEMS_PER_ROW + 1))
        if len(found) > MAX_PROBLEMS_PER_ROW:
            found[-1] = Problem("", "too_many_problems", "This row has more problems than are listed here.")
        return found

    def _columns(self, row: dict[str, Any]) -> Iterator[Problem]:
        """What is wrong with a row's columns whatever the format: typos, pictures, the task."""
        if "task" in row and not (isinstance(row["task"], str) and 1 <= len(row["task"]) <= 64):
            yield wrong_type("task", "a name of 1 to 64 characters", row["task"])
        for key in row:
            if key in self.keys:
                continue
            meant = typo_of(key, self.keys) or typo_of(key, self.siblings)
            if meant and meant not in row:
                hint = f'did you mean "{meant}"?'
                yield Problem(join("", key), "unknown_key", f"Unknown key {shown(key)}.", hint)
            elif key in MEDIA and row[key]:
                message = f"The row has {key}; only text can be trained on."
                yield Problem(key, "unsupported_content", message)


MEDIA = ("images", "image", "videos", "video", "audios", "audio")
"""Columns that no row may lose in silence: the text is about them."""


def unknown_keys(found: dict[str, Any], known: Collection[str], path: str = "") -> Iterator[Problem]:
    """A problem for every key of `found` that is not in `known`, with the key that was probably meant.

    A key without a value says nothing, so it passes: OpenAI's client writes what it did not use as null.
    """
    for key, value in found.items():
        if key not in known and value is not None:
            yield Problem(
                join(path, key),
                "unknown_key",
                f"Unknown key {shown(key)}.",
                did_you_mean(key, known) or f"remove it; known keys are {', '.join(known)}",
            )


def did_you_mean(word: str, known: Collection[str]) -> str:
    """`did you mean "prompt"?`, or nothing where nothing is near (or too much to look through)."""
    if len(known) > 100:
        return ""
    near = difflib.get_close_matches(word[:64].lower(), known, n=1, cutoff=0.7)
    return f'did you mean "{near[0]}"?' if near else ""


@lru_cache(4096)
def typo_of(word: str, known: tuple[str, ...]) -> str:
    """The one of `known` that differs from `word` by one slip of the finger, or in case and dashes; or "".

    Stricter than `did_you_mean`: what is not a typo may be a column of its own (`task_id`, `prompt_id`).
    """
    if not 4 <= len(word) <= 64:
        return ""
    plain = word.lower().replace("-", "_").replace(" ", "_")
    return next((name for name in known if len(name) >= 4 and _one_slip(plain, name)), "")


def _one_slip(one: str, other: str) -> bool:
    """Equal up to one letter more, less or other, or two letters swapped (Damerau and Levenshtein)."""
    if abs(len(one) - len(other)) > 1:
        return False
    while one and other and one[0] == other[0]:
        one, other = one[1:], other[1:]
    while one and other and one[-1] == other[-1]:
        one, other = one[:-1], other[:-1]
    return max(len(one), len(other)) <= 1 or (len(one) == 2 and one == other[::-1])


def wrong_type(path: str, wanted: str, value: Any, hint: str = "") -> Problem:
    got = "an empty string" if isinstance(value, str) and not value.strip() else json_type(value)
    return Problem(path, "wrong_type", f"Expected {wanted}, got {got}.", hint)


def json_type(value: Any) -> str:
    """What JSON calls it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "a string"
    return "an array" if isinstance(value, list) else "an object"


def join(path: str, key: str) -> str:
    """The path of `key` inside the object at `path`."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", key):
        return f"{path}[{shown(key)}]"
    return f"{path}.{key}" if path else key


def shown(text: object, limit: int = 60) -> str:
    """A string of the user's: quoted, short, printable wherever it ends up (no NUL, no lone surrogate)."""
    quoted = json.dumps(clean(str(text)[: limit + 1])[:limit], ensure_ascii=False)
    return quoted if len(str(text)) <= limit else quoted + "…"


def clean(text: str) -> str:
    """`text` as every database and terminal can hold it: what they cannot becomes U+FFFD."""
    if text.isprintable():  # almost always, and a hundred times faster
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


class BadJSON(ValueError):
    """A text is not strict JSON. `position` is the character where reading ended, where it is known."""

    def __init__(self, code: str, message: str, hint: str = "", position: int = 0) -> None:
        super().__init__(message)
        self.code, self.message, self.hint, self.position = code, message, hint, position

    @property
    def reason(self) -> str:
        """The message, for whoever has said before that it is not JSON."""
        return self.message.removeprefix("Not JSON: ")


def parse_json(text: str) -> tuple[Any, list[Problem]]:
    """Read strict JSON: also what Python's reader lets pass silently is wrong.

    Returns the value, and the problems of a value that could be read all the same: a key given twice, a NUL
    or half a surrogate pair in a string (no database and no tokenizer takes them), too many levels.

    Raises:
        BadJSON: it cannot be read: syntax, NaN or Infinity, a number out of range.
    """
    twice: dict[int, tuple[dict[str, Any], list[str]]] = {}

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            times = Counter(key for key, _ in pairs)
            # The object itself is kept beside its id: a dropped one could give its id to another.
            twice[id(made)] = (made, [key for key, count in times.items() if count > 1][:5])
        return made

    try:
        value = json.loads(text, object_pairs_hook=to_dict, parse_constant=_refuse, parse_float=_finite)
    except json.JSONDecodeError as error:
        message = f"Not JSON: {error.msg}, at character {error.pos + 1}."
        hint = next((hint for said, hint in _HINTS.items() if error.msg.startswith(said)), "")
        raise BadJSON("not_json", message, hint, error.pos) from None
    except RecursionError:
        raise BadJSON("too_deep", f"Nested more than {MAX_DEPTH} levels deep.") from None
    except BadJSON:
        raise
    except ValueError:  # an integer of thousands of digits
        raise BadJSON("not_json", "Not JSON that can be read: a number has too many digits.") from None

    # Almost no line needs the walk: it is taken only where its text shows that it could find something.
    if twice or text.count("[") + text.count("{") > MAX_DEPTH or _SUSPICIOUS_ESCAPE.search(text):
        return value, list(islice(_walk(value, twice), MAX_PROBLEMS_PER_ROW))
    return value, []


_HINTS = {
    "Expecting property name": "names are in double quotes, and no comma stands before a closing brace",
    "Expecting value": "values are strings in double quotes, numbers, true, false, null, arrays or objects",
    "Extra data": "is a line feed missing between two rows?",
    "Invalid control character": "inside a string, a line feed is written \\n and a tab \\t",
    "Unterminated string": "was it cut off?",
}
_SUSPICIOUS_ESCAPE = re.compile(r"\\u(?:0000|[dD][89abcdefABCDEF])")


def _refuse(constant: str) -> NoReturn:
    raise BadJSON("nan", f"Not JSON: {constant} is no JSON value.", "write a number, a string or null")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise BadJSON("nan", f"The number {shown(digits, 30)} is out of range.")
    return value


def _walk(value: Any, twice: dict[int, tuple[dict[str, Any], list[str]]]) -> Iterator[Problem]:
    """Problems that can be anywhere in a value. A stack, not recursion: the depth is the sender's choice."""
    waiting: list[tuple[Any, str, int]] = [(value, "", 1)]
    while waiting:
        item, path, depth = waiting.pop()
        if isinstance(item, str):
            yield from _unstorable(item, path)
        elif isinstance(item, (dict, list)) and depth > MAX_DEPTH:
            yield Problem(path[:200], "too_deep", f"Nested more than {MAX_DEPTH} levels deep.")
            return
        elif isinstance(item, list):
            waiting.extend((part, f"{path}[{index}]", depth + 1) for index, part in enumerate(item))
        elif isinstance(item, dict):
            for key in twice[id(item)][1] if id(item) in twice else ():
                yield Problem(
                    join(path, key), "duplicate_key", f"The key {shown(key)} is there twice.", "keep one"
                )
            for key in item:
                yield from _unstorable(key, join(path, key))
            waiting.extend((part, join(path, key), depth + 1) for key, part in item.items())


def _unstorable(text: str, path: str) -> Iterator[Problem]:
    if "\0" in text:
        yield Problem(path, "nul_character", "A string holds the character U+0000.", "remove \\u0000")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        yield Problem(
            path,
            "lone_surrogate",
            f"A string holds {half}, half of a surrogate pair: it is no character.",
            "write the file as UTF-8 (in Python: json.dumps(row, ensure_ascii=False))",
        )


FORMATS: tuple[type[Format], ...] = variants_of(Format, __name__, __path__)  # type: ignore[assignment]


_BY_RANK: tuple[Format, ...] = tuple(
    variant()  # type: ignore[call-arg]
    for variant in sorted(
        FORMATS, key=lambda variant: (variant.rank, str(variant.model_fields["kind"].default))
    )
)


def detect(row: dict[str, Any]) -> Format | None:
    """The format that a row claims to be of."""
    return next((format for format in _BY_RANK if format.detect(row)), None)


def format_of(kind: str) -> Format:
    """The format of this name.

    Raises:
        KeyError: there is none.
    """
    for format in _BY_RANK:
        if format.kind == kind:
            return format
    raise KeyError(kind)
