"""A base with and without an adapter, by transformers and peft alone: held-out loss, and answers to prompts.

A script and not a module of ours: it imports nothing of this repository. It reads
{"base", "adapter", "validation", "prompts"} as JSON from its input and writes one line of JSON.

Shapes: T tokens of one row, V vocabulary entries.
"""

import json
import sys
from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 48


def main() -> None:
    asked = json.load(sys.stdin)
    tokenizer = AutoTokenizer.from_pretrained(asked["adapter"])
    base = AutoModelForCausalLM.from_pretrained(asked["base"], dtype=torch.float32).eval()
    with open(asked["validation"]) as lines:
        rows = [json.loads(line) for line in lines]
    prompts = asked["prompts"]
    # Before the adapter: PEFT puts its layers into the very same model.
    base_loss = held_out_loss(base, tokenizer, rows)
    before = [answer(base, tokenizer, prompt) for prompt in prompts]
    tuned = PeftModel.from_pretrained(base, asked["adapter"]).eval()
    result = {
        "base_loss": base_loss,
        "adapter_loss": held_out_loss(tuned, tokenizer, rows),
        "answers": [
            {"prompt": prompt, "before": old, "after": answer(tuned, tokenizer, prompt)}
            for prompt, old in zip(prompts, before, strict=True)
        ],
    }
    sys.stdout.write(json.dumps(result) + "\n")


@torch.inference_mode()
def held_out_loss(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    """Mean negative log-likelihood of the last message's tokens, over all rows."""
    nll, count = 0.0, 0
    for row in rows:
        messages = row["messages"]
        tokens_T = ids(tokenizer, messages, add_generation_prompt=False)
        start = len(ids(tokenizer, messages[:-1], add_generation_prompt=True))
        logits_TV = model(torch.tensor([tokens_T])).logits[0]
        targets_T = torch.tensor(tokens_T[start:])
        predicted_TV = logits_TV[start - 1 : -1].float()
        nll += float(functional.cross_entropy(predicted_TV, targets_T, reduction="sum"))
        count += len(targets_T)
    return nll / count


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, prompt: str) -> str:
    tokens_T = ids(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
    end = tokenizer.eos_token_id
    made = model.generate(
        input_ids=torch.tensor([tokens_T]),
        attention_mask=torch.ones(1, len(tokens_T), dtype=torch.long),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end,
    )
    return str(tokenizer.decode(made[0, len(tokens_T) :], skip_special_tokens=True)).strip()


def ids(tokenizer: Any, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> list[int]:
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


if __name__ == "__main__":
    main()
