"""Strict decoding of plain mappings into the dataclasses of `schema`.

Nothing is guessed: an unknown key, a missing key or a value of the wrong type is a problem. All
problems of a configuration are collected, each with its full key path, before any is raised.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

_INVALID: Any = object()
"""Stands for a value whose problem has been recorded; it never leaves this module."""


def decode(target: Any, value: Any, problems: list[str]) -> Any:
    """Decodes ``value`` to the type ``target``.

    Args:
        target: a dataclass, a union of dataclasses with a ``kind`` field, or a type of a schema field.
        value: what the YAML parser returned.
        problems: gets one line ``key: problem`` for everything that is wrong.

    Returns:
        The decoded value; meaningless if ``problems`` has grown.
    """
    return _decode(target, value, "", problems)


def _decode(target: Any, value: Any, key: str, problems: list[str]) -> Any:
    origin, args = typing.get_origin(target), typing.get_args(target)
    if dataclasses.is_dataclass(target):
        return _decode_dataclass(target, value, key, problems)
    if origin in (types.UnionType, typing.Union):
        return _decode_union(args, value, key, problems)
    if origin is Literal:
        return _decode_literal(args, value, key, problems)
    if origin is list:
        if not isinstance(value, list):
            return _wrong_type("a list", value, key, problems)
        return [_decode(args[0], item, f"{key}[{i}]", problems) for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            return _wrong_type("a mapping of keys", value, key, problems)
        return dict(value)
    return _decode_scalar(target, value, key, problems)


def _decode_dataclass(target: Any, value: Any, key: str, problems: list[str], default: Any = None) -> Any:
    """Decodes a section; keys that are not given come from ``default``, else from the field's own default."""
    if not isinstance(value, Mapping):
        return _wrong_type("a mapping of keys", value, key, problems)
    known = [field.name for field in dataclasses.fields(target)]
    problems.extend(_unknown_key(str(name), known, key) for name in value if name not in known)
    hints = typing.get_type_hints(target)
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(target):
        path = _join(key, field.name)
        if field.name in value:
            arguments[field.name] = _decode_field(field, hints[field.name], value[field.name], path, problems)
        elif default is not None:
            arguments[field.name] = getattr(default, field.name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{path}: missing; it has no default")
            arguments[field.name] = _INVALID
    return _INVALID if any(v is _INVALID for v in arguments.values()) else target(**arguments)


def _decode_field(field: dataclasses.Field[Any], hint: Any, value: Any, key: str, problems: list[str]) -> Any:
    if dataclasses.is_dataclass(hint):
        # A section given in part keeps the rest of *this* field's default: `prm.optimizer.lr` alone
        # must not change `prm.optimizer.clip_grad` to the general default of optimizers.
        factory = field.default_factory
        default = factory() if factory is not dataclasses.MISSING else None
        return _decode_dataclass(hint, value, key, problems, default)
    return _decode(hint, value, key, problems)


def _decode_union(members: Sequence[Any], value: Any, key: str, problems: list[str]) -> Any:
    if types.NoneType in members:
        if value is None:
            return None
        (member,) = (m for m in members if m is not types.NoneType)
        return _decode(member, value, key, problems)
    if not isinstance(value, Mapping):
        return _wrong_type("a mapping of keys", value, key, problems)
    by_kind = {typing.get_args(typing.get_type_hints(member)["kind"])[0]: member for member in members}
    kind_key = _join(key, "kind")
    if "kind" not in value:
        problems.append(f"{kind_key}: missing; choose one of {_choices(by_kind)}")
        return _INVALID
    kind = _decode_literal(tuple(by_kind), value["kind"], kind_key, problems)
    return _INVALID if kind is _INVALID else _decode_dataclass(by_kind[kind], value, key, problems)


def _decode_literal(choices: Sequence[Any], value: Any, key: str, problems: list[str]) -> Any:
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return value
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    problems.append(f"{key}: {value!r} is not a choice{hint}; choose one of {_choices(choices)}")
    return _INVALID


def _decode_scalar(target: Any, value: Any, key: str, problems: list[str]) -> Any:
    if target is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            return _wrong_type("a number", value, key, problems)
        return number if math.isfinite(number) else _wrong_type("a finite number", value, key, problems)
    if type(value) is target:
        return value
    if target is str and isinstance(value, bool | int | float):
        return _wrong_type("text (put it in quotes)", value, key, problems)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return _wrong_type(names[target], value, key, problems)


def _wrong_type(expected: str, value: Any, key: str, problems: list[str]) -> Any:
    got = "null" if value is None else f"{value!r} ({type(value).__name__})"
    problems.append(f"{key or 'configuration'}: expected {expected}, got {got}")
    return _INVALID


def _unknown_key(name: str, known: Sequence[str], key: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"{_join(key, name)}: unknown key; {hint}"


def _choices(choices: typing.Iterable[Any]) -> str:
    return ", ".join(repr(choice) for choice in choices)


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
