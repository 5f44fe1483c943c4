"""Makes a tuner of ours a PEFT method: a member of PeftType, and a row in each of PEFT's tables."""

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method


def register(name: str, config: type[Any], model: type[Any]) -> None:
    """Register a method called `name`; safe to repeat with the same classes, as on a reload of their module.

    Raises:
        ValueError: PEFT, or another module, has a method of this name already.
    """
    value = name.upper()
    if value in PeftType.__members__:
        member = PeftType(value)
        there = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
        if there is None or _named(there) != _named(config):
            raise ValueError(
                f"PEFT already has a method {value}{f' ({there.__module__})' if there else ''}; "
                f"{config.__module__} needs another name, and published adapters a conversion."
            )
        for table in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
            table.pop(member, None)
    else:
        _extend(value)
    register_peft_method(name=name, config_cls=config, model_cls=model)


def _named(kind: type[Any]) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


def _extend(value: str) -> None:
    # A plain string in PEFT's tables would load too, but PEFT and transformers ask for `.peft_type.value`.
    # Python offers no way to add a member to an enumeration, so this does what EnumType does for its own.
    member = str.__new__(PeftType, value)
    member._name_ = value
    member._value_ = value
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    type.__setattr__(PeftType, value, member)
    PeftType._member_names_.append(value)
    PeftType._member_map_[value] = member
    PeftType._value2member_map_[value] = member
