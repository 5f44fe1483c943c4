"""What the demo says about an adapter is measured, by libraries that know nothing of us."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.demo import Report
from tests.tiny import save_tiny_base, tiny_tokenizer

SCRIPT = Path(__file__).parents[2] / "jobs" / "demo_compare.py"
ROWS = [
    {"messages": [{"role": "user", "content": "add two"}, {"role": "assistant", "content": "five"}]},
    {
        "messages": [
            {"role": "user", "content": "what is the sky?"},
            {"role": "assistant", "content": "the sky is blue, over the lazy dog"},
        ]
    },
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


def test_held_out_loss_is_what_transformers_itself_computes_on_the_answers_alone(base: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from jobs.demo_compare import held_out_loss

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer: Any = tiny_tokenizer()
    nll, count = 0.0, 0
    for row in ROWS:
        # Another way to the same tokens: the template's own {% generation %} mask.
        encoded = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        tokens = torch.tensor([encoded["input_ids"]])
        labels = tokens.masked_fill(torch.tensor([encoded["assistant_masks"]]) == 0, -100)
        targets = int((labels != -100).sum())
        nll += float(model(input_ids=tokens, labels=labels).loss.detach()) * targets
        count += targets
    assert held_out_loss(model, tokenizer, ROWS) == pytest.approx(nll / count, rel=1e-5)


def test_the_script_runs_on_its_own_and_a_fresh_lora_changes_nothing(base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    adapter, validation = tmp_path / "adapter", tmp_path / "rows.jsonl"
    get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"])
    ).save_pretrained(adapter)
    tiny_tokenizer().save_pretrained(adapter)
    validation.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    question = {
        "base": str(base),
        "adapter": str(adapter),
        "validation": str(validation),
        "prompts": ["add two and three"],
    }
    done = subprocess.run(
        [sys.executable, "-P", str(SCRIPT)],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["adapter_loss"] == pytest.approx(found["base_loss"], rel=1e-6)
    (answer,) = found["answers"]
    assert answer["before"] == answer["after"]


def test_the_script_imports_nothing_of_this_repository() -> None:
    imports = [
        line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith(("import ", "from "))
    ]
    assert not {name.partition(".")[0] for name in imports} & {"jobs", "cluster", "peft_service"}


def test_only_a_lower_loss_of_a_job_that_succeeded_is_better() -> None:
    assert Report(status="succeeded", base_loss=4.0, adapter_loss=1.0).better
    assert not Report(status="succeeded", base_loss=4.0, adapter_loss=4.0).better
    assert not Report(status="failed", base_loss=4.0, adapter_loss=1.0).better
    assert not Report().better
