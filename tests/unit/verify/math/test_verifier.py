"""The verifier on real model outputs, hostile answers, and its accounting."""

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_prime.batch import Prompt, Response
from megatron_prime.config.schema_verifier import VerifierSection
from megatron_prime.errors import VerifierError
from megatron_prime.verify.routing import build_verifier

CASES = Path(__file__).parents[3] / "data" / "grader_cases" / "cases.jsonl"
UNEVALUATED = {
    # Equal to the truth, and labelled right where they come from; here an answer must be worked out.
    ("12", r"\boxed{3·4}"),
    ("10", r"\boxed{\binom{5}{2}}"),
    ("120", r"\boxed{5!}"),
}
SLOW_TRUTH = r"1\leq|z|\leq \frac{3}{2}"
"""Only math-verify reads it, and it evaluates the answer to it."""
MISSED = {
    # The symbolic grader does not know these spellings; each is a false negative, none a false positive.
    (r"\frac{1}{3}", r"\boxed{0.333...}"),
    (r"30^\circ", r"\boxed{\frac{\pi}{6}}"),
    # Only the last box counts.
    ("1,2", r"\boxed{1},\boxed{2}"),
}


@pytest.fixture(scope="module")
def verifier():
    with build_verifier(VerifierSection(num_workers=2, timeout_seconds=5.0), ["math"]) as math_verifier:
        yield math_verifier


def _item(gold, text, ability="math"):
    prompt = Prompt(prompt_id="p", text="", token_ids=(), ground_truth=gold, ability=ability)
    return prompt, Response(text=text, token_ids=(), logprobs=(), finish_reason="stop", weight_version=0)


def _cases(*kinds):
    rows = [json.loads(line) for line in CASES.read_text().splitlines()]
    return [row for row in rows if row["kind"] in kinds]


def _accepted(verifier, rows):
    verdicts = verifier.verify([_item(row["gold"], row["pred"]) for row in rows])
    return [verdict.status == "correct" for verdict in verdicts]


@pytest.mark.parametrize(("kind", "num_rows"), [("qwen", 68), ("gsm8k", 40), ("identity", 40)])
def test_agrees_with_the_labels_of_real_outputs(verifier, kind, num_rows):
    rows = _cases(kind)
    assert len(rows) == num_rows
    assert _accepted(verifier, rows) == [row["expected"] for row in rows]


def test_accepts_no_wrong_answer_and_nearly_every_spelling_of_a_right_one(verifier):
    rows = _cases("positive", "negative", "extract", "inject")
    accepted = _accepted(verifier, rows)
    wrong = [(row["gold"], row["pred"]) for row, ok in zip(rows, accepted, strict=True) if ok and not row["expected"]]
    missed = {(row["gold"], row["pred"]) for row, ok in zip(rows, accepted, strict=True) if row["expected"] and not ok}
    assert wrong == []
    assert missed <= MISSED | UNEVALUATED


def test_never_runs_the_text_of_an_answer(verifier, tmp_path):
    target = tmp_path / "created"
    create = f"open('{target}','w').write('x')"
    payloads = [
        create,
        rf"\pi and {create}",
        f"__import__('os').system('touch {target}')",
        f'exec("{create}")',
        f'eval("{create}")',
        rf"\begin{{matrix}}{create}\end{{matrix}}",
        rf"\text{{{create}}}",
        f"x+{create}",
        rf"\frac{{1}}{{{create}}}",
        "().__class__.__base__.__subclasses__()",
    ]
    verdicts = verifier.verify([_item(gold, rf"\boxed{{{p}}}") for p in payloads for gold in ("5", "x+1", r"\pi")])
    assert not target.exists()
    assert all(verdict.status != "correct" for verdict in verdicts)


def test_rewards_follow_the_status_and_failures_are_missing():
    with build_verifier(VerifierSection(timeout_seconds=1.0), ["math"]) as verifier:
        verdicts = verifier.verify(
            [
                _item("7", r"\boxed{7}"),
                _item("7", r"\boxed{8}"),
                _item("7", "seven"),
                _item("7", r"\boxed{}"),
                _item("7", r"\boxed{" + "7" * 2000 + "}"),
                _item(SLOW_TRUTH, r"\boxed{z \in [0, 9^{9^{9^9}}]}"),
                _item("", r"\boxed{x+1}"),
                _item("x+1", r"\boxed{9^{9^{9^9}}}"),
                _item("3", r"\boxed{9^{9^{9^9}}}"),
            ]
        )
        statuses = ["correct", "wrong", "no_answer", "malformed", "too_long", "timeout", "grader_error"]
        assert [verdict.status for verdict in verdicts] == [*statuses, "resource", "wrong"]
        assert [verdict.reward for verdict in verdicts] == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, None, 0.0, 0.0]
        assert verdicts[0].extracted == "7" and verdicts[2].extracted is None
        assert 1.0 <= verdicts[5].seconds < 4.0


def test_a_ground_truth_of_thousands_of_digits_is_no_error(verifier, caplog):
    verdicts = verifier.verify([_item("9" * 5000, r"\boxed{9}"), _item("9" * 5000, rf"\boxed{{{'9' * 900}}}")])
    assert all(verdict.status in ("wrong", "grader_error") for verdict in verdicts) and not caplog.text


def test_refuses_problems_of_another_kind(verifier):
    with pytest.raises(VerifierError, match="ability 'code'"):
        verifier.verify([_item("{}", "print(1)", ability="code")])


def test_no_items_give_no_verdicts(verifier):
    assert verifier.verify([]) == []


@pytest.mark.parametrize(
    ("answer", "tolerance", "status"),
    [
        ("4.2", 0.1, "correct"),
        ("4.25", 0.1, "correct"),
        ("\\frac{41}{10}", 0.1, "correct"),
        ("4.31", 0.1, "wrong"),
        ("420", 0.1, "wrong"),
        ("x", 0.1, "wrong"),
        ("4.25", None, "wrong"),
        ("4.25", "0.1", "wrong"),
        ("4.25", float("nan"), "wrong"),
    ],
)
def test_numbers_may_be_off_where_the_problem_says_so(verifier, answer, tolerance, status):
    prompt, response = _item("4.2", f"\\boxed{{{answer}}}")
    prompt = dataclasses.replace(prompt, extra_info={"tolerance": tolerance})
    assert [verdict.status for verdict in verifier.verify([(prompt, response)])] == [status]
