"""Beside a base held in 4 bits: every method that says so trains there for real.

The base's bytes stay as they are, the first answers are the quantised base's, the artifact says the same on
a fresh quantised base, and merges exactly into the full one.
"""

import pytest
import torch

from cluster.plan import base_bytes
from peft_service import artifact, base_model, methods
from peft_service.errors import InvalidRequest
from peft_service.methods import METHODS
from peft_service.methods.lora import LoRA
from peft_service.methods.peft import ADMITTED, PeftNative
from peft_service.tasks import tasks_of
from peft_service.variants import kind_of
from tests.methods import checks
from tests.methods.checks import Live, Trial
from tests.methods.test_conformance import ALL
from tests.methods.test_peft import SMALL

EXAMPLES = {
    kind_of(variant): checks.example(variant)
    for variant in METHODS
    if variant.trains and kind_of(variant) != "peft"
}
EXAMPLES |= {
    f"lora-{init}": LoRA(rank=4, alpha=8, init=init)
    for init in ("gaussian", "pissa", "olora", "eva", "loftq", "orthogonal")
}
EXAMPLES |= {f"peft-{name}": PeftNative(type=name, config=SMALL.get(name, {})) for name in ADMITTED}
ABLE = [name for name, method in EXAMPLES.items() if method.can.nf4]
# Biases and a new head are where four bits have failed; T5 has layers that transformers leaves whole.
ON_BERT = [name for name in ABLE if name.startswith("peft-") and name != "peft-TRAINABLE_TOKENS"]
HEADED = ("p_tuning_v2", "unipelt")
"""Never for text that is to be written."""
TRIALS = [(name, "llama", "causal_lm") for name in ABLE if name not in (*ON_BERT, *HEADED)]
TRIALS += [
    (name, "bert", "sequence_classification")
    for name in ABLE
    if name not in ("poly", "prefix_tuning", "peft-TRAINABLE_TOKENS") and not name.startswith("lora-")
]
TRIALS += [("lora", "t5", "seq2seq_lm"), ("lora", "bert", "token_classification")]
if not ALL:  # each once, beside biases and a new head where it can be
    TRIALS = list({name: (name, base, task) for name, base, task in TRIALS}.values())


def bits(tensor):
    """Packed codes, read as floats, may be NaN, which equals nothing."""
    return tensor.detach().clone().contiguous().view(torch.uint8)


@pytest.mark.parametrize(("name", "base", "task"), TRIALS)
def test_it_trains_beside_four_bits(name, base, task, root, tmp_path):
    method = EXAMPLES[name]
    live = Live(Trial(method, base, task), root, rate=1e-2, quantize="nf4")
    case, shape = live.case, checks.shape_of(base, root)
    methods.admit(method, shape, case)
    named = dict(live.attached.model.named_parameters())
    trained = {n for n, p in named.items() if p.requires_grad}
    assert sum(named[n].numel() for n in trained) == methods.trainable(method, shape, case)
    assert all(named[n].dtype == torch.float32 for n in trained)
    if method.can.starts_as_base and name != "lora-loftq":  # which starts nearer to the base that was not
        assert checks.difference(live.answers(), live.before, live.probe) <= checks.TOLERANCE
    packed = {n: bits(p) for n, p in named.items() if n not in trained}
    assert any(p.shape[-1] == 1 for n, p in named.items() if n in packed), "nothing is in 4 bits"
    first = {n: named[n].detach().clone() for n in trained}
    for number in range(4):
        live.step(number)
    assert any(not torch.equal(first[n], named[n]) for n in trained)
    assert all(torch.equal(before, bits(named[n])) for n, before in packed.items())

    said, directory = live.answers(), live.save(tmp_path / "made")
    for quantize in ("nf4", None):
        fresh = base_model.load(
            live.directory, precision="fp32", quantize=quantize, task=task, labels=case.labels, seed=5
        )
        fresh.config.pad_token_id = 2
        model = artifact.load(fresh, directory)
        with torch.no_grad():
            again = checks._answers(model, live.probe)
        if quantize:
            assert checks.difference(again, said, live.probe) <= checks.TOLERANCE
        elif hasattr(model, "merge_and_unload") and method.can.mergeable:
            merged = model.merge_and_unload().eval()
            with torch.no_grad():
                worst = checks.difference(checks._answers(merged, live.probe), again, live.probe)
            assert worst <= checks.TOLERANCE * 5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("base", checks.bases.KINDS)
def test_a_plan_knows_the_bytes_of_a_base_in_four_bits(base, precision, root):
    task = tasks_of(checks.bases.ARCHITECTURES[base])[0]
    directory = checks.directory_of(base, root)
    model = base_model.load(directory, precision=precision, quantize="nf4", task=task, labels=("a", "b"))
    head = tuple(f"{name}." for name in model.new_head)
    held = [p for n, p in model.named_parameters() if not head or not n.startswith(head)]
    planned, _ = base_bytes(checks.shape_of(base, root).for_task(task), precision, "nf4")
    assert planned == sum(p.numel() * p.element_size() for p in held)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in ABLE])
def test_what_does_not_is_refused_with_what_does(name, root):
    base, task = ("t5", "seq2seq_lm") if name == "xattn" else ("llama", "causal_lm")
    trial = Trial(EXAMPLES[name], base, task)
    case = checks.case_of(trial).model_copy(update={"quantize": "nf4"})
    with pytest.raises(InvalidRequest, match=r"base held in nf4: .{60}") as refused:
        methods.admit(trial.method, checks.shape_of(base, root), case)
    assert refused.value.param == "base.quantize"


def test_poly_adds_into_what_a_layer_with_a_bias_says(root):
    trial = Trial(EXAMPLES["poly"], "bert", "sequence_classification")
    case = checks.case_of(trial)
    methods.admit(trial.method, checks.shape_of("bert", root), case)
    case = case.model_copy(update={"quantize": "nf4"})
    with pytest.raises(InvalidRequest, match="mtl_lora"):
        methods.admit(trial.method, checks.shape_of("bert", root), case)


@pytest.mark.parametrize(
    ("base", "task"),
    [
        ("llama", "token_classification"),
        ("bert", "sequence_classification"),
        ("bert", "question_answering"),
        ("t5", "sequence_classification"),
        ("t5", "token_classification"),
        ("bart", "question_answering"),
    ],
)
def test_a_new_head_is_never_in_four_bits(base, task, root):
    import bitsandbytes

    labels = checks.bases.labels_of(task)
    model = base_model.load(
        checks.directory_of(base, root), precision="fp32", quantize="nf4", task=task, labels=labels
    )
    packed = [n for n, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(packed) > 8
    assert model.new_head
    assert not [n for n in packed if n.startswith(tuple(model.new_head))]
