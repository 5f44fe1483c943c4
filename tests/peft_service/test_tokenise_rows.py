"""Tokenising rows of every kind, policies of what is learned, several files as one, and constant memory."""

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from peft_service import tokenise as tokenise_module
from peft_service import tokenised as tokenised_module
from peft_service.columns import Columns
from peft_service.containers import compression
from peft_service.errors import InvalidTrainingFile
from peft_service.rendering import Reading
from peft_service.tokenise import Meaning, rows_at, tokenise
from peft_service.tokenised import Tokenised, concatenated
from tests.peft_service.test_tokenise import (
    CHATML,
    FOOT,
    HEAD,
    MARKED,
    THINKING,
    chat,
    make_tokenizer,
    targets_of,
    write,
)

TOKENIZER = make_tokenizer(CHATML, eos="<|im_end|>")
PLAIN = make_tokenizer(None)


def texts(data: Tokenised, tokenizer, count: int) -> list[str]:
    return [tokenizer.decode(data.row(index)[0]) for index in range(count)]


def codes(caught) -> list[tuple[int, str]]:
    return [(error["line"], error["code"]) for error in caught.value.details["errors"]]


# ------------------------------------------------------------------------------------------- kinds of rows


def test_a_pair_is_two_sequences_with_one_prompt(tmp_path):
    row = {"prompt": "two and three?", "chosen": " five", "rejected": " six six"}
    data = tokenise(
        write(tmp_path / "a.jsonl", [row] * 3), "preference", PLAIN, 99, meaning=Meaning(rows="pairs")
    )
    assert (data.rows, data.sequences, len(data.offsets)) == (3, 2, 7)
    assert targets_of(data, PLAIN, 0) == [" five</s>"]
    assert targets_of(data, PLAIN, 1) == [" six six</s>"]
    assert data.lengths([0, 2]).tolist() == [[len(data.row(i)[0]) for i in (0, 1)]] * 2


def test_of_a_pair_that_is_too_long_both_go(tmp_path):
    rows = [
        {"prompt": "a", "chosen": " b", "rejected": " c" * 50},
        {"prompt": "a", "chosen": " b", "rejected": " c"},
    ]
    path, meaning = write(tmp_path / "a.jsonl", rows), Meaning(rows="pairs")
    data = tokenise(path, "preference", PLAIN, 16, "drop", meaning)
    assert (data.rows, data.lines.tolist()) == (1, [2])
    assert data.statistics["dropped"] == {"count": 1, "lines": [1]}
    with pytest.raises(InvalidTrainingFile) as caught:
        tokenise(path, "preference", PLAIN, 16, "error", meaning)
    assert codes(caught) == [(1, "too_long")]


def test_an_unpaired_row_has_its_prompt_with_another_prompts_answer_behind_it(tmp_path):
    rows = [
        {"prompt": "the sum?", "completion": " five", "label": True},
        {"prompt": "the sum?", "completion": " six", "label": False},
        {"prompt": "the answer?", "completion": " yes", "label": True},
    ]
    meaning = Meaning(rows="unpaired")
    data = tokenise(write(tmp_path / "a.jsonl", rows), "unpaired", PLAIN, 99, meaning=meaning)
    assert (data.rows, data.sequences) == (3, 2)
    assert texts(data, PLAIN, 6) == [
        "the sum? five</s>",
        "the sum? yes</s>",  # not that of the next row, whose prompt is the same
        "the sum? six</s>",
        "the sum? yes</s>",
        "the answer? yes</s>",
        "the answer? five</s>",
    ]
    assert [targets_of(data, PLAIN, index) for index in (1, 5)] == [[" yes</s>"], [" five</s>"]]
    assert data.row_numbers.tolist() == [[1.0], [0.0], [1.0]]


def test_every_token_of_a_document_but_the_first_is_learned_and_its_end(tmp_path):
    data = tokenise(write(tmp_path / "a.jsonl", [{"text": "the sum of two"}]), "text", PLAIN, 99)
    ids, mask = data.row(0)
    assert PLAIN.decode(ids) == "the sum of two</s>"
    assert mask.tolist() == [0] + [1] * (len(ids) - 1)


@settings(max_examples=30, deadline=None)
@given(words=st.integers(1, 60), most=st.integers(8, 20))
def test_a_document_that_is_split_loses_no_target_and_learns_none_twice(tmp_path_factory, words, most):
    path = tmp_path_factory.mktemp("split") / "a.jsonl"
    text = " ".join(["the", "sum", "two", "five", "zebra"][index % 5] for index in range(words))
    whole = tokenise(write(path, [{"text": text}]), "text", PLAIN, 10_000)
    data = tokenise(path, "text", PLAIN, most, "split")
    targets = [int(i) for row in range(data.rows) for i, m in zip(*data.row(row), strict=True) if m]
    ids, mask = whole.row(0)
    assert targets == ids[mask == 1].tolist()
    assert all(len(data.row(row)[0]) <= most for row in range(data.rows))
    assert data.statistics["split"]["count"] == (1 if data.rows > 1 else 0)
    assert data.statistics["lost_tokens"] == 0


def test_lines_of_a_text_file_are_documents(tmp_path):
    path = tmp_path / "poem.txt"
    path.write_text("the sum\n\ntwo and three\nis five\n")
    data = tokenise([("poem.txt", path)], "text", PLAIN, 99)
    assert texts(data, PLAIN, 3) == ["the sum</s>", "two and three</s>", "is five</s>"]
    assert data.lines.tolist() == [1, 3, 4]
    paragraphs = tokenise([("poem.txt", path)], "text", PLAIN, 99, reading=Reading(documents="paragraph"))
    assert paragraphs.rows == 2
    assert tokenise([("poem.txt", path)], "text", PLAIN, 99, reading=Reading(documents="file")).rows == 1


def test_tokens_of_somebody_else_are_taken_as_they_are_and_checked_against_the_vocabulary(tmp_path):
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, {"input_ids": [5, 6]}]
    path = write(tmp_path / "a.jsonl", rows)
    data = tokenise(path, "tokens", TOKENIZER, 99)
    assert [data.row(i)[0].tolist() for i in (0, 1)] == [[5, 6, 7, 8], [5, 6]]
    assert [data.row(i)[1].tolist() for i in (0, 1)] == [[0, 0, 1, 1], [0, 1]]
    write(path, [{"input_ids": [5, len(TOKENIZER)]}])
    with pytest.raises(InvalidTrainingFile, match="not in the tokenizer") as caught:
        tokenise(path, "tokens", TOKENIZER, 99)
    assert codes(caught) == [(1, "token_out_of_range")]


def test_segments_are_put_together_with_nothing_between_them(tmp_path):
    pieces = [("<s>the sum is", False), (" five", True), (" and", False), (" six</s>", True)]
    row = {"segments": [{"text": text, "label": label} for text, label in pieces]}
    data = tokenise(write(tmp_path / "a.jsonl", [row]), "segments", PLAIN, 99)
    assert PLAIN.decode(data.row(0)[0]) == "<s>the sum is five and six</s>"
    assert targets_of(data, PLAIN) == [" five", " six</s>"]


def test_a_prompt_is_rendered_up_to_the_answer_and_its_row_is_kept_for_graders(tmp_path):
    meaning = Meaning(rows="prompts")
    row = {"prompt": [{"role": "user", "content": "two and three?"}], "answer": 5}
    data = tokenise(write(tmp_path / "a.jsonl", [row]), "prompts", TOKENIZER, 99, meaning=meaning)
    assert TOKENIZER.decode(data.row(0)[0]) == (
        "<|im_start|>user\ntwo and three?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not data.row(0)[1].any()
    assert data.item(0)["answer"] == 5
    # A conversation with an answer is a prompt too: the answer is for the graders.
    answered = tokenise(
        write(tmp_path / "b.jsonl", [chat("two and three?", "five")]), "chat", TOKENIZER, 99, meaning=meaning
    )
    assert answered.row(0)[0].tolist() == data.row(0)[0].tolist()
    assert answered.item(0)["completion"] == "five"


def test_numbers_and_sets_of_classes_stand_beside_the_rows(tmp_path):
    rows = [{"text": "two", "label": 2.5}, {"text": "three", "label": -1.0}]
    meaning = Meaning("sequence_classification", ("value",), rows="values")
    data = tokenise(write(tmp_path / "a.jsonl", rows), "regression", TOKENIZER, 99, meaning=meaning)
    assert data.row_numbers.tolist() == [[2.5], [-1.0]]
    rows = [{"text": "two", "labels": ["b", "a"]}, {"text": "three", "labels": []}]
    meaning = Meaning("sequence_classification", ("a", "b", "c"), rows="class_sets")
    data = tokenise(write(tmp_path / "b.jsonl", rows), "multi_label", TOKENIZER, 99, meaning=meaning)
    assert data.row_numbers.tolist() == [[1, 1, 0], [0, 0, 0]]


# ---------------------------------------------------------------------------------------- what is learned


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_policies_choose_the_targets(tmp_path, template):
    tokenizer = make_tokenizer(template, eos="<|im_end|>")
    path = write(tmp_path / "a.jsonl", [chat("two?", "yes", "three?", "no", system="the sum")])

    def learned(**reading):
        return targets_of(tokenise(path, "chat", tokenizer, 199, reading=Reading(**reading)), tokenizer)

    assert learned() == ["yes<|im_end|>", "no<|im_end|>"]
    assert learned(train_on="last_assistant") == ["no<|im_end|>"]
    assert learned(eos="last") == ["yes", "no<|im_end|>"]
    assert learned(eos="all") == ["<|im_end|>", "<|im_end|>", "yes<|im_end|>", "<|im_end|>", "no<|im_end|>"]
    (everything,) = learned(train_on="all")
    assert everything.startswith("system\nthe sum<|im_end|>"), "all but the first token"
    apart = tokenise(path, "chat", tokenizer, 199, reading=Reading(turns="apart"))
    assert [targets_of(apart, tokenizer, row) for row in (0, 1)] == [["yes<|im_end|>"], ["no<|im_end|>"]]
    assert (apart.rows, apart.lines.tolist()) == (2, [1, 1])


def test_a_template_that_rewrites_earlier_turns_is_learned_with_turns_apart(tmp_path):
    tokenizer = make_tokenizer(THINKING, eos="<|im_end|>")
    path = write(tmp_path / "a.jsonl", [chat("two?", "yes", "three?", "no")])
    with pytest.raises(InvalidTrainingFile, match="apart"):
        tokenise(path, "chat", tokenizer, 199)
    data = tokenise(path, "chat", tokenizer, 199, reading=Reading(turns="apart"))
    assert [targets_of(data, tokenizer, row) for row in (0, 1)] == [
        ["<think>\n\n</think>\n\nyes<|im_end|>"],
        ["<think>\n\n</think>\n\nno<|im_end|>"],
    ]


def test_reasoning_is_written_inside_think_where_the_template_does_not_know_it(tmp_path):
    row = chat("two?", "yes")
    row["messages"][-1]["reasoning_content"] = "the sum"
    data = tokenise(write(tmp_path / "a.jsonl", [row]), "chat", TOKENIZER, 199)
    assert targets_of(data, TOKENIZER) == ["<think>\nthe sum\n</think>\n\nyes<|im_end|>"]


def test_what_comes_after_the_last_answer_is_left_away_and_counted(tmp_path):
    row = chat("two?", "yes", "thanks")
    data = tokenise(write(tmp_path / "a.jsonl", [row]), "chat", TOKENIZER, 199)
    assert TOKENIZER.decode(data.row(0)[0]).endswith("yes<|im_end|>\n")
    assert data.statistics["trailing_messages"] == {"count": 1, "lines": [1]}


def test_the_second_method_sees_an_untrained_text_among_the_targets(tmp_path):
    """Without it, the system's text, which this template writes behind the answer, would be learned."""
    moved = (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if m.role == 'assistant' %} {{ messages[0].content }}{% endif %}<|im_end|>\n" + FOOT
    )
    tokenizer = make_tokenizer(moved, eos="<|im_end|>")
    path = write(tmp_path / "a.jsonl", [chat("two?", "yes", system="zebra")])
    with pytest.raises(InvalidTrainingFile) as caught:
        tokenise(path, "chat", tokenizer, 199)
    assert codes(caught) == [(1, "masks_disagree")]


def test_texts_that_a_template_changes_are_counted_as_unchecked(tmp_path):
    upper = make_tokenizer(HEAD + "{{ m.content | upper }}<|im_end|>\n" + FOOT, eos="<|im_end|>")
    data = tokenise(write(tmp_path / "a.jsonl", [chat("two?", "yes")]), "chat", upper, 199)
    assert targets_of(data, upper) == ["YES<|im_end|>"]
    assert data.statistics["unchecked_masks"]["count"] == 1
    assert data.statistics["rewritten_content"]["count"] == 1


# ------------------------------------------------------------------------------------- columns and files


def test_columns_are_mapped_and_rows_can_be_looked_up_again(tmp_path):
    rows = [{"question": f"two {n}?", "answer": f" {n}", "id": n} for n in range(5)]
    path = write(tmp_path / "a.jsonl", rows)
    reading = Reading(columns=Columns({"prompt": "question", "completion": "answer"}), limit=3)
    data = tokenise(path, "prompt_completion", PLAIN, 99, reading=reading)
    assert (data.rows, targets_of(data, PLAIN, 2)) == (3, [" 2</s>"])
    assert rows_at([("a.jsonl", path)], reading, data.part(2)) == [
        {"prompt": "two 0?", "completion": " 0"},
        {"prompt": "two 1?", "completion": " 1"},
    ]


def test_several_files_are_one_data_set_and_a_row_says_where_it_is_from(tmp_path):
    one = write(tmp_path / "1.jsonl", [{"prompt": "a", "completion": " b"}] * 2)
    two = tmp_path / "2.csv"
    two.write_text("prompt,completion\nc, d\n")
    both = tokenise([("1.jsonl", one), ("2.csv", two)], "prompt_completion", PLAIN, 99)
    assert (both.rows, both.lines.tolist(), both.row_files.tolist()) == (3, [1, 2, 2], [0, 0, 1])
    assert both.place(2) == "line 2 of 2.csv"
    mixed = concatenated([both, tokenise(one, "prompt_completion", PLAIN, 99)], ["first", "second"])
    assert texts(mixed, PLAIN, 5) == ["a b</s>", "a b</s>", "c d</s>", "a b</s>", "a b</s>"]
    assert [mixed.place(row) for row in (2, 3)] == ["line 2 of first/2.csv", "line 1 of second"]
    assert mixed.statistics["rows"] == 5


@pytest.mark.parametrize("rows", ["pairs", "unpaired", "prompts", "values"])
def test_what_is_saved_is_a_safetensors_file_and_comes_back(tmp_path, rows):
    made = {
        "pairs": ("preference", {"prompt": "a", "chosen": " b", "rejected": " c"}, Meaning(rows="pairs")),
        "unpaired": (
            "unpaired",
            {"prompt": "a", "completion": " b", "label": True},
            Meaning(rows="unpaired"),
        ),
        "prompts": ("prompts", {"prompt": "a b", "x": 1}, Meaning(rows="prompts")),
        "values": (
            "regression",
            {"text": "a", "label": 0.5},
            Meaning("sequence_classification", ("value",), rows="values"),
        ),
    }
    format, row, meaning = made[rows]
    data = tokenise(write(tmp_path / "a.jsonl", [row] * 3), format, PLAIN, 99, meaning=meaning)
    data.save(tmp_path / "a.safetensors")
    again = Tokenised.load(tmp_path / "a.safetensors")
    theirs = load_file(tmp_path / "a.safetensors")
    assert (again.sequences, again.statistics) == (data.sequences, data.statistics)
    for name, values in theirs.items():
        assert np.array_equal(getattr(again, name), values)
        assert np.array_equal(getattr(data, name), values)
    part = again.part(2)
    assert (part.rows, part.sequences) == (2, data.sequences)
    assert np.array_equal(part.row(1)[0], data.row(1)[0])


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    """A row of these has 155 tokens, 775 bytes of ids and masks: they are in files, and of a row some numbers
    remain in memory, such as where it begins."""
    monkeypatch.setattr(tokenise_module, "BATCH_CHARACTERS", 10_000)
    monkeypatch.setattr(tokenise_module, "COPY_BYTES", 20_000)
    monkeypatch.setattr(tokenised_module, "COPY_BYTES", 20_000)
    monkeypatch.setattr(compression, "CHUNK_BYTES", 20_000)
    line = json.dumps({"text": "the sum of two and three is five, zebra " * 10}) + "\n"

    def peak(rows: int) -> int:
        path = tmp_path / f"{rows}.jsonl"
        path.write_text(line * rows)
        tracemalloc.start()
        tokenise(path, "text", PLAIN, 512).save(tmp_path / "out.safetensors")
        made = Tokenised.load(tmp_path / "out.safetensors")
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert made.rows == rows
        assert made.input_ids.nbytes > 600 * rows
        return found

    peak(100)
    assert (peak(1000) - peak(250)) / 750 < 400
