"""Hybrid and MAM: every pair of methods, parts that load alone, AdapterHub's numbers, and what is refused."""

import os
from itertools import permutations

import pytest
import torch
from pydantic import ValidationError

from peft_service import artifact, delta, methods
from peft_service.errors import InvalidRequest
from peft_service.gate import weights_of
from peft_service.methods import METHODS, Case, Material
from peft_service.methods.hybrid import LEVELS, Hybrid, together
from peft_service.methods.mam import MAM
from peft_service.methods.prefix_tuning import PrefixTuning
from peft_service.variants import kind_of
from tests import golden
from tests.methods import checks
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


EXAMPLES = {kind_of(variant): {"kind": kind_of(variant), **variant.small} for variant in METHODS}
ALL = bool(os.environ.get("METHODS_ALL"))
BASES = {"llama": "causal_lm", "bert": "sequence_classification"} | (
    {"opt": "causal_lm", "t5": "seq2seq_lm", "bart": "seq2seq_lm"} if ALL else {}
)


def pairs(base):
    """All, in both orders; without METHODS_ALL each on one base and in one order."""
    number = {kind: place for place, kind in enumerate(sorted(LEVELS))}
    for one, two in permutations(sorted(LEVELS), 2):
        if ALL or (one < two and (number[one] + number[two]) % 2 == (base == "bert")):
            yield one, two


@pytest.mark.parametrize("base", BASES)
def test_every_pair_works_or_is_refused_with_a_reason(root, tmp_path, base):
    shape, found, refused = shape_of(base, root), {}, []
    for pair in pairs(base):
        try:
            method = Hybrid(parts=[EXAMPLES[kind] for kind in pair])
            trial = Trial(method, base, BASES[base])
            methods.admit(method, shape, case_of(trial))
        except (ValidationError, InvalidRequest) as error:
            refused.append(str(error))
            continue
        live = Live(trial, root, rate=1e-2)
        start = live.engine.trainable()
        count = sum(value.numel() for value in start.values())
        assert count == methods.trainable(method, shape, live.case), pair
        if method.can.starts_as_base:
            assert difference(live.answers(), live.before, live.probe) <= 2e-5, pair
        for step in range(2):
            live.step(step)
        now = live.engine.trainable()
        assert not [name for name, value in start.items() if torch.equal(value, now[name])], pair
        live.save(tmp_path / "-".join(pair))
        found[pair] = difference(checks.load(live, tmp_path / "-".join(pair))[1], live.answers(), live.probe)
    assert len(found) > 15
    assert all(len(message) > 60 for message in refused)
    assert not {pair: worst for pair, worst in found.items() if not worst <= 2e-5}


@pytest.mark.parametrize("kind", sorted(EXAMPLES.keys() - LEVELS.keys()))
def test_what_cannot_be_a_part_says_why_and_what_can(kind):
    said = rf"'{kind}' cannot be a part: it .{{20,}}; .*What can: adapter, bitfit"
    with pytest.raises(ValidationError, match=said):
        Hybrid(parts=[{"kind": kind}, {"kind": "lora"}])


def test_bitfit_as_a_part_changes_the_base_as_it_does_alone(root, tmp_path):
    """Its directory is a delta of the base's own biases and of the head, which applies without the others."""
    live = trained(root, "bert", "sequence_classification", ({"kind": "lora", "rank": 4}, {"kind": "bitfit"}))
    live.save(tmp_path / "whole")
    made = delta.load(tmp_path / "whole" / "part-0")
    base = artifact.load_base(live.directory, live.trial.task, live.case.labels)
    own = dict(base.named_parameters())
    biases = {n for n in own if n.endswith(".bias") and ".encoder." in n}
    assert biases <= made.dense.keys() <= own.keys()
    assert all(n.endswith(".bias") or n.startswith("classifier") for n in made.dense)
    values = live.engine.trainable()
    for name, tensor in made.dense.items():
        assert not torch.equal(tensor, own[name])
        ends = name.rpartition(".")[2]
        inside = name.removesuffix(f".{ends}")
        (found,) = (
            value
            for outer, value in values.items()
            if f".{outer}".endswith(
                (f".{name}", f".{inside}.base_layer.{ends}", f".{inside}.modules_to_save.default.{ends}")
            )
        )
        assert torch.equal(tensor, found)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([{"kind": "lora"}], "at least 2"),
        ([{"kind": "lora"}, {"kind": "dora"}], "both are a LoRA"),
        ([{"kind": "prefix_tuning"}, {"kind": "prompt_tuning"}], "both are a prompt"),
        ([{"kind": "lora"}, {"kind": "lora", "rank": 2}], "there twice"),
        ([{"kind": "lora"}, {"kind": "full"}], "base's own matrices"),
        ([{"kind": "lora"}, {"kind": "nonsense"}], "is no method"),
        ([{"kind": "pasta"}, {"kind": "prompt_tuning"}], "take prefix_tuning"),
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
