"""The one plug-in rule: a file in a folder is a variant, a frozen pydantic model tagged by `kind`."""

import importlib
import pkgutil
from collections.abc import Iterable
from typing import Annotated, Any, Union

from pydantic import BaseModel, ConfigDict, Field


class Frozen(BaseModel):
    """A value: immutable, and an unknown key is an error instead of a silent typo."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def variants_of(
    parent: type[Frozen], package: str, path: Iterable[str], tag: str = "kind"
) -> tuple[type[Frozen], ...]:
    """Import every module of `package` and return `parent`'s direct subclasses, sorted by their tag.

    `tag` is another name of the field only where a protocol of other people's has one.

    Raises:
        TypeError: a variant has no literal default for the tag, or two variants share one.
    """
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")
    variants = sorted(parent.__subclasses__(), key=lambda variant: kind_of(variant, tag))
    kinds = [kind_of(variant, tag) for variant in variants]
    if len(set(kinds)) != len(kinds):
        raise TypeError(f"two variants in {package} share a {tag}: {kinds}")
    return tuple(variants)


def kind_of(variant: type[Frozen], tag: str = "kind") -> str:
    """The name a user writes for this variant."""
    field = variant.model_fields.get(tag)
    if field is None or not isinstance(field.default, str):
        raise TypeError(f"{variant.__name__} needs `{tag}: Literal['…'] = '…'`")
    return field.default


def union_of(variants: tuple[type[Frozen], ...], tag: str = "kind") -> Any:
    """The tagged union of `variants`, for use as a field's type."""
    if len(variants) == 1:
        return variants[0]
    return Annotated[Union[variants], Field(discriminator=tag)]  # noqa: UP007 - a tuple made at run time
