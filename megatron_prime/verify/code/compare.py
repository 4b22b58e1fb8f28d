"""Whether what a program gave is what was expected. Runs outside the sandbox, on plain data."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

TOLERANCE = 1e-6
"""Absolute and relative, for numbers that the expected output gives with a decimal point or an exponent."""
_DECIMAL = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?")


def same_tokens(expected: str, output: str) -> bool:
    """The same words in the same order, whatever the white space between them; case counts."""
    wanted, given = expected.split(), output.split()
    return len(wanted) == len(given) and all(map(_same_token, wanted, given))


def same_lines(expected: str, output: str) -> bool:
    """The same lines but for blanks at the ends of lines and empty lines at the end."""
    return _lines(expected) == _lines(output)


def same_lines_in_any_order(expected: str, output: str) -> bool:
    """The same words line by line, the lines in any order."""
    return Counter(map(_words, _lines(expected))) == Counter(map(_words, _lines(output)))


CHECKERS: dict[str, Callable[[str, str], bool]] = {
    "tokens": same_tokens,
    "lines": same_lines,
    "unordered_lines": same_lines_in_any_order,
}
"""What a problem with standard output may ask for by name; ``tokens`` where it does not ask."""


def same_values(expected: Any, value: Any) -> bool:
    """Whether a returned value equals the expected JSON value.

    Tuples count as lists and keys that JSON turned into text as numbers; order counts.

    Args:
        expected: from JSON.
        value: plain built-in data.
    """
    if isinstance(expected, float) and _is_number(value):
        return _close(expected, value)
    if isinstance(expected, list):
        items = _items(value)
        return items is not None and len(items) == len(expected) and all(map(same_values, expected, items))
    if isinstance(expected, dict):
        if not isinstance(value, dict) or len(value) != len(expected):
            return False
        named = {_key(key): item for key, item in value.items()}
        return all(key in named and same_values(item, named[key]) for key, item in expected.items())
    if isinstance(expected, str) or isinstance(value, str) or expected is None:
        return type(expected) is type(value) and expected == value
    return _is_number(value) and expected == value


def _same_token(expected: str, given: str) -> bool:
    if expected == given:
        return True
    if not _DECIMAL.fullmatch(expected):
        return False
    try:
        # float() also reads "nan", "infinity" and digits with underscores.
        number = float(expected)
        return math.isfinite(number) and "_" not in given and _close(number, float(given))
    except ValueError:
        return False


def _close(expected: float, given: float | int) -> bool:
    if not math.isfinite(expected):
        return expected == given
    try:
        return math.isclose(expected, given, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    except OverflowError:
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _items(value: Any) -> list[Any] | None:
    return list(value) if isinstance(value, list | tuple) else None


def _key(key: Any) -> str:
    if isinstance(key, bool) or key is None:
        return {True: "true", False: "false", None: "null"}[key]
    return str(key)


def _lines(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _words(line: str) -> tuple[str, ...]:
    return tuple(line.split())
