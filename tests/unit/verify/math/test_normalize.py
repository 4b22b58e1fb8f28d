"""One spelling for many: numbers that are read exactly, units, and text that stays as it is."""

from __future__ import annotations

from fractions import Fraction

import pytest

from megatron_prime.verify.math.normalize import MAX_EXACT_CHARS, clean_unicode, exact_value, normalize


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The answer is 4", "4"),
        ("So the final answer is: -3", "-3"),
        (r"\text{The answer is }\frac12", r"\frac{1}{2}"),
        ("answer = x+1", "x+1"),
        ("the answer is", "theansweris"),
        (r"\text{answer}", "answer"),
    ],
)
def test_words_in_front_say_only_that_it_is_the_answer(text: str, plain: str) -> None:
    assert normalize(text).text == plain


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", Fraction(7)),
        ("-7.50", Fraction(-15, 2)),
        (".5", Fraction(1, 2)),
        ("1,234,567", Fraction(1234567)),
        (r"1\,000", Fraction(1000)),
        ("1{,}234.5", Fraction("1234.5")),
        ("3/4", Fraction(3, 4)),
        (r"-\dfrac{3}{-4}", Fraction(3, 4)),
        (r"\frac12", Fraction(1, 2)),
        (r"3\frac{1}{2}", Fraction(7, 2)),
        ("-3 1/2", Fraction(-7, 2)),
        ("5e-9", Fraction(5, 10**9)),
        (r"6.02\times 10^{23}", 602 * Fraction(10) ** 21),
        (r"\$12.", Fraction(12)),
        ("½", Fraction(1, 2)),
        ("3½", Fraction(7, 2)),
        ("−５", Fraction(-5)),
        ("0.333...", Fraction(1, 3)),
        ("-0.1666\\ldots", Fraction(-1, 6)),
        ("0.142857142857…", Fraction(1, 7)),
        (r"2.1\overline{36}", Fraction(47, 22)),
        (r"0.\overline{3}", Fraction(1, 3)),
    ],
)
def test_reads_numbers_exactly(text, value):
    assert normalize(clean_unicode(text)).value == value


@pytest.mark.parametrize(
    "text", ["1/0", r"\frac{1}{0}", "1,23", "1e99999", "--5", "1.2.3", "x", "", "5!", "0.33...", "0.1234..."]
)
def test_leaves_other_text_alone(text):
    assert normalize(text).value is None


def test_a_space_between_digits_is_no_product():
    assert exact_value("3 1/2") == Fraction(7, 2) and exact_value("31/2") == Fraction(31, 2)
    assert normalize("12").value == 12 and normalize("1 2").value is None


def test_a_list_is_no_number_with_separators():
    assert normalize("1,234").value == 1234
    assert normalize("1, 234").value is None


@pytest.mark.parametrize(
    ("text", "body", "unit"),
    [
        (r"28\%", "28", "%"),
        ("5 meters", "5", "m"),
        (r"5\text{ km}", "5", "km"),
        (r"12\text{ cm}^2", "12", "cm^2"),
        (r"30^\circ", "30", "°"),
        ("5x", "5x", ""),
        (r"\text{even}", r"\text{even}", ""),
    ],
)
def test_units_are_cut_off_and_named_alike(text: str, body: str, unit: str) -> None:
    found = normalize(text)
    assert (found.body.strip(), found.unit) == (body, unit)


def test_words_are_told_from_products_of_letters() -> None:
    assert normalize(r"\text{even}").is_word
    assert not normalize("even").is_word and not normalize(r"\text{5}").is_word


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("x² + y₁₀", "x^{2} + y_{10}"),
        ("2 × 3 ≤ π", r"2 \times  3 \le  \pi "),
        ("√16", r"\sqrt{16}"),
        ("⅔", r"\frac{2}{3}"),
        ("1\u200b2\u202e", "12"),
        ("１２", "12"),
        ("plain 5", "plain 5"),
    ],
)
def test_look_alikes_get_one_spelling(text: str, clean: str) -> None:
    assert clean_unicode(text) == clean


def test_numbers_longer_than_python_reads_are_left_alone() -> None:
    assert exact_value("9" * MAX_EXACT_CHARS) is not None
    assert exact_value("9" * (MAX_EXACT_CHARS + 1)) is None
