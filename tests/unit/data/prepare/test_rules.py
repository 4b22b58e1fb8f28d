"""Figures, proofs, blanks and choices, on real problems.

Problems are from the MATH training set (hendrycks/math, MIT) and AMC.
"""

from __future__ import annotations

import pytest

from megatron_prime.data.prepare.rules import OpenQuestion, open_choices, reason_to_drop

SOCKS = "What is the smallest number of socks that must be selected to guarantee at least $10$ pairs?"
AMC = (
    "\n$\\textbf{(A)}\\ 21\\qquad \\textbf{(B)}\\ 23\\qquad \\textbf{(C)}\\ 24\\qquad "
    "\\textbf{(D)}\\ 30\\qquad \\textbf{(E)}\\ 50$\n"
)
CURVE = "Find the curve defined by the equation\n\\[r = \\frac{1}{1 - \\cos \\theta}.\\]"
LETTERS = (
    "\n\n(A) Line\n(B) Circle\n(C) Parabola\n(D) Ellipse\n(E) Hyperbola\n\nEnter the letter of the correct option."
)
POLYGON = "Given that an interior angle of a regular polygon is $144^{\\circ}$, then the number of sides is ( )"


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        ("In the figure, $\\overline{DC}$ is parallel to $\\overline{AB}$. Find $\\angle ACB$.", "figure"),
        ("In the diagram, what is $x$?", "figure"),
        ("What is the area? ![](https://cdn.mathpix.com/cropped/1.jpg)", "figure"),
        ("Round $\\pi$ to three significant figures.", None),
        ("Figure out how many eggs are left.", None),
        ("Prove that $\\sqrt2$ is irrational.", "proof"),
        ("Show that $n^2+n$ is even.", "proof"),
        ("How much does her score improve?", None),
        ("The value is $\\underline{\\quad}$.", "fill_in_blank"),
        ("What is $1+1$?", None),
    ],
)
def test_what_cannot_be_asked(problem: str, reason: str | None) -> None:
    assert reason_to_drop(problem) == reason


@pytest.mark.parametrize(
    ("problem", "answer", "expected"),
    [
        (SOCKS + AMC, "23", OpenQuestion(SOCKS, "23")),
        (SOCKS + AMC, "\\text{(D)}", OpenQuestion(SOCKS, "30")),
        (CURVE + LETTERS, "C", OpenQuestion(CURVE, "Parabola")),
        (CURVE + LETTERS, "(E)", OpenQuestion(CURVE, "Hyperbola")),
        (
            POLYGON + "\nA: $12$\n\nB: $10$\n\nC: $8$\n\nD: $6$",
            "B",
            OpenQuestion(POLYGON.removesuffix(" ( )"), "10"),
        ),
        (
            "What is $2^{10}$ divided by $2017?$\n$\\mathrm{\\textbf{(A)} \\ }226\\qquad "
            "\\mathrm{\\textbf{(B)} \\ } 1,024\\qquad \\mathrm{\\textbf{(C)} \\ } \\dfrac12$",
            "1024",
            OpenQuestion("What is $2^{10}$ divided by $2017?$", "1024"),
        ),
        ("Is it?\n(A) $-2^{50}$ (B) $x=1$ (C) 0", "A", OpenQuestion("Is it?", "-2^{50}")),
    ],
)
def test_choices_are_cut_off(problem: str, answer: str, expected: OpenQuestion) -> None:
    assert open_choices(problem, answer) == expected


@pytest.mark.parametrize(
    ("problem", "answer", "reason"),
    [
        ("Which of the following is even?" + AMC, "24", "choice_needed"),
        ("Which statement is true?\nA. one\nB. two\nC. three", "A", "choice_needed"),
        ("What is the probability?\n(A) $\\frac12$ (B) $\\frac13$ (C) none of these", "A", "choice_needed"),
        # The value is none of the choices, so what looks like choices may be the question.
        (
            "How many numbers exist with (A) first digit 1, (B) last digit 2, and (C) no digit 3?",
            "54",
            "choice_unclear",
        ),
        (SOCKS + AMC, "H", "choice_unclear"),
        (SOCKS + AMC + "\n\nA sock weighs 5 grams.", "23", "choice_unclear"),
        ("In triangle $A. B. C. $ what is $1+1$?", "2", "choice_unclear"),
        ("What is $(A)$, and $(B)$?", "1", None),
        ('[asy] label("$A$",(A),N); label("$B$",(B),N); label("$C$",(C),N); [/asy] Find $AB$.', "3", None),
    ],
)
def test_choices_that_stay(problem: str, answer: str, reason: str | None) -> None:
    assert open_choices(problem, answer) == reason
