"""What a base is asked to do: the task, which architectures can do it, and how large its head is."""

import re
from typing import Literal, get_args

Architecture = Literal["decoder", "encoder", "encoder_decoder"]
Task = Literal[
    "causal_lm", "seq2seq_lm", "sequence_classification", "token_classification", "question_answering"
]
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)
TASKS: tuple[Task, ...] = get_args(Task)
CLASSIFYING: tuple[Task, ...] = ("sequence_classification", "token_classification", "question_answering")
"""Tasks that put a new head on the base; it is trained with every method and saved with the adapter."""

AUTO_CLASSES: dict[Task, str] = {
    "causal_lm": "AutoModelForCausalLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
}
"""The class of transformers that has the head."""
PEFT_TASKS: dict[Task, str] = {
    "causal_lm": "CAUSAL_LM",
    "seq2seq_lm": "SEQ_2_SEQ_LM",
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
}
"""peft's names for them."""

IN_BLOCK = re.compile(r"\.\d+\.")
"""In the names of what the transformer's numbered blocks have; outside are embeddings, heads and poolers."""

_OF: dict[Architecture, tuple[Task, ...]] = {
    "decoder": ("causal_lm", *CLASSIFYING),
    "encoder": CLASSIFYING,
    "encoder_decoder": ("seq2seq_lm", *CLASSIFYING),
}

_DENSE_HEADS = {
    "sequence_classification": {"roberta", "xlm-roberta", "camembert", "distilbert", "electra", "t5", "mt5"}
    | {"umt5", "bart", "mbart"},
    "token_classification": set[str](),
    "question_answering": set[str](),
}
"""Model types whose head has a d x d layer before the labels."""
_SCORE_HEADS = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "opt", "gpt2", "gpt_neox"}
"""Decoders: a linear layer without bias on the last token; tags and answers have a bias."""
POOLED_HEADS = {"bert", "albert"}
"""Sequence classification reads a pooled first token; a checkpoint without that pooler gets a new one."""
_POSSIBLE = _SCORE_HEADS | POOLED_HEADS | _DENSE_HEADS["sequence_classification"]


def tasks_of(architecture: Architecture) -> tuple[Task, ...]:
    return _OF[architecture]


_WITHOUT: dict[Task, set[str]] = {
    "token_classification": {"bart", "mbart", "opt"},
    "question_answering": {"gemma", "gemma2", "phi3"},
}
"""Model types for which transformers has no class with that head."""


def has_known_head(model_type: str, task: Task) -> bool:
    """Whether transformers has a class for this task and `head_parameters` knows its size."""
    return task not in CLASSIFYING or (model_type in _POSSIBLE and model_type not in _WITHOUT.get(task, ()))


def head_parameters(task: Task, model_type: str, hidden: int, labels: int, pooled: bool) -> int:
    """Parameters of the new head. `pooled`: the checkpoint has a pooler.

    A linear layer of `labels` outputs (two for a question's answer: its first and its last token), and
    before it, for some model types, a dense layer of hidden x hidden.
    """
    if task not in CLASSIFYING:
        return 0
    outputs = 2 if task == "question_answering" else labels
    bias = 0 if model_type in _SCORE_HEADS and task == "sequence_classification" else outputs
    head = hidden * outputs + bias
    if model_type in _DENSE_HEADS[task]:
        head += hidden * hidden + hidden
    if model_type in POOLED_HEADS and task == "sequence_classification" and not pooled:
        head += hidden * hidden + hidden
    return head
