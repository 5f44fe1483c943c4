"""The demo's instruction set: a request in plain English, answered by one line of JSON that calls a tool.

    "Could you book a table for 4 at 19:30?"  ->  {"tool": "book_table", "people": 4, "time": "19:30"}

Generated, so it is free to use, and the same for the same seed. The shipped base model has never seen it and
cannot do it; after less than a minute of LoRA it can, with times and numbers that no training row has.
The values are short numbers on purpose: this model learns to copy those, but not names it has never met.
"""

import json
import random
from typing import Any

Row = dict[str, Any]

LEARNING_RATE = 5e-3
BATCH_SIZE = 16
N_EPOCHS = 3
MAX_STEPS = 80
"""What the demo trains with (LoRA of rank 16 on all linear layers)."""

ASKS: dict[str, list[str]] = {
    "book_table": [
        "book a table for {people} at {time}",
        "reserve a table at {time} for {people} people",
        "get us a table for {people} at {time}",
        "find a place for {people} to eat at {time}",
    ],
    "set_alarm": [
        "wake me up at {time}",
        "set an alarm for {time}",
        "make sure I am up at {time}",
    ],
    "set_timer": [
        "set a timer for {minutes} minutes",
        "count down {minutes} minutes",
        "start a {minutes} minute timer",
    ],
    "set_heating": [
        "heat the house to {degrees} degrees at {time}",
        "turn the heating to {degrees} degrees at {time}",
        "make it {degrees} degrees in here at {time}",
    ],
    "track_order": [
        "tell me where order {order} is",
        "check the status of order {order}",
        "track my order {order}",
        "look up order number {order}",
    ],
    "pay_bill": [
        "pay bill {bill}",
        "settle bill number {bill}",
        "take care of bill {bill}",
    ],
}
SLOTS: dict[str, list[str]] = {
    "book_table": ["people", "time"],
    "set_alarm": ["time"],
    "set_timer": ["minutes"],
    "set_heating": ["degrees", "time"],
    "track_order": ["order"],
    "pay_bill": ["bill"],
}
"""The answer's keys, in order."""

HELD_OUT = {"time", "minutes", "order", "bill"}
"""Slots whose values (as one number) are divisible by nine in held-out rows and never in training rows."""

OPENINGS = [
    "Please {}.",
    "Can you {}?",
    "Could you {}?",
    "Would you {}, please?",
    "I need you to {}.",
    "{}.",
    "Hi, {}!",
]

PROMPTS: list[tuple[str, str]] = [
    ("Please book a table for 7 at 18:45.", '{"tool": "book_table", "people": 7, "time": "18:45"}'),
    ("Can you check the status of order 9414?", '{"tool": "track_order", "order": 9414}'),
    ("Pay bill 873.", '{"tool": "pay_bill", "bill": 873}'),
    ("Would you wake me up at 05:40, please?", '{"tool": "set_alarm", "time": "05:40"}'),
    ("Set a timer for 27 minutes.", '{"tool": "set_timer", "minutes": 27}'),
    (
        "I need you to make it 21 degrees in here at 16:20.",
        '{"tool": "set_heating", "degrees": 21, "time": "16:20"}',
    ),
]
"""(prompt, answer), shown before and after; no training row has these times, orders, bills or minutes."""


def training_rows(seed: int = 0, count: int = 576) -> list[Row]:
    """`count` different requests in chat form; none is among PROMPTS or in any `validation_rows`."""
    return _rows(random.Random(f"train {seed}"), count, held_out=False)


def validation_rows(seed: int = 0, count: int = 64) -> list[Row]:
    """Different from every training row: a request is on one side or the other by its numbers and names."""
    return _rows(random.Random(f"validation {seed}"), count, held_out=True)


def write_jsonl(rows: list[Row]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def _rows(rng: random.Random, count: int, held_out: bool) -> list[Row]:
    rows: dict[str, Row] = {}
    while len(rows) < count:
        tool = rng.choice(list(ASKS))
        values = {slot: _value(rng, slot, held_out) for slot in SLOTS[tool]}
        asked = rng.choice(ASKS[tool]).format(**values)
        opening = rng.choice(OPENINGS)
        request = opening.format(asked[0].upper() + asked[1:] if opening.startswith("{}") else asked)
        answer = json.dumps({"tool": tool, **values})
        rows[request] = {
            "messages": [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
        }
    return list(rows.values())


def _value(rng: random.Random, slot: str, held_out: bool) -> Any:
    while True:
        match slot:
            case "people":
                value: Any = rng.randint(2, 12)
            case "degrees":
                value = rng.randint(15, 26)
            case "minutes":
                value = rng.randint(2, 99)
            case "bill":
                value = rng.randint(100, 999)
            case "order":
                value = rng.randint(1000, 9999)
            case _:
                value = f"{rng.randint(0, 23):02}:{rng.randrange(0, 60, 5):02}"
        if slot not in HELD_OUT or (int(str(value).replace(":", "")) % 9 == 0) == held_out:
            return value
