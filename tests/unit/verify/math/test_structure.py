"""What kind of an answer a text is: lists, sets, intervals, relations, matrices, and what is none of them."""

from __future__ import annotations

import pytest

from megatron_prime.verify.math.structure import ELLIPSIS, Value, is_name, read
from megatron_prime.verify.math.tokens import Unreadable, tokenize


def kinds(value: Value) -> list[str]:
    return [item.kind for item in value.items]


@pytest.mark.parametrize(
    ("text", "kind", "brackets", "num_items"),
    [
        ("x+1", "formula", "", 0),
        ("1, 2, 3", "list", "", 3),
        (r"\{1, 2\}", "set", "", 2),
        (r"\emptyset", "set", "", 0),
        ("(1, 2)", "tuple", "()", 2),
        ("[0, 1)", "tuple", "[)", 2),
        (r"\langle 1, 2 \rangle", "tuple", "()", 2),
        (r"(0,1) \cup (2,3)", "union", "", 2),
        ("1:2", "ratio", "", 2),
        ("a = 1, b = 2", "named", "a,b", 2),
        ("x^2 + y^2 = 1", "equation", "", 0),
        ("x + y < 1", "inequality", "<", 0),
        (r"1 + 2 = 3 \approx 3.0", "chain", r"= \approx", 3),
        (r"3 \pmod 7", "congruence", "", 2),
        (r"\text{even}", "words", "even", 0),
        (r"\begin{pmatrix}1 & 2\\3 & 4\end{pmatrix}", "matrix", "", 2),
        (r"1 \pm \sqrt2", "list", "", 2),
        ("(1,2); (3,4)", "list", "", 2),
        (r"\mathbb{R}", "tuple", "()", 2),
    ],
)
def test_every_form_has_its_kind(text: str, kind: str, brackets: str, num_items: int) -> None:
    value = read(text)
    assert (value.kind, value.text, len(value.items)) == (kind, brackets, num_items)


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        ("1 < x", r"(1, \infty)"),
        (r"x \le 5", r"(-\infty, 5]"),
        (r"1 < x \le 5", "(1, 5]"),
        (r"5 \ge x > 1", "(1, 5]"),
        (r"x \in (1, 5]", "(1, 5]"),
        (r"x \ne 2", r"(-\infty, 2) \cup (2, \infty)"),
    ],
)
def test_inequalities_of_one_variable_are_intervals(text: str, interval: str) -> None:
    found, expected = read(text), read(interval)
    assert (found.kind, found.text, found.items) == (expected.kind, expected.text, expected.items)


@pytest.mark.parametrize(
    ("text", "name"), [("x = 5", "x"), ("f(2) = 5", "f(2)"), (r"\angle ABC = 5", r"\angleABC"), ("5", "")]
)
def test_a_value_may_have_a_name(text: str, name: str) -> None:
    assert (read(text).kind, read(text).name) == ("formula", name)


def test_an_ellipsis_stands_for_others() -> None:
    assert read(r"1, 2, \ldots, 9").items[2] == ELLIPSIS
    assert kinds(read(r"1, 2, \ldots, 9")) == ["formula", "formula", "words", "formula"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1,,,2",
        "(1, 2",
        "x =",
        "1 < 2 > 3 < 4",
        "[5]",
        r"\begin{pmatrix}1 & 2\\3\end{pmatrix}",
        "2 cm cm =",
        "the sum is 5",
    ],
)
def test_what_is_none_of_these_is_not_read(text: str) -> None:
    with pytest.raises(Unreadable):
        read(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x", True),
        ("v_1", True),
        ("f(x)", True),
        ("AB", True),
        ("(x, y)", True),
        (r"\text{total}", True),
        ("xy", False),
        ("2x", False),
        ("x+1", False),
        ("e", False),
        (r"\pi", False),
        ("5", False),
        ("", False),
    ],
)
def test_products_and_numbers_are_no_names(text: str, expected: bool) -> None:
    assert is_name(tokenize(text)) is expected
