"""Record which tokens TRL and LLaMA-Factory learn of the same rows, as a golden file for our tests.

Each in an environment of its own; LLaMA-Factory 0.9.5 wants an older transformers, and without its
dependencies for pictures and sound:

    python3 -m venv TRL && TRL/bin/pip install trl==1.16.0 torch
    TRL/bin/python tools/golden_tokens.py trl
    python3 -m venv LF && LF/bin/pip install --no-deps llamafactory==0.9.5
    LF/bin/pip install transformers==4.57.6 datasets==4.0.0 peft==0.18.1 trl==0.24.0 accelerate==1.11.0 \
        torch omegaconf sentencepiece tiktoken fire einops pillow httpx torchdata
    LF/bin/python tools/golden_tokens.py llamafactory

Writes its part of tests/golden/trained-tokens.json: counts and hashes, no text. Needs ../shared/data. Imports
nothing of peft_service: what the file says must not depend on what it judges.
"""

import copy
import csv
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "DISABLE_VERSION_CHECK": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.data.compared import (
    ANSWERED,
    GOLDEN,
    PLAIN_ROWS,
    SHARED,
    TOKENIZERS,
    TRAJECTORIES,
    TRAJECTORY_TOOLS,
    TRL_ROWS,
    Tokens,
    reading,
)

IGNORED = -100


def read(name: str) -> list[dict[str, Any]]:
    """The rows of a file under ../shared/data."""
    path = SHARED / name
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    found: list[dict[str, Any]] = json.loads(text)
    return found


def learned(ids: list[int], labels: list[int]) -> Tokens:
    assert len(ids) == len(labels)
    return ids, [label != IGNORED for label in labels]


def answer(prompt: list[int], said: list[int]) -> Tokens:
    return [*prompt, *said], [False] * len(prompt) + [True] * len(said)


# ------------------------------------------------------------------------------------------------------- TRL


def of_trl() -> dict[str, Any]:
    """What TRL's own trainers hold after their constructors: nothing is called from outside."""
    made: dict[str, Any] = {}
    for name, make in TOKENIZERS.items():
        found = {}
        cases = {f"rows/{case}": rows for case, rows in TRL_ROWS.items()}
        for file, (prompt, completion) in ANSWERED.items():
            rows = read(file)[:PLAIN_ROWS]
            cases[f"file/{file}"] = [{"prompt": r[prompt], "completion": r[completion]} for r in rows]
        tools = read(TRAJECTORY_TOOLS)
        said = [row["messages"] for row in read(TRAJECTORIES)]
        cases[f"file/{TRAJECTORIES}"] = [{"messages": messages, "tools": tools} for messages in said]
        cases[f"file, calls written anew/{TRAJECTORIES}"] = [
            {"messages": _plain_calls(messages, anew=True), "tools": tools} for messages in said
        ]
        for case, rows in cases.items():
            if name == "gpt2" and "tools" in rows[0]:
                continue  # the ChatML template knows none
            found[case] = reading(_trl_sequences(case, rows, make()))
        made[name] = found
    return made


def _trl_sequences(case: str, rows: list[dict[str, Any]], tokenizer: Any) -> Iterator[Tokens]:
    import torch
    import trl
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    if case.startswith("rows/prompt-only"):
        # What trl/trainer/grpo_trainer.py does with prompts before it generates.
        for row in rows:
            prompt = row["prompt"]
            if isinstance(prompt, str):
                ids = tokenizer(text=prompt)["input_ids"]
            else:
                ids = tokenizer.apply_chat_template(
                    prompt, add_generation_prompt=True, tokenize=True, return_dict=True
                )["input_ids"]
            yield ids, [False] * len(ids)
        return
    # Tools as JSON in a string, which TRL takes too: Arrow would give every schema the others' keys as null.
    rows = [{**row, "tools": json.dumps(row["tools"])} if "tools" in row else row for row in rows]
    if any("messages" in row for row in rows):
        rows = [{**row, "messages": _plain_calls(row["messages"])} for row in rows]
    data = Dataset.from_list(rows)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **small))
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "output_dir": folder,
            "report_to": "none",
            "use_cpu": True,
            "max_length": None,
            "bf16": False,
        }
        if "chosen" in rows[0]:
            trainer = trl.DPOTrainer(
                model,
                ref_model=copy.deepcopy(model),
                args=trl.DPOConfig(**options),
                train_dataset=data,
                processing_class=tokenizer,
            )
            for row in trainer.train_dataset:
                yield answer(row["prompt_ids"], row["chosen_ids"])
                yield answer(row["prompt_ids"], row["rejected_ids"])
        elif "label" in rows[0]:
            trainer = trl.KTOTrainer(
                model,
                ref_model=copy.deepcopy(model),
                args=trl.KTOConfig(**options, per_device_train_batch_size=2),
                train_dataset=data,
                processing_class=tokenizer,
            )
            for row in trainer.train_dataset:
                yield answer(row["prompt_ids"], row["completion_ids"])
        else:
            trainer = trl.SFTTrainer(
                model,
                args=trl.SFTConfig(**options, assistant_only_loss="messages" in rows[0]),
                train_dataset=data,
                processing_class=tokenizer,
            )
            for row in trainer.train_dataset:
                yield learned(row["input_ids"], row["labels"])


def _plain_calls(messages: list[dict[str, Any]], anew: bool = False) -> list[dict[str, Any]]:
    """Arguments as a string: as objects, Arrow would give each call the keys of all others.

    `anew`: a string is parsed and written again, as chat templates write an object.
    """
    made = []
    for message in messages:
        calls = message.get("tool_calls")
        if calls:
            calls = [
                {
                    **call,
                    "function": {
                        **call["function"],
                        "arguments": _string(call["function"]["arguments"], anew),
                    },
                }
                for call in calls
            ]
        made.append({**message, "tool_calls": calls or None})
    return made


def _string(arguments: Any, anew: bool) -> str:
    if isinstance(arguments, str):
        if not anew:
            return arguments
        arguments = json.loads(arguments)
    return json.dumps(arguments, ensure_ascii=False)


# --------------------------------------------------------------------------------------------- LLaMA-Factory

DEMOS = {
    "llamafactory/identity.json": ("sft", {}),
    "llamafactory/alpaca_en_demo.json": ("sft", {}),
    "llamafactory/alpaca_zh_demo.json": ("sft", {}),
    "llamafactory/glaive_toolcall_en_demo.json": ("sft", None),
    "llamafactory/dpo_en_demo.json": ("rm", None),
    "llamafactory/kto_en_demo.json": ("kto", None),
    "llamafactory/c4_demo.jsonl": ("pt", None),
}
"""File -> (stage, what dataset_info.json of the demos says of it, None: as it is there)."""
OF_THE_NEXT_ENGINE = {
    "llamafactory/v1_sft_demo.jsonl": "chatml",
    "llamafactory/v1_dpo_demo.jsonl": "chatml",
    "llamafactory/reason_tool_use_demo_50.jsonl": "qwen3",
}
"""Demos of llamafactory.v1 -> the name of its renderer that can write them."""


def of_llamafactory() -> dict[str, Any]:
    """What its own loader, template and processors make of its demos; sound is never touched."""
    import transformers  # noqa: F401 - looks for torchaudio by itself, before there is an empty one

    sys.modules["torchaudio"] = ModuleType("torchaudio")
    made: dict[str, Any] = {}
    for name, make in TOKENIZERS.items():
        found = {}
        template = _template(name)
        with tempfile.TemporaryDirectory() as folder:
            listed = json.loads((SHARED / "llamafactory" / "dataset_info.json").read_text())
            entries = {}
            for file, (stage, entry) in DEMOS.items():
                key = Path(file).stem
                entries[file] = (stage, {**(listed[key] if entry is None else entry)})
            for file, (prompt, completion) in ANSWERED.items():
                entries[file] = ("sft", {"columns": {"prompt": prompt, "response": completion}})
            info = {file: {**entry, "file_name": str(SHARED / file)} for file, (_, entry) in entries.items()}
            (Path(folder) / "dataset_info.json").write_text(json.dumps(info))
            for file, (stage, _) in entries.items():
                if name == "gpt2" and "toolcall" in file:
                    continue  # the ChatML template knows none
                rows = _processed(file, stage, template, make(), folder)
                found[f"file/{file}"] = reading(rows)
        if name == "gpt2":
            for file, renderer in OF_THE_NEXT_ENGINE.items():
                rows = list(_rendered(file, renderer, make()))
                found[f"v1/{file}"] = reading(rows)
                if renderer != "chatml":
                    # Its prompts have words of their own, so only what is learned can be compared.
                    said = [[i for i, yes in zip(ids, mask, strict=True) if yes] for ids, mask in rows]
                    found[f"v1-answers/{file}"] = reading((ids, [True] * len(ids)) for ids in said)
        made[name] = found
    return made


def _template(name: str) -> Any:
    """LLaMA-Factory's own ChatML; for the shipped base one with the text that its template writes."""
    from llamafactory.data.formatter import FunctionFormatter, StringFormatter, ToolFormatter
    from llamafactory.data.template import TEMPLATES, register_template
    from llamafactory.data.tool_utils import TOOLS, FunctionCall, ToolUtils

    if name == "gpt2":
        return TEMPLATES["chatml"]

    class Shipped(ToolUtils):
        @staticmethod
        def tool_formatter(tools: list[dict[str, Any]]) -> str:
            wrapped = [{"type": "function", "function": tool} for tool in tools]
            lines = [json.dumps(tool, ensure_ascii=False) for tool in wrapped]
            return "\n".join(["You may call these tools:", *lines])

        @staticmethod
        def function_formatter(functions: list[FunctionCall]) -> str:
            return "".join(
                f'<tool_call>{{"name": {json.dumps(name)}, "arguments": {arguments}}}</tool_call>'
                for name, arguments in functions
            )

        @staticmethod
        def tool_extractor(content: str) -> Any:
            return content

    TOOLS["shipped"] = Shipped()
    ask = "<|im_end|><|im_start|>assistant<|im_sep|>"
    register_template(
        "shipped",
        format_user=StringFormatter(slots=["<|im_start|>user<|im_sep|>{{content}}" + ask]),
        format_assistant=StringFormatter(slots=["{{content}}<|im_end|>"]),
        format_system=StringFormatter(slots=["<|im_start|>system<|im_sep|>{{content}}<|im_end|>"]),
        format_observation=StringFormatter(slots=["<|im_start|>tool<|im_sep|>{{content}}" + ask]),
        format_function=FunctionFormatter(slots=["{{content}}<|im_end|>"], tool_format="shipped"),
        format_tools=ToolFormatter(tool_format="shipped"),
    )
    return TEMPLATES["shipped"]


def _processed(file: str, stage: Any, template: Any, tokenizer: Any, folder: str) -> Iterator[Tokens]:
    from llamafactory.data.loader import get_dataset
    from llamafactory.hparams import DataArguments, ModelArguments
    from transformers import Seq2SeqTrainingArguments

    template.fix_special_tokens(tokenizer)
    data = DataArguments(
        template="chatml",
        dataset=file,
        dataset_dir=folder,
        cutoff_len=1_000_000,
        train_on_prompt=False,
        mask_history=False,
        packing=False,
        overwrite_cache=True,
        max_samples=PLAIN_ROWS if file in ANSWERED else None,
    )
    training = Seq2SeqTrainingArguments(output_dir=folder, report_to="none", use_cpu=True)
    model = ModelArguments(model_name_or_path="unused", cache_dir=folder)
    made = get_dataset(template, model, data, training, stage, tokenizer)["train_dataset"]
    for row in made:
        if stage == "rm":
            yield learned(row["chosen_input_ids"], row["chosen_labels"])
            yield learned(row["rejected_input_ids"], row["rejected_labels"])
        elif stage == "pt":
            yield row["input_ids"], [True] * len(row["input_ids"])
        else:
            yield learned(row["input_ids"], row["labels"])


def _rendered(file: str, renderer: str, tokenizer: Any) -> Iterator[Tokens]:
    """What the engine of llamafactory.v1 renders, sequence after sequence."""
    from llamafactory.v1.core.data_engine import DataEngine
    from llamafactory.v1.core.utils.rendering import Renderer

    engine, render = DataEngine(str(SHARED / file)), Renderer(renderer, tokenizer)
    for index in range(len(engine)):
        made = render.process_samples([engine[index]])[0]
        ids, labels = made["input_ids"], made["labels"]
        kinds = made.get("token_type_ids", [1] * len(ids))
        for kind in sorted(set(kinds)):
            at = [place for place, one in enumerate(kinds) if one == kind]
            yield learned([ids[place] for place in at], [labels[place] for place in at])


SOURCES = {
    "trl": (of_trl, ("trl", "transformers", "tokenizers")),
    "llamafactory": (of_llamafactory, ("llamafactory", "transformers", "tokenizers")),
}


def main() -> None:
    source = sys.argv[1]
    make, packages = SOURCES[source]
    known = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    known[source] = {"versions": {name: version(name) for name in packages}, **make()}
    GOLDEN.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
