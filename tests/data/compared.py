"""Rows, files and tokenizers that other tools' reading is compared on, and how a reading is written down.

Imports nothing of peft_service: tools/golden_tokens.py uses it in the environments of those tools.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
SHIPPED = ROOT / "peft_service" / "shipped" / "tiny-llama-3m"
GOLDEN = ROOT / "tests" / "golden" / "trained-tokens.json"
LISTED = 20

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "departures",
            "description": "Trains that leave a station next.",
            "parameters": {
                "type": "object",
                "properties": {"station": {"type": "string"}, "count": {"type": "integer"}},
                "required": ["station"],
            },
        },
    }
]
_ASKED = {"role": "user", "content": "When does the next train leave Brünn?"}
_CALLED = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "call00001",
            "type": "function",
            "function": {"name": "departures", "arguments": {"station": "Brünn", "count": 1}},
        }
    ],
}
_TOLD = {"role": "tool", "name": "departures", "tool_call_id": "call00001", "content": '["14:05 Wien"]'}
_SAID = {"role": "assistant", "content": "At 14:05, to Wien."}


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


TRL_ROWS: dict[str, list[dict[str, Any]]] = {
    "language-modeling-text": [
        {"text": "Rivers carry more sand in spring."},
        {"text": "  An indented line,\nand another. "},
    ],
    "language-modeling-messages": [
        {"messages": [_user("Name a prime above 90."), _answer("97")]},
        {
            "messages": [
                {"role": "system", "content": "Answer in one word."},
                _user("Capital of Peru?"),
                _answer("Lima"),
                _user("And of Kenya?"),
                _answer("Nairobi"),
            ]
        },
        {"messages": [_user("Write a list."), _answer("- one\n- two\n"), _user("Thanks! "), _answer(" 🙂")]},
    ],
    "prompt-only-text": [{"prompt": "The colour of a ripe lemon is"}, {"prompt": "3 + 4 ="}],
    "prompt-only-messages": [
        {"prompt": [_user("Name a prime above 90.")]},
        {"prompt": [{"role": "system", "content": "Be brief."}, _user("Why is the sky blue?")]},
    ],
    "prompt-completion-text": [
        {"prompt": "The colour of a ripe lemon is", "completion": " yellow."},
        {"prompt": "3 + 4 =", "completion": " 7"},
        {"prompt": "Q: one more?\nA:", "completion": "\nno"},
    ],
    "prompt-completion-messages": [
        {"prompt": [_user("Name a prime above 90.")], "completion": [_answer("97")]},
        {
            "prompt": [
                {"role": "system", "content": "Be brief."},
                _user("Capital of Peru?"),
                _answer("Lima"),
                _user("And of Kenya?"),
            ],
            "completion": [_answer("Nairobi")],
        },
    ],
    "tool-calling-messages": [{"messages": [_ASKED, _CALLED, _TOLD, _SAID], "tools": TOOLS}],
    "tool-calling-prompt-completion": [
        {"prompt": [_ASKED], "completion": [_CALLED], "tools": TOOLS},
        {"prompt": [_ASKED, _CALLED, _TOLD], "completion": [_SAID], "tools": TOOLS},
    ],
    "preference-explicit-text": [
        {"prompt": "The colour of a ripe lemon is", "chosen": " yellow.", "rejected": " loud."},
        {"prompt": "3 + 4 =", "chosen": " 7", "rejected": " seventy"},
    ],
    "preference-explicit-messages": [
        {
            "prompt": [_user("Name a prime above 90.")],
            "chosen": [_answer("97")],
            "rejected": [_answer("91, I think.")],
        },
    ],
    "preference-implicit-text": [
        {
            "chosen": "The colour of a ripe lemon is yellow.",
            "rejected": "The colour of a ripe lemon is loud.",
        },
        {"chosen": "3 + 4 = 7", "rejected": "3 + 4 = 70"},
    ],
    "preference-implicit-messages": [
        {
            "chosen": [_user("Name a prime above 90."), _answer("97")],
            "rejected": [_user("Name a prime above 90."), _answer("91, I think.")],
        },
    ],
    "preference-tools": [
        {"prompt": [_ASKED], "chosen": [_CALLED], "rejected": [_answer("I do not know.")], "tools": TOOLS}
    ],
    "unpaired-text": [
        {"prompt": "The colour of a ripe lemon is", "completion": " yellow.", "label": True},
        {"prompt": "3 + 4 =", "completion": " seventy", "label": False},
    ],
    "unpaired-messages": [
        {"prompt": [_user("Name a prime above 90.")], "completion": [_answer("97")], "label": True},
        {"prompt": [_user("Capital of Peru?")], "completion": [_answer("Quito")], "label": False},
    ],
}
"""Rows of every type that TRL documents, standard and conversational, but for stepwise supervision: TRL 1.16
has no trainer for it."""

PLAIN_ROWS = 500
"""So many of gsm8k and of banking77: their rows are all alike."""
ANSWERED = {"gsm8k/train.jsonl": ("question", "answer"), "banking77/train.csv": ("text", "category")}
"""Files of a question and an answer -> their columns."""
TRAJECTORIES, TRAJECTORY_TOOLS = "tau-bench/airline_trajectories.jsonl", "tau-bench/airline_tools.json"


def gpt2() -> Any:
    """GPT-2's tokenizer with two tokens more, for ChatML; the end of a turn is the end of the text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    folder = SHARED / "tokenizer-gpt2"
    made = PreTrainedTokenizerFast(
        tokenizer_object=ByteLevelBPETokenizer(
            str(folder / "vocab.json"), str(folder / "merges.txt")
        )._tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    made.chat_template = (ROOT / "peft_service" / "templates" / "chatml.jinja").read_text()
    return made


def shipped() -> Any:
    """The shipped base's tokenizer and template, which knows tools."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(SHIPPED)


TOKENIZERS = {"shipped": shipped, "gpt2": gpt2}

Tokens = tuple[Sequence[int], Sequence[bool]]
"""Token ids, and whether each is learned. The first token is predicted from nothing, so it never is, and no
tool's loss looks at it, whatever its labels say."""


def row_digest(ids: Sequence[int], mask: Sequence[bool]) -> str:
    """Four hex digits of a row: enough to see which row differs."""
    mask = [False, *map(bool, mask[1:])]
    said = json.dumps([list(map(int, ids)), mask]).encode()
    return hashlib.sha256(said).hexdigest()[:4]


def reading(sequences: Iterable[Tokens]) -> dict[str, Any]:
    """What is written down of a reading: counts and hashes, never text."""
    whole = hashlib.sha256()
    counts, digests = [], []
    for ids, mask in sequences:
        mask = [False, *map(bool, mask[1:])]
        said = json.dumps([list(map(int, ids)), mask]).encode()
        whole.update(said)
        counts.append([len(ids), sum(mask)])
        digests.append(row_digest(ids, mask))
    return {
        "sequences": len(counts),
        "tokens": sum(count[0] for count in counts),
        "trained": sum(count[1] for count in counts),
        "first": counts[:LISTED],
        "each": "".join(digests),
        "sha256": whole.hexdigest(),
    }
