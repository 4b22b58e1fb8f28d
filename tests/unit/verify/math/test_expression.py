"""Formulas as trees, beside Python's own arithmetic; and what is not understood to its end."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prime.verify.math.evaluate import exact
from megatron_prime.verify.math.expression import Node, both_signs, letters, number, parse
from megatron_prime.verify.math.tokens import Unreadable, tokenize


def read(formula: str) -> Node:
    return parse(tokenize(formula))


@pytest.mark.parametrize(
    ("formula", "value"),
    [
        ("1+2*3", Fraction(7)),
        ("2-3-4", Fraction(-5)),
        ("8/4/2", Fraction(1)),
        ("-2^2", Fraction(-4)),
        ("2^3^2", Fraction(512)),
        ("2^{-1}", Fraction(1, 2)),
        (r"\frac12", Fraction(1, 2)),
        (r"\frac{1+2}{4}", Fraction(3, 4)),
        (r"3\frac{1}{2}", Fraction(7, 2)),
        ("3 1/2", Fraction(7, 2)),
        (r"3 \cdot \frac{1}{2}", Fraction(3, 2)),
        ("2(3)(4)", Fraction(24)),
        ("1--5", Fraction(6)),
        ("4!", Fraction(24)),
        (r"\binom{5}{2}", Fraction(10)),
        ("|2-5|", Fraction(3)),
        (r"\lfloor 7/2 \rfloor", Fraction(3)),
        (r"\lceil 7/2 \rceil", Fraction(4)),
        (r"\sqrt[3]{27}", Fraction(3)),
        ("2.50e1", Fraction(25)),
    ],
)
def test_signs_products_and_powers_bind_as_they_are_written(formula: str, value: Fraction) -> None:
    assert exact(read(formula)) == (value, 0)


def formulas() -> st.SearchStrategy[str]:
    leaf = st.integers(1, 20).map(str)

    def extend(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        pairs = st.tuples(inner, st.sampled_from(["+", "-", "*"]), inner)
        return st.one_of(pairs.map("".join), inner.map("({})".format), inner.map("-({})".format))

    return st.recursive(leaf, extend, max_leaves=12)


@given(formulas())
def test_arithmetic_is_pythons(formula: str) -> None:
    assert exact(read(formula)) == (eval(formula), 0)


@pytest.mark.parametrize(
    ("formula", "kind", "value"),
    [
        (r"\sin^2 x", "power", None),
        (r"\sin^{-1} x", "call", "arcsin"),
        (r"\log_2 8", "call", "log"),
        (r"\sin 2x \cos x", "product", None),
        ("x_1", "letter", "x_1"),
        ("x'", "letter", "x'"),
        (r"\vec{v}", "letter", r"\vecv"),
        ("e", "constant", "e"),
        (r"\pi", "constant", "pi"),
        (r"30^\circ", "degree", None),
    ],
)
def test_functions_names_and_constants(formula: str, kind: str, value: str | None) -> None:
    node = read(formula)
    assert (node.kind, node.value) == (kind, value)


def test_an_argument_without_brackets_ends_before_the_next_function() -> None:
    first, second = read(r"\sin 2x \cos x").args
    assert first == Node("call", (Node("product", (number(2), Node("letter", value="x"))),), "sin")
    assert second == Node("call", (Node("letter", value="x"),), "cos")


@pytest.mark.parametrize(
    "formula",
    [
        "1 2",
        "1+",
        "--5",
        "(1",
        "x..",
        r"\int x",
        r"\sum_{i} i",
        r"\sin",
        "2^",
        r"\frac{1}",
        r"3 \text{ cm}",
        "1" * 5000,
        "1e9999",
    ],
)
def test_what_is_not_understood_to_its_end_is_not_read(formula: str) -> None:
    with pytest.raises(Unreadable):
        read(formula)


def test_both_signs_are_two_formulas() -> None:
    values: list[Any] = [exact(node) for node in both_signs(read(r"1 \pm 2 \mp 3"))]
    assert values == [(Fraction(0), 0), (Fraction(2), 0)]
    assert both_signs(read("1+2")) == [read("1+2")]


def test_variables_are_collected_and_constants_are_none() -> None:
    assert letters(read(r"x_1 + \sin(e y) - \pi x_1")) == {"x_1", "y"}
