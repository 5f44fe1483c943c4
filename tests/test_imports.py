"""What an import may cost: the CLI, the API and the spec answer without loading the training stack."""

import importlib.util
import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "ray", "transformers", "peft", "deepspeed", "bitsandbytes", "accelerate"}
SLOW = {"boto3", "botocore"}
"""Half a second: only for who really talks to a bucket."""

LIGHT = [
    "peft_service.spec",
    "peft_service.store",
    "peft_service.catalog",
    "peft_service.validate",
    "peft_service.base_model",
    "cluster.plan",
    "cluster.capacity",
    "cluster.launch",
    "jobs.settings",
    "jobs.queue",
    "jobs.request",
    "jobs.scheduler",
    "jobs.api",
    "jobs.client",
    "jobs.cli",
    "jobs.imports",
    "jobs.preview",
    "peft_service.preview",
]

SCRIPT = """
import importlib, json, sys
importlib.import_module(sys.argv[1])
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_loads_nothing_heavy(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"there is no {module}")
    done = subprocess.run([sys.executable, "-c", SCRIPT, module], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert module.partition(".")[0] in loaded
    assert loaded & (HEAVY | SLOW) == set()


def test_the_check_sees_a_heavy_import() -> None:
    command = [sys.executable, "-c", SCRIPT, "botocore"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "botocore" in json.loads(done.stdout)
