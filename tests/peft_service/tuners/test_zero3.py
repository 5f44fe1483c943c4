"""Every tuner under DeepSpeed ZeRO-3, where a parameter read outside of its module's forward is empty."""

import json
import subprocess
import sys

import pytest

from tests.peft_service.tuners.cases import CASES
from tests.servers import free_ports

TRAINER = """
import json, os, sys
import torch, deepspeed
from peft import get_peft_model
from tests.peft_service.tuners import bases
from tests.peft_service.tuners.cases import CASES

os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1])
deepspeed.init_distributed("gloo")
settings = {
    "train_micro_batch_size_per_gpu": 3,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
out = {}
for case in CASES:
    kind = "llama" if "llama" in case.kinds else case.kinds[0]
    losses = {}
    for stage in (0, 3):
        torch.manual_seed(0)
        model = get_peft_model(bases.base(kind), case.make())
        bases.stir(model, scale=0.05)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        model.config.use_cache = False
        model.train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        engine = None
        if stage == 3:
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
            assert all(p.numel() == 0 for p in parameters), case.name
        losses[stage] = []
        for _ in range(3):
            run = engine or model
            torch.manual_seed(1)
            given = bases.inputs(kind)
            bases.ready(model)
            loss = (run(**given).logits.float() ** 2).mean()
            losses[stage].append(loss.item())
            if engine:
                engine.backward(loss)
                engine.step()
            else:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        if engine:
            engine.destroy()
    out[case.name] = losses
print("RESULT" + json.dumps(out))
"""


@pytest.mark.long
def test_losses_are_those_of_one_process():
    done = subprocess.run(
        [sys.executable, "-c", TRAINER, str(free_ports(1)[0])], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.rpartition("RESULT")[2].splitlines()[0])
    assert set(results) == {case.name for case in CASES}
    for name, losses in results.items():
        assert len(set(losses["0"])) == 3, (name, losses)
        for plain, cut in zip(losses["0"], losses["3"], strict=True):
            assert abs(plain - cut) < 1e-4 * abs(plain), (name, losses)
