"""Hybrid and MAM: parts that load alone, AdapterHub's numbers, and combinations that are refused."""

import pytest
import torch
from pydantic import ValidationError

from peft_service import artifact, methods
from peft_service.errors import InvalidRequest
from peft_service.gate import weights_of
from peft_service.methods import Case, Material
from peft_service.methods.hybrid import Hybrid, together
from peft_service.methods.mam import MAM
from peft_service.methods.prefix_tuning import PrefixTuning
from tests import golden
from tests.methods.checks import Live, Trial, case_of, difference, shape_of
from tests.peft_service.tuners import adapterhub

PARTS = (
    {"kind": "LoRA", "rank": 4, "alpha": 8},
    {"kind": "pfeiffer", "size": 8},
    {"kind": "prompt_tuning", "virtual_tokens": 3},
)


def trained(root, base="llama", task="causal_lm", parts=PARTS):
    live = Live(Trial(Hybrid(parts=parts), base, task), root, rate=1e-2)
    for step in range(3):
        live.step(step)
    return live


def alone(live, directory):
    """(model, answers) of one part's directory on a fresh base."""
    base = artifact.load_base(live.directory, live.trial.task, live.case.labels, dtype=torch.float32)
    base.config.pad_token_id = 2
    return artifact.load(base, directory)


def answers(model, live):
    with torch.no_grad():
        logits = model(**live.probe.inputs).logits
    return {"logits": logits[:, -live.probe.tokens_BT.shape[1] :] if logits.ndim == 3 else logits}


def test_every_part_trains_and_loads_alone_and_resting_parts_leave_the_others(root, tmp_path):
    """All parts but one put back to what does nothing: the answers of that one's directory alone."""
    live = trained(root, parts=PARTS[:2])
    begin = Live(live.trial, root)
    start = begin.engine.trainable()
    for name, value in live.engine.trainable().items():
        if "lora_A" not in name:
            assert not torch.equal(value, start[name]), name
    live.save(tmp_path / "whole")
    for number, mark in enumerate(("lora_", "bottleneck_")):
        names = [name for name, _ in weights_of(tmp_path / "whole" / f"part-{number}").items()]
        assert names
        assert all(mark in name and "base_layer" not in name for name in names)
        one = answers(alone(live, tmp_path / "whole" / f"part-{number}"), live)
        kept = live.engine.trainable()
        with torch.no_grad():
            for name, parameter in live.engine.parameters.items():
                if mark not in name:
                    parameter.copy_(start[name])
        two = answers(live.engine.model.eval(), live)
        with torch.no_grad():
            for name, parameter in live.engine.parameters.items():
                parameter.copy_(kept[name])
        assert difference(one, two, live.probe) <= 2e-5
        assert difference(one, live.before, live.probe) > 1e-3


@pytest.mark.parametrize(
    ("base", "task", "parts"),
    [
        ("llama", "causal_lm", PARTS),
        ("bert", "sequence_classification", PARTS),
        ("llama", "causal_lm", ({"kind": "ssf"}, {"kind": "lora", "rank": 4}, {"kind": "tiny_attention"})),
        ("bert", "token_classification", ({"kind": "dora", "rank": 4}, {"kind": "adapter", "size": 4})),
    ],
)
def test_what_is_saved_is_what_was_trained(root, tmp_path, base, task, parts):
    live = trained(root, base, task, parts)
    said = live.answers()
    live.save(tmp_path / "whole")
    values = sum(t.numel() for t in weights_of(tmp_path / "whole").values())
    assert values == methods.stored(live.trial.method, shape_of(base, root), live.case)
    loaded = answers(alone(live, tmp_path / "whole"), live)
    assert difference(loaded, said, live.probe) <= 2e-5


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([{"kind": "lora"}], "at least 2"),
        ([{"kind": "lora"}, {"kind": "dora"}], "both are a LoRA"),
        ([{"kind": "prefix_tuning"}, {"kind": "prompt_tuning"}], "both are a prompt"),
        ([{"kind": "lora"}, {"kind": "lora", "rank": 2}], "there twice"),
        ([{"kind": "lora"}, {"kind": "full"}], "cannot be a part"),
        ([{"kind": "lora"}, {"kind": "nonsense"}], "cannot be a part"),
        ([{"kind": "lora"}, {"kind": "adapter", "sizes": 3}], "sizes"),
        ([{"kind": "lora", "init": "pissa"}, {"kind": "adapter"}], "init pissa"),
        ([{"kind": "qlora"}, {"kind": "adapter"}], "base.quantize"),
    ],
)
def test_combinations_that_cannot_be_are_refused(parts, said):
    with pytest.raises(ValidationError, match=said):
        Hybrid(parts=parts)


def test_a_limit_names_its_part(root):
    hybrid = Hybrid(parts=[{"kind": "lora"}, {"kind": "prefix_tuning"}])
    assert not hybrid.can.gradient_checkpointing
    assert hybrid.can.why["gradient_checkpointing"].startswith("its part prefix_tuning: ")
    assert hybrid.can.tasks == ("causal_lm", "seq2seq_lm")
    assert together(Hybrid(**Hybrid.small).parts).starts_as_base
    trial = Trial(hybrid, "bert", "token_classification")
    with pytest.raises(InvalidRequest, match="prefix_tuning"):
        methods.admit(hybrid, shape_of("bert", root), case_of(trial))
    again = Hybrid.model_validate(hybrid.model_dump(mode="json"))
    assert again == hybrid


def test_each_part_learns_at_its_own_rate_in_proportion(root):
    live = trained(root)
    rates = {name: live.attached.ratio(name) * live.trial.method.rate() for name in live.engine.parameters}
    for part in live.trial.method.parts:
        mark = {"lora": "lora_", "adapter": "bottleneck_", "prompt_tuning": "prompt_encoder"}[part.kind]
        found = {round(rate, 9) for name, rate in rates.items() if mark in name}
        assert found == {round(part.rate(), 9)}


def test_mam_is_adapterhubs_through_the_method():
    recorded = golden.load("mam-llama")
    model = recorded.base()
    model.new_head = []
    attached = MAM(virtual_tokens=3, size=4, scale=4.0).attach(model, Case(), Material())
    model = attached.model.eval()
    hub = {
        (*adapterhub.place(n, "llama"), adapterhub.bottleneck_part(n)): n
        for n in recorded.adapter
        if not n.startswith("pool.")
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "bottleneck_parts" in name:
                place = adapterhub.ours(name.removeprefix("base_model."))
                parameter.copy_(recorded.adapter[hub.pop((*place, name.split(".default.")[1]))])
        assert not hub
        (prefix,) = (t for n, t in recorded.adapter.items() if n.startswith("pool."))
        weight = model.prompt_encoder["default"].embedding.weight
        weight.copy_(prefix.view(weight.shape))
    given = {name: value for name, value in recorded.inputs.items() if name != "position_ids"}
    torch.testing.assert_close(model(**given).logits, recorded.output, rtol=1e-5, atol=3e-5)


def test_mam_has_the_papers_scale_and_count(root):
    method = MAM(**MAM.small)
    adapter, prefix = method._whole(Case()).ordered
    assert (adapter.variant, adapter.scale) == ("parallel", 4.0)
    assert prefix == PrefixTuning(virtual_tokens=5)
    d, m, k = 32, 8, 16
    shape = shape_of("llama", root)
    assert method.trainable(shape, Case()) == 2 * (2 * d * m + d + m) + 2 * 2 * 5 * k
