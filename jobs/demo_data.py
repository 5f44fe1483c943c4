"""The demo's instruction set: a request in plain English, answered by one line of JSON that calls a tool.

    "Could you book a table for 4 at 19:30?"  ->  {"tool": "book_table", "people": 4, "time": "19:30"}

Generated, so it is free to use, and the same for the same seed. The shipped base model has never seen it and
cannot do it; after less than a minute of LoRA it can, with numbers, names and places that were held out.
"""

import json
import random
from typing import Any

Row = dict[str, Any]

LEARNING_RATE = 5e-3
BATCH_SIZE = 16
N_EPOCHS = 4
"""What the demo trains with (LoRA of rank 16 on all linear layers)."""

# fmt: off
NAMES = [
    "Alice", "Amir", "Anna", "Bella", "Ben", "Bruno", "Carla", "Chloe", "Clara", "Daniel", "David",
    "Diego", "Elena", "Emma", "Esther", "Felix", "Frank", "Gloria", "Grace", "Henry", "Hugo", "Irene",
    "Ivy", "Jack", "James", "Karen", "Kate", "Leo", "Lucas", "Maria", "Mia", "Nina", "Noah", "Olivia",
    "Oscar", "Paul", "Peter", "Quinn", "Rita", "Rosa", "Sam", "Simon", "Teresa", "Tina", "Uma", "Vera",
    "Victor", "Walter", "Wendy", "Xavier", "Yara", "Zoe",
]
CITIES = [
    "Athens", "Austin", "Berlin", "Boston", "Cairo", "Chicago", "Denver", "Dublin", "Geneva", "Lisbon",
    "London", "Madrid", "Miami", "Milan", "Oslo", "Paris", "Prague", "Rome", "Seattle", "Sydney",
    "Tokyo", "Toronto", "Vienna", "Warsaw",
]
# fmt: on
DAYS = ["today", "tomorrow", "on Monday", "on Tuesday", "on Wednesday", "on Thursday", "on Friday"]
NEVER_TRAINED_NAMES = ["Natalia", "Robert", "Sophie", "Marcus"]
NEVER_TRAINED_CITIES = ["Dallas", "Venice", "Houston"]

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
    "track_order": [
        "tell me where order {order} is",
        "check the status of order {order}",
        "track my order {order}",
        "look up order number {order}",
    ],
    "send_money": [
        "send ${amount} to {to}",
        "pay {to} ${amount}",
        "give {to} ${amount}",
        "transfer {amount} dollars to {to}",
    ],
    "get_weather": [
        "tell me the weather in {city} {day}",
        "check if it will rain in {city} {day}",
        "say how warm it gets in {city} {day}",
    ],
    "call": [
        "call {who} at {time}",
        "ring {who} at {time}",
        "phone {who} at {time}",
    ],
}
SLOTS: dict[str, list[str]] = {
    "book_table": ["people", "time"],
    "set_alarm": ["time"],
    "track_order": ["order"],
    "send_money": ["to", "amount"],
    "get_weather": ["city", "day"],
    "call": ["who", "time"],
}
"""The answer's keys, in order. Held out: some names and cities; times and orders divisible by nine."""

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
    ("Can you check the status of order 90414?", '{"tool": "track_order", "order": 90414}'),
    ("Send $365 to Natalia.", '{"tool": "send_money", "to": "Natalia", "amount": 365}'),
    ("Would you wake me up at 05:40, please?", '{"tool": "set_alarm", "time": "05:40"}'),
    (
        "Could you tell me the weather in Dallas tomorrow?",
        '{"tool": "get_weather", "city": "Dallas", "day": "tomorrow"}',
    ),
    ("I need you to call Robert at 16:20.", '{"tool": "call", "who": "Robert", "time": "16:20"}'),
]
"""(prompt, answer), shown before and after; no training row has their times, orders, names or cities."""


def training_rows(seed: int = 0, count: int = 640) -> list[Row]:
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
        if "day" in values:
            values["day"] = values["day"].removeprefix("on ")
        answer = json.dumps({"tool": tool, **values})
        rows[request] = {
            "messages": [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
        }
    return list(rows.values())


def _value(rng: random.Random, slot: str, held_out: bool) -> Any:
    match slot:
        case "people":
            return rng.randint(2, 12)
        case "amount":
            return rng.randint(5, 999)
        case "day":
            return rng.choice(DAYS)
        case "city":
            return rng.choice(NEVER_TRAINED_CITIES if held_out else CITIES)
        case "to" | "who":
            return rng.choice(NEVER_TRAINED_NAMES if held_out else NAMES)
        case _:  # a time or an order number
            while True:
                number = rng.randint(10_000, 99_999)
                text = (
                    f"{rng.randint(0, 23):02}:{rng.randrange(0, 60, 5):02}" if slot == "time" else str(number)
                )
                if (int(text.replace(":", "")) % 9 == 0) == held_out:
                    return text if slot == "time" else number
