"""Tiny random bases of every architecture on disk, with tokenizers, and rows of every task for them."""

import json
import os
from functools import cache
from pathlib import Path

import torch

from peft_service import shipped
from peft_service.formats import FORMATS
from peft_service.objectives import OBJECTIVES
from peft_service.tokenise import Meaning, tokenise
from tests.tiny import tiny_tokenizer

WIDTH, LAYERS, VOCABULARY = 32, 2, 300
KINDS = ("llama", "opt", "bert", "t5", "bart")
ARCHITECTURES = {
    "llama": "decoder",
    "opt": "decoder",
    "bert": "encoder",
    "t5": "encoder_decoder",
    "bart": "encoder_decoder",
}
"""Of each architecture first the one without biases."""
SHIPPED = "shipped"
"""The base of the package: no tiny one, but a pretrained decoder."""
WORDS = ("sky", "sea", "dog", "fox", "river", "town", "sum", "five", "blue", "lazy", "quick", "colour")
LABELS = ("bird", "fish", "tree")


def model(kind: str, seed: int = 0):
    """A model in float32 with weights far from zero."""
    import transformers as hf

    common = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "llama":
            made = hf.LlamaForCausalLM(
                hf.LlamaConfig(
                    hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, **common,
                )
            )  # fmt: skip
        elif kind == "opt":
            made = hf.OPTForCausalLM(
                hf.OPTConfig(
                    hidden_size=WIDTH, ffn_dim=64, num_hidden_layers=LAYERS, num_attention_heads=4,
                    max_position_embeddings=128, word_embed_proj_dim=WIDTH, dropout=0.0, **common,
                )
            )  # fmt: skip
        elif kind == "bert":
            made = hf.BertModel(
                hf.BertConfig(
                    hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
                    max_position_embeddings=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                    **common,
                )
            )  # fmt: skip
        elif kind == "t5":
            made = hf.T5ForConditionalGeneration(
                hf.T5Config(
                    d_model=WIDTH, d_kv=8, d_ff=64, num_layers=LAYERS, num_heads=4, dropout_rate=0.0,
                    decoder_start_token_id=2, **common,
                )
            )  # fmt: skip
        else:
            made = hf.BartForConditionalGeneration(
                hf.BartConfig(
                    d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=4,
                    decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, dropout=0.0,
                    max_position_embeddings=128, decoder_start_token_id=1, forced_eos_token_id=None, **common,
                )
            )  # fmt: skip
        for name, parameter in made.named_parameters():
            if parameter.ndim == 2:
                # T5 divides what the tied embedding says by sqrt(d).
                parameter.data.normal_(std=1.0 if name == "shared.weight" and kind == "t5" else 0.15)
            elif name.endswith("bias"):
                parameter.data.normal_(std=0.05)
    return made


def tokenizer(kind: str):
    """The tiny tokenizer; an encoder's and an encoder-decoder's put their own tokens around a text."""
    if kind == SHIPPED:
        from peft_service.base_model import load_tokenizer

        return load_tokenizer(shipped.path())
    from tokenizers.processors import TemplateProcessing

    made = tiny_tokenizer()
    begin, end = made.bos_token, made.eos_token
    single = f"{begin} $A {end}" if kind == "bert" else f"$A {end}"
    pair = f"{begin} $A {end} $B {end}" if kind == "bert" else f"$A {end} $B {end}"
    if kind in ("bert", "t5", "bart"):
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single=single,
            pair=pair,
            special_tokens=[(begin, made.bos_token_id), (end, made.eos_token_id)],
        )
    if kind == "bert":
        made.add_special_tokens({"cls_token": begin, "sep_token": end})
    if kind in ("t5", "bart"):
        made.chat_template = None
    return made


def save(kind: str, directory: Path) -> Path:
    """`directory` as a base."""
    made = model(kind)
    made.save_pretrained(directory)
    tokenizer(kind).save_pretrained(directory)
    return directory


def rows(task: str, count: int = 32, tasks: tuple[str, ...] = ()) -> list[dict]:
    """Rows that can be learned by heart: the answer depends on the words."""
    made = []
    for number in range(count):
        one, two = WORDS[number % len(WORDS)], WORDS[(number * 7 + 3) % len(WORDS)]
        text = f"{one} {two}" + " the" * (number % 3)
        if task in ("causal_lm", "seq2seq_lm"):
            row = {"prompt": f"{text}:", "completion": f" {two} {one}"}
        elif task == "sequence_classification":
            row = {"text": text, "label": LABELS[number % 3]}
        elif task == "token_classification":
            words = text.split()
            row = {"tokens": words, "tags": [LABELS[len(word) % 3] for word in words]}
        else:
            context = f"the {one} is {two}"
            answer = {"text": [two], "answer_start": [context.rindex(two)]}
            row = {"question": f"what is {one}", "context": context, "answers": answer}
        if tasks:
            row["task"] = tasks[number % len(tasks)]
        made.append(row)
    return made


def format_of_task(task: str) -> str:
    """The format whose rows `rows` makes."""
    return {"causal_lm": "prompt_completion", "seq2seq_lm": "prompt_completion"}.get(
        task, {"sequence_classification": "classification"}.get(task, task)
    )


def objective_of(task: str):
    format = format_of_task(task)
    return next(variant() for variant in OBJECTIVES if format in variant.default_for)


def labels_of(task: str, tasks: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The labels in `rows`."""
    shape = next(
        variant() for variant in FORMATS if variant.model_fields["kind"].default == format_of_task(task)
    )
    return tuple(sorted({label for row in rows(task, tasks=tasks) for label in shape.labels(row)}))


@cache
def _tokenised(kind: str, task: str, count: int, tasks: tuple[str, ...], directory: str):
    # Of each process its own: two ranks come here at once.
    path = Path(directory) / f"rows-{kind}-{task}-{count}-{len(tasks)}-{os.getpid()}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(task, count, tasks)))
    meaning = Meaning(task, labels_of(task, tasks), tasks)
    return tokenise(path, format_of_task(task), tokenizer(kind), 64, "error", meaning)


def tokenised(kind: str, task: str, directory: Path, count: int = 32, tasks: tuple[str, ...] = ()):
    """`rows` as a run gets them."""
    return _tokenised(kind, task, count, tasks, str(directory))
