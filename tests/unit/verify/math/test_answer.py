"""Extraction and exact comparison of math answers."""

import pytest

from megatron_prime.verify.math.answer import MAX_ANSWER_CHARS, decide, extract_answer
from megatron_prime.verify.math.normalize import clean_unicode


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{5}.", "5"),
        (r"first \boxed{3}, but then \boxed{5}", "5"),
        (r"\boxed{\frac{1}{2}} and more {text}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed 5 apples", "5"),
        (r"\boxed 42.", "42"),
        (r"{unclosed \boxed{5}", "5"),
        (r"\boxed{5}} stray", "5"),
        ("\\boxed{\n5\n}", "5"),
        (r"\boxed{3} and a broken \boxed{5", "3"),
        ("\u202e\\boxed{\u200b5\x00}", "5"),
        (r"\boxedtext{4} \boxed{5}", "5"),
    ],
)
def test_extracts_the_last_complete_box(text, answer):
    found = extract_answer(text)
    assert (found.status, found.answer) == ("found", answer)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("the answer is 5", "no_answer"),
        ("", "no_answer"),
        (r"\boxed{}", "malformed"),
        (r"\boxed{ }", "malformed"),
        (r"\boxed{5", "malformed"),
        (r"\boxed{\ }", "malformed"),
        (r"\boxed{" + "1" * (MAX_ANSWER_CHARS + 1) + "}", "too_long"),
        (r"\boxed{5}" + "x" * 20_001, "no_answer"),
    ],
)
def test_says_why_there_is_no_answer(text, status):
    assert extract_answer(text).status == status


@pytest.mark.parametrize("text", [r"\boxed" * 300_000, r"\boxed{" * 300_000, "{" * 10**6, "}" * 10**6, "$" * 10**6])
def test_extraction_takes_linear_time(text):
    assert extract_answer(text).status in ("no_answer", "malformed")


def test_a_space_between_digits_keeps_its_meaning():
    assert decide("12", "1 2") is not True


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("0.5", r"\frac{1}{2}"),
        ("x^2", clean_unicode("x²")),
        (r"\text{Even}", r"\text{even}"),
        ("A", r"\text{(A)}"),
        (r"\text{C}", "(C)"),
        ("5", r"5\text{ meters}"),
        ("90", clean_unicode("90°")),
        (r"10\%", "10"),
        ("(1, 2)", r"\left(1,2\right)"),
        ("(1,0.5)", r"\left(1,\frac12\right)"),
        ("1,2", r"2 \text{ and } 1"),
        ("5", "x=5"),
        ("y=5", "5"),
        ("12_{8}", "12_8"),
        (r"12\text{ cm}^2", r"12\mathrm{cm}^2"),
    ],
)
def test_accepts_other_spellings(gold, answer):
    assert decide(gold, answer) is True


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("5", "-5"),
        ("100", "1"),
        ("10000", "9999"),
        ("1.325e-27", "5.3e-9"),
        (r"\frac{100}{3}", "33.3"),
        ("5", "5 or 6"),
        ("5", r"5 \text{ or } 6"),
        ("7", "6,7,8"),
        ("1,2", "12"),
        ("(0,1)", "[0,1]"),
        ("(0,1]", "[0,1)"),
        ("(1,2)", "(2,1)"),
        ("(1,2)", "(1,2,3)"),
        ("y=5", "x=5"),
        ("10", "10_2"),
        ("12_8", "12_9"),
        ("5", "banana"),
        (r"\text{odd}", r"\text{even}"),
        (r"5\text{ km}", r"5\text{ cm}"),
        (r"12\text{ cm}^3", r"12\text{ cm}^2"),
        (r"\{1,2\}", r"\{1,3\}"),
    ],
)
def test_rejects_different_answers(gold, answer):
    assert decide(gold, answer) is False


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        (r"28\%", "28 percent", True),
        (r"28\%", r"28\text{ pct}", True),
        ("5 m", r"5\text{ meters}", True),
        (r"5\text{ cm}", r"5\text{ km}", False),
        (r"12\text{ feet}", "12 ft", True),
        (r"30^\circ", r"\frac{\pi}{6}", True),
        (r"\frac{5\pi}{6}", "150°", True),
        (r"30^\circ", r"\frac{\pi}{3}", False),
        (r"180^\circ", r"\pi", True),
        (r"\frac{1}{3}", "0.333...", True),
        (r"\frac{1}{3}", "0.3333", False),
    ],
)
def test_units_angles_and_periods(gold, answer, equal):
    assert decide(clean_unicode(gold), clean_unicode(answer)) is equal


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"$\boxed{1}$, $\boxed{2}$ and $\boxed{3}$.", "1, 2, 3"),
        (r"\boxed{1}\quad\text{and}\quad\boxed{2}", "1, 2"),
        # Said again in another form, corrected, or repeated: the last one counts.
        (r"\boxed{1\frac12}, or \boxed{\frac32}", r"\frac32"),
        (r"\boxed{3}. But wait, $x$ is even, so \boxed{4}", "4"),
        (r"\boxed{6}, \boxed{6}", "6"),
        (r"\boxed{3} \boxed{5}", "5"),
    ],
)
def test_boxes_side_by_side(text, answer):
    assert extract_answer(text).answer == answer


@pytest.mark.parametrize(
    ("gold", "answer"), [("x+1", "1+x"), (r"\sqrt{8}", r"2\sqrt{2}"), ("e", "E"), ("2, x+1", "1+x, 2")]
)
def test_leaves_algebra_to_the_symbolic_grader(gold, answer):
    assert decide(gold, answer) is None
