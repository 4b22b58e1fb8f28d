"""Whether two answers say the same: order, brackets, names, chains, ratios, and the rules of a data set."""

from __future__ import annotations

from fractions import Fraction

import pytest

from megatron_prime.verify.math.compare import STRICT, Rules, same
from megatron_prime.verify.math.structure import read

ANY_FORM = Rules(any_form=True)


@pytest.mark.parametrize(
    ("truth", "answer", "expected"),
    [
        ("1, 2", "2, 1", True),
        (r"\{1, 2\}", "2, 1", True),
        ("(1, 2)", "(2, 1)", False),
        ("(1, 2)", "[1, 2]", False),
        ("1, 1, 2", "1, 2, 2", False),
        ("1, 2", "1, 2, 3", False),
        (r"1, \ldots, 9", r"1, \ldots, 9", True),
        (r"1, \ldots, 9", r"9, \ldots, 1", False),
        ("x = 5", "5", True),
        ("x = 5", "y = 5", False),
        ("a = 1, b = 2", "b = 2, a = 1", True),
        ("a = 1, b = 2", "(1, 2)", True),
        ("a = 1, b = 2", "(2, 1)", False),
        (r"(0,1) \cup (2,3)", r"(2,3) \cup (0,1)", True),
        ("x^2 + y^2 = 1", "2x^2 + 2y^2 = 2", True),
        ("x^2 + y^2 = 1", "x^2 + y^2 = 2", False),
        ("y = 2x", "2x - y = 0", True),
        ("x = 5", "2x = 10", False),  # still to be solved
        ("x + y < 1", "2x + 2y < 2", True),
        ("x + y < 1", "x + y > 1", False),
        (r"x + y \le 1", "x + y < 1", False),
        ("1:2", r"\frac12", True),
        ("2:1", r"\frac12", False),
        (r"\text{Even}", r"\text{even}", True),
        (r"3 \pmod 7", "3", True),
        (r"\begin{pmatrix}1 & 2\\3 & 4\end{pmatrix}", r"\begin{bmatrix}1 & 2\\3 & 4\end{bmatrix}", True),
        (r"\begin{pmatrix}1 & 2\\3 & 4\end{pmatrix}", r"\begin{pmatrix}1 & 3\\2 & 4\end{pmatrix}", False),
        (r"\{5\}", "5", True),
    ],
)
def test_answers_are_compared_by_what_they_say(truth: str, answer: str, expected: bool) -> None:
    assert same(read(truth), read(answer)) is expected


@pytest.mark.parametrize(
    ("truth", "answer", "expected"),
    [
        ("3", "1 + 2 = 3", True),
        ("3", "1 + 2 = 4", False),
        ("3", "0 = 0", False),
        ("3", "3 = 1 + 2", False),  # ends in what is still to be worked out
        (r"\sqrt2", r"\sqrt2 \approx 1.41", True),
        (r"\sqrt2", r"\sqrt2 \approx 1.6", False),
        ("1.41", r"\sqrt2 \approx 1.41", True),
    ],
)
def test_every_side_of_a_chain_must_be_true(truth: str, answer: str, expected: bool) -> None:
    assert same(read(truth), read(answer)) is expected


@pytest.mark.parametrize(
    ("truth", "answer", "strict", "any_form"),
    [
        ("6", r"\frac{12}{2}", False, True),
        ("6", "2 + 4", False, True),
        ("6", "6", True, True),
        ("6", "7", False, False),
    ],
)
def test_a_data_set_may_take_expressions(truth: str, answer: str, strict: bool, any_form: bool) -> None:
    assert same(read(truth), read(answer), STRICT) is strict
    assert same(read(truth), read(answer), ANY_FORM) is any_form


def test_a_tolerance_is_for_numbers_wherever_they_stand() -> None:
    rules = Rules(tolerance=Fraction(1, 100))
    assert same(read("(3.14, 2)"), read("(3.145, 2)"), rules)
    assert not same(read("(3.14, 2)"), read("(3.16, 2)"), rules)
    assert not same(read("3.14"), read("3.145"), STRICT)


def test_a_truth_that_was_cut_off_may_be_given_exactly() -> None:
    assert same(read("0.33333333"), read(r"\frac13"))
    assert not same(read("0.33333333"), read("0.333333333"))
    assert not same(read("0.3333"), read(r"\frac13"))
    assert same(read("1.41421356"), read(r"\sqrt2"), ANY_FORM) and not same(read("1.41421356"), read(r"\sqrt2"))
