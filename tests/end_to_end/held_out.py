"""Each objective's own measure of a base and of its adapter, row by row, by plain transformers and peft.

    python tests/end_to_end/held_out.py TOLD.json

TOLD has `measure`, `base`, `adapter` and maybe `teacher` (directories), `rows`, and `labels` of a head. Out
comes one line of JSON: `base` and `adapter`, a number a row (higher is better), and over all targets the
adapter's `loss` and `accuracy` and the base's `base_loss`, as the service reports them. Nothing of the
service is used: what a text's tokens and targets are, and what a measure is, is written here once more.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

HEADS = {
    "classes": "AutoModelForSequenceClassification",
    "class_sets": "AutoModelForSequenceClassification",
    "value": "AutoModelForSequenceClassification",
    "reward": "AutoModelForSequenceClassification",
    "tags": "AutoModelForTokenClassification",
    "spans": "AutoModelForQuestionAnswering",
}
"""Measure -> the class that has its head; of all others AutoModelForCausalLM."""


class Scored(NamedTuple):
    score: float
    """Of one row; higher is better."""
    loss: float = 0.0
    """Summed over the row's targets."""
    right: float = 0.0
    targets: int = 0


class Texts(NamedTuple):
    """A model that writes, and the base to compare it with."""

    tokenizer: Any
    model: Any
    base: Callable[[Tensor], Tensor]
    """(1, T) tokens -> the base's logits."""
    told: dict[str, Any]

    def tokens(self, prompt: str, answer: str) -> tuple[Tensor, Tensor]:
        """((1, T) tokens, (T-1,) whether the next one belongs to the answer); the end is learned too."""
        found = self.tokenizer(prompt + answer, return_offsets_mapping=True)
        ids = [*found["input_ids"], self.tokenizer.eos_token_id]
        mine = [end > len(prompt) for _, end in found["offset_mapping"]] + [True]
        return torch.tensor([ids]), torch.tensor(mine[1:])

    def chat(self, messages: list[dict[str, str]]) -> tuple[Tensor, Tensor]:
        """The same of a conversation, whose last message is the answer, by the adapter's own template."""
        whole = self.tokenizer.apply_chat_template(messages, tokenize=False)
        before = self.tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        assert whole.startswith(before)
        whole = whole.rstrip("\n")  # what a template writes between turns is no answer
        found = self.tokenizer(whole, return_offsets_mapping=True, add_special_tokens=False)
        mine = [end > len(before) for _, end in found["offset_mapping"]]
        return torch.tensor([found["input_ids"]]), torch.tensor(mine[1:])

    def row(self, row: dict[str, Any], answer: str = "completion") -> tuple[Tensor, Tensor]:
        if "messages" in row:
            return self.chat(row["messages"])
        return self.tokens(row.get("prompt", ""), row.get("text") or row[answer])

    def logits(self, tokens: Tensor, base: bool) -> Tensor:
        logits: Tensor = self.base(tokens) if base else self.model(input_ids=tokens).logits
        return logits[0, :-1].double()

    def logps(self, row: dict[str, Any], answer: str, base: bool) -> Tensor:
        """Log-probabilities of the answer's tokens."""
        tokens, mine = self.row(row, answer)
        found = self.logits(tokens, base).log_softmax(-1)
        return found.gather(1, tokens[0, 1:, None])[:, 0][mine]


def loss(of: Texts, row: dict[str, Any], base: bool) -> Scored:
    tokens, mine = of.row(row)
    logits, targets = of.logits(tokens, base)[mine], tokens[0, 1:][mine]
    nll = float(F.cross_entropy(logits, targets, reduction="sum"))
    right = int((logits.argmax(-1) == targets).sum())
    return Scored(-nll / len(targets), nll, right, len(targets))


def divergence(of: Texts, row: dict[str, Any], base: bool) -> Scored:
    """KL(teacher || model) of a target token; the loss is that and the tokens' own, mixed."""
    tokens, mine = of.row(row)
    student, targets = of.logits(tokens, base)[mine], tokens[0, 1:][mine]
    teacher = of.told["teacher"](input_ids=tokens).logits[0, :-1].double()[mine]

    def kl(temperature: float) -> float:
        p, q = (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)
        return float((p.exp() * (p - q)).sum())

    heat, alpha = of.told["temperature"], of.told["alpha"]
    nll = float(F.cross_entropy(student, targets, reduction="sum"))
    right = int((student.argmax(-1) == targets).sum())
    total = alpha * heat**2 * kl(heat) + (1 - alpha) * nll
    return Scored(-kl(1.0) / len(targets), total, right, len(targets))


def reward_of_ratio(of: Texts, row: dict[str, Any], base: bool) -> Scored:
    """Whether log π/π_ref of the better answer is larger. The base's own are all 0: it does not know."""
    if base:
        return Scored(0.5)
    gained = [
        float(of.logps(row, side, False).sum() - of.logps(row, side, True).sum())
        for side in ("chosen", "rejected")
    ]
    right = float(gained[0] > gained[1])
    return Scored(right, right=right, targets=1)


def sums(of: Texts, row: dict[str, Any], base: bool) -> Scored:
    chosen, rejected = (of.logps(row, side, base).sum() for side in ("chosen", "rejected"))
    right = float(chosen > rejected)
    return Scored(right, right=right, targets=1)


def means(of: Texts, row: dict[str, Any], base: bool) -> Scored:
    chosen, rejected = (of.logps(row, side, base).mean() for side in ("chosen", "rejected"))
    right = float(chosen > rejected)
    return Scored(right, right=right, targets=1)


def sign_of_ratio(of: Texts, row: dict[str, Any], base: bool) -> Scored:
    """Whether log π/π_ref is above 0 for a good answer and below for a bad one."""
    if base:
        return Scored(0.5)
    gained = float((of.logps(row, "completion", False) - of.logps(row, "completion", True)).sum())
    right = float(gained > 0) if row["label"] else float(gained < 0)
    return Scored(right, right=right, targets=1)


def answers(of: Texts, row: dict[str, Any], base: bool) -> Scored:
    """Whether the likeliest answer is the right one, to the letter."""
    tokens = torch.tensor([of.tokenizer(row["prompt"])["input_ids"]])
    start = tokens.shape[1]
    for _ in range(of.told["max_new_tokens"]):
        logits = of.base(tokens) if base else of.model(input_ids=tokens).logits
        following = logits[0, -1].argmax().view(1, 1)
        if int(following) == of.tokenizer.eos_token_id:
            break
        tokens = torch.cat([tokens, following], dim=1)
    said = of.tokenizer.decode(tokens[0, start:], skip_special_tokens=True)
    return Scored(float(said == row["answer"]))


def reward(tokenizer: Any, model: Any, row: dict[str, Any], labels: list[str]) -> Scored:
    chosen, rejected = (
        model(**tokenizer(row["prompt"] + row[side] + tokenizer.eos_token, return_tensors="pt")).logits[0, 0]
        for side in ("chosen", "rejected")
    )
    right = float(chosen > rejected)
    return Scored(right, float(-F.logsigmoid((chosen - rejected).double())), right, 1)


def classes(tokenizer: Any, model: Any, row: dict[str, Any], labels: list[str]) -> Scored:
    logits = model(**tokenizer(row["text"], return_tensors="pt")).logits[0].double()
    truth = labels.index(row["label"])
    right = float(logits.argmax() == truth)
    return Scored(right, float(-logits.log_softmax(-1)[truth]), right, 1)


def class_sets(tokenizer: Any, model: Any, row: dict[str, Any], labels: list[str]) -> Scored:
    logits = model(**tokenizer(row["text"], return_tensors="pt")).logits[0].double()
    truth = torch.tensor([float(label in row["labels"]) for label in labels], dtype=torch.float64)
    nll = float(F.binary_cross_entropy_with_logits(logits, truth, reduction="sum"))
    right = float(((logits > 0) == (truth > 0)).sum())
    return Scored(right / len(labels), nll, right, len(labels))


def value(tokenizer: Any, model: Any, row: dict[str, Any], labels: list[str]) -> Scored:
    found = float(model(**tokenizer(row["text"], return_tensors="pt")).logits[0, 0])
    square = (found - row["score"]) ** 2
    return Scored(-square, square, 0.0, 1)


def tags(tokenizer: Any, model: Any, row: dict[str, Any], labels: list[str]) -> Scored:
    found = tokenizer(row["tokens"], is_split_into_words=True, return_tensors="pt")
    logits, places = model(**found).logits[0].double(), found.word_ids()
    firsts = [places.index(word) for word in range(len(row["tokens"]))]
    truth = torch.tensor([labels.index(tag) for tag in row["tags"]])
    right = float((logits[firsts].argmax(-1) == truth).sum())
    nll = float(F.cross_entropy(logits[firsts], truth, reduction="sum"))
    return Scored(right / len(truth), nll, right, len(truth))


def spans(tokenizer: Any, model: Any, row: dict[str, Any], labels: list[str]) -> Scored:
    """Whether both ends are right; the service's accuracy is of each end."""
    found = tokenizer(row["question"], row["context"], return_tensors="pt", return_offsets_mapping=True)
    offsets, places = found.pop("offset_mapping")[0].tolist(), found.sequence_ids()
    begin = row["answers"]["answer_start"][0]
    end = begin + len(row["answers"]["text"][0])
    inside = [
        at for at, (one, other) in enumerate(offsets) if places[at] == 1 and one < end and other > begin
    ]
    made = model(**found)
    ends = ((made.start_logits, inside[0]), (made.end_logits, inside[-1]))
    right = [float(logits[0].argmax() == truth) for logits, truth in ends]
    nll = sum(float(-logits[0].double().log_softmax(-1)[truth]) for logits, truth in ends)
    return Scored(float(all(right)), nll, sum(right), 2)


TEXTS: dict[str, Callable[[Texts, dict[str, Any], bool], Scored]] = {
    measure.__name__: measure
    for measure in (loss, divergence, reward_of_ratio, sums, means, sign_of_ratio, answers)
}
LABELLED: dict[str, Callable[[Any, Any, dict[str, Any], list[str]], Scored]] = {
    measure.__name__: measure for measure in (reward, classes, class_sets, value, tags, spans)
}


def body_of(directory: str, measure: str, labels: list[str]) -> Any:
    """The base, with a new head where the measure needs one: as random as a head that was never trained."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"dtype": torch.float32}
    if measure == "spans":
        options["key_mapping"] = {r"^model\.": "transformer."}  # the name of a Llama's body in this class
    elif measure in HEADS:
        options["num_labels"] = len(labels)
    made = getattr(transformers, HEADS.get(measure, "AutoModelForCausalLM"))
    return made.from_pretrained(directory, **options).eval()


def measured(told: dict[str, Any]) -> dict[str, Any]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(told["adapter"])
    measure, labels = told["measure"], told.get("labels", [])
    found: dict[str, list[Scored]] = {}
    if measure in HEADS:
        base = body_of(told["base"], measure, labels)
        found["base"] = [LABELLED[measure](tokenizer, base, row, labels) for row in told["rows"]]
        model = peft.PeftModel.from_pretrained(base, told["adapter"]).eval()
        found["adapter"] = [LABELLED[measure](tokenizer, model, row, labels) for row in told["rows"]]
    else:
        base = body_of(told["base"], measure, labels)
        model = peft.PeftModel.from_pretrained(body_of(told["base"], measure, labels), told["adapter"]).eval()
        if "teacher" in told:
            told["teacher"] = body_of(told["teacher"], measure, labels)
        texts = Texts(tokenizer, model, lambda tokens: base(input_ids=tokens).logits, told)
        for name in ("base", "adapter"):
            found[name] = [TEXTS[measure](texts, row, name == "base") for row in told["rows"]]
    targets = max(1, sum(each.targets for each in found["adapter"]))
    return {
        **{name: [each.score for each in rows] for name, rows in found.items()},
        "base_loss": sum(each.loss for each in found["base"]) / targets,
        "loss": sum(each.loss for each in found["adapter"]) / targets,
        "accuracy": sum(each.right for each in found["adapter"]) / targets,
    }


if __name__ == "__main__":
    with torch.no_grad():
        sys.stdout.write(json.dumps(measured(json.loads(Path(sys.argv[1]).read_text()))) + "\n")
