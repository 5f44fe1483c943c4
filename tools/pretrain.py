"""Pretrain the base model that the repository ships: text -> tokenizer -> windows -> Llama -> safetensors.

    OMP_NUM_THREADS=2 python tools/pretrain.py --data ../shared/data --out build/pretrain --steps 600

Everything follows from the data, the seed and the arguments. `--out` always holds a complete, loadable model:
it is written again every `--save-every` steps, so that a run cut short has a result too.

Shapes: B windows per step, T tokens per window, V vocabulary entries.
"""

import argparse
import hashlib
import json
import math
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 4096
CONTEXT = 1024
SPECIAL = ["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"]
TOOL_MARKS = ["<tool_call>", "</tool_call>"]
TEMPLATE = Path(__file__).parent / "chat_template.jinja"
CARD = Path(__file__).parent / "model_card.md"

Row = dict[str, Any]
"""One document: {"text": …} or {"messages": [...], "tools": [...]}."""


# ---------------------------------------------------------------------------------------------- text


def held_out(key: str) -> bool:
    """One document in 20, by its name alone: the split survives a change of order or of the rest."""
    return hashlib.sha256(key.encode()).digest()[0] < 13


def tinyshakespeare(data: Path) -> Iterator[tuple[str, Row]]:
    """Public domain. Speeches are grouped to about 1,500 characters a document."""
    group: list[str] = []
    for speech in (data / "tinyshakespeare/input.txt").read_text().split("\n\n"):
        group.append(speech.strip())
        if sum(map(len, group)) > 1500:
            text = "\n\n".join(group)
            yield text[:200], {"text": text}
            group = []


def gsm8k(data: Path) -> Iterator[tuple[str, Row]]:
    """MIT. Without the calculator marks <<48/2=24>>; a third stays plain text, the rest is conversations."""
    for line in (data / "gsm8k/train.jsonl").read_text().splitlines():
        row = json.loads(line)
        question, answer = row["question"].strip(), re.sub(r"<<[^>]*>>", "", row["answer"]).strip()
        if hashlib.sha256(answer.encode()).digest()[0] < 85:
            yield question, {"text": f"Question: {question}\nAnswer: {answer}"}
        else:
            yield question, {"messages": turns(question, answer)}


def self_instruct(data: Path) -> Iterator[tuple[str, Row]]:
    """Apache-2.0. 175 instructions written by people."""
    for line in (data / "self-instruct/seed_tasks.jsonl").read_text().splitlines():
        row = json.loads(line)
        for instance in row["instances"]:
            prompt = "\n\n".join(
                part.strip() for part in (row["instruction"], instance["input"]) if part.strip()
            )
            yield row["id"], {"messages": turns(prompt, instance["output"].strip())}


def bfcl(data: Path) -> Iterator[tuple[str, Row]]:
    """Apache-2.0. A question, the functions on offer, and the calls that answer it."""
    for name in ("BFCL_v4_simple_python.json", "BFCL_v4_parallel.json"):
        answers = {}
        for line in (data / "bfcl/possible_answer" / name).read_text().splitlines():
            row = json.loads(line)
            answers[row["id"]] = row["ground_truth"]
        for line in (data / "bfcl" / name).read_text().splitlines():
            row = json.loads(line)
            calls = [
                {
                    "function": {
                        "name": function,
                        "arguments": {k: v[0] for k, v in values.items() if v[0] != ""},
                    }
                }
                for call in answers[row["id"]]
                for function, values in call.items()
            ]
            messages = [*row["question"][0], {"role": "assistant", "content": None, "tool_calls": calls}]
            yield row["id"], {"messages": messages, "tools": row["function"]}


def tau_bench(data: Path) -> Iterator[tuple[str, Row]]:
    """MIT. Airline support conversations with tool calls; the policy they all open with is kept once.

    The assistant's side was written by a language model (gpt-4o) in the published trajectories.
    """
    for number, line in enumerate((data / "tau-bench/airline_trajectories.jsonl").read_text().splitlines()):
        row = json.loads(line)
        if number == 0:
            yield "policy", {"text": row["messages"][0]["content"]}
        messages = [message for message in row["messages"] if message["role"] != "system"]
        yield f"task {row['task_id']}", {"messages": messages}  # all trials of a task on the same side


def exercises(seed: int, count: int, words: list[str], sentences: list[str]) -> Iterator[tuple[str, Row]]:
    """Made here: repeat a sentence, look a value up, pick from a list. They teach copying from context.

    In so few tokens it does not learn that from prose, and nothing can be fine-tuned on top of a model that
    cannot copy. The wording and the answers have nothing in common with the demo's task.
    """
    rng = random.Random(seed)

    def word() -> str:
        return rng.choice(words)

    def value() -> str:
        number = "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 5)))
        clock = f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
        pair = f"{word()} {word()}"
        return rng.choice(
            [number, number, word().title(), word(), pair, clock, f"{word()[:2].upper()}-{number}"]
        )

    for index in range(count):
        kind = rng.random()
        if kind < 0.35:
            said = (
                rng.choice(sentences)
                if rng.random() < 0.5
                else " ".join(value() for _ in range(rng.randint(2, 8)))
            )
            ask = rng.choice(
                ["Repeat this: {}", "Say this again: {}", "Copy: {}", "{}\n\nRepeat the text above."]
            )
            row = turns(ask.format(said), said)
        elif kind < 0.8:
            record = {word(): value() for _ in range(rng.randint(2, 6))}
            key = rng.choice(list(record))
            listing = rng.choice(["\n", ", ", "; "]).join(f"{k}: {v}" for k, v in record.items())
            ask = rng.choice(["What is the {}?", "Tell me the {}.", "Look up: {}", "{}?"]).format(key)
            answer = rng.choice(["{v}", "{v}", "{k}: {v}", "The {k} is {v}."]).format(k=key, v=record[key])
            row = turns(f"{listing}\n{ask}" if rng.random() < 0.7 else f"{ask}\n{listing}", answer)
        else:
            items = [value() for _ in range(rng.randint(3, 6))]
            name, at = rng.choice([("first", 0), ("second", 1), ("last", -1)])
            row = turns(f"{', '.join(items)}\nWhich is the {name}?", items[at])
        yield f"exercise {index}", {"messages": row}


def turns(prompt: str, answer: str) -> list[Row]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


SOURCES: dict[str, tuple[Callable[[Path], Iterator[tuple[str, Row]]], float]] = {
    "gsm8k": (gsm8k, 0.40),
    "tinyshakespeare": (tinyshakespeare, 0.14),
    "tau-bench": (tau_bench, 0.13),
    "bfcl": (bfcl, 0.09),
    "self-instruct": (self_instruct, 0.04),
}
"""Reader and share of the training tokens. The rest (0.20) is `exercises`."""


LICENCES = {
    "gsm8k": "MIT, Copyright (c) 2021 OpenAI",
    "tinyshakespeare": "public domain",
    "tau-bench": "MIT, Copyright (c) 2024 Sierra",
    "bfcl": "Apache-2.0",
    "self-instruct": "Apache-2.0",
    "exercises": "Apache-2.0 (made by this repository)",
}


def documents(data: Path, seed: int = 0) -> dict[str, dict[str, list[Row]]]:
    """{source: {"train": rows, "held_out": rows}}."""
    found: dict[str, dict[str, list[Row]]] = {}
    for source, (read, _) in SOURCES.items():
        found[source] = {"train": [], "held_out": []}
        for key, row in read(data):
            found[source]["held_out" if held_out(f"{source}: {key}") else "train"].append(row)
    sentences = [
        sentence
        for row in found["gsm8k"]["train"]
        if "messages" in row
        for sentence in re.split(r"(?<=[.?!])\s+", row["messages"][0]["content"])
        if 15 < len(sentence) < 120
    ]
    words = sorted(set(re.findall(r"\b[a-z]{3,9}\b", " ".join(sentences))))
    made = exercises(seed, 12_000, words, sentences)
    found["exercises"] = {"train": [], "held_out": []}
    for key, row in made:
        found["exercises"]["held_out" if held_out(key) else "train"].append(row)
    for rows in found.values():  # the same text under two names: short exercises come up more than once
        seen = {json.dumps(row) for row in rows["train"]}
        rows["held_out"] = [row for row in rows["held_out"] if json.dumps(row) not in seen]
    return found


# --------------------------------------------------------------------------------------- tokenizer


def render(row: Row, tokenizer: PreTrainedTokenizerFast) -> str:
    """The document as the model reads it, closed by <|endoftext|>."""
    if "text" in row:
        return str(row["text"]) + "<|endoftext|>"
    text = tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False)
    return str(text) + "<|endoftext|>"


def plain(row: Row) -> str:
    """All the words of a document, without markup: what the tokenizer learns its merges from."""
    if "text" in row:
        return str(row["text"])
    return json.dumps([row["messages"], row.get("tools")], ensure_ascii=False).replace("\\n", "\n")


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any input can be written, so there is no unknown token. Digits stay single."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL + TOOL_MARKS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    state = json.loads(bpe.to_str())
    for token in state["added_tokens"]:  # a tool call is part of the answer: decoding must not skip its marks
        token["special"] = token["content"] in SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE.read_text(),
    )


# ------------------------------------------------------------------------------------------- model


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def windows(
    streams: dict[str, list[np.ndarray]], shares: dict[str, float], length: int, rng: random.Random
) -> Iterator[np.ndarray]:
    """Windows of `length` + 1 tokens for ever; each continues in its source where the last one stopped.

    Documents are shuffled anew whenever a source is used up. Attention may look across a document's end: with
    <|endoftext|> between them the model learns to ignore it, and no mask is needed.
    """
    buffers = {source: np.empty(0, np.int64) for source in streams}
    waiting: dict[str, list[np.ndarray]] = {source: [] for source in streams}
    names = sorted(streams)
    while True:
        source = rng.choices(names, [shares[name] for name in names])[0]
        parts = [buffers[source]]
        while sum(map(len, parts)) < length + 1:
            if not waiting[source]:
                waiting[source] = rng.sample(streams[source], len(streams[source]))
            parts.append(waiting[source].pop())
        joined = np.concatenate(parts)
        buffers[source] = joined[length:]  # the last target is the next window's first input
        yield joined[: length + 1]


class Muon:
    """Momentum whose update is orthogonalised by Newton-Schulz iterations (Jordan et al. 2024), for matrices.

    Here because the budget is CPU minutes: it needs clearly fewer tokens than AdamW. `torch.optim.Muon`
    iterates in bfloat16, which a CPU without AVX512-BF16 emulates at a thirtieth of its fp32 speed.
    """

    def __init__(
        self, parameters: list[torch.nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.05
    ):
        self.momentum, self.weight_decay = momentum, weight_decay
        shapes = {parameter.shape for parameter in parameters}
        self.groups = [[p for p in parameters if p.shape == shape] for shape in sorted(shapes)]
        self.velocity = [torch.zeros(len(group), *group[0].shape) for group in self.groups]

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        for group, velocity in zip(self.groups, self.velocity, strict=True):
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            velocity.lerp_(gradient, 1 - self.momentum)
            update = orthogonal(gradient.lerp(velocity, self.momentum)) * 0.2 * max(velocity.shape[1:]) ** 0.5
            for parameter, change in zip(group, update, strict=True):
                parameter.mul_(1 - learning_rate * self.weight_decay).sub_(change, alpha=learning_rate)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """(N, rows, columns) -> about U V^T of each, by five quintic Newton-Schulz steps."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315) @ x
    return x.mT if tall else x


def schedule(step: int, steps: int) -> float:
    """Warm up over 20 steps, stay, then fall linearly to 2% over the last 40% of the steps."""
    return min(1.0, (step + 1) / 20, max(0.02, (steps - step) / (0.4 * steps)))


@torch.no_grad()
def loss_of(model: LlamaForCausalLM, tokens: np.ndarray, length: int = 256, limit: int = 24) -> float:
    """Mean loss in nats per token over up to `limit` windows of a token stream."""
    model.eval()
    count = min(limit, (len(tokens) - 1) // length)
    total = 0.0
    for start in range(0, count, 8):
        rows = [tokens[i * length : (i + 1) * length + 1] for i in range(start, min(start + 8, count))]
        total += nats(model, torch.from_numpy(np.stack(rows))).item() * len(rows)
    model.train()
    return total / count


def unigram_loss(training: list[np.ndarray], tokens: np.ndarray) -> float:
    """Nats per token of the source's own token frequencies, add-one smoothed: what knowing no order gives."""
    counts = np.bincount(np.concatenate(training), minlength=VOCABULARY) + 1
    return float(-np.log(counts / counts.sum())[tokens].mean())


def nats(model: LlamaForCausalLM, tokens_BT: torch.Tensor) -> torch.Tensor:
    logits = model(tokens_BT[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1), tokens_BT[:, 1:].flatten())


# --------------------------------------------------------------------------------------------- run


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, record: Row) -> None:
    """A complete model directory, bfloat16; the directory appears whole or not at all."""
    fresh = out.with_name(out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(state)
    copy.generation_config.update(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")],
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    copy.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    described = json.loads((fresh / "tokenizer_config.json").read_text())
    # transformers 4 and 5 know this name; the "TokenizersBackend" that 5 writes is unknown to 4
    described["tokenizer_class"] = "PreTrainedTokenizerFast"
    (fresh / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")
    (fresh / "README.md").write_text(card(record))
    (fresh / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    for file in fresh.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner alone
    fresh.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--tokens-per-step", type=int, default=3072)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=60)
    parser.add_argument(
        "--long-share", type=float, default=0.12, help="share of the steps, at the end, in windows of 1024"
    )
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)

    found = documents(arguments.data)
    tokenizer = train_tokenizer(plain(row) for source in found.values() for row in source["train"])
    shares = {source: share for source, (_, share) in SOURCES.items()}
    shares["exercises"] = 1 - sum(shares.values())

    def encode(rows: list[Row]) -> list[np.ndarray]:
        encoded = tokenizer([render(row, tokenizer) for row in rows], add_special_tokens=False)["input_ids"]
        return [np.array(ids, np.int64) for ids in encoded]

    streams = {source: encode(rows["train"]) for source, rows in found.items()}
    unseen = {source: np.concatenate(encode(rows["held_out"])) for source, rows in found.items()}
    sizes = {source: sum(map(len, parts)) for source, parts in streams.items()}
    say("tokens in the training text", sizes)
    unigram = {source: round(unigram_loss(streams[source], unseen[source]), 4) for source in streams}

    model = new_model(tokenizer)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0)
    record: Row = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": arguments.seed,
        "steps": arguments.steps,
        "tokens_per_step": arguments.tokens_per_step,
        "learning_rate": arguments.learning_rate,
        "text_tokens": sizes,
        "shares": {source: round(share, 3) for source, share in shares.items()},
        "curve": [],
    }
    say("parameters", record["parameters"])

    turn = int(arguments.steps * (1 - arguments.long_share))
    supply = windows(streams, shares, 256, rng)
    began, seen, smooth = time.monotonic(), 0, 0.0
    for step in range(arguments.steps):
        length = 256 if step < turn else CONTEXT
        if step == turn:
            supply = windows(streams, shares, CONTEXT, rng)
        batch_BT = torch.from_numpy(
            np.stack([next(supply) for _ in range(arguments.tokens_per_step // length)])
        )
        loss = nats(model, batch_BT)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = arguments.learning_rate * schedule(step, arguments.steps)
        for group in adam.param_groups:
            group["lr"] = rate
        muon.step(rate)
        adam.step()
        model.zero_grad()
        seen += arguments.tokens_per_step
        smooth = loss.item() if step == 0 else 0.95 * smooth + 0.05 * loss.item()
        if step % 10 == 9:
            pace = seen / (time.monotonic() - began)
            say(f"step {step + 1}/{arguments.steps} loss {smooth:.3f} norm {norm:.2f} {pace:.0f} tokens/s")
        if (step + 1) % arguments.save_every == 0 or step + 1 == arguments.steps:
            losses = {source: round(loss_of(model, tokens), 4) for source, tokens in unseen.items()}
            mean = sum(losses[source] * shares[source] for source in losses)
            point = {
                "step": step + 1,
                "tokens": seen,
                "held_out": losses,
                "unigram": unigram,
                "held_out_mean": round(mean, 4),
            }
            record["curve"].append(point)
            record["seconds"] = round(time.monotonic() - began)
            save(model, tokenizer, arguments.out, record)
            say("saved", point, f"perplexity {math.exp(mean):.1f}")


def card(record: Row) -> str:
    """The model card, with the numbers of this very run."""
    last = record["curve"][-1]
    rows = "\n".join(
        f"| {source} | {licence} | {record['text_tokens'][source]:,} | {record['shares'][source]:.0%} "
        f"| {last['held_out'][source]:.2f} | {last['unigram'][source]:.2f} |"
        for source, licence in LICENCES.items()
    )
    curve = "\n".join(
        f"| {point['step']} | {point['tokens']:,} | {point['held_out_mean']:.3f} |"
        for point in record["curve"]
    )
    return CARD.read_text().format(
        **{key: value for key, value in record.items() if key not in ("curve", "text_tokens", "shares")},
        tokens=last["tokens"],
        rows=rows,
        curve=curve,
        mean=last["held_out_mean"],
    )


def say(*words: Any) -> None:
    print(time.strftime("%H:%M:%S"), *words, flush=True)  # noqa: T201  (a script's output)


if __name__ == "__main__":
    main()
