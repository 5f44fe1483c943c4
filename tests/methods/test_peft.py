"""The table of peft's further types: as the installed peft has them, and every type passes the checks."""

import dataclasses

import pytest
from pydantic import ValidationError

from peft_service import base_model, methods
from peft_service.methods.peft import ADMITTED, NOT_OFFERED, REFUSED, RESERVED, PeftNative
from tests.methods import checks
from tests.methods.checks import Trial

SMALL = {
    "TRAINABLE_TOKENS": {"token_indices": [5, 100, 257]},
    "SHIRA": {"r": 4},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "OFT": {"oft_block_size": 8},
    "HRA": {"r": 4},
    "ROAD": {"group_size": 16},
    "PSOFT": {"r": 4, "psoft_alpha": 4},
    "FOURIERFT": {"n_frequency": 50},
    "WAVEFT": {"n_frequency": 50},
    "C3A": {"block_size": 8},
    "RANDLORA": {"r": 4},
    "VBLORA": {"r": 4, "num_vectors": 16, "vector_length": 8},
    "UNILORA": {"theta_d_length": 64},
    "PVERA": {"r": 8},
    "TINYLORA": {"u": 8},
    "MISS": {"r": 4},
    "HIRA": {"r": 4},
    "GRALORA": {"r": 4, "alpha": 8},
    "DELORA": {"r": 4},
    "PEANUT": {"r": 4},
    "DEFT": {"r": 4},
    "SUPERTUNING": {"sparsity": 0.9},
}
OTHER = {
    "LOKR": {"r": 2, "decompose_both": True, "decompose_factor": 2},
    "OFT": {"oft_block_size": 4, "block_share": True},
    "BOFT": {"boft_block_size": 8},
    "ROAD": {"group_size": 8, "variant": "road_4"},
    "PSOFT": {"r": 6, "psoft_mag_a": False, "psoft_orth": False},
    "RANDLORA": {"r": 5},
    "OSF": {"effective_rank": 10},
    "DEFT": {"r": 40, "decomposition_method": "qr"},
    "VBLORA": {"r": 2, "num_vectors": 8, "vector_length": 4},
}
"""Settings that change the count in another way."""


def test_every_type_of_the_installed_peft_is_admitted_or_refused():
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType

    theirs = {
        str(getattr(kind, "value", kind))
        for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
        if config.__module__.startswith("peft.")
    }
    assert not set(ADMITTED) & set(REFUSED)
    assert set(ADMITTED) | set(REFUSED) == theirs
    assert all(name in PeftType.__members__ for name in ADMITTED)


@pytest.mark.parametrize("name", ADMITTED)
def test_the_settings_are_those_of_the_installed_peft(name):
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    common = {field.name for field in dataclasses.fields(peft.PeftConfig)}
    theirs = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[name])} - common
    hidden = set(NOT_OFFERED.get(name, ())) | RESERVED
    assert set(ADMITTED[name].settings) == theirs - hidden
    assert set(NOT_OFFERED.get(name, ())) <= theirs


@pytest.mark.parametrize(("base", "task"), [("llama", "causal_lm"), ("bert", "sequence_classification")])
@pytest.mark.parametrize("name", ADMITTED)
def test_it_holds_what_every_method_must(name, base, task, root, tmp_path):
    trial = Trial(PeftNative(type=name, config=SMALL.get(name, {})), base, task)
    if ADMITTED[name].place == "embedding" and base == "bert":
        with pytest.raises(methods.InvalidRequest, match="no head"):
            methods.admit(trial.method, checks.shape_of(base, root), checks.case_of(trial))
        return
    methods.admit(trial.method, checks.shape_of(base, root), checks.case_of(trial))
    checks.check_all(trial, root, tmp_path / "made")


@pytest.mark.parametrize("name", OTHER)
def test_the_count_holds_with_other_settings(name, root):
    trial = Trial(PeftNative(type=name, config=OTHER[name]), "llama", "causal_lm")
    live = checks.Live(trial, root)
    trained = sum(p.numel() for p in live.engine.parameters.values())
    assert trained == trial.method.trainable(checks.shape_of("llama", root), live.case)


@pytest.mark.parametrize("name", ADMITTED)
def test_it_learns(name, root):
    """Sixty steps at one of two rates, on a decoder."""
    trial = Trial(PeftNative(type=name, config=SMALL.get(name, {})), "llama", "causal_lm")
    best = 1e9
    for factor in (10.0, 50.0):
        live = checks.Live(trial, root, steps=60, rate=min(0.3, trial.method.rate() * factor))
        start = live.loss()
        for number in range(60):
            live.step(number)
        best = min(best, live.loss())
        if best < 0.9 * start:
            break
    if name == "TRAINABLE_TOKENS":  # three tokens, of which few rows have one
        assert best < start
    else:
        assert best < 0.9 * start, f"from {start:.3f} to {best:.3f}"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"type": "LOHAA"}, "Did you mean LOHA"),
        ({"type": "ADAMSS"}, "scikit-learn"),
        ({"type": "LOHA", "config": {"rnk": 4}}, "Did you mean 'r'|It has: alpha"),
        ({"type": "LOHA", "config": {"rank_dropuot": 0.1}}, "Did you mean 'rank_dropout'"),
        ({"type": "LOHA", "config": {"r": "four"}}, "is a whole number, at least 1, by default 8"),
        ({"type": "LOHA", "config": {"r": 0}}, "at least 1"),
        ({"type": "LOHA", "config": {"r": 2.5}}, "a whole number"),
        ({"type": "LOHA", "config": {"r": True}}, "a whole number"),
        ({"type": "LOHA", "config": {"module_dropout": 1.0}}, "from 0 and below 1"),
        ({"type": "LOHA", "config": {"rank_dropout": float("nan")}}, "from 0 and below 1"),
        ({"type": "OFT", "config": {"oft_block_size": 0}}, "at least 1"),
        ({"type": "OFT", "config": {"num_cayley_neumann_terms": 1}}, "at least 2"),
        ({"type": "OFT", "config": {"coft": 1}}, "true or false"),
        ({"type": "SHIRA", "config": {"mask_type": "best"}}, "one of random"),
        ({"type": "ROAD", "config": {"variant": "road_3"}}, "one of road_1, road_2, road_4"),
        ({"type": "ROAD", "config": {"group_size": 1}}, "an even number, at least 2"),
        ({"type": "OSF", "config": {"effective_rank": 0}}, "at least 1"),
        ({"type": "SUPERTUNING", "config": {"sparsity": 1.0}}, "above 0 and below 1"),
        (
            {"type": "TRAINABLE_TOKENS", "config": {"token_indices": ["a"]}},
            "a list of different whole numbers",
        ),
        ({"type": "TRAINABLE_TOKENS", "config": {"token_indices": [5, 5]}}, "a list of different"),
        ({"type": "GRALORA", "config": {"r": 5}}, "must divide config.r, which is 5"),
        ({"type": "VBLORA", "config": {"num_vectors": 1}}, "must be at most config.num_vectors"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(fields, said):
    with pytest.raises(ValidationError, match=said):
        PeftNative.model_validate(fields)


def test_a_block_that_does_not_divide_is_refused_before_anything_runs(root):
    trial = Trial(PeftNative(type="OFT", config={"oft_block_size": 24}), "llama", "causal_lm")
    with pytest.raises(methods.InvalidRequest, match="such as 8"):
        methods.admit(trial.method, checks.shape_of("llama", root), checks.case_of(trial))


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("SHIRA", {}, r"k_proj is 16 x 32, which allows config\.r up to 10, and it is 32"),
        ("PSOFT", {}, r"config\.r up to 16"),
        ("MISS", {}, r"config\.r up to 32"),
        ("OSF", {"effective_rank": 16}, r"config\.effective_rank up to 15"),
        ("FOURIERFT", {}, r"config\.n_frequency up to 512"),
        ("WAVEFT", {"n_frequency": 513}, r"config\.n_frequency up to 512"),
    ],
)
def test_what_is_too_much_for_the_narrowest_layer_is_refused_with_the_most_there_is(name, config, said, root):
    """The installed peft fails on these while it attaches, but for OSF, which then has nothing to train."""
    trial = Trial(PeftNative(type=name, config=config), "llama", "causal_lm")
    with pytest.raises(methods.InvalidRequest, match=said) as refused:
        methods.admit(trial.method, checks.shape_of("llama", root), checks.case_of(trial))
    assert refused.value.param == "adapter.config"
    if name == "OSF":
        return
    with pytest.raises((ValueError, RuntimeError)):
        trial.method.attach(
            base_model.load(checks.directory_of("llama", root), precision="fp32"),
            checks.case_of(trial),
            methods.Material(),
        )


@pytest.mark.parametrize("name", ADMITTED)
def test_every_type_has_its_name_and_its_rate(name):
    kind, preset = methods.names()[methods.spelled(name)]
    assert (kind, preset) == ("peft", {"type": name})
    assert 0 < PeftNative(type=name).rate() < 0.1
