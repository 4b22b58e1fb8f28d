"""Plain mappings to sections, and what is wrong with them in the words of a configuration's user."""

import difflib
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from megatron_prime.config.keys import hints_of, kinds, members, range_of, sections
from megatron_prime.errors import ConfigError

_EXPECTED = {
    "bool_type": "true or false",
    "dataclass_type": "a mapping of keys",
    "dict_type": "a mapping of keys",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_attributes_type": "a mapping of keys",
    "string_type": "text",
}
"""What should have been there, by pydantic's name of the error."""
_OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


def validate(target: Any, values: Mapping[str, Any]) -> Any:
    """Makes a section, or one of several sections that ``kind`` chooses from, out of plain mappings.

    Args:
        target: the section's class, or a union of such with a discriminator.
        values: what the YAML parser returned.

    Returns:
        The section; keys that are not given have their defaults.

    Raises:
        ConfigError: one line ``key: problem`` for everything that is wrong, each key by its full path.
    """
    try:
        return _adapter(target).validate_python(values)
    except ValidationError as error:
        found = error.errors(include_url=False)
        raise ConfigError([_problem(detail, target) for detail in found]) from None


@functools.cache
def _adapter(target: Any) -> TypeAdapter[Any]:
    return TypeAdapter(target)


def _problem(error: ErrorDetails, target: Any) -> str:
    """One of pydantic's findings as a line ``key: problem``."""
    kind, value, place = error["type"], error["input"], error["loc"]
    if kind in ("unexpected_keyword_argument", "invalid_key"):
        section, hint = _locate(place[:-1], target)
        return _unknown_key(_join(section, str(place[-1])), str(place[-1]), list(hints_of(sections(hint)[0])))
    key, hint = _locate(place, target)
    if kind == "missing":
        return f"{key}: missing; it has no default"
    if kind == "union_tag_not_found":
        return f"{_join(key, 'kind')}: missing; choose one of {_choices(kinds(hint))}"
    if kind == "union_tag_invalid":
        return f"{_join(key, 'kind')}: {_no_choice(value['kind'], list(kinds(hint)))}"
    if kind == "literal_error":
        choices = [choice for member in members(hint) for choice in get_args(member)]
        return f"{key}: {_no_choice(value, choices)}"
    if kind in _OUT_OF_RANGE:
        return f"{key}: {value} is out of range; must be {range_of(hint)}"
    if kind not in _EXPECTED:
        return f"{key}: {error['msg']}"
    expected = _EXPECTED[kind]
    if kind == "string_type" and isinstance(value, bool | int | float):
        expected += " (put it in quotes)"
    got = "null" if value is None else f"{value!r} ({type(value).__name__})"
    return f"{key or 'configuration'}: expected {expected}, got {got}"


def _locate(place: Sequence[str | int], target: Any) -> tuple[str, Any]:
    """Key path and type of what an error is about; pydantic's path of it also has the choices by ``kind``."""
    key, hint = "", target
    for part in place:
        inner = sections(hint)
        if len(inner) > 1:
            hint = kinds(hint)[str(part)]
        elif inner:
            key, hint = _join(key, str(part)), hints_of(inner[0])[str(part)]
        else:
            (items,) = (member for member in members(hint) if get_args(member))
            key, hint = f"{key}[{part}]", get_args(items)[0]
    return key, hint


def _no_choice(value: Any, choices: Sequence[Any]) -> str:
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"{value!r} is not a choice{hint}; choose one of {_choices(choices)}"


def _unknown_key(key: str, name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"{key}: unknown key; {hint}"


def _choices(choices: Iterable[Any]) -> str:
    return ", ".join(repr(choice) for choice in choices)


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
