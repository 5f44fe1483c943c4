"""The base model in the package is what its card says, and the demo's rows are what the demo needs."""

import importlib.util
import json
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs import demo_data
from peft_service import shipped

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " leading and trailing space \n"},
    {"role": "assistant", "content": "\n so has this one  "},
    {
        "role": "user",
        "content": [{"type": "text", "text": "Wie spät ist "}, {"type": "text", "text": "es? 🕒"}],
    },
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "CET"}'}},
            {"id": "2", "type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}},
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "19:30"},
    {"role": "tool", "tool_call_id": "2", "content": "18:30"},
    {"role": "assistant", "content": "19:30"},
]
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(shipped.path())


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(shipped.path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def pretrain() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pretrain", ROOT / "tools" / "pretrain.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_files_fit_in_16_megabytes_and_hold_no_code() -> None:
    files = [file for file in shipped.path().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 16_000_000
    assert {file.suffix for file in files} <= {".json", ".jinja", ".safetensors", ".md", ".txt"}
    assert shipped.uri() == f"file://{shipped.path()}"


def test_it_loads_in_another_process_without_this_package_and_knows_its_size() -> None:
    program = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], local_files_only=True)\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], local_files_only=True)\n"
        "assert type(model).__name__ == 'LlamaForCausalLM' and len(tokenizer) == model.config.vocab_size\n"
        "assert not any(name.startswith('peft_service') for name in sys.modules)\n"
        "print(sum(p.numel() for p in model.parameters()), model.dtype)"
    )
    command = [sys.executable, "-I", "-c", program, str(shipped.path())]
    count, dtype = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    config = json.loads((shipped.path() / "config.json").read_text())
    h, m, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    kv = h * config["num_key_value_heads"] // config["num_attention_heads"]
    assert int(count) == config["vocab_size"] * h + layers * (2 * h * h + 2 * h * kv + 3 * h * m + 2 * h) + h
    assert dtype == "torch.bfloat16"
    assert f"{int(count):,} parameters" in card()


def test_every_weight_is_finite() -> None:
    with safe_open(shipped.path() / "model.safetensors", "pt") as weights:
        assert all(torch.isfinite(weights.get_tensor(name)).all() for name in weights.keys())  # noqa: SIM118


def test_any_text_survives_the_tokenizer(tokenizer: Any) -> None:
    for text in ("  two  spaces\t\n\n", "čeština 日本語 🤖", "0123456789", "\x00\x7f", '{"a": [1, 2.5]}'):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert len(tokenizer("48213", add_special_tokens=False)["input_ids"]) == 5  # digits stay single
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token != tokenizer.eos_token


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_the_chat_template_is_prefix_stable_in_tokens(tokenizer: Any, tools: Any) -> None:
    def ids(messages: list[dict[str, Any]], prompt: bool = False) -> list[int]:
        encoded = tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=prompt, return_dict=True
        )
        return list(encoded["input_ids"])

    whole = ids(CHAT)
    for count in range(1, len(CHAT) + 1):
        part = ids(CHAT[:count])
        assert whole[: len(part)] == part
        if count < len(CHAT) and CHAT[count]["role"] == "assistant":
            asked = ids(CHAT[:count], prompt=True)
            assert whole[: len(asked)] == asked
            assert len(asked) > len(part)


def test_the_generation_mask_is_each_assistant_turn_with_its_end(tokenizer: Any) -> None:
    encoded = tokenizer.apply_chat_template(
        CHAT, tools=TOOLS, return_dict=True, return_assistant_tokens_mask=True
    )
    spans: list[list[int]] = []
    previous = 0
    for token, trained in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
        if trained:
            spans = spans if previous else [*spans, []]
            spans[-1].append(token)
        previous = trained
    calls = "".join(
        f'<tool_call>{{"name": "clock", "arguments": {{"zone": "{zone}"}}}}</tool_call>'
        for zone in ("CET", "UTC")
    )
    said = ["\n so has this one  ", calls, "19:30"]
    assert [tokenizer.decode(span) for span in spans] == [text + "<|im_end|>" for text in said]


def test_the_chat_template_refuses_what_it_cannot_say(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="found critic"):
        tokenizer.apply_chat_template([{"role": "critic", "content": "no"}])
    with pytest.raises(Exception, match="image_url"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "image_url"}]}])


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data, the text the model was pretrained on")
def test_it_predicts_text_it_has_not_seen_far_better_than_word_counts_do(
    model: Any, tokenizer: Any, pretrain: ModuleType
) -> None:
    found = pretrain.documents(DATA)
    for source in ("gsm8k", "tinyshakespeare"):
        seen, unseen = (
            tokenizer([pretrain.render(row, tokenizer) for row in found[source][side][:200]])["input_ids"]
            for side in ("train", "held_out")
        )
        # The oracle: how often each token occurs in this very source, add-one smoothed.
        counts = Counter(token for row in seen for token in row)
        total = sum(counts.values()) + model.config.vocab_size
        stream = [token for row in unseen for token in row][: 16 * 256 + 1]
        unigram = -sum(math.log((counts[token] + 1) / total) for token in stream[1:]) / (len(stream) - 1)
        loss = pretrain.loss_of(model, torch.tensor(stream).numpy())
        print(f"{source}: {loss:.3f} nats per token, counting words {unigram:.3f}")  # noqa: T201
        assert loss < unigram - 1.0


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data, the text the model was pretrained on")
def test_no_held_out_document_is_trained_on(pretrain: ModuleType) -> None:
    for source, rows in pretrain.documents(DATA).items():
        seen = {json.dumps(row) for row in rows["train"]}
        assert rows["held_out"], source
        assert not seen & {json.dumps(row) for row in rows["held_out"]}, source


def test_the_card_names_every_source_its_licence_and_the_losses(pretrain: ModuleType) -> None:
    text = card()
    for source in [*pretrain.SOURCES, "exercises"]:
        assert source in text
    for licence in ("public domain", "MIT", "Apache-2.0"):
        assert licence in text
    for notice in ("Copyright (c) 2021 OpenAI", "Copyright (c) 2024 Sierra"):  # MIT asks for these lines
        assert notice in text
    record = json.loads((shipped.path() / "training.json").read_text())
    for source, loss in record["curve"][-1]["held_out"].items():
        assert re.search(rf"\| {source} \|.*\b{loss:.2f}\b", text), source


def test_the_demo_rows_are_deterministic_and_training_never_sees_validation() -> None:
    training, validation = demo_data.training_rows(), demo_data.validation_rows()
    assert training == demo_data.training_rows() != demo_data.training_rows(1)
    asked = [row["messages"][0]["content"] for row in training]
    unseen = [row["messages"][0]["content"] for row in validation] + [
        prompt for prompt, _ in demo_data.PROMPTS
    ]
    assert len(set(asked)) == len(asked)
    assert len(set(unseen)) == len(unseen)
    assert not set(asked) & set(unseen)
    calls = [json.loads(row["messages"][1]["content"]) for row in training]
    answers = [row["messages"][1]["content"] for row in validation] + [
        answer for _, answer in demo_data.PROMPTS
    ]
    for slot in demo_data.HELD_OUT:
        assert not {call.get(slot) for call in calls} & {
            json.loads(answer).get(slot, "") for answer in answers
        }


def test_every_demo_answer_is_one_line_of_json_that_the_request_determines() -> None:
    rows = demo_data.training_rows() + demo_data.validation_rows()
    pairs = [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows]
    for request, answer in pairs + demo_data.PROMPTS:
        call = json.loads(answer)
        assert json.dumps(call) == answer
        assert call["tool"] in demo_data.ASKS
        assert [key for key in call if key != "tool"] == demo_data.SLOTS[call["tool"]]
        assert all(str(value) in request for key, value in call.items() if key != "tool")


def card() -> str:
    return (shipped.path() / "README.md").read_text()
