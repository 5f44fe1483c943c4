"""Tokenising: exactly the answer and its end token are targets, for real templates, or it is an error.

The oracle everywhere: decoding the target tokens gives the text that should be learned, and the ids are those
that transformers' own `apply_chat_template` gives.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_service.errors import InvalidRequest, InvalidTrainingFile
from peft_service.tokenise import digest_of, tokenise
from peft_service.tokenised import Tokenised

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not beside the repository")

# Jinja as transformers runs it swallows the line feed after a block tag, so the templates write FEED.
FEED = "{{ '\n' }}"
HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
FOOT = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = HEAD + "{{ m.content }}<|im_end|>\n" + FOOT
MARKED = (
    HEAD
    + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    + "{% else %}{{ m.content }}<|im_end|>{% endif %}"
    + FEED
    + FOOT
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>tools\n{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>"
    + FEED
    + "{% endif %}"
    + HEAD
    + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% for call in m.tool_calls %}"
    + FEED
    + "<tool_call>{{ call.function.name }} {{ call.function.arguments | tojson }}</tool_call>"
    + "{% endfor %}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
    + FEED
    + FOOT
)
NO_RESULTS = TOOLS.replace(HEAD, "{% for m in messages if m.role != 'tool' %}<|im_start|>{{ m.role }}\n")
THINKING = (  # as Qwen3: the last answer has a think block, earlier ones lose theirs
    HEAD
    + "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
    + "<|im_end|>\n"
    + FOOT
)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


@cache
def make_tokenizer(
    template: str | None, *, trim: bool = True, bos: bool = False, eos: str | None = "</s>"
) -> Any:
    """A small byte-level BPE as Llama 3, Qwen and GPT-2 have; `trim` blanks from offsets as theirs do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the sum of two and three is five\n\n\n", "what is the answer? yes  no"] * 9, trainer
    )
    steps: list[Any] = [processors.ByteLevel(trim_offsets=trim)]
    if bos:
        steps.append(processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]))
    tokenizer.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, chat_template=template
    )


TOKENIZERS = {
    "chatml": make_tokenizer(CHATML, eos="<|im_end|>"),
    "marked": make_tokenizer(MARKED, eos="<|im_end|>"),
    "marked untrimmed": make_tokenizer(MARKED, trim=False),
    "tools": make_tokenizer(TOOLS),
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat(*contents: str, system: str | None = None) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    messages += [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return {"messages": messages}


def targets_of(tokenised: Tokenised, tokenizer: Any, index: int = 0) -> list[str]:
    """The decoded text of every run of targets in a row."""
    ids, mask = tokenised.row(index)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    return [tokenizer.decode(ids[a:b]) for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(
    turns=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12), min_size=2, max_size=6
    )
)
def test_the_targets_are_every_answer_with_its_end_token(tmp_path_factory, name, turns):
    tokenizer = TOKENIZERS[name]
    turns = turns[: len(turns) // 2 * 2]
    turns[1::2] = [answer if answer.strip() else "ok" for answer in turns[1::2]]
    path = write(tmp_path_factory.getbasetemp() / f"{name}.jsonl", [chat(*turns, system="Be kind.")])
    tokenised = tokenise(path, "chat", tokenizer, 4096)
    whole = tokenizer.apply_chat_template(chat(*turns, system="Be kind.")["messages"], return_dict=False)
    assert tokenised.row(0)[0].tolist() == whole
    merged = tokenised.statistics["merged_boundaries"]["count"]
    said = targets_of(tokenised, tokenizer)
    if not merged:  # blanks at the start of an answer may share a token with the line feed before it
        assert said == [answer + "<|im_end|>" for answer in turns[1::2]]
    assert [text.lstrip("\n ") for text in said] == [
        (answer + "<|im_end|>").lstrip("\n ") for answer in turns[1::2]
    ]


def test_both_ways_to_find_the_targets_give_the_same_and_blanks_follow_the_template(tmp_path):
    path = write(tmp_path / "a.jsonl", [chat("hi", "hello", "and?", "bye")])
    fed = MARKED.replace("{% endgeneration %}", FEED + "{% endgeneration %}")
    fed = fed.replace("{% endif %}" + FEED, FEED + "{% endif %}")
    made = {}
    for name, template in (("plain", CHATML), ("marked", MARKED), ("fed", fed)):
        tokenizer = make_tokenizer(template)
        made[name] = tokenise(path, "chat", tokenizer, 100)
        made[name + " said"] = targets_of(made[name], tokenizer)
    np.testing.assert_array_equal(made["plain"].target_mask, made["marked"].target_mask)
    assert made["plain said"] == made["marked said"] == ["hello<|im_end|>", "bye<|im_end|>"]
    assert made["fed said"] == ["hello<|im_end|>\n", "bye<|im_end|>\n"]
    assert made["plain"].statistics["targets_found_by"] == "prefixes and placeholders"
    assert made["marked"].statistics["targets_found_by"] == "prefixes and {% generation %}"


@pytest.mark.parametrize(
    "template",
    [
        MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"),
        MARKED.replace("{% generation %}{{ m.content }}", "{{ m.content }}{% generation %}"),
        "{% generation %}<|im_start|>{% endgeneration %}" + MARKED,
        MARKED.replace(
            "{% else %}{{ m.content }}", "{% else %}{% generation %}{{ m.content }}{% endgeneration %}"
        ),
    ],
    ids=["no end token", "no content", "more", "the user too"],
)
def test_a_template_that_marks_something_else_is_an_error(tmp_path, template):
    path = write(tmp_path / "a.jsonl", [chat("hi", "hello")])
    with pytest.raises(InvalidTrainingFile, match="generation") as caught:
        tokenise(path, "chat", make_tokenizer(template), 100)
    assert [error["code"] for error in caught.value.details["errors"]] == ["masks_disagree"]


def test_llama2s_template_is_trained_from_the_space_to_the_eos(tmp_path):
    tokenizer = make_tokenizer(LLAMA2)
    path = write(tmp_path / "a.jsonl", [chat("hi", "hello", "and?", "bye")])
    tokenised = tokenise(path, "chat", tokenizer, 100)
    assert targets_of(tokenised, tokenizer) == [" hello </s>", " bye </s>"]
    assert tokenised.row(0)[0][0] == tokenizer.bos_token_id
    assert tokenised.statistics["eos_appended"]["count"] == 0


def test_what_a_template_refuses_is_reported_by_line(tmp_path):
    rows = [
        chat("hi", "hello"),
        chat("hi", "hello", system="x"),
        chat("hi", "hello"),
        chat("a", "b", system="y"),
    ]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(InvalidTrainingFile) as caught:
        tokenise(path, "chat", make_tokenizer(LLAMA2), 100)
    errors = caught.value.details["errors"]
    assert [(error["line"], error["code"]) for error in errors] == [
        (2, "template_error"),
        (4, "template_error"),
    ]
    assert "Only user and assistant roles are supported" in errors[0]["message"]
    assert caught.value.details["error_count"] == 2


def test_a_template_that_rewrites_earlier_answers_is_an_error_with_a_way_out(tmp_path):
    tokenizer = make_tokenizer(THINKING)
    row = chat("hi", "hello", "and?", "bye")
    path = write(tmp_path / "a.jsonl", [chat("hi", "hello"), row])
    with pytest.raises(InvalidTrainingFile) as caught:
        tokenise(path, "chat", tokenizer, 100)
    (error,) = caught.value.details["errors"]
    assert (error["line"], error["path"], error["code"]) == (2, "messages[1]", "not_a_prefix")
    assert '"weight": 0' in error["hint"]

    row["messages"][1]["weight"] = 0  # the way out that the hint names
    tokenised = tokenise(write(path, [row]), "chat", tokenizer, 100)
    assert targets_of(tokenised, tokenizer) == ["<think>\n\n</think>\n\nbye<|im_end|>"]


def test_messages_of_weight_0_are_read_but_not_trained(tmp_path):
    row = chat("hi", "hello", "and?", "bye", "so?", "end")
    row["messages"][3]["weight"] = 0
    path = write(tmp_path / "a.jsonl", [row])
    for name in ("chatml", "marked"):
        tokenised = tokenise(path, "chat", TOKENIZERS[name], 100)
        assert targets_of(tokenised, TOKENIZERS[name]) == ["hello<|im_end|>", "end<|im_end|>"]


def test_a_conversation_may_begin_with_the_assistant(tmp_path):
    row = {"messages": [{"role": "assistant", "content": "Welcome!"}, *chat("hi", "hello")["messages"]]}
    path = write(tmp_path / "a.jsonl", [row])
    for name in ("chatml", "marked"):
        said = targets_of(tokenise(path, "chat", TOKENIZERS[name], 100), TOKENIZERS[name])
        assert said == ["Welcome!<|im_end|>", "hello<|im_end|>"]


CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": "ü"}'}}
TOOL_ROW = {
    "messages": [
        {"role": "developer", "content": "Be exact."},
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "two", "tool_call_id": "c1"},
        {"role": "assistant", "content": "It is 2."},
    ],
    "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
}


def test_tool_calls_are_trained_and_tool_results_are_not(tmp_path):
    tokenizer = TOKENIZERS["tools"]
    tokenised = tokenise(write(tmp_path / "a.jsonl", [TOOL_ROW]), "chat", tokenizer, 1000)
    assert targets_of(tokenised, tokenizer) == [
        '\n<tool_call>add {"a": 1, "b": "ü"}</tool_call><|im_end|>',
        "It is 2.<|im_end|>",
    ]
    whole = tokenizer.decode(tokenised.row(0)[0])
    assert whole.startswith('<|im_start|>tools\n{"type": "function"')
    assert "<|im_start|>system\nBe exact.<|im_end|>" in whole


@pytest.mark.parametrize(
    ("template", "change", "code"),
    [
        (CHATML, {}, "template_drops_tools"),
        (CHATML, {"tools": None}, "template_drops_tools"),
        (NO_RESULTS, {}, "template_drops_message"),
    ],
    ids=["tools", "calls", "results"],
)
def test_what_a_template_would_leave_out_in_silence_is_an_error(tmp_path, template, change, code):
    path = write(tmp_path / "a.jsonl", [{**TOOL_ROW, **change}])
    with pytest.raises(InvalidTrainingFile) as caught:
        tokenise(path, "chat", make_tokenizer(template), 1000)
    assert [error["code"] for error in caught.value.details["errors"]] == [code]


def test_without_a_template_a_conversation_is_refused_and_never_given_chatml(tmp_path):
    tokenizer = make_tokenizer(None)
    with pytest.raises(InvalidTrainingFile, match="has no chat template"):
        tokenise(write(tmp_path / "a.jsonl", [chat("hi", "hello")]), "chat", tokenizer, 100)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("prompt", ["two and", "two and\n", "what? ", "", "ü🙂"])
@pytest.mark.parametrize("completion", [" three", "three\n", "🙂 five  ", "five</s>"])
def test_plain_text_has_the_ids_of_the_whole_text_and_an_eos(tmp_path, bos, prompt, completion):
    tokenizer = make_tokenizer(CHATML, bos=bos)
    path = write(tmp_path / "a.jsonl", [{"prompt": prompt, "completion": completion}])
    tokenised = tokenise(path, "prompt_completion", tokenizer, 100)
    ids, mask = tokenised.row(0)
    text = (prompt + completion).removesuffix("</s>")
    assert ids.tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert (ids[0] == tokenizer.bos_token_id) == bos
    assert mask[-1] == 1
    assert mask[0] == 0
    said = tokenizer.decode(ids[mask == 1])
    wanted = completion.removesuffix("</s>") + "</s>"
    if prompt or bos:
        # "what? " + "three" is "what" "?" " three" in tokens: the space comes with its word.
        merged = prompt.endswith(" ") and not completion.startswith((" ", "🙂"))
        assert said == (" " if merged else "") + wanted
        assert tokenised.statistics["merged_boundaries"]["count"] == int(merged)
    else:
        assert mask.tolist() == [0] + [1] * (len(ids) - 1)  # nothing stands before the first token


def test_plain_text_that_no_eos_could_end_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(InvalidTrainingFile, match="no EOS token"):
        tokenise(path, "prompt_completion", make_tokenizer(None, eos=None), 100)


def test_a_template_without_an_end_token_gets_the_eos_so_that_the_model_learns_to_stop(tmp_path):
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    tokenised = tokenise(
        write(tmp_path / "a.jsonl", [chat("hi", "hello", "so", "end")]), "chat", tokenizer, 100
    )
    assert targets_of(tokenised, tokenizer) == [" hello\n", " end\n</s>"]
    assert tokenised.statistics["eos_appended"] == {"count": 1, "lines": [1]}


def test_message_lists_of_prompt_and_completion_train_the_completion_only(tmp_path):
    messages = chat("hi", "hello", "and?", "bye")["messages"]
    path = write(tmp_path / "a.jsonl", [{"prompt": messages[:3], "completion": messages[3:]}])
    for name in ("chatml", "marked"):
        tokenised = tokenise(path, "prompt_completion", TOKENIZERS[name], 100)
        assert targets_of(tokenised, TOKENIZERS[name]) == ["bye<|im_end|>"]


def test_an_instruction_is_a_conversation_with_a_template_and_alpacas_text_without(tmp_path):
    row = {"instruction": "Add.", "input": "2 2", "output": "4", "history": [["Hi", "Hello"]]}
    path = write(tmp_path / "a.jsonl", [row])
    tokenised = tokenise(path, "instruction", TOKENIZERS["marked"], 200)
    assert targets_of(tokenised, TOKENIZERS["marked"]) == ["Hello<|im_end|>", "4<|im_end|>"]
    plain = make_tokenizer(None)
    tokenised = tokenise(path, "instruction", plain, 200)
    assert targets_of(tokenised, plain) == ["4</s>"]
    assert plain.decode(tokenised.row(0)[0]).endswith("### Input:\n2 2\n\n### Response:\n4</s>")


def test_rows_that_are_too_long_are_refused_dropped_or_cut_and_always_counted(tmp_path):
    rows = [chat("hi", "hello"), chat("why? " * 5, "so " * 30), chat("hi", "hello")]
    path, tokenizer = write(tmp_path / "a.jsonl", rows), TOKENIZERS["marked"]
    whole = tokenise(path, "chat", tokenizer, 1000)
    lengths = np.diff(whole.offsets).tolist()
    most = lengths[1] - 7
    with pytest.raises(
        InvalidTrainingFile, match=f"The row has {lengths[1]} tokens; max_seq_len is {most}"
    ) as caught:
        tokenise(path, "chat", tokenizer, most)
    assert [error["line"] for error in caught.value.details["errors"]] == [2]

    dropped = tokenise(path, "chat", tokenizer, most, "drop")
    assert dropped.lines.tolist() == [1, 3]
    assert dropped.statistics["dropped"] == {"count": 1, "lines": [2]}
    assert dropped.statistics["lost_tokens"] == lengths[1]
    for policy, kept in (("right", slice(0, most)), ("left", slice(7, None))):
        cut = tokenise(path, "chat", tokenizer, most, policy)
        np.testing.assert_array_equal(cut.row(1)[0], whole.row(1)[0][kept])
        np.testing.assert_array_equal(cut.row(1)[1], whole.row(1)[1][kept])
        np.testing.assert_array_equal(cut.row(2)[0], whole.row(2)[0])
        assert cut.statistics["truncated"] == {"count": 1, "lines": [2]}
        assert cut.statistics["lost_tokens"] == 7
        assert cut.statistics["length"]["max"] == most


def test_a_row_that_loses_all_its_targets_is_an_error_not_a_silent_nothing(tmp_path):
    rows = [chat("hi", "hello"), chat("why? " * 40, "so"), chat("why? " * 40, "so")]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(InvalidTrainingFile, match="removes all its") as caught:
        tokenise(path, "chat", TOKENIZERS["marked"], 40, "right")
    assert [(e["line"], e["code"]) for e in caught.value.details["errors"]] == [
        (2, "no_targets"),
        (3, "no_targets"),
    ]
    with pytest.raises(InvalidTrainingFile, match="all 2 are longer than 40 tokens"):
        tokenise(write(path, rows[1:]), "chat", TOKENIZERS["marked"], 40, "drop")


def test_saved_and_loaded_it_is_the_same(tmp_path):
    path = write(tmp_path / "a.jsonl", [chat("hi", "hello"), chat("a", "b")])
    made = tokenise(path, "chat", TOKENIZERS["marked"], 100)
    made.save(tmp_path / "a.safetensors")
    loaded = Tokenised.load(tmp_path / "a.safetensors")
    for name, kind in (
        ("input_ids", np.int32),
        ("target_mask", np.uint8),
        ("offsets", np.int64),
        ("lines", np.int64),
    ):
        assert getattr(loaded, name).dtype == kind
        np.testing.assert_array_equal(getattr(loaded, name), getattr(made, name))
    assert loaded.statistics == made.statistics
    assert (loaded.rows, loaded.target_tokens) == (2, made.statistics["target_tokens"])


def test_the_digest_names_everything_that_the_result_depends_on_and_nothing_else():
    given = ("ab" * 32, TOKENIZERS["marked"], "chat", 128, "error")
    digest = digest_of(*given)
    again = make_tokenizer.__wrapped__(MARKED, eos="<|im_end|>")
    assert again is not given[1]
    TOKENIZERS["marked"](["a", "b c"], padding=False, truncation=True, max_length=2)
    assert digest_of(*given) == digest == digest_of(given[0], again, *given[2:])
    others = [
        ("cd" * 32, *given[1:]),
        (given[0], TOKENIZERS["chatml"], *given[2:]),
        (given[0], make_tokenizer(MARKED), *given[2:]),
        (*given[:2], "instruction", 128, "error"),
        (*given[:3], 129, "error"),
        (*given[:4], "drop"),
    ]
    assert len({digest, *(digest_of(*other) for other in others)}) == 7


def test_a_tokenizer_without_offsets_is_refused():
    with pytest.raises(InvalidRequest, match=r"tokenizer\.json"):
        tokenise(Path("none"), "chat", object(), 100)


def test_a_file_that_nobody_validated_gives_the_same_report(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"messages": []}\n{"prompt"\n\n\xff\n')
    with pytest.raises(InvalidTrainingFile) as caught:
        tokenise(path, "chat", TOKENIZERS["marked"], 100)
    assert [(error["line"], error["code"]) for error in caught.value.details["errors"]] == [
        (1, "empty_messages"),
        (2, "not_json"),
        (3, "blank_line"),
        (4, "not_utf8"),
    ]


def gpt2(template: str | None) -> Any:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    folder = SHARED / "tokenizer-gpt2"
    backend = ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend._tokenizer,
        eos_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=template,
    )


@needs_shared
def test_gsm8k_turned_into_conversations_trains_its_answers(tmp_path):
    pairs = [json.loads(line) for line in (SHARED / "gsm8k" / "train.jsonl").read_text().splitlines()[:150]]
    path = write(tmp_path / "a.jsonl", [chat(pair["question"], pair["answer"]) for pair in pairs])
    for template in (CHATML, MARKED):
        tokenizer = gpt2(template)
        tokenised = tokenise(path, "chat", tokenizer, 1024)
        assert tokenised.rows == 150
        for index, pair in enumerate(pairs):
            assert targets_of(tokenised, tokenizer, index) == [pair["answer"] + "<|im_end|>"]


@needs_shared
def test_self_instructs_tasks_train_their_outputs(tmp_path):
    tasks = [
        json.loads(line) for line in (SHARED / "self-instruct" / "seed_tasks.jsonl").read_text().splitlines()
    ]
    rows = [{"instruction": task["instruction"], **task["instances"][0]} for task in tasks]
    path = write(tmp_path / "a.jsonl", rows)
    for template, end in ((MARKED, "<|im_end|>"), (None, "<|endoftext|>")):
        tokenizer = gpt2(template)
        tokenised = tokenise(path, "instruction", tokenizer, 4096)
        merged = set(tokenised.statistics["merged_boundaries"]["lines"])
        assert len(merged) < 5
        for index, row in enumerate(rows):
            said = "".join(targets_of(tokenised, tokenizer, index))
            assert said.endswith(row["output"] + end)
            assert said == row["output"] + end or index + 1 in merged


@needs_shared
def test_real_tool_conversations_train_what_the_assistant_says(tmp_path):
    tools = json.loads((SHARED / "tau-bench" / "airline_tools.json").read_text())
    rows = []
    for line in (SHARED / "tau-bench" / "airline_trajectories.jsonl").read_text().splitlines()[:8]:
        messages = json.loads(line)["messages"]
        while messages[-1]["role"] != "assistant":
            messages.pop()
        rows.append({"messages": messages, "tools": tools})
    tokenizer = gpt2(TOOLS)
    tokenised = tokenise(write(tmp_path / "a.jsonl", rows), "chat", tokenizer, 32_768)
    for index, row in enumerate(rows):
        said = targets_of(tokenised, tokenizer, index)
        answers = [message for message in row["messages"] if message["role"] == "assistant"]
        assert len(said) == len(answers)
        for text, message in zip(said, answers, strict=True):
            assert text.startswith(message["content"] or "\n<tool_call>")
            assert all(call["function"]["name"] in text for call in message.get("tool_calls") or ())
            assert text.endswith("<|im_end|>")
