"""A preview shows exactly what is trained on, and no template outlives its limits.

The oracle everywhere: the ids and masks that `tokenise`, which runs use, makes of the same file.
"""

import hashlib
import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_service import base_model, preview, shipped
from peft_service.errors import InvalidRequest, InvalidTrainingFile
from peft_service.preview import Order, look
from peft_service.run import reading_of
from peft_service.spec import FineTuneSpec
from peft_service.tokenise import Meaning, tokenise
from tests.tiny import tiny_tokenizer

ZEROS = "0" * 64


@cache
def shape() -> base_model.ModelShape:
    return base_model.shape_of_directory(shipped.path())


def order(path: Path, rows: list[Any], format: str, objective: str = "sft", **changes: Any) -> Order:
    """An order for a file of these rows; changes are keys of the order, of the spec's data or training."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = {"id": "file-1", "key": "k", "sha256": ZEROS, "rows": max(1, len(rows)), "format": format}
    file |= {name: changes.pop(name) for name in ("labels",) if name in changes}
    looking = {name: changes.pop(name) for name in ("rows_", "statistics") if name in changes}
    data = {
        name: changes.pop(name) for name in ("too_long", "template", "turns", "train_on") if name in changes
    }
    spec = FineTuneSpec.model_validate(
        {
            "name": "x",
            "base": {"id": "a/b", "uri": shipped.uri()},
            "method": {"kind": "lora"},
            "objective": {"kind": objective},
            "data": {"training": file, **data},
            "training": {"learning_rate": 1e-3, **changes},
        }
    )
    return Order(
        spec=spec,
        shape=shape(),
        base=str(shipped.path()),
        parts=((path.name, str(path)),),
        rows=looking.get("rows_", 100),
        statistics=looking.get("statistics", False),
    )


def template(jinja: str) -> dict[str, str]:
    return {"jinja": jinja, "sha256": ZEROS}


def chat(*words: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(words)
    return {"messages": [{"role": role, "content": word} for role, word in zip(roles, words, strict=False)]}


def trained(asked: Order) -> Any:
    """What a run makes of the order's file."""
    spec = asked.spec
    tokenizer = base_model.load_tokenizer(shipped.path())
    file = spec.data.training
    meaning = Meaning(
        spec.objective.task("decoder"), spec.objective.labels(spec.data.labels), (), spec.objective.rows
    )
    return tokenise(
        [(name, Path(path)) for name, path in asked.parts],
        file.format,
        tokenizer,
        spec.training.max_seq_len,
        spec.data.too_long,
        meaning,
        reading_of(spec, file),
    )


LONG = " ".join(f"word{n}" for n in range(60))
CASES: dict[str, dict[str, Any]] = {
    "chat": {"format": "chat", "rows": [chat("hi", "ho 😀 é"), chat("a", "b ", " c\n", "d")]},
    "prompt_completion": {
        "format": "prompt_completion",
        "rows": [{"prompt": "one and one is ", "completion": "two"}, {"prompt": "x", "completion": " é"}],
    },
    "text split": {
        "format": "text",
        "objective": "pretraining",
        "rows": [{"text": LONG}, {"text": "short"}],
        "too_long": "split",
        "max_seq_len": 16,
    },
    "cut at its end": {
        "format": "prompt_completion",
        "rows": [{"prompt": "one", "completion": LONG}, {"prompt": "one", "completion": "two"}],
        "too_long": "right",
        "max_seq_len": 16,
    },
    "cut at its beginning": {
        "format": "prompt_completion",
        "rows": [{"prompt": LONG, "completion": "two"}],
        "too_long": "left",
        "max_seq_len": 16,
    },
    "pairs": {
        "format": "preference",
        "objective": "dpo",
        "rows": [{"prompt": "one and one? ", "chosen": "two", "rejected": "three"}],
    },
    "classification": {
        "format": "classification",
        "objective": "classification",
        "rows": [{"text": "good", "label": "yes"}, {"text": "bad", "label": "no"}],
        "labels": ["no", "yes"],
    },
    "tokens": {
        "format": "tokens",
        "rows": [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]}],
    },
    "segments": {
        "format": "segments",
        "rows": [{"segments": [{"text": "one ", "label": False}, {"text": "two", "label": True}]}],
    },
    "turns apart": {"format": "chat", "rows": [chat("a", "b", "c", "d")], "turns": "apart"},
    "all tokens": {"format": "chat", "rows": [chat("a", "b", "c", "d")], "train_on": "all"},
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_shown_is_what_is_trained(name: str, tmp_path: Path) -> None:
    case = dict(CASES[name])
    asked = order(tmp_path / "data.jsonl", **case)
    found, made = look(asked), trained(asked)
    sequences = [sequence for row in found["rows"] for sequence in row["sequences"]]
    ids = [token["id"] for sequence in sequences for token in sequence["tokens"]]
    mask = [int(token["trained"]) for sequence in sequences for token in sequence["tokens"]]
    assert np.array_equal(ids, made.input_ids)
    assert np.array_equal(mask, made.target_mask)
    assert [len(sequence["tokens"]) for sequence in sequences] == np.diff(made.offsets).tolist()
    assert [row["line"] for row in found["rows"] for _ in {s["row"] for s in row["sequences"]}] == list(
        made.lines
    )
    happened = {
        kind: len([row for row in found["rows"] if kind in row["happened"]])
        for kind in ("split", "truncated")
    }
    assert happened == {kind: made.statistics[kind]["count"] for kind in happened}
    assert sum(row["lost_tokens"] for row in found["rows"]) == made.statistics["lost_tokens"]
    for sequence in sequences:
        assert sequence["counts"] == {
            "tokens": len(sequence["tokens"]),
            "trained": sum(token["trained"] for token in sequence["tokens"]),
        }


def test_the_places_of_tokens_are_those_of_their_text(tmp_path: Path) -> None:
    asked = order(tmp_path / "data.jsonl", [chat("  two  blanks\n\n", "é😀 ünd  \t so")], "chat")
    (row,) = look(asked)["rows"]
    (sequence,) = row["sequences"]
    text, at = sequence["text"], 0
    for token in sequence["tokens"]:
        assert token["text"] == text[token["start"] : token["end"]]
        assert token["start"] <= at <= token["end"]  # nothing is between two tokens
        at = token["end"]
    assert at == len(text)
    learned = "".join(
        text[max(token["start"], before) : token["end"]]
        for before, token in zip(
            [0, *(t["end"] for t in sequence["tokens"])], sequence["tokens"], strict=False
        )
        if token["trained"]
    )
    assert learned == "é😀 ünd  \t so<|im_end|>"
    assert [token["text"] for token in sequence["tokens"] if token.get("special")][-1] == "<|im_end|>"


def test_pairs_show_both_sequences_and_labels_are_named(tmp_path: Path) -> None:
    (row,) = look(order(tmp_path / "p.jsonl", **CASES["pairs"]))["rows"]
    assert [(s["name"], s["text"]) for s in row["sequences"]] == [
        ("chosen", "one and one? two"),
        ("rejected", "one and one? three"),
    ]
    rows = look(order(tmp_path / "c.jsonl", **CASES["classification"]))["rows"]
    assert [row["sequences"][0]["label"] for row in rows] == ["yes", "no"]


def test_a_cut_row_shows_its_own_text_and_how_much_is_not_in_it(tmp_path: Path) -> None:
    text = LONG + "two"
    for too_long in ("left", "right"):
        rows = [{"prompt": LONG[:-4], "completion": LONG[-4:] + "two"}]
        if too_long == "right":
            rows = [{"prompt": LONG[:4], "completion": LONG[4:] + "two"}]
        asked = order(tmp_path / "d.jsonl", rows, "prompt_completion", too_long=too_long, max_seq_len=16)
        (row,) = look(asked)["rows"]
        (sequence,) = row["sequences"]
        end = len(text) - sequence["after"]
        assert sequence["text"] == text[sequence["before"] : end]
        assert (sequence["before"] > 0, sequence["after"] > 0) == (too_long == "left", too_long == "right")
        for token in sequence["tokens"]:
            if not token.get("special"):
                assert sequence["text"][token["start"] : token["end"]] == token["text"]
    pieces = look(order(tmp_path / "d.jsonl", **CASES["text split"]))["rows"][0]["sequences"]
    assert all(LONG[piece["before"] :].startswith(piece["text"]) for piece in pieces)
    assert pieces[-1]["before"] + len(pieces[-1]["text"]) == len(LONG)


def test_lines_are_chosen_and_absent_ones_named(tmp_path: Path) -> None:
    rows = [chat(f"{n}", f"{n}!") for n in range(20)]
    found = look(order(tmp_path / "d.jsonl", rows, "chat", rows_=(3, 17, 40)))
    assert [row["line"] for row in found["rows"]] == [3, 17]
    assert "16!" in found["rows"][1]["sequences"][0]["text"]
    assert found["warnings"] == ["no row begins in line 40"]
    assert [row["line"] for row in look(order(tmp_path / "d.jsonl", rows, "chat", rows_=2))["rows"]] == [1, 2]


def test_a_row_that_cannot_be_trained_on_says_why(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user"}]}, chat("a", LONG), chat("a", "b")]
    found = look(order(tmp_path / "d.jsonl", rows, "chat", max_seq_len=32))
    codes = [[problem["code"] for problem in row["problems"]] for row in found["rows"]]
    assert codes[1:] == [["too_long"], []]
    assert codes[0]
    assert [len(row["sequences"]) for row in found["rows"]] == [0, 0, 1]
    found = look(order(tmp_path / "d.jsonl", rows[1:], "chat", max_seq_len=32, too_long="drop"))
    assert [list(row["happened"]) for row in found["rows"]] == [["dropped"], []]


def test_statistics_are_those_of_training_and_more(tmp_path: Path) -> None:
    rows = [chat(f"what is {n}?", f"{n} it is") for n in range(50)]
    asked = order(
        tmp_path / "d.jsonl", rows, "chat", statistics=True, rows_=1, batch_size=5, n_epochs=2, max_seq_len=64
    )
    found, made = look(asked)["statistics"], trained(asked)
    assert {name: found[name] for name in made.statistics} == made.statistics
    assert found["steps"] == 20
    assert found["trained_share"] == pytest.approx(made.target_tokens / len(made.input_ids), abs=1e-4)
    assert found["last_targets"] == {"<|im_end|>": 50}
    assert found["eos_in_targets"] is True
    packing = found["packing"]
    assert packing["full"] == pytest.approx(len(made.input_ids) / (64 * packing["lines"]), abs=1e-4)
    # Best-fit needs at most 11/9 of the fewest lines that could hold the tokens, and one.
    assert packing["lines"] <= 11 / 9 * -(-len(made.input_ids) // 64) + 1
    jinja = (shipped.path() / "chat_template.jinja").read_bytes()
    assert found["template_sha256"] == hashlib.sha256(jinja).hexdigest()


def test_statistics_of_a_large_file_are_of_its_beginning_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preview, "STATISTICS_ROWS", 10)
    rows = [chat(f"what is {n}?", f"{n} it is") for n in range(25)]
    found = look(order(tmp_path / "d.jsonl", rows, "chat", statistics=True, batch_size=5, n_epochs=1))
    assert (found["statistics"]["rows"], found["statistics"]["complete"]) == (10, False)
    assert found["statistics"]["steps"] == 5  # of all rows
    assert found["warnings"] == ["the statistics are of the first 10 of 25 rows"]


def test_a_model_that_would_not_learn_to_stop_is_warned_of(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    rows = [{"input_ids": [0, 0, 200, 201], "labels": [-100, -100, 200, 201]}]  # 0 is its BOS
    asked = order(tmp_path / "d.jsonl", rows, "tokens", statistics=True)
    found = look(asked.model_copy(update={"base": str(tmp_path / "base")}))
    assert found["statistics"]["eos_in_targets"] is False
    assert found["statistics"]["bos_twice"] == 1
    assert len(found["warnings"]) == 2


def test_a_file_with_bad_rows_has_no_statistics_but_their_list(tmp_path: Path) -> None:
    rows = [chat("a", "b"), chat("a", LONG), chat("c", "d")]
    with pytest.raises(InvalidTrainingFile) as caught:
        look(order(tmp_path / "d.jsonl", rows, "chat", statistics=True, rows_=1, max_seq_len=32))
    assert caught.value.details["error_count"] == 1


def test_tokens_beyond_what_is_listed_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "SHOWN_TOKENS", 20)
    rows = [chat("a", LONG), chat("a", "b")]
    first, second = look(order(tmp_path / "d.jsonl", rows, "chat"))["rows"]
    (sequence,) = first["sequences"]
    assert len(sequence["tokens"]) == 20
    assert sequence["tokens_left_out"] == sequence["counts"]["tokens"] - 20
    assert second["sequences"][0]["tokens"] == []
    assert second["sequences"][0]["tokens_left_out"] == second["sequences"][0]["counts"]["tokens"]


# ------------------------------------------------------------------------------------------ the process


def test_the_process_says_the_same(tmp_path: Path) -> None:
    rows = [chat("hi", "ho 😀"), chat("a", "b")]
    asked = order(tmp_path / "d.jsonl", rows, "chat", statistics=True)
    assert preview.preview(asked) == json.loads(json.dumps(look(asked)))


def test_an_error_arrives_as_it_was_raised(tmp_path: Path) -> None:
    rows = [chat("a", LONG)]
    asked = order(tmp_path / "d.jsonl", rows, "chat", statistics=True, max_seq_len=32)
    with pytest.raises(InvalidTrainingFile) as caught:
        preview.preview(asked)
    with pytest.raises(InvalidTrainingFile) as wanted:
        look(asked)
    assert caught.value.body() == wanted.value.body()


LOOP = "{% for i in range(99999) %}" * 4 + "{% endfor %}" * 4
LIMITS = {
    "loops for ever": LOOP,
    "writes gigabytes": "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "makes one huge text": "{{ 'x' * 99999999999 }}",
    "makes text of text": "{% set n = namespace(t='x') %}"
    "{% for i in range(64) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
    "makes a huge number": "{{ 9 ** (9 ** 9) }}",
    "pads without end": "{{ '%9999999999d' | format(1) }}",
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_template_ends_at_its_limits(name: str, tmp_path: Path) -> None:
    asked = order(
        tmp_path / "d.jsonl", [chat("a", "b")], "chat", template=template(LIMITS[name] + "{{ messages }}")
    )
    start = time.monotonic()
    with pytest.raises(InvalidRequest) as caught:
        preview.preview(asked)
    assert (caught.value.code, caught.value.param) == ("template_limits", "data.template")
    # 15 s on a machine that has nothing else to do; starting takes longer on a busy one.
    assert time.monotonic() - start < preview.ROWS_SECONDS + preview.START_SECONDS


@pytest.mark.parametrize(
    "jinja",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.environ }}",
        "{% set x = messages.append(1) %}",
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "{{ nothing.at.all }}",
    ],
)
def test_a_template_that_reaches_out_is_an_error_of_its_row(jinja: str, tmp_path: Path) -> None:
    asked = order(tmp_path / "d.jsonl", [chat("a", "b")], "chat", template=template(jinja + "{{ messages }}"))
    (row,) = look(asked)["rows"]
    assert [problem["code"] for problem in row["problems"]] == ["template_error"]


def test_the_process_gets_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("PEFT_SERVICE_DATABASE_URL", "postgresql://user:hunter2@host/db")
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    assert "hunter2" not in json.dumps(preview.environment())
