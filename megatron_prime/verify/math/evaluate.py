"""The values of formulas: exact where they are rational, and to 50 digits elsewhere. Sizes are bounded throughout."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

from megatron_prime.verify.math.expression import Node, letters
from megatron_prime.verify.math.tokens import Unreadable

DIGITS = 50
_EQUAL_DIGITS = 25
"""So many digits of two values must agree; what rounding and cancellation cost stays far below."""
_ZERO = Fraction(1, 10**35)
"""Computed values below this are 0."""
MAX_BITS = 60_000
"""Of an exact number, and of the exponent of a power of two that an inexact one may reach."""
MAX_FACTORIAL = 3000
_NUM_POINTS = 8
_MIN_POINTS = 3

Exact = tuple[Fraction, Fraction]
"""A complex number with rational parts."""
Point = Mapping[str, Fraction]


class TooLarge(ArithmeticError):
    """A value beyond all bounds."""


class Undefined(ArithmeticError):
    """No value: a division by zero, the logarithm of zero."""


def exact(node: Node, point: Point | None = None) -> Exact | None:
    """The value of a formula where it and all its parts are rational (or complex with rational parts).

    Args:
        node: the formula.
        point: values of its variables.

    Raises:
        TooLarge, Undefined: see there.
    """
    rule = _EXACT.get(node.kind)
    if node.kind == "number" and isinstance(node.value, Fraction):
        return node.value, Fraction(0)
    if node.kind == "letter":
        return None if point is None else (point[str(node.value)], Fraction(0))
    if node.kind == "constant":
        return (Fraction(0), Fraction(1)) if node.value == "i" else None
    if rule is None:
        return None
    values = [exact(arg, point) for arg in node.args]
    if any(value is None for value in values):
        return None
    result = rule(*(value for value in values if value is not None))
    if result is not None and max(_bits(part) for part in result) > MAX_BITS:
        raise TooLarge
    return result


def rational(node: Node) -> Fraction | None:
    """The value of a formula without variables where it is a rational number."""
    value = exact(node)
    return value[0] if value is not None and value[1] == 0 else None


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _times(a: Exact, b: Exact) -> Exact:
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def _multiply(*values: Exact) -> Exact:
    result = (Fraction(1), Fraction(0))
    for value in values:
        result = _times(result, value)
        if max(map(_bits, result)) > MAX_BITS:
            raise TooLarge
    return result


def _divide(a: Exact, b: Exact) -> Exact:
    size = b[0] ** 2 + b[1] ** 2
    if size == 0:
        raise Undefined
    return _times(a, (b[0] / size, -b[1] / size))


def _power(base: Exact, exponent: Exact) -> Exact | None:
    if exponent[1] != 0:
        return None
    if exponent[0].denominator != 1:
        root = _root(base, (Fraction(exponent[0].denominator), Fraction(0)))
        return None if root is None else _power(root, (Fraction(exponent[0].numerator), Fraction(0)))
    count = int(exponent[0])
    if count < 0:
        if base == (0, 0):
            raise Undefined
        return _power(_divide((Fraction(1), Fraction(0)), base), (-exponent[0], Fraction(0)))
    if _bits(base[0]) <= 1 and _bits(base[1]) <= 1 and 0 in base:
        # 0, 1, -1, i and -i stay small.
        count %= 4
        count += 4 * (count == 0 and base == (0, 0) and exponent[0] > 0)
    elif max(1, *map(_bits, base)) * count > 2 * MAX_BITS:
        raise TooLarge
    if base[1] == 0:
        return base[0] ** count, Fraction(0)
    result, square = (Fraction(1), Fraction(0)), base
    while count:
        if count % 2:
            result = _times(result, square)
        count //= 2
        square = _times(square, square)
    return result


def _root(radicand: Exact, degree: Exact) -> Exact | None:
    if radicand[1] != 0 or degree[1] != 0 or degree[0].denominator != 1 or not 2 <= degree[0] <= 64:
        return None
    value, count = radicand[0], int(degree[0])
    top, bottom = _whole_root(abs(value.numerator), count), _whole_root(value.denominator, count)
    if top is None or bottom is None or (value < 0 and count > 3):
        return None
    found = Fraction(top, bottom)
    if value >= 0:
        return found, Fraction(0)
    return (Fraction(0), found) if count == 2 else (-found, Fraction(0))


def _whole_root(value: int, degree: int) -> int | None:
    if degree == 2:
        root = math.isqrt(value)
        return root if root * root == value else None
    low, high = 0, 1 << (value.bit_length() // degree + 1)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if middle**degree < value else (low, middle)
    return low if low**degree == value else None


def _factorial(value: Exact) -> Exact | None:
    if value[1] != 0 or value[0].denominator != 1 or value[0] < 0:
        return None
    if value[0] > MAX_FACTORIAL:
        raise TooLarge
    return Fraction(math.factorial(int(value[0]))), Fraction(0)


def _binomial(top: Exact, bottom: Exact) -> Exact | None:
    if top[1] or bottom[1] or top[0].denominator != 1 or bottom[0].denominator != 1 or top[0] < 0 or bottom[0] < 0:
        return None
    if min(bottom[0], max(top[0] - bottom[0], 0)) > MAX_FACTORIAL or _bits(top[0]) > 64:
        raise TooLarge
    return Fraction(math.comb(int(top[0]), int(bottom[0]))), Fraction(0)


def _real_rule(function: Callable[[Fraction], Any]) -> Callable[[Exact], Exact | None]:
    return lambda value: None if value[1] else (Fraction(function(value[0])), Fraction(0))


_EXACT: dict[str, Callable[..., Exact | None]] = {
    "sum": lambda *values: (sum((v[0] for v in values), Fraction(0)), sum((v[1] for v in values), Fraction(0))),
    "negative": lambda value: (-value[0], -value[1]),
    "product": _multiply,
    "quotient": _divide,
    "power": _power,
    "root": _root,
    "factorial": _factorial,
    "binomial": _binomial,
    "absolute": _real_rule(abs),
    "floor": _real_rule(math.floor),
    "ceiling": _real_rule(math.ceil),
}


@lru_cache(maxsize=1)
def _mpmath() -> Any:
    import mpmath

    context = mpmath.mp.clone()
    context.dps = DIGITS
    return context


def numeric(node: Node, point: Point | None = None) -> Any:
    """The value of a formula as a number of mpmath with `DIGITS` digits.

    Raises:
        TooLarge, Undefined: see there.
        Unreadable: infinity in the middle of a formula.
    """
    mp = _mpmath()
    value = exact(node, point)
    if value is not None:
        real, imaginary = (mp.mpf(part.numerator) / part.denominator for part in value)
        return mp.mpc(real, imaginary) if value[1] else real
    if node.kind == "constant":
        if node.value == "infinity":
            raise Unreadable("infinity in a formula")
        return {"e": mp.e, "pi": mp.pi, "i": mp.j}[str(node.value)] * 1
    args = [numeric(arg, point) for arg in node.args]
    try:
        result = _NUMERIC[node.kind](mp, str(node.value), *args)
    except (ZeroDivisionError, ValueError) as error:
        raise Undefined from error
    except (OverflowError, KeyError, NotImplementedError) as error:
        raise TooLarge from error
    if not mp.isfinite(result):
        raise Undefined
    return result


def _numeric_power(mp: Any, _: str, base: Any, exponent: Any) -> Any:
    if base == 0:
        if mp.re(exponent) <= 0:
            raise Undefined
        return mp.mpf(0)
    if abs(exponent) * (abs(mp.log(abs(base), 2)) + 1) > MAX_BITS:
        raise TooLarge
    return base**exponent


def _call(mp: Any, function: str, value: Any, base: Any = None) -> Any:
    if abs(value) > 10**12 and function not in ("ln", "log", "lg"):
        raise TooLarge
    if function in ("ln", "log", "lg"):
        if value == 0 or base in (0, 1):
            raise Undefined
        logarithm = mp.log(value)
        return logarithm / mp.log(10 if function == "lg" else base) if function == "lg" or base else logarithm
    if function == "exp":
        return _numeric_power(mp, "", mp.e * 1, value)
    name = function.replace("arc", "a")
    if name not in _MPMATH_NAMES:
        raise Unreadable(f"{function} is not understood")
    return getattr(mp, name)(value)


_MPMATH_NAMES = frozenset(
    f"{arc}{name}{h}" for arc in ("", "a") for name in ("sin", "cos", "tan", "cot", "sec", "csc") for h in ("", "h")
)


def _sized(function: Callable[..., Any], limit: int) -> Callable[..., Any]:
    def rule(mp: Any, _: str, value: Any, *others: Any) -> Any:
        if max(map(abs, (value, *others))) > limit:
            raise TooLarge
        return function(mp, value, *others)

    return rule


_NUMERIC: dict[str, Callable[..., Any]] = {
    "sum": lambda mp, _, *args: mp.fsum(args),
    "negative": lambda mp, _, arg: -arg,
    "product": lambda mp, _, *args: mp.fprod(args),
    "quotient": lambda mp, _, a, b: a / b,
    "power": _numeric_power,
    "root": lambda mp, _, a, n: _numeric_power(mp, _, a, 1 / n) if a != 0 else mp.mpf(0),
    "call": _call,
    "factorial": _sized(lambda mp, a: mp.gamma(a + 1), MAX_FACTORIAL),
    "binomial": _sized(lambda mp, a, b: mp.binomial(a, b), MAX_FACTORIAL),
    "absolute": lambda mp, _, a: abs(a),
    "floor": lambda mp, _, a: mp.floor(a),
    "ceiling": lambda mp, _, a: mp.ceil(a),
    "degree": lambda mp, _, a: a * mp.pi / 180,
}


@lru_cache(maxsize=64)
def _points(names: frozenset[str]) -> tuple[dict[str, Fraction], ...]:
    """Values for variables, the same in every process: of both signs, none of them special."""
    chance = random.Random(20250203)
    return tuple(
        {
            name: Fraction(chance.choice((-1, 1) if number % 2 else (1,)) * chance.randint(210, 2890), 1009)
            for name in sorted(names)
        }
        for number in range(_NUM_POINTS)
    )


def equal(one: Node, other: Node, tolerance: Fraction | None = None) -> bool:
    """Whether two formulas have the same value, wherever both have one.

    Formulas with variables are compared at fixed points; an identity of formulas of this size that holds at all of
    them to 25 digits holds. Points where only one of the two is real count for neither.

    Raises:
        TooLarge: a value beyond all bounds.
        Unreadable: a part that has no value.
    """
    infinite = _infinity(one), _infinity(other)
    if any(infinite):
        return infinite[0] == infinite[1]
    names = letters(one)
    if names != letters(other):
        return False
    if not names:
        return _equal_at(one, other, None, tolerance) is True
    verdicts = [_equal_at(one, other, point, tolerance) for point in _points(names)]
    seen = [verdict for verdict in verdicts if verdict is not None]
    return len(seen) >= _MIN_POINTS and all(seen)


def _infinity(node: Node) -> int:
    """1 or -1 for infinity and its negative, 0 for anything else."""
    if node.kind == "negative":
        return -_infinity(node.args[0])
    return int(node.kind == "constant" and node.value == "infinity")


def _equal_at(one: Node, other: Node, point: Point | None, tolerance: Fraction | None) -> bool | None:
    """At one point; None where it says nothing."""
    try:
        a, b = exact(one, point), exact(other, point)
        if a is not None and b is not None:
            off = abs(a[0] - b[0])
            return a == b if tolerance is None else a[1] == b[1] and off <= tolerance
        mp = _mpmath()
        x, y = numeric(one, point), numeric(other, point)
    except Undefined:
        return None if point is not None else False
    if point is not None and (abs(mp.im(x)) > 1e-20) != (abs(mp.im(y)) > 1e-20):
        return None
    return close(x, y, tolerance)


def close(x: Any, y: Any, tolerance: Fraction | None = None) -> bool:
    """Whether two numbers of mpmath agree to 25 digits, or to an absolute tolerance."""
    mp = _mpmath()
    if tolerance is not None:
        return bool(abs(x - y) <= mp.mpf(tolerance.numerator) / tolerance.denominator)
    size = max(abs(x), abs(y))
    if size < mp.mpf(_ZERO.numerator) / _ZERO.denominator:
        return True
    return bool(abs(x - y) <= size * mp.mpf(10) ** -_EQUAL_DIGITS)


def proportional(one: Node, other: Node) -> int:
    """Sign of the constant that one formula is of another one: 1, -1, or 0 where there is none."""
    names = letters(one)
    if not names or names != letters(other):
        return 0
    ratios = []
    for point in _points(names):
        try:
            a, b = numeric(one, point), numeric(other, point)
        except Undefined:
            continue
        if close(a, 0) or close(b, 0):
            continue
        ratios.append(a / b)
    if len(ratios) < _MIN_POINTS or not all(close(ratio, ratios[0]) for ratio in ratios):
        return 0
    real = _mpmath().re(ratios[0])
    return 0 if abs(_mpmath().im(ratios[0])) > 1e-20 else (1 if real > 0 else -1)
