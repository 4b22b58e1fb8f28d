"""Values of formulas: exact ones beside fractions, inexact ones beside Python's functions, and their bounds."""

from __future__ import annotations

import cmath
import math
from fractions import Fraction

import pytest

from megatron_prime.verify.math.evaluate import TooLarge, Undefined, equal, exact, numeric, proportional, rational
from megatron_prime.verify.math.expression import Node, parse
from megatron_prime.verify.math.tokens import tokenize


def read(formula: str) -> Node:
    return parse(tokenize(formula))


@pytest.mark.parametrize(
    ("formula", "value"),
    [
        ("0.1+0.2", (Fraction(3, 10), 0)),
        ("(1+2i)(3-i)", (5, 5)),
        ("1/(1+i)", (Fraction(1, 2), Fraction(-1, 2))),
        ("i^{4000003}", (0, -1)),
        (r"\sqrt{-4}", (0, 2)),
        (r"\sqrt[3]{-8}", (-2, 0)),
        (r"8^{2/3}", (4, 0)),
        (r"(2/3)^{-3}", (Fraction(27, 8), 0)),
        (r"\sqrt{2}", None),
        (r"\pi - \pi", None),
        (r"(-8)^{1/4}", None),
    ],
)
def test_rational_values_are_exact_and_others_are_none(formula: str, value: tuple[Fraction, Fraction] | None) -> None:
    assert exact(read(formula)) == value


def test_a_rational_number_has_no_imaginary_part() -> None:
    assert rational(read("7/2")) == Fraction(7, 2)
    assert rational(read("1+i")) is None and rational(read(r"\sqrt2")) is None


@pytest.mark.parametrize(
    ("formula", "value"),
    [
        (r"\sin(1)+\cos^2(2)", math.sin(1) + math.cos(2) ** 2),
        (r"\log_2 10", math.log2(10)),
        (r"\ln 10", math.log(10)),
        (r"\lg 50", math.log10(50)),
        (r"e^{\pi}", math.exp(math.pi)),
        (r"\arctan(3)", math.atan(3)),
        (r"\sqrt{2}+\sqrt[3]{5}", math.sqrt(2) + 5 ** (1 / 3)),
        (r"2.5!", math.gamma(3.5)),
        (r"e^{2i}", cmath.exp(2j)),
        (r"\sqrt{-2}", cmath.sqrt(-2)),
        (r"180^\circ", math.pi),
        (r"|1-\sqrt3|", abs(1 - math.sqrt(3))),
        (r"\exp(1)", math.e),
    ],
)
def test_inexact_values_are_those_of_python(formula: str, value: complex) -> None:
    assert complex(numeric(read(formula))) == pytest.approx(value, rel=1e-14)


@pytest.mark.parametrize("formula", ["1/0", r"0^{-1}", r"\ln 0", r"\frac{1}{\sin 0 - 0}", r"\log_1 5"])
def test_no_value_is_an_error_of_its_own(formula: str) -> None:
    with pytest.raises(Undefined):
        numeric(read(formula))


@pytest.mark.parametrize(
    "formula",
    [
        "9^{9^{9}}",
        "100000!",
        r"\binom{1000000000}{500000000}",
        r"\sin(10^{10000})",
        r"2^{100000} * 3^{100000}",
        r"e^{10^9}",
    ],
)
def test_values_beyond_all_bounds_are_not_computed(formula: str) -> None:
    with pytest.raises(TooLarge):
        numeric(read(formula))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("x+1", "1+x", True),
        ("(x+1)^2", "x^2+2x+1", True),
        ("(x+1)^2", "x^2+2x+2", False),
        ("x", "y", False),
        (r"\sin^2 x + \cos^2 x + y - y", "1", False),  # the variables differ
        (r"\sin(2x)", r"2\sin x\cos x", True),
        (r"\sqrt{x^2}", "|x|", True),
        (r"\sqrt{x^2}", "x", False),
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        (r"\sqrt{2}", "1.414213562373", False),
        ("0.5", "1/2", True),
        (r"\infty", r"-\infty", False),
        (r"\infty", r"\infty", True),
        ("1/0", "1/0", False),
        (r"\pi", "3.14159265358979323846264338327950288", True),
    ],
)
def test_formulas_are_equal_where_their_values_are(one: str, other: str, expected: bool) -> None:
    assert equal(read(one), read(other)) is expected


@pytest.mark.parametrize(("other", "expected"), [("3.14", True), ("3.13", False), (r"\pi+0.004", True)])
def test_a_tolerance_is_absolute(other: str, expected: bool) -> None:
    assert equal(read(r"\pi"), read(other), Fraction(1, 200)) is expected


@pytest.mark.parametrize(
    ("one", "other", "sign"),
    [("2x+4", "x+2", 1), ("x+2", "-3x-6", -1), ("x+2", "x+3", 0), ("x+2", "2y+4", 0), ("5", "10", 0)],
)
def test_a_constant_factor_has_a_sign(one: str, other: str, sign: int) -> None:
    assert proportional(read(one), read(other)) == sign
