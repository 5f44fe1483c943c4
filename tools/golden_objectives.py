"""Record what TRL's trainers compute for a tiny model, as golden files for the tests of our objectives.

Run with an environment of its own, because TRL is no part of this project:

    python3 -m venv TRL && TRL/bin/pip install trl==1.16.0 transformers==5.23.0 peft==0.21.2 torch==2.13.0
    TRL/bin/python tools/golden_objectives.py [NAME ...]     writes tests/golden/objectives-NAME.safetensors

The losses are those of the trainers' own `compute_loss`, on batches of their own collators; nothing of them
is written again here. Computed in float64 as far as TRL lets it (see README.md there), stored as float32.
Imports nothing of peft_service: what these files say must not depend on what they judge.
"""

import json
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.golden import DIRECTORY, base_weights, chirp, fill
from tests.tiny import tiny_tokenizer

LLAMA = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64,
    "tie_word_embeddings": True, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1, "use_cache": False,
}  # fmt: skip
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
LIMIT = 300_000  # bytes of one file

# (prompt, better answer, worse answer): tokens from 5 to 95, no two lengths alike
LENGTHS = ((3, 4, 2), (5, 1, 3), (1, 6, 5), (4, 2, 7))
GOOD = (True, False, True, True)


def ids(count: int, start: int) -> list[int]:
    return [5 + (start * 17 + place * 31 + place * place * 7) % 90 for place in range(count)]


PAIRS = [
    {"prompt": ids(a, 3 * n), "chosen": ids(b, 3 * n + 1), "rejected": ids(c, 3 * n + 2)}
    for n, (a, b, c) in enumerate(LENGTHS)
]
# Prompt, answer, another row's answer, whether its own is good; the KL that the others' show goes up or down.
UNPAIRED = {
    others: [
        {
            "prompt": row["prompt"],
            "completion": row["chosen"],
            "other": PAIRS[(n + turn) % len(PAIRS)][name],
            "label": GOOD[n],
        }
        for n, row in enumerate(PAIRS)
    ]
    for others, (name, turn) in {"up": ("rejected", 2), "down": ("chosen", 3)}.items()
}


def base(classes: bool = False) -> torch.nn.Module:
    """The tiny LLaMA with weights by the formula of tests/golden."""
    config = LlamaConfig(**LLAMA, attn_implementation="eager")
    if classes:
        config.num_labels = 1
    model = (LlamaForSequenceClassification if classes else LlamaForCausalLM)(config)
    fill(model, base_weights({name: list(p.shape) for name, p in model.named_parameters()}))
    return model


def lora(classes: bool = False) -> LoraConfig:
    return LoraConfig(**LORA, task_type="SEQ_CLS" if classes else "CAUSAL_LM")


def adapted(model: torch.nn.Module, scale: float) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters; LoRA's get values by formula, far from their first."""
    named = {name: p for name, p in sorted(model.named_parameters()) if p.requires_grad}
    with torch.no_grad():
        for t, (name, parameter) in enumerate(named.items()):
            if "lora_" in name:
                parameter.copy_(scale * chirp(list(parameter.shape), t + 100))
    return named


def text_rows(kind: str) -> Dataset:
    """A trainer wants to see a dataset; it is not used."""
    row: dict[str, Any] = {"prompt": "the sky", "chosen": " is blue", "rejected": " is green"}
    if kind == "unpaired":
        row = {"prompt": "the sky", "completion": " is blue", "label": True}
    return Dataset.from_list([row, {**row, "prompt": "the sea"}])


def trainer_of(kind: str, trainer_class: Any, config_class: Any, options: dict[str, Any]) -> Any:
    classes = kind == "reward"
    arguments = config_class(
        output_dir=tempfile.mkdtemp(), report_to=[], bf16=False, use_cpu=True, gradient_checkpointing=False,
        per_device_train_batch_size=2, remove_unused_columns=False, **options,
    )  # fmt: skip
    trainer = trainer_class(
        model=base(classes), args=arguments, train_dataset=text_rows(kind), processing_class=tiny_tokenizer(),
        peft_config=lora(classes),
    )  # fmt: skip
    trainer.model.double().eval()
    return trainer


def from_paper_collator(trainer: Any) -> dict[str, Any]:
    """The batch of CPO's and ORPO's collator."""
    features = []
    for row in PAIRS:
        feature: dict[str, Any] = {"prompt_input_ids": row["prompt"]}
        feature["prompt_attention_mask"] = [1] * len(row["prompt"])
        for name in ("chosen", "rejected"):
            whole = row["prompt"] + row[name]
            feature[f"{name}_input_ids"] = whole
            feature[f"{name}_attention_mask"] = [1] * len(whole)
            feature[f"{name}_labels"] = [-100] * len(row["prompt"]) + row[name]
        features.append(feature)
    return trainer.data_collator(features)


class Recorded:
    """A file in the making."""

    def __init__(self, name: str, rows: list[dict[str, Any]], scale: float):
        self.name, self.rows, self.scale = name, rows, scale
        self.cases: dict[str, Any] = {}
        self.tensors: dict[str, torch.Tensor] = {}

    def add(self, case: str, options: dict[str, Any], model: torch.nn.Module, loss_of: Any) -> None:
        """`loss_of()` after the parameters have their values."""
        named = adapted(model, self.scale)
        for parameter in named.values():
            parameter.grad = None
        loss = loss_of()
        loss.backward()
        self.cases[case] = {"options": options, "loss": float(loss)}
        for name, parameter in named.items():
            short = name.removeprefix("base_model.model.").replace(".default", "")
            assert parameter.grad is not None, name
            self.tensors[f"gradient.{case}.{short}"] = parameter.grad.float().clone().contiguous()

    def save(self) -> None:
        packages = ("trl", "transformers", "peft", "torch")
        meta = {
            "rows": self.rows, "cases": self.cases, "scale": self.scale, "base": LLAMA, "lora": LORA,
            "versions": {package: version(package) for package in packages},
        }  # fmt: skip
        path = DIRECTORY / f"objectives-{self.name}.safetensors"
        save_file(self.tensors, path, metadata={"objectives": json.dumps(meta, sort_keys=True)})
        assert path.stat().st_size < LIMIT, path


def pairs() -> Recorded:
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    file = Recorded("pairs", PAIRS, 0.3)
    rows = [{f"{name}_ids": value for name, value in row.items()} for row in PAIRS]
    for case, options in {
        "dpo": {"loss_type": ["sigmoid"], "beta": 0.1},
        "dpo-stiff": {"loss_type": ["sigmoid"], "beta": 0.5},
        "dpo-hinge": {"loss_type": ["hinge"], "beta": 0.1},
        "dpo-ipo": {"loss_type": ["ipo"], "beta": 0.1},
        "dpo-robust": {"loss_type": ["robust"], "beta": 0.1, "label_smoothing": 0.1},
        "dpo-smoothed": {"loss_type": ["aot"], "beta": 0.1, "label_smoothing": 0.1},
    }.items():
        trainer = trainer_of("pairs", DPOTrainer, DPOConfig, options)
        # `aot` sorts the pairs of a batch, and of one pair is the smoothed sigmoid, which has no own name.
        batches = [[row] for row in rows] if options["loss_type"] == ["aot"] else [rows]

        def loss_of(trainer: Any = trainer, batches: Any = batches) -> torch.Tensor:
            losses = [trainer.compute_loss(trainer.model, trainer.data_collator(batch)) for batch in batches]
            return torch.stack(losses).mean()

        file.add(case, options, trainer.model, loss_of)
    for case, trainer_class, config_class, options in (
        ("cpo", CPOTrainer, CPOConfig, {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 1.0}),
        (
            "cpo-smoothed",
            CPOTrainer,
            CPOConfig,
            {"loss_type": "sigmoid", "cpo_alpha": 0.5, "label_smoothing": 0.1},
        ),
        ("cpo-hinge", CPOTrainer, CPOConfig, {"loss_type": "hinge", "beta": 0.1, "cpo_alpha": 0.0}),
        ("cpo-ipo", CPOTrainer, CPOConfig, {"loss_type": "ipo", "beta": 0.1, "cpo_alpha": 1.0}),
        (
            "simpo",
            CPOTrainer,
            CPOConfig,
            {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
        ),
        ("orpo", ORPOTrainer, ORPOConfig, {"beta": 0.1}),
        ("orpo-heavy", ORPOTrainer, ORPOConfig, {"beta": 2.0}),
    ):
        trainer = trainer_of("pairs", trainer_class, config_class, options)
        batch = from_paper_collator(trainer)
        file.add(case, options, trainer.model, lambda t=trainer, b=batch: t.compute_loss(t.model, b))
    return file


def unpaired() -> Recorded:
    from trl import KTOConfig, KTOTrainer

    file = Recorded("unpaired", [], 0.3)
    for case, others, options in (
        ("kto", "up", {"beta": 0.1}),
        ("kto-weighted", "up", {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7}),
        ("kto-clamped", "down", {"beta": 0.1}),
    ):
        trainer = trainer_of("unpaired", KTOTrainer, KTOConfig, options)
        batch = trainer.data_collator(
            [
                {
                    "prompt_ids": row["prompt"],
                    "completion_ids": row["completion"],
                    "KL_completion_ids": row["other"],
                    "label": row["label"],
                }
                for row in UNPAIRED[others]
            ]
        )
        file.add(case, options, trainer.model, lambda t=trainer, b=batch: t.compute_loss(t.model, b))
        file.cases[case]["rows"] = UNPAIRED[others]
        file.cases[case]["kl"] = trainer._metrics["eval"]["kl"][-1]
    return file


def reward() -> Recorded:
    from trl import RewardConfig, RewardTrainer

    file = Recorded("reward", PAIRS, 0.3)
    for case, options in {"reward": {}, "reward-centred": {"center_rewards_coefficient": 0.1}}.items():
        trainer = trainer_of("reward", RewardTrainer, RewardConfig, options)
        batch = trainer.data_collator(
            [
                {"chosen_ids": row["prompt"] + row["chosen"], "rejected_ids": row["prompt"] + row["rejected"]}
                for row in PAIRS
            ]
        )
        file.add(case, options, trainer.model, lambda t=trainer, b=batch: t.compute_loss(t.model, dict(b)))
    return file


def distillation() -> Recorded:
    """The base is the teacher of itself with an adapter: their logits, in TRL's own divergence."""
    from trl.experimental.gkd import GKDTrainer

    file = Recorded("distillation", PAIRS, 0.3)
    width = max(len(row["prompt"] + row["chosen"]) for row in PAIRS)
    tokens = torch.full((len(PAIRS), width), 2)
    labels = torch.full((len(PAIRS), width), -100)
    mask = torch.zeros((len(PAIRS), width), dtype=torch.long)
    for place, row in enumerate(PAIRS):
        start, end = len(row["prompt"]), len(row["prompt"] + row["chosen"])
        tokens[place, :end] = torch.tensor(row["prompt"] + row["chosen"])
        labels[place, start:end] = tokens[place, start:end]
        mask[place, :end] = 1
    model = get_peft_model(base(), lora()).double().eval()
    teacher = base().double().eval()
    for case, beta, temperature in (
        ("forward", 0.0, 2.0), ("reverse", 1.0, 2.0), ("jensen_shannon", 0.5, 2.0), ("cold", 0.0, 0.7),
    ):  # fmt: skip

        def loss_of(beta: float = beta, temperature: float = temperature) -> torch.Tensor:
            with torch.no_grad():
                told = teacher(input_ids=tokens, attention_mask=mask).logits[:, :-1]
            said = model(input_ids=tokens, attention_mask=mask).logits[:, :-1]
            return GKDTrainer.generalized_jsd_loss(
                said, told, labels[:, 1:], beta=beta, temperature=temperature
            )

        file.add(case, {"beta": beta, "temperature": temperature}, model, loss_of)
    return file


def groups() -> Recorded:
    """GRPO: two answers to each prompt, one better than the other by some advantage."""
    from trl import GRPOConfig, GRPOTrainer

    # Prompts of one length: what is masked in front of a shorter one is NaN in eager attention, and 0 × NaN.
    rows = [
        {"prompt": ids(4, 3 * n), "completion": row[name], "advantage": sign * (0.5 + 0.25 * n)}
        for n, row in enumerate(PAIRS)
        for name, sign in (("chosen", 1), ("rejected", -1))
    ]
    file = Recorded("groups", rows, 0.3)
    answer = max(len(row["completion"]) for row in rows)
    short = [answer - len(row["completion"]) for row in rows]
    inputs = {
        "prompt_ids": torch.tensor([row["prompt"] for row in rows]),
        "prompt_mask": torch.ones(len(rows), 4, dtype=torch.long),
        "completion_ids": torch.tensor(
            [row["completion"] + [2] * less for row, less in zip(rows, short, strict=True)]
        ),
        "completion_mask": torch.tensor([[1] * (answer - less) + [0] * less for less in short]),
        "advantages": torch.tensor([row["advantage"] for row in rows], dtype=torch.float64),
        "num_items_in_batch": torch.tensor(sum(len(row["completion"]) for row in rows)),
    }
    for case, options in {
        "grpo": {"loss_type": "grpo"},
        "dapo": {"loss_type": "dapo"},
        "bnpo": {"loss_type": "bnpo"},
        "dr_grpo": {"loss_type": "dr_grpo"},
        "grpo-kl": {"loss_type": "grpo", "beta": 0.2},
        "grpo-kl-paper": {"loss_type": "grpo", "beta": 0.2, "use_bias_correction_kl": False},
        "dapo-warm-kl": {"loss_type": "dapo", "beta": 0.04, "temperature": 0.7},
    }.items():
        told = {"temperature": 1.0, "beta": 0.0, "max_completion_length": 16, "num_generations": 2, **options}
        arguments = GRPOConfig(
            output_dir=tempfile.mkdtemp(), report_to=[], bf16=False, use_cpu=True,
            gradient_checkpointing=False, per_device_train_batch_size=2, **told,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=base(), args=arguments, train_dataset=Dataset.from_list([{"prompt": "the sky"}] * 2),
            processing_class=tiny_tokenizer(), peft_config=lora(),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
        )  # fmt: skip
        trainer.model.double().eval()
        trainer.current_gradient_accumulation_steps = 1

        def loss_of(trainer: Any = trainer, told: Any = told) -> torch.Tensor:
            given = dict(inputs)
            if told["beta"]:
                whole = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
                mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
                with torch.no_grad(), trainer.model.disable_adapter():
                    given["ref_per_token_logps"] = trainer._get_per_token_logps_and_entropies(
                        trainer.model, whole, mask, answer
                    )[0]
            return trainer._compute_loss(trainer.model, given)

        file.add(case, told, trainer.model, loss_of)
    return file


FILES = {
    "pairs": pairs, "unpaired": unpaired, "reward": reward, "distillation": distillation, "groups": groups,
}  # fmt: skip

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    for wanted in sys.argv[1:] or FILES:
        FILES[wanted]().save()
