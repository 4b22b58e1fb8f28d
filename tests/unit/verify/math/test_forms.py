"""An answer is an answer: what is not in a final form, or says more than one thing, earns nothing."""

import pytest

from megatron_prime.batch import Prompt, Response
from megatron_prime.config.schema_verifier import VerifierSection
from megatron_prime.verify.routing import build_verifier


@pytest.fixture(scope="module")
def verifier():
    with build_verifier(VerifierSection(num_workers=1, timeout_seconds=5.0), ["math"]) as math_verifier:
        yield math_verifier


def _reward(verifier, truth, answer, question="", **extra_info):
    prompt = Prompt(prompt_id="p", text=question, token_ids=(), ground_truth=truth, extra_info=extra_info)
    text = f"So it is $\\boxed{{{answer}}}$."
    response = Response(text=text, token_ids=(), logprobs=(), finish_reason="stop", weight_version=0)
    return verifier.verify([(prompt, response)])[0].reward


UNEVALUATED = [
    ("338350", r"\sum_{k=1}^{100} k^2"),
    ("120", "5!"),
    ("120", r"\binom{10}{3}"),
    (r"\frac13", r"\int_0^1 x^2 dx"),
    ("1", r"\lim_{x\to 0}\frac{\sin x}{x}"),
    ("12", r"\gcd(48,36)"),
    ("144", r"\mathrm{lcm}(48,36)"),
    ("6", r"\operatorname{lcm}(2,3)"),
    ("12", r"\sqrt{144}"),
    ("2", r"17 \mod 5"),
    ("2", r"17 \bmod 5"),
    ("-2", r"\det\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    ("-2", r"\begin{vmatrix}1&2\\3&4\end{vmatrix}"),
    ("1024", "2^{10}"),
    ("3", r"\log_2 8"),
    ("3", r"\lfloor 3.7 \rfloor"),
    ("7", r"\lceil 6.2\rceil"),
    (r"\frac12", r"\sin 30^\circ"),
    ("2x", r"\frac{d}{dx} x^2"),
    ("3628800", r"\prod_{k=1}^{10} k"),
    ("5", "|-5|"),
    ("21", "3(4+5)-6"),
    ("87", "12*7+3"),
    ("87", r"12 \times 7 + 3"),
    ("9", "16-3-4"),
    ("15", r"\frac{120}{8}"),
    (r"\begin{pmatrix}7\\15\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}\begin{pmatrix}1\\3\end{pmatrix}"),
    ("(x+1)(x-1)", "x^2-1"),
    (r"\frac{3}{5}", r"\frac{1}{2}+\frac{1}{10}"),
    ("5+12i", r"(3+2i)^2"),
    ("6+9i", "(1+2i)6-3i"),
    ("21", r"\max(3,21,7)"),
    ("2", "x^2-4=0, x>0"),
    (r"\frac{\pi}{4}", r"\arctan 1"),
    ("10", "1010_2"),
    ("1010_2", "10"),
    ("12_7", "12"),
    ("40_9", "58_9 - 18_9"),
    (r"11\sqrt2", r"\sqrt{242}"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{3}{\sqrt{27}}"),
    (r"\frac{\sqrt{3}}{3}", r"\sqrt{\sqrt[3]{\sqrt{\frac{1}{729}}}}"),
    (r"5\sqrt2", r"3\sqrt2+2\sqrt2"),
    (r"3+2\sqrt2", r"(1+\sqrt2)^2"),
    (r"\sqrt{2}+1", r"\frac{1}{\sqrt{2}-1}"),
    (r"\sqrt{21}", r"\frac{21}{\sqrt{21}}"),
    (r"10x \sqrt{21x}", r"\sqrt{75x} \cdot \sqrt{2x} \cdot \sqrt{14x}"),
    ("8x^9", "(2x^3)^3"),
    (r"\frac{1}{N+1}", r"\frac{(N-1)!(N)}{(N+1)!}"),
    ("2k+2", "(-k + 4) + (-2 + 3k)"),
    ("15x - 80", "19x + 1 - 4x - 81"),
    ("5r^5", r"\frac{(10r^3)(4r^6)}{8r^4}"),
    (r"\frac{11+9a}{20}", r"\frac{4+6a}{5}-\frac{1+3a}{4}"),
    ("6r^2-4r-24", "4(3r^3+5r-6)-6(2r^3-r^2+4r)"),
    (r"\cot x", r"\frac{\sec x}{\sin x} - \frac{\sin x}{\cos x}"),
    ("14", "(u+4)(u-1) - (u-3)(u+6)"),
    ("0", "x^2+2x+1=0"),
    ("0", "a + b + c + d = 0"),
    ("1", r"\omega^3 = 1"),
    ("0", "x(x+1)=0"),
    ("5", "2x=10"),
    ("x=5", "2x=10"),
    (r"(5,\infty)", r"\frac{1}{x - 5} > 0"),
    (r"x \in [-2,7]", r"x^2 - 5x - 4 \le 10"),
    (r"(-\sqrt{3}, \sqrt{3})", "-4<x^{4}+4x^{2}<21"),
]


@pytest.mark.parametrize(("truth", "answer"), UNEVALUATED)
def test_what_is_still_to_be_worked_out_earns_nothing(verifier, truth, answer):
    assert _reward(verifier, truth, answer) == 0.0


@pytest.mark.parametrize(
    ("truth", "answer"),
    [case for case in UNEVALUATED if case[0] in ("120", "1024", "12", "2k+2", "5+12i", "15")][:8],
)
def test_a_data_set_may_want_expressions(verifier, truth, answer):
    wanted = 0.0 if "gcd" in answer else 1.0
    assert _reward(verifier, truth, answer, answer_form="any") == wanted


@pytest.mark.parametrize(
    ("truth", "answer"),
    [
        ("42", "42 x"),
        ("42", "42y"),
        ("42", r"42 \text{ million}"),
        ("42", "42 thousand"),
        ("42", "42 minus one"),
        ("42", r"42\text{ times two}"),
        ("42", r"42\text{ squared}"),
        ("42", r"42 \text{ dozen}"),
        ("42", "42万"),
        ("42", "43 = 42"),
        ("43", "43 = 42"),
        ("42", r"42 \approx 43"),
        ("43", r"42 \approx 43"),
        ("42", r"42\text{ is not the answer; it is }"),
        ("42", "[42,42]"),
        ("42", "x = 42 = 43"),
        ("42", r"43 \equiv 42"),
        ("42", r"43 \to 42"),
        ("42", r"42 \text{ but maybe 43}"),
        ("42", r"42\text{ (43)}"),
        ("42", r"42 \text{ cm or } 43 \text{ cm}"),
        ("42", r"42 \lor 43"),
        ("42", "42!"),
        (r"\sqrt2", "1.414214"),
        (r"\pi/4", "0.785398"),
        (r"\frac13", "0.3333333"),
        ("(1,5)", r"\{1,5\}"),
        ("(1,5)", "1,5"),
        (r"\{1,2\}", "(1,2)"),
        (r"\{1,2\}", "(2,1)"),
        ("1, 2, 3", r"1,2,3,\ldots"),
        ("1, 2, 3", "1, 2, 3, ..."),
        ("1, 2, 3", "(1,2,3)"),
        (r"1, 2, \ldots, n", r"1, 3, 5, \ldots, 2n-1"),
        ("100, 200", "100200"),
        ("12, 144", "12144"),
        ("-5, 100", "-5100"),
        ("32349", "32, 349"),
        ("0.5", r"0.5\%"),
        ("28\\%", "2800"),
        ("e", "E"),
        ("A", "(A)(B)(C)(D)"),
        ("x=5", "y=5"),
        ("4", "4 x^{2}"),
        ("-37_8", "37_8"),
        ("42", r"\overline{42}"),
    ],
)
def test_more_than_the_answer_or_something_else_earns_nothing(verifier, truth, answer):
    assert _reward(verifier, truth, answer) == 0.0


@pytest.mark.parametrize(
    ("truth", "answer"),
    [
        (r"\sum_{k=1}^{n} k", r"\sum_{k=1}^{n} k"),
        ("2^{31}-1", "2147483647"),
        (r"\frac{1}{46}\binom{2024}{990}+\frac{1}{2}", r"\frac{\binom{2024}{990}+23}{46}"),
        (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt3}"),
        (r"5(1+\sqrt2)", r"5+5\sqrt2"),
        ("4N^3+9N^2+6N+1", "(N+1)^2(4N+1)"),
        ("18", "(16-3-4)*2=18"),
        (r"\frac{1}{2}", r"\frac{2}{4}"),
        (r"3\ln 2", r"\ln 8"),
        (r"\tan^2(y)+1", r"\sec^2(y)"),
        (r"\frac{x+2}{7}", r"\frac{x}{7}+\frac{2}{7}"),
        ("(x - 1)^2 + 3", "3 + (x-1)^2"),
        ("x^2+y^2=1", "2x^2+2y^2=2"),
        ("3x-y+13=0", "y = 3x+13"),
        (r"\sqrt{2}", r"x = \sqrt2 \approx 1.414"),
        ("100, 200", "200, 100"),
        ("12, 144", "144, 12"),
        ("-5, 100", "100, -5"),
        (r"\{1,2\}", "1,2"),
        (r"3\pm\sqrt{2}", r"3+\sqrt2, 3-\sqrt2"),
        ("[0,1]", r"0\le x\le 1"),
        ("(-\\infty,2)\\cup(2,\\infty)", r"x \ne 2"),
        ("1/2,1,2", r"\left\{\frac{1}{2}, 1, 2\right\}"),
        ("10", r"10\%"),
        ("42", r"42^\circ"),
        (r"\bar{x}=-0.5", "-0.5"),
        ("4 x^{2}", r"4x^2"),
        (r"\{x \mid x \geq 3\}", r"[3,\infty)"),
        (r"\left[\begin{array}{l}1 \\ 2\end{array}\right]", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"125\textnormal{ miles}", "125 miles"),
        ("-37_8", "-37_{8}"),
    ],
)
def test_final_forms_are_accepted_in_any_spelling(verifier, truth, answer):
    assert _reward(verifier, truth, answer) == 1.0


@pytest.mark.parametrize(
    ("truth", "answer", "reward"),
    [
        (r"v_{\max}=5", "5", 1.0),
        (r"v_{\max}=5", r"v_{\max} = 5", 1.0),
        (r"v_{\max}=5", "6", 0.0),
        ("4:30 p.m.", r"4:30\text{ p.m.}", 1.0),
        ("4:30 p.m.", "4:30", 1.0),
        ("4:30 p.m.", "4:45 p.m.", 0.0),
        (r"e^{i\pi}", "-1", 1.0),
        ("i^2", "-1", 1.0),
        (r"\sqrt{-4}", "2i", 1.0),
        (r"\cos 60^\circ", r"\frac12", 1.0),
        (r"60\%", "0.6", 1.0),
        ("0.6", r"60\%", 1.0),
        ("C", "(C) 15", 1.0),
        ("C", r"\text{(C) } 15", 1.0),
        ("C", "(D) 15", 0.0),
        (r"\frac{\pi}{2}", "pi/2", 1.0),
        ("7*sin(pi*x/5)+1", r"7\sin\left(\frac{\pi x}{5}\right)+1", 1.0),
        ("exp(16)", "e^{16}", 1.0),
        ("e^{16}", "exp(16)", 1.0),
        ("4.148", r"\text{approximately } 4.148", 1.0),
        ("2x^3+c", r"2x^3 + c \text{ for any real } c", 1.0),
        ("3.54e-07", "3.54*10^{-7}", 1.0),
        ("30", "30 个", 1.0),
        ("30", "30 яблок", 1.0),
        (r"\frac{1}{2}", "0,5", 1.0),
        ("9 (apples)", "9", 1.0),
        ("9 (apples)", "8", 0.0),
        ('["7\\\\text{ kg}"]', r"7\text{ kg}", 1.0),
        ('["4", "9"]', "9, 4", 1.0),
        ('["4", "9"]', "4", 0.0),
        (r"f(x)=2x^3+c", "2x^3+c", 1.0),
        (r"A(x)=\frac{1}{2}(x^2-x-4)", r"\frac12x^2-\frac12x-2", 1.0),
        (r"p=5,q=2;p=7,q=2", "(5,2),(7,2)", 1.0),
        ("(p,q)=(3,2)", "(3,2)", 1.0),
        ("0.657894736842105", r"\frac{25}{38}", 1.0),
        ("0.657894736842105", r"\frac{25}{37}", 0.0),
        (r"\frac{54\sqrt{6}}{25}", r"The\ area\ of\ triangle\ ABC\ is\ \frac{54\sqrt{6}}{25}", 1.0),
        (r"\frac{54\sqrt{6}}{25}", r"The\ area\ of\ triangle\ ABC\ is\ not\ \frac{54\sqrt{6}}{25}", 0.0),
        ("30", "答案：30", 1.0),
        ("30", "Ответ: 30", 1.0),
        ("x<3 or x>5", r"(-\infty,3)\cup(5,\infty)", 1.0),
        (r"x\equiv 3\pmod 7", r"3 \pmod{7}", 1.0),
        (r"x\equiv 3\pmod 7", r"3 \pmod{5}", 0.0),
        ("x=2, y=3", "(2, 3)", 1.0),
        ("x=2, y=3", "x=3, y=2", 0.0),
        (r"2, \frac{3 + i\sqrt{3}}{2}, \frac{3 - i\sqrt{3}}{2}", r"2, \frac{3 \pm i \sqrt{3}}{2}", 1.0),
    ],
)
def test_truths_and_answers_as_people_write_them(verifier, truth, answer, reward):
    assert _reward(verifier, truth, answer) == reward


@pytest.mark.parametrize(
    ("truth", "answer", "reward"),
    [
        ("1.5, 2.5", "2.52, 1.49", 1.0),
        ("(1.5, 2.5)", "(1.52, 2.5)", 1.0),
        ("1.5, 2.5", "1.5, 2.9", 0.0),
        (r"\sqrt2", "1.41", 1.0),
        (r"\sqrt2", "1.3", 0.0),
        (r"(\sqrt2, 1)", "(1.41, 1)", 1.0),
    ],
)
def test_a_tolerance_holds_in_lists_and_for_irrational_truths(verifier, truth, answer, reward):
    assert _reward(verifier, truth, answer, tolerance=0.05) == reward


@pytest.mark.parametrize(
    ("question", "truth", "answer", "reward"),
    [
        (r"Express $\frac{3}{20}$ as a decimal.", "0.15", r"\frac{3}{20}", 0.0),
        (r"Express $\frac{3}{20}$ as a decimal.", "0.15", "0.15", 1.0),
        ("Expand $(x+1)(x-1)$.", "x^2-1", "(x+1)(x-1)", 0.0),
        (r"Simplify \(\sqrt{53}\).", r"\sqrt{53}", r"\sqrt{53}", 1.0),
        ("What is $6$ times one?", "6", "6", 1.0),
    ],
)
def test_a_formula_of_the_question_is_no_answer_unless_it_is_the_truth(verifier, question, truth, answer, reward):
    assert _reward(verifier, truth, answer, question) == reward


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9^9}}",
        r"\gcd(10^{100000},3)",
        r"\gcd(48,36)",
        r"17 \mod 5",
        "(" * 400 + "1" + ")" * 400,
        r"(1+i)^{10^9}",
        r"\sqrt[1000000000]{2}",
        "x!!!!!!!!",
        "2^2^2^2^2^2",
        r"\sqrt{" * 150 + "2" + "}" * 150,
        "1/0",
        r"\frac{",
    ],
)
@pytest.mark.parametrize("truth", ["12", "x+1", r"\sqrt{2}", r"1\leq|z|\leq \frac{3}{2}"])
def test_whatever_an_answer_does_to_the_grader_is_worth_0_and_not_missing(verifier, truth, answer):
    assert _reward(verifier, truth, answer) == 0.0


def test_a_truth_that_cannot_be_compared_is_missing_and_not_the_answers_fault():
    with build_verifier(VerifierSection(num_workers=1, timeout_seconds=1.0), ["math"]) as verifier:
        assert _reward(verifier, "9^{9^{9^9}}", "3") is None
        assert _reward(verifier, "", "x+1") is None
