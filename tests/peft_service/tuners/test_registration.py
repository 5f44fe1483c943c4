"""Tests of adding a member to PeftType."""

import ast
import copy
import subprocess
import sys
from dataclasses import dataclass

import pytest
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from peft_service.tuners import bottleneck, registration
from tests.peft_service.tuners.cases import CASES

NAMES = sorted({str(case.make().peft_type.value) for case in CASES})


@pytest.mark.parametrize("name", NAMES)
def test_the_member_is_one_like_pefts_own(name):
    member = PeftType(name)
    assert PeftType[name] is member
    assert getattr(PeftType, name) is member
    assert isinstance(member, PeftType)
    assert isinstance(member, str)
    assert member == name
    assert (member.name, member.value) == (name, name)
    assert list(PeftType).count(member) == 1
    assert member in PeftType
    assert copy.deepcopy(member) is member
    assert copy.copy(member) is member
    assert {PeftType.LORA: 1, member: 2}[PeftType(name)] == 2
    assert repr(member) == f"<PeftType.{name}: '{name}'>"
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == PEFT_TYPE_TO_TUNER_MAPPING[member].prefix


def test_the_enumeration_is_otherwise_as_it_was():
    assert PeftType("LORA") is PeftType.LORA
    assert len(list(PeftType)) == len(set(PeftType)) == len(PeftType.__members__)
    with pytest.raises(ValueError, match="is not a valid PeftType"):
        PeftType("NO_SUCH_METHOD")


def test_registering_again_is_harmless():
    before = list(PeftType)
    registration.register("bottleneck", bottleneck.BottleneckConfig, bottleneck.BottleneckModel)
    assert list(PeftType) == before


def test_a_reload_of_the_module_registers_the_new_classes():
    code = (
        "import importlib, peft_service.tuners.bottleneck as b; from peft import PeftType, mapping;"
        "n, old = len(PeftType), b.BottleneckConfig; importlib.reload(b); assert len(PeftType) == n;"
        "assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING['BOTTLENECK'] is b.BottleneckConfig is not old"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_that_peft_has_is_refused():
    @dataclass
    class Other(PeftConfig):
        pass

    before = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA]
    with pytest.raises(ValueError, match="already has a method LORA"):
        registration.register("lora", Other, object)
    with pytest.raises(ValueError, match="already has a method BOTTLENECK"):
        registration.register("bottleneck", Other, object)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is before


def test_importing_the_package_registers_every_file_that_is_there():
    code = (
        "import peft_service.tuners, peft; print(sorted(t.value for t in peft.PeftType"
        " if peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[t].__module__.startswith('peft_service.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(NAMES) <= set(ast.literal_eval(done.stdout))
