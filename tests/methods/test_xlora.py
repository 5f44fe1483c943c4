"""X-LoRA: what the router scales, and an artifact that is whole wherever it is put."""

import shutil

import pytest
import torch

from peft_service import artifact, methods
from peft_service.errors import InvalidRequest
from peft_service.methods.lora import LoRA
from peft_service.methods.xlora import XLoRA
from peft_service.tuners.xlora import attach_router
from tests.methods import checks
from tests.methods.checks import Live, Trial, case_of, directory_of, shape_of

SMALL = XLoRA(sources=("a", "b"))


def base_of(root):
    return artifact.load_base(directory_of("llama", root), "causal_lm", dtype=torch.float32).eval()


def test_a_router_that_chooses_one_is_that_lora(root):
    """With its bias alone it gives every token and layer the same weights: (1, 0), or (1/2, 1/2)."""
    live = Live(Trial(SMALL, "llama", "causal_lm"), root)
    sources = checks.sources(live.trial, root)
    last = live.attached.model.base_model.internal_xlora_classifier.layers[-1]
    batch = live.batch(range(4))
    for chosen in (0, 1):
        last.weight.data.zero_()
        last.bias.data.copy_((torch.arange(len(last.bias)) % 2 == chosen) * 100.0)
        live.engine.model.eval()
        with torch.no_grad():
            found = live.engine.model(**batch.inputs).logits
            wanted = artifact.load(base_of(root), sources[chosen])(**batch.inputs).logits
            base = base_of(root)(**batch.inputs).logits
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert (wanted - base).abs().max() > 1e-3


@pytest.mark.parametrize(
    "fields", [{"depth": 3, "size": 7}, {"layerwise": False}, {"depth": 2, "size": 5, "layerwise": False}]
)
def test_the_count_is_the_formulas_for_every_router(root, fields):
    method = XLoRA(sources=("a", "b"), **fields)
    live = Live(Trial(method, "llama", "causal_lm"), root)
    names = [name for name, _ in live.attached.model.named_parameters() if _.requires_grad]
    assert all("internal_xlora_classifier" in name for name in names)
    count = sum(p.numel() for p in live.engine.parameters.values())
    assert count == methods.trainable(method, shape_of("llama", root), live.case)


def test_the_router_learns_which_rows_belong_to_which_lora(root, tmp_path):
    """Each LoRA knows one half of the rows by heart. The suite's own sources have hardly learned anything, so
    that no router among them can."""
    halves, places = (range(0, 32, 2), range(1, 32, 2)), []
    for number, rows in enumerate(halves):
        expert = Live(Trial(LoRA(rank=8, alpha=16), "llama", "causal_lm"), root)
        optimizer = torch.optim.AdamW(expert.engine.parameters.values(), lr=1e-2, weight_decay=0)
        for _ in range(60):
            (expert.objective.loss_sum(expert.engine.model, expert.batch(rows))[0] / 60).backward()
            optimizer.step()
            optimizer.zero_grad()
        places.append(expert.save(tmp_path / str(number)))

    live = Live(Trial(SMALL, "llama", "causal_lm"), root)
    model = base_of(root)
    router = attach_router(model, live.case, XLoRA(sources=("a", "b"), depth=2, size=64), places)
    router.model.eval()

    def loss(rows):
        batch = live.batch(rows)
        nll, _ = live.objective.loss_sum(router.model, batch)
        return nll / live.objective.targets(batch)

    start = float(loss(range(32)))
    with torch.no_grad():
        experts = [
            float(live.objective.loss_sum(artifact.load(base_of(root), place), live.batch(range(32)))[0])
            / int(live.objective.targets(live.batch(range(32))))
            for place in places
        ]
    trained = [p for p in router.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0)
    for _ in range(120):
        loss(range(32)).backward()
        optimizer.step()
        optimizer.zero_grad()
    end = float(loss(range(32)))
    assert end < 0.75 * min(start, *experts), (start, experts, end)


def test_the_artifact_is_whole_after_a_move(root, tmp_path):
    """The LoRAs it was trained with are gone from where they were."""
    trial = Trial(SMALL, "llama", "causal_lm")
    live = Live(trial, root, rate=0.05)
    copies = []
    for number, source in enumerate(live.attached.sources):
        copies.append(tmp_path / f"source-{number}")
        shutil.copytree(source, copies[-1])
    live.attached.sources = tuple(copies)
    for step in range(3):
        live.step(step)
    said = live.answers()
    live.save(tmp_path / "saved")
    shutil.move(tmp_path / "saved", tmp_path / "elsewhere")
    for copy in copies:
        shutil.rmtree(copy)
    assert checks.difference(checks.load(live, tmp_path / "elsewhere")[1], said, live.probe) <= 1e-5
    assert str(tmp_path) not in (tmp_path / "elsewhere" / "adapter_config.json").read_text()


def test_what_cannot_work_is_refused(root):
    with pytest.raises(InvalidRequest, match="set targets to"):
        Live(Trial(XLoRA(sources=("a", "b"), targets=("q_proj",)), "llama", "causal_lm"), root)
    shape = shape_of("llama", root)
    renamed = tuple((name.replace("model.", "transformer."), o, i) for name, o, i in shape.linears)
    case = case_of(Trial(SMALL, "llama", "causal_lm"))
    with pytest.raises(InvalidRequest, match="use arrow"):
        methods.admit(SMALL, shape.model_copy(update={"linears": renamed}), case)
    with pytest.raises(InvalidRequest, match="replayed"):
        methods.admit(SMALL, shape, case.model_copy(update={"gradient_checkpointing": True}))
