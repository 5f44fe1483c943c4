"""The same rows teach the same tokens as in TRL and LLaMA-Factory; where they do not, a difference says why.

What they make of the rows is in tests/golden/trained-tokens.json, recorded by tools/golden_tokens.py: counts
and hashes of token ids and masks. A difference is a function here that turns our reading into theirs, and
then all must be equal, row by row: so each says exactly what is different, and nothing else is.
"""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from peft_service.columns import Columns
from peft_service.rendering import Reading
from peft_service.tokenise import Meaning, tokenise
from peft_service.tokenised import Tokenised
from peft_service.validate import validate
from tests.data.compared import (
    ANSWERED,
    GOLDEN,
    PLAIN_ROWS,
    SHARED,
    TOKENIZERS,
    TRAJECTORIES,
    TRAJECTORY_TOOLS,
    TRL_ROWS,
    reading,
)

Rows = list[tuple[list[int], list[bool]]]
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not beside the repository")

RECORDED: dict[str, dict[str, dict[str, Any]]] = {
    f"{source} {name}": cases
    for source, made in json.loads(GOLDEN.read_text()).items()
    for name, cases in made.items()
    if name != "versions"
}
ARGUMENTS_AS_WRITTEN = f"file/{TRAJECTORIES}"
"""Calls whose arguments are JSON in a string, written `{"a":1}`. TRL gives the string to the template, and
this one puts it in as it is. Here arguments become objects, which templates write `{"a": 1}`: so do servers,
which parse the arguments of a request's calls before they render it. TRL with arguments written so gives the
same tokens: that case is compared exactly."""
RENDERED_BY_QWEN3 = "llamafactory/reason_tool_use_demo_50.jsonl"
"""The one demo with reasoning. Its renderer's prompts have words of their own: only answers are compared."""
MANY_TOKENS = 400_000


def cases() -> Iterator[Any]:
    """All that is compared token by token; the large files are not for every day."""
    for which, made in RECORDED.items():
        for case, wanted in made.items():
            if RENDERED_BY_QWEN3 not in case and case != ARGUMENTS_AS_WRITTEN:
                marks = [pytest.mark.long] if wanted["tokens"] > MANY_TOKENS else []
                yield pytest.param(which, case, marks=marks, id=f"{which} {case}")


REASONING = """\
{%- for m in messages -%}
  {{ '<|im_start|>' ~ m.role ~ '\\n' }}
  {%- if m.role == 'assistant' -%}
    {%- generation -%}
      {%- if m.reasoning_content -%}
        {{ '<think>\\n' ~ m.reasoning_content.strip('\\n') ~ '\\n</think>\\n\\n' }}
      {%- endif -%}
      {{ m.content.lstrip('\\n') }}
      {%- for call in m.tool_calls or [] -%}
        {{ '\\n' if m.content or not loop.first }}{{ '<tool_call>\\n{"name": "' ~ call.function.name }}
        {{- '", "arguments": ' ~ (call.function.arguments | tojson) ~ '}\\n</tool_call>' }}
      {%- endfor -%}
      {{ '<|im_end|>' }}
    {%- endgeneration -%}
  {%- else -%}
    {{ m.content }}{%- if loop.first -%}{{ tools | tojson }}{%- endif -%}{{ '<|im_end|>' }}
  {%- endif -%}
  {{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
"""Writes an answer as Qwen3 does: its thoughts, its words, its calls. What is asked, it writes in short."""


@cache
def tokenizer_of(name: str) -> Any:
    return TOKENIZERS[name]()


def rows_of(made: Tokenised, step: int = 1) -> Rows:
    """Every `step`-th sequence, as plain lists."""
    found = (made.row(index) for index in range(0, len(made.offsets) - 1, step))
    return [(ids.tolist(), mask.astype(bool).tolist()) for ids, mask in found]


def read(
    path: Path, name: str, format: str | None = None, reading: Reading | None = None, jinja: str = ""
) -> Rows:
    """Our reading of a file: of a pair both sides, of an unpaired row the row itself."""
    tokenizer = tokenizer_of(name)
    kind = format or validate(path).format
    assert kind is not None
    kinds = {"preference": "pairs", "unpaired": "unpaired", "prompts": "prompts"}
    rows: Any = kinds.get(kind, "text")
    if jinja:
        tokenizer = TOKENIZERS[name]()
        tokenizer.chat_template = jinja
    made = tokenise(path, kind, tokenizer, 1_000_000, "error", Meaning(rows=rows), reading)
    return rows_of(made, 2 if rows == "unpaired" else 1)


@cache
def trajectories(name: str) -> Rows:
    """The longest rows of all, up to 60 messages."""
    tools = tuple(json.loads((SHARED / TRAJECTORY_TOOLS).read_text()))
    return read(SHARED / TRAJECTORIES, name, "chat", Reading(tools=tools))


# What others do otherwise -------------------------------------------------------------------------------


def line_feed_after_the_end(rows: Rows, name: str) -> Rows:
    """ChatML writes a line feed behind <|im_end|>, and they learn it.

    LLaMA-Factory's templates have it in the slot of the answer. TRL takes all that is behind a prompt as the
    completion (with `assistant_only_loss`, it does as we do). Nobody asks for it when serving: the answer has
    ended before it. Not learned here, as the template's own {% generation %} says.
    """
    (feed,) = tokenizer_of(name).encode("\n")
    made = []
    for ids, mask in rows:
        ends = [at for at in range(1, len(ids)) if mask[at - 1] and not mask[at]]
        assert all(ids[at] == feed for at in ends)
        made.append((ids, [yes or at in ends for at, yes in enumerate(mask)]))
    return made


def header_of_the_answer(rows: Rows, name: str) -> Rows:
    """The engine of llamafactory.v1 learns whole messages, with the <|im_start|>assistant in front of them.

    When serving, that is the generation prompt: the model is never asked to write it.
    """
    header = tokenizer_of(name).encode("<|im_start|>assistant\n")
    made = []
    for ids, mask in line_feed_after_the_end(rows, name):
        begins = [at for at in range(1, len(ids)) if mask[at] and not mask[at - 1]]
        assert all(ids[at - len(header) : at] == header for at in begins)
        added = {at - back for at in begins for back in range(1, len(header) + 1)}
        made.append((ids, [yes or at in added for at, yes in enumerate(mask)]))
    return made


def empty_system_message(rows: Rows, name: str, file: str) -> Rows:
    """Where a row's tools are "[]", LLaMA-Factory writes a system message without a word.

    It looks whether there is a text, not whether there is a tool in it. No server writes that for no tools.
    """
    empty = tokenizer_of(name).encode("<|im_start|>system<|im_sep|><|im_end|>")
    source = json.loads((SHARED / file).read_text())
    return [
        (empty + ids, [False] * len(empty) + mask) if row["tools"] == "[]" else (ids, mask)
        for (ids, mask), row in zip(rows, source, strict=True)
    ]


def messages_after_the_last_answer(rows: Rows, name: str) -> Rows:
    """TRL keeps what comes after the last answer. Nothing is learned of it, and nothing that is learned sees
    it, so we leave it out: the statistics count it as `trailing_messages`."""
    made = []
    lines = (SHARED / TRAJECTORIES).read_text().splitlines()
    for (ids, mask), line in zip(rows, lines, strict=True):
        messages = json.loads(line)["messages"]
        last = max(at for at, message in enumerate(messages) if message["role"] == "assistant")
        text = "".join(
            f"<|im_start|>{message['role']}<|im_sep|>{message['content']}<|im_end|>"
            for message in messages[last + 1 :]
        )
        more = tokenizer_of(name).encode(text)
        made.append((ids + more, mask + [False] * len(more)))
    return made


def prompt_shorter_by_a_letter(rows: Rows, name: str) -> Rows:
    """Where one answer is the beginning of the other, TRL's common prompt ends before its last letter but
    keeps the blank before it, so the answer loses its blank. Our prompts never end with a blank."""
    first, second = rows[:2], rows[2:]
    made = []
    for ids, mask in second:
        mask = list(mask)
        mask[mask.index(True)] = False
        made.append((ids, mask))
    return first + made


CHATML_COMPLETIONS = (
    "rows/prompt-completion-messages",
    "rows/preference-explicit-messages",
    "rows/preference-implicit-messages",
    "rows/unpaired-messages",
)


def of_trl(case: str, name: str, folder: Path) -> Rows:
    """Our reading, with TRL's differences."""
    kind, _, what = case.partition("/")
    if kind == "rows":
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in TRL_ROWS[what]))
        rows = read(path, name)
        if case == "rows/preference-implicit-text" and name == "shipped":
            return prompt_shorter_by_a_letter(rows, name)
        if case in CHATML_COMPLETIONS and name == "gpt2":
            return line_feed_after_the_end(rows, name)
        return rows
    if what == TRAJECTORIES:
        return messages_after_the_last_answer(trajectories(name), name)
    prompt, completion = ANSWERED[what]
    columns = Columns({"prompt": prompt, "completion": completion})
    return read(SHARED / what, name, "prompt_completion", Reading(columns=columns, limit=PLAIN_ROWS))


def of_llamafactory(case: str, name: str, folder: Path) -> Rows:
    """Our reading, with LLaMA-Factory's differences."""
    kind, _, file = case.partition("/")
    if kind == "v1":
        return header_of_the_answer(read(SHARED / file, name), name)
    if file in ANSWERED:
        prompt, completion = ANSWERED[file]
        columns = Columns({"instruction": prompt, "output": completion})
        rows = read(SHARED / file, name, "instruction", Reading(columns=columns, limit=PLAIN_ROWS))
    else:
        rows = read(SHARED / file, name)
    if "glaive" in file:
        rows = empty_system_message(rows, name, file)
    plain = "c4_demo" in file
    return line_feed_after_the_end(rows, name) if name == "gpt2" and not plain else rows


@needs_shared
@pytest.mark.parametrize(("which", "case"), list(cases()))
def test_the_same_tokens(which, case, tmp_path):
    source, name = which.split()
    rows = (of_trl if source == "trl" else of_llamafactory)(case, name, tmp_path)
    found, wanted = reading(rows), RECORDED[which][case]
    other = [at for at, (a, b) in enumerate(zip(digests(found), digests(wanted), strict=True)) if a != b]
    assert not other, f"{len(other)} of {len(rows)} sequences are read otherwise, the first are {other[:20]}"
    assert found == wanted


def digests(said: dict[str, Any]) -> Iterator[str]:
    return (said["each"][at : at + 4] for at in range(0, len(said["each"]), 4))


@needs_shared
@pytest.mark.long
def test_calls_as_they_are_written_in_the_file_are_all_that_differs(tmp_path):
    wanted = RECORDED["trl shipped"][ARGUMENTS_AS_WRITTEN]
    rows = of_trl(ARGUMENTS_AS_WRITTEN, "shipped", tmp_path)
    lines = (SHARED / TRAJECTORIES).read_text().splitlines()
    compact = []
    for line in lines:
        calls = [call for message in json.loads(line)["messages"] for call in message.get("tool_calls") or ()]
        written = [call["function"]["arguments"] for call in calls]
        compact.append(any(text != json.dumps(json.loads(text), ensure_ascii=False) for text in written))
    other = [a != b for a, b in zip(digests(reading(rows)), digests(wanted), strict=True)]
    assert other == compact
    assert any(other)


@needs_shared
def test_answers_with_reasoning_and_calls():
    """Rows of one question are learned as llamafactory.v1 does, headers aside.

    Of several questions, it leaves out the reasoning of all but the last, as Qwen3's template does in a
    conversation that goes on, and teaches those answers without their thoughts. Here such a template would be
    an error that names `turns: apart`; one that keeps all thoughts, as this, teaches them.
    """
    recorded = RECORDED["llamafactory gpt2"]
    wanted = recorded[f"v1-answers/{RENDERED_BY_QWEN3}"]
    rows = header_of_the_answer(read(SHARED / RENDERED_BY_QWEN3, "gpt2", "chat", jinja=REASONING), "gpt2")
    answers = [[id for id, yes in zip(ids, mask, strict=True) if yes] for ids, mask in rows]
    found = reading((ids, [True] * len(ids)) for ids in answers)
    other = [a != b for a, b in zip(digests(found), digests(wanted), strict=True)]
    source = [json.loads(line)["messages"] for line in (SHARED / RENDERED_BY_QWEN3).read_text().splitlines()]
    several = [sum(message["role"] == "user" for message in messages) > 1 for messages in source]
    assert other == several
    assert 0 < sum(several) < len(several)
    assert found["trained"] > wanted["trained"] == recorded[f"v1/{RENDERED_BY_QWEN3}"]["trained"] - len(rows)


def test_every_type_of_row_that_trl_trains_on_is_compared():
    assert {f"rows/{kind}" for kind in TRL_ROWS} <= set(RECORDED["trl shipped"])


def test_stepwise_supervision_is_refused_and_not_read_as_something_else(tmp_path):
    """A type that TRL documented, and has no trainer for in 1.16."""
    path = tmp_path / "steps.jsonl"
    row = {"prompt": "9 or 11?", "completions": ["9 is less.", "So 11."], "labels": [True, False]}
    path.write_text(json.dumps(row) + "\n")
    report = validate(path)
    assert report.format is None or report.problem_count
