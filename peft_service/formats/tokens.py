"""`{"input_ids", "labels"?, "attention_mask"?}`: rows that somebody else has tokenised.

`labels` is the ids again, with -100 where a token is not learned, as transformers has it: not shifted.
Without labels all tokens are learned. `attention_mask` is 1 where the row is, 0 where it was padded: the
padding, at either end, is left off.
"""

from collections.abc import Iterator
from typing import Any, Literal

from peft_service.formats import Example, Format, Problem, wrong_type

NOT_LEARNED = -100
LARGEST_ID = 2**31 - 1


class Tokens(Format):
    kind: Literal["tokens"] = "tokens"

    keys = ("input_ids", "labels", "attention_mask", "task")
    rank = 20
    sample = '{"input_ids": [17, 10, 17, 28, 19], "labels": [-100, -100, -100, -100, 19]}'
    dialects = ('{"input_ids": [17, 10, 17, 0, 0], "attention_mask": [1, 1, 1, 0, 0]}',)

    def detect(self, row: dict[str, Any]) -> bool:
        return "input_ids" in row

    def check(self, row: dict[str, Any]) -> Iterator[Problem]:
        lists = {}
        for key in ("input_ids", "labels", "attention_mask"):
            value = row.get(key)
            if value is None and key != "input_ids":
                continue
            if not isinstance(value, list):
                yield wrong_type(key, "an array of whole numbers", value)
                return
            # bool is a subclass of int.
            wrong = next((at for at, one in enumerate(value) if type(one) is not int), None)
            if wrong is not None:
                yield wrong_type(f"{key}[{wrong}]", "a whole number", value[wrong])
                return
            lists[key] = value
        ids = lists["input_ids"]
        if not ids:
            yield Problem("input_ids", "empty_text", "The row has no tokens.")
            return
        for key, value in lists.items():
            if len(value) != len(ids):
                said = f"{len(ids)} input_ids, but {len(value)} in {key}."
                yield Problem(key, "length_mismatch", said)
                return
        wrong = next((at for at, one in enumerate(ids) if not 0 <= one <= LARGEST_ID), None)
        if wrong is not None:
            yield Problem(f"input_ids[{wrong}]", "bad_token_id", f"{ids[wrong]} is no id of a token.")
        labels, mask = lists.get("labels", ids), lists.get("attention_mask", [1] * len(ids))
        wrong = next((at for at, one in enumerate(mask) if one not in (0, 1)), None)
        if wrong is not None:
            said = "attention_mask must be 0 or 1."
            yield Problem(f"attention_mask[{wrong}]", "wrong_value", said)
            return
        start, end = _extent(mask)
        if 0 in mask[start:end]:
            said = "attention_mask leaves out tokens in the middle of the row."
            hint = "only padding at the ends can be left out; what is not to be learned has the label -100"
            yield Problem("attention_mask", "wrong_value", said, hint)
        for at in range(start, end):
            if labels[at] not in (NOT_LEARNED, ids[at]):
                said = f"The label {labels[at]} is neither -100 nor the token's own id, {ids[at]}."
                hint = "labels are the input_ids, with -100 where nothing is learned; do not shift them"
                yield Problem(f"labels[{at}]", "label_not_its_token", said, hint)
                break
        # The first token of a row follows nothing, so it is never learned.
        if all(labels[at] == NOT_LEARNED for at in range(start + 1, end)):
            said = "No token behind the first is learned: there is nothing to learn."
            yield Problem("labels" if "labels" in lists else "input_ids", "nothing_to_learn", said)

    def messages_or_text(self, row: dict[str, Any]) -> Example:
        ids, labels = row["input_ids"], row.get("labels") or row["input_ids"]
        start, end = _extent(row.get("attention_mask") or [1] * len(ids))
        return Example(
            token_ids=tuple(ids[start:end]),
            token_targets=tuple(label != NOT_LEARNED for label in labels[start:end]),
            task=row.get("task"),
        )


def _extent(mask: list[int]) -> tuple[int, int]:
    """[start, end) of the row in its padding."""
    if 1 not in mask:
        return 0, 0
    return mask.index(1), len(mask) - mask[::-1].index(1)
