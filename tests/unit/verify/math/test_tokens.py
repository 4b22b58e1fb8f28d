"""Mathematics in tokens: one spelling for synonyms, names inside runs of letters, and cuts outside of brackets."""

from __future__ import annotations

import pytest

from megatron_prime.verify.math.tokens import Token, Unreadable, enclosed, split, tokenize


def texts(formula: str) -> list[str]:
    return [token.text for token in tokenize(formula)]


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        (r"\dfrac12 \cdot x", [r"\frac", "12", "*", "x"]),
        ("2.5e-3x", ["2.5e-3", "x"]),
        ("xy", ["x", "y"]),
        ("sinx", [r"\sin", "x"]),
        ("arctan(x)", [r"\arctan", "(", "x", ")"]),
        ("xpi", ["x", r"\pi"]),
        ("a<=b", ["a", r"\le", "b"]),
        (r"a \leqslant b \lor c", ["a", r"\le", "b", ",", "c"]),
        (r"\left(\;1\,,\ 2 \right)", ["(", "1", ",", "2", ")"]),
        ("2**3", ["2", "^", "3"]),
        (r"1 \text{ and } 2", ["1", ",", "2"]),
        ("1 or 2", ["1", ",", "2"]),
        (r"\mathrm{e}^x", ["e", "^", "x"]),
        (r"\mathbb{R}", [r"\mathbbR"]),
        (r"\begin{pmatrix}1 & 2\end{pmatrix}", [r"\begin", "1", "&", "2", r"\end"]),
        ("1,234", ["1234"]),
        ("1,234,5", ["1", ",", "234", ",", "5"]),
        ("(1,234)", ["(", "1", ",", "234", ")"]),
    ],
)
def test_synonyms_are_one_token_and_nothing_is_skipped(formula: str, expected: list[str]) -> None:
    assert texts(formula) == expected


def test_words_are_kept_as_words_and_letters_of_a_style_as_letters() -> None:
    assert tokenize(r"\text{even}") == [Token("word", "even")]
    assert tokenize(r"\mathrm{x}") == [Token("letter", "x")]
    assert tokenize(r"\text{x}") == [Token("word", "x")]
    assert tokenize("日") == [Token("word", "日")]


@pytest.mark.parametrize(
    ("formula", "parts"),
    [
        ("1,2,3", [["1"], ["2"], ["3"]]),
        ("(1,2),3", [["(", "1", ",", "2", ")"], ["3"]]),
        ("(0,1],2", [["(", "0", ",", "1", "]"], ["2"]]),
        (r"\{1,2\},3", [[r"\{", "1", ",", "2", r"\}"], ["3"]]),
        (",1", [[], ["1"]]),
    ],
)
def test_formulas_are_cut_outside_of_brackets(formula: str, parts: list[list[str]]) -> None:
    found, separators = split(tokenize(formula), frozenset({","}))
    assert [[token.text for token in part] for part in found] == parts
    assert separators == [","] * (len(parts) - 1)


@pytest.mark.parametrize("formula", ["(1", "1)", "(1}", r"\{1)", r"\lfloor x \rceil"])
def test_brackets_that_do_not_match_are_refused(formula: str) -> None:
    with pytest.raises(Unreadable):
        split(tokenize(formula), frozenset({","}))


@pytest.mark.parametrize(
    ("formula", "expected"), [("(1,2)", True), ("(1)+(2)", False), ("((1))", True), ("1", False), ("()", True)]
)
def test_one_bracket_around_everything(formula: str, expected: bool) -> None:
    assert enclosed(tokenize(formula)) is expected
