"""What the fields of the sections say about their keys: types, ranges, and what a resumed run may change."""

import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin

from pydantic.fields import FieldInfo

from megatron_prime.config.section import MayChange, Section


def hints_of(section: type) -> dict[str, Any]:
    """Type of each key of a section, with what its annotation says besides."""
    return typing.get_type_hints(section, include_extras=True)


def members(hint: Any) -> tuple[Any, ...]:
    """The types that a value may have, None among them, without what annotations say besides."""
    if get_origin(hint) is Annotated:
        return members(get_args(hint)[0])
    if get_origin(hint) in (types.UnionType, typing.Union):
        return tuple(found for member in get_args(hint) for found in members(member))
    return (hint,)


def sections(hint: Any) -> tuple[type, ...]:
    """The sections that a key may hold: none for a plain value, several where ``kind`` chooses."""
    return tuple(member for member in members(hint) if isinstance(member, type) and issubclass(member, Section))


def kinds(hint: Any) -> dict[str, type]:
    """Sections by the value of ``kind`` that chooses them."""
    return {get_args(hints_of(section)["kind"])[0]: section for section in sections(hint)}


def annotations(hint: Any) -> Iterator[Any]:
    """What an annotation says besides the type, of a union's members and a list's items too."""
    if get_origin(hint) is Annotated:
        yield from get_args(hint)[1:]
    if get_origin(hint) is not None:
        for argument in get_args(hint):
            yield from annotations(argument)


def range_of(hint: Any) -> str:
    """The range of a key's numbers in words, such as ``>= 1`` or ``in [0, 1)``; empty where there is none."""
    limits: dict[str, float] = {}
    for found in annotations(hint):
        for limit in found.metadata if isinstance(found, FieldInfo) else ():
            limits |= {name: getattr(limit, name) for name in ("gt", "ge", "lt", "le") if hasattr(limit, name)}
    low, high = limits.get("gt", limits.get("ge")), limits.get("lt", limits.get("le"))
    if low is None:
        return ""
    if high is None:
        return f"{'>' if 'gt' in limits else '>='} {low:.10g}"
    return f"in {'(' if 'gt' in limits else '['}{low:.10g}, {high:.10g}{')' if 'lt' in limits else ']'}"


def changeable_keys(section: type, prefix: str = "", of_all: bool = False) -> Iterator[str]:
    """Full paths of the keys that a run may be resumed with other values of.

    Args:
        section: to look through, with the sections in it.
        prefix: path of the section itself, with a dot behind it.
        of_all: whether the section as a whole is marked.
    """
    for name, hint in hints_of(section).items():
        # A mark belongs to the key itself, so it stands outside of everything else.
        marked = of_all or (get_origin(hint) is Annotated and any(isinstance(m, MayChange) for m in get_args(hint)[1:]))
        for inner in sections(hint):
            yield from changeable_keys(inner, f"{prefix}{name}.", marked)
        if marked and not sections(hint):
            yield f"{prefix}{name}"
