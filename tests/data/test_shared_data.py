"""Every file under ../shared/data goes in as it is, or with a column mapping, and no row is lost in silence.

The number of rows is MANIFEST.json's; the trained tokens of some rows are counted a second time, from the
text that a template renders and the tokenizer alone. The mappings are those that a user would write.
"""

import csv
import io
import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from tokenizers import Tokenizer

from peft_service.columns import Columns
from peft_service.rendering import Reading
from peft_service.tokenise import Meaning, tokenise
from peft_service.tokenised import Tokenised
from peft_service.validate import validate
from tests.data.compared import SHARED, SHIPPED, TRAJECTORIES, TRAJECTORY_TOOLS, gpt2, shipped

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not beside the repository")

BFCL_PROMPTS = {"messages": "question[0]", "tools": "function"}


@dataclass(frozen=True)
class Given:
    """How a user hands in a file."""

    format: str
    """What it is taken for."""
    columns: dict[str, Any] | None = None
    container: str = "jsonl"
    rows: str = "text"
    task: str = "causal_lm"
    too_long: str = "error"
    tokens: int = 8192
    """The longest row."""
    some: int | None = None
    """So many rows are tokenised; all are validated and counted."""
    blank: int = 0
    """Lines of the file that hold nothing and so are no rows; a warning has their number."""
    merged: int = 0
    """Rows with a token that holds the end of the prompt and the beginning of the answer."""


FILES = {
    "gsm8k/train.jsonl": Given(
        "prompt_completion", {"prompt": "question", "completion": "answer"}, some=1000
    ),
    "llamafactory/identity.json": Given("instruction", container="json_array"),
    "llamafactory/alpaca_en_demo.json": Given("instruction", container="json_array"),
    "llamafactory/alpaca_zh_demo.json": Given("instruction", container="json_array", some=300),
    "llamafactory/glaive_toolcall_en_demo.json": Given(
        "sharegpt", container="json_array", too_long="left", tokens=1024, some=100
    ),
    "llamafactory/dpo_en_demo.json": Given("preference", container="json_array", rows="pairs", some=100),
    "llamafactory/kto_en_demo.json": Given("unpaired", container="json_array", rows="unpaired", some=150),
    "llamafactory/c4_demo.jsonl": Given("text", too_long="split", tokens=2048),
    "llamafactory/v1_sft_demo.jsonl": Given("chat"),
    "llamafactory/v1_dpo_demo.jsonl": Given("preference", rows="pairs"),
    "llamafactory/reason_tool_use_demo_50.jsonl": Given("chat"),
    "e2e/valid.txt": Given(
        "prompt_completion",
        {
            "prompt": {"split": "text", "on": "||", "part": 0},
            "completion": {"split": "text", "on": "||", "part": 1},
        },
        container="text",
        some=1500,
        merged=3,
    ),
    "tinyshakespeare/input.txt": Given("text", container="text", blank=7223, some=8000),
    "banking77/train.csv": Given(
        "classification", {"text": "text", "label": "category"}, container="csv", rows="classes", some=3000
    ),
    "bfcl/BFCL_v4_simple_python.json": Given("prompts", BFCL_PROMPTS, rows="prompts"),
    "bfcl/BFCL_v4_parallel.json": Given("prompts", BFCL_PROMPTS, rows="prompts"),
    "bfcl/possible_answer/BFCL_v4_simple_python.json": Given(
        "prompt_completion", {"prompt": "id", "completion": {"text": "{ground_truth}"}}
    ),
    "bfcl/possible_answer/BFCL_v4_parallel.json": Given(
        "prompt_completion", {"prompt": "id", "completion": {"text": "{ground_truth}"}}
    ),
    "self-instruct/seed_tasks.jsonl": Given(
        "instruction",
        {"instruction": "instruction", "input": "instances[0].input", "output": "instances[0].output"},
    ),
    "anthropic-evals/interest-in-math.jsonl": Given(
        "preference",
        {
            "prompt": "question",
            "chosen": "answer_matching_behavior",
            "rejected": "answer_not_matching_behavior",
        },
        rows="pairs",
    ),
    "kdconv/music_dev.json": Given("chat", {"conversation": "messages[*].message"}, container="json_array"),
    TRAJECTORIES: Given("chat", {"messages": "messages"}, too_long="drop", some=10),
}
OTHER_ROLES = {
    "llamafactory/dataset_info.json": "a registry of data sets, no data",
    TRAJECTORY_TOOLS: "the tools of the trajectories beside it",
    "tokenizer-gpt2/vocab.json": "a tokenizer",
    "tokenizer-gpt2/merges.txt": "a tokenizer",
}
"""Files that are no data, and what they are for."""


@cache
def manifest() -> dict[str, dict[str, Any]]:
    return {entry["file"]: entry for entry in json.loads((SHARED / "MANIFEST.json").read_text())}


@cache
def tokenizer() -> Any:
    return shipped()


def columns_of(given: Given) -> Columns | None:
    return Columns(given.columns) if given.columns else None


@cache
def tools() -> tuple[dict[str, Any], ...]:
    return tuple(json.loads((SHARED / TRAJECTORY_TOOLS).read_text()))


def test_every_file_is_tried():
    assert set(FILES) | set(OTHER_ROLES) == set(manifest())


@pytest.mark.parametrize("file", FILES)
def test_the_file_goes_in_with_every_row(file):
    given, entry = FILES[file], manifest()[file]
    report = validate(SHARED / file, columns=columns_of(given))
    assert (report.format, report.container) == (given.format, given.container), report.problems[:3]
    assert (report.problem_count, report.complete) == (0, True), report.problems[:3]
    blank = [warning.message for warning in report.warnings if warning.code == "blank_line"]
    assert report.rows == entry["rows"] - given.blank
    assert [message.split()[0] for message in blank] == ([str(given.blank)] if given.blank else [])
    assert (report.bytes, report.sha256) == (entry["bytes"], entry["sha256"])


@cache
def tokenised(file: str) -> Tokenised:
    given = FILES[file]
    path = SHARED / file
    labels: tuple[str, ...] = ()
    if given.rows == "classes":
        labels = tuple(validate(path, columns=columns_of(given)).statistics["labels"])
    reading = Reading(
        columns=columns_of(given),
        limit=given.some,
        tools=tools() if file == TRAJECTORIES else (),
    )
    task = "sequence_classification" if given.rows == "classes" else "causal_lm"
    meaning = Meaning(task=task, labels=labels, rows=given.rows)
    return tokenise(path, given.format, tokenizer(), given.tokens, given.too_long, meaning, reading)


@pytest.mark.parametrize("file", FILES)
def test_no_row_is_lost_in_silence(file):
    made, given = tokenised(file), FILES[file]
    found = made.statistics
    wanted = given.some or manifest()[file]["rows"]
    assert len(set(made.lines.tolist())) + found["dropped"]["count"] == wanted
    for happened, kind in (("dropped", "drop"), ("truncated", "left"), ("split", "split")):
        assert bool(found[happened]["count"]) == (given.too_long == kind), happened
    assert bool(found["lost_tokens"]) == (given.too_long in ("drop", "left"))
    assert found["target_tokens"] == int(made.target_mask.sum())
    assert found["merged_boundaries"]["count"] == given.merged
    for never in ("rewritten_content", "unchecked_masks", "eos_appended"):
        assert found[never]["count"] == 0, (never, found[never])


# The same by hand -----------------------------------------------------------------------------------------

Piece = tuple[str, bool]
"""Some text between two special tokens, and whether it is learned."""
END = "<|im_end|>"


def said(role: str, text: str, trained: bool | None = None) -> list[Piece]:
    """A message as the shipped template writes it."""
    learned = role == "assistant" if trained is None else trained
    return [(f"<|im_start|>{role}<|im_sep|>", False), (text + END, learned)]


def called(*calls: dict[str, Any]) -> str:
    made = ""
    for call in calls:
        arguments = json.dumps(call["arguments"], ensure_ascii=False)
        made += f'<tool_call>{{"name": "{call["name"]}", "arguments": {arguments}}}</tool_call>'
    return made


def of_parts(message: dict[str, Any]) -> str:
    """The parts of a message of LLaMA-Factory's next engine; reasoning as models that reason write it."""
    texts: dict[str, str] = {"text": "", "reasoning": "", "tool_call": ""}
    for part in message["content"]:
        is_call = part["type"] == "tool_call"
        texts[part["type"]] += called(json.loads(part["value"])) if is_call else part["value"]
    thought = f"<think>\n{texts['reasoning'].strip()}\n</think>\n\n" if texts["reasoning"] else ""
    return thought + texts["text"] + texts["tool_call"]


def conversation(messages: list[Any]) -> list[Piece]:
    """Messages in any of the vocabularies of these files, up to the last answer."""
    made: list[list[Piece]] = []
    for message in messages:
        if "from" in message:
            speaker, text = message["from"], message["value"]
            if speaker == "function_call":
                made.append(said("assistant", called(json.loads(text))))
            else:
                roles = {"human": "user", "gpt": "assistant", "observation": "tool"}
                made.append(said(roles.get(speaker, speaker), text))
        elif isinstance(message["content"], list):
            made.append(said(message["role"], of_parts(message)))
        else:
            calls = [call["function"] for call in message.get("tool_calls") or ()]
            calls = [{**call, "arguments": json.loads(call["arguments"])} for call in calls]
            made.append(said(message["role"], (message["content"] or "") + called(*calls)))
    while made and not made[-1][-1][1]:
        made.pop()
    return [piece for message in made for piece in message]


def judged(messages: list[Any], answer: dict[str, Any]) -> list[Piece]:
    """A prompt of which nothing is learned, and an answer."""
    whole = conversation([*messages, answer])
    return [(text, False) for text, _ in whole[:-1]] + whole[-1:]


def by_hand(file: str, row: Any) -> list[list[Piece]]:
    """What a row teaches, from the file's own keys: one sequence, or the two of a pair."""
    if file == "e2e/valid.txt":
        prompt, answer = row.split("||")
        return [[(prompt, False), (answer + END, True)]]
    if file == "tinyshakespeare/input.txt":
        return [[(row + END, True)]]
    if file == "banking77/train.csv":
        return [[(row["text"], False)]]
    if file == "gsm8k/train.jsonl":
        return [[(row["question"], False), (row["answer"] + END, True)]]
    if file == "llamafactory/c4_demo.jsonl":
        return [[(row["text"] + END, True)]]
    if file == "self-instruct/seed_tasks.jsonl":
        row = {"instruction": row["instruction"], **row["instances"][0]}
    if "instruction" in row:
        asked = "\n".join(filter(None, (row["instruction"], row["input"])))
        return [said("user", asked) + said("assistant", row["output"])]
    if file.startswith("bfcl/possible_answer/"):
        return [[(row["id"], False), (json.dumps(row["ground_truth"], ensure_ascii=False) + END, True)]]
    if file.startswith("bfcl/"):
        (message,) = row["question"][0]
        return [[*said("user", message["content"]), ("<|im_start|>assistant<|im_sep|>", False)]]
    if file == "anthropic-evals/interest-in-math.jsonl":
        answers = row["answer_matching_behavior"], row["answer_not_matching_behavior"]
        return [[(row["question"], False), (answer + END, True)] for answer in answers]
    if file == "kdconv/music_dev.json":
        texts = [message["message"] for message in row["messages"]]
        turns = [said("assistant" if at % 2 else "user", text) for at, text in enumerate(texts)]
        return [[piece for turn in turns for piece in turn]]
    if "chosen_messages" in row:
        both = row["chosen_messages"], row["rejected_messages"]
        return [judged(messages[:-1], messages[-1]) for messages in both]
    if "chosen" in row:
        return [judged(row["conversations"], row[side]) for side in ("chosen", "rejected")]
    if "label" in row:
        return [judged(row["messages"][:-1], row["messages"][-1])]
    return [conversation(row.get("conversations") or row["messages"])]


def source(file: str) -> list[Any]:
    """The rows of a file; of one of lines, the lines."""
    text = (SHARED / file).read_text(encoding="utf-8")
    if file.endswith(".csv"):
        return list(csv.DictReader(io.StringIO(text)))
    if file.endswith(".txt"):
        return text.split("\n")
    if FILES[file].container == "json_array":
        whole: list[Any] = json.loads(text)
        return whole
    return [json.loads(line) for line in text.splitlines() if line]


@pytest.mark.parametrize("file", FILES)
def test_the_trained_tokens_are_those_counted_by_hand(file):
    """With the tokenizers library alone, piece after piece: special tokens keep the pieces apart."""
    made, given, rows = tokenised(file), FILES[file], source(file)
    encode = Tokenizer.from_file(str(SHIPPED / "tokenizer.json")).encode
    compared = 0
    lines = made.lines.tolist()
    for index in [*range(3), made.rows // 2, made.rows - 1]:
        if lines.count(lines[index]) > 1:
            continue  # a document in pieces
        row = rows[index if given.container == "csv" else lines[index] - 1]
        sequences = by_hand(file, row)
        for side, pieces in enumerate(sequences):
            ids, mask = [], []
            for text, learned in pieces:
                some = encode(text, add_special_tokens=False).ids
                ids += some
                mask += [learned] * len(some)
            if given.rows == "classes":
                mask[-1] = True
            found_ids, found_mask = made.row(index * made.sequences + side)
            if not has_tools(row, file):
                assert len(ids) == len(found_ids) or len(found_ids) == given.tokens
            count = min(len(ids), len(found_ids))
            mask = mask[-count:]
            if count == len(found_ids):
                mask[0] = False  # it follows nothing
            assert found_ids[-count:].tolist() == ids[-count:], row
            assert found_mask[-count:].tolist() == mask, row
            compared += 1
    assert compared >= 3


def has_tools(row: Any, file: str) -> bool:
    """Then the template writes them in front, in words that are not looked at here."""
    if file == TRAJECTORIES:
        return True
    return (isinstance(row, dict) and (row.get("tools") or "[]") != "[]") or "function" in row


# Files of another role ------------------------------------------------------------------------------------


def test_a_registry_and_tools_are_not_taken_for_data():
    for file in ("llamafactory/dataset_info.json", TRAJECTORY_TOOLS):
        report = validate(SHARED / file)
        assert report.format is None
        assert report.problem_count or "unknown_format" in {warning.code for warning in report.warnings}


def test_the_tools_go_in_front_of_every_trajectory():
    made = tokenised(TRAJECTORIES)
    for index in range(made.rows):
        text = tokenizer().decode(made.row(index)[0])
        first = text.split(END)[0]
        assert all(f'"name": "{tool["function"]["name"]}"' in first for tool in tools())
    assert len(tools()) == manifest()[TRAJECTORY_TOOLS]["rows"]


def test_the_tokenizer_files_make_a_tokenizer_that_gives_text_back():
    made = gpt2()
    assert len(made) == 50_257 + 2
    text = "Zürich → 東京, 1234567 🙂\n\n\tend"
    assert made.decode(made.encode(text)) == text
