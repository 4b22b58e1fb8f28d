"""What a verifier must do: good ones pass, and whatever is wrong is named with the answer that shows it."""

from __future__ import annotations

import json
import threading

import pytest
from own_verifiers import CASES, Crashing, Direct, Exact, Fickle, Generous, Refusing, Silent

from megatron_prime.config.schema_verifier import VerifierSection
from megatron_prime.errors import VerifierError
from megatron_prime.verify.contract import ODD_TEXTS, Case, check_verifier, odd_answer_problems
from megatron_prime.verify.routing import build_verifier


def test_the_contract_accepts_a_good_verifier_and_ours():
    check_verifier(lambda section: Exact(), CASES)
    maths = [Case(r"\boxed{4}", "4", 1.0), Case(r"\boxed{x+1}", "1+x", 1.0), Case(r"\boxed{5}", "4", 0.0)]
    section = VerifierSection(timeout_seconds=2.0)
    check_verifier(lambda section: build_verifier(section, ["math"]), maths, section=section)


def test_the_contract_accepts_the_code_verifier(fork_server):
    tests = json.dumps({"inputs": ["1"], "outputs": ["2"]})
    code = [Case(f"```python\nprint({n})\n```", tests, float(n == 2), ability="code") for n in (2, 3)]
    check_verifier(lambda section: build_verifier(section, ["code"]), code)


@pytest.mark.parametrize(
    ("verifier", "complaint"),
    [
        (Crashing, "answer '': the future raised IndexError"),
        (Generous, "answer 'yes': the verdict has reward 2.0"),
        (Fickle, "answer 'yes': once correct"),
        (Silent, "answer 'yes': no verdict in time"),
        (Direct, "answer 'yes': submit returned a Verdict"),
        (Refusing, "answer 'yes': submit raised KeyError"),
    ],
)
def test_the_contract_names_what_is_wrong(verifier, complaint):
    with pytest.raises(VerifierError) as caught:
        check_verifier(lambda section: verifier(), CASES, patience_seconds=0.5)
    assert complaint in str(caught.value)


def test_the_contract_wants_both_kinds_of_cases():
    with pytest.raises(VerifierError, match="cases: give at least one"):
        check_verifier(lambda section: Exact(), CASES[:1])
    with pytest.raises(VerifierError, match=r"answer 'yes': reward 1.0 \(correct\), expected 0.0"):
        check_verifier(lambda section: Exact(), [Case("yes", "yes", 0.0), Case("good", "good", 1.0)])


def test_odd_answers_need_a_verdict_and_no_certain_reward():
    prompts = [case.prompt for case in CASES[:1]]
    assert odd_answer_problems(Exact(), prompts) == []
    problems = odd_answer_problems(Crashing(), prompts)
    assert (
        len(problems) == len(ODD_TEXTS)
        and problems[0] == "answer '': the future raised IndexError: list index out of range"
    )


def test_verdicts_of_one_round_are_asked_for_side_by_side():
    """A verifier that answers only when two answers are there would wait for ever otherwise."""

    class Paired(Exact):
        barrier = threading.Barrier(2)

        def judge(self, prompt, response):
            self.barrier.wait(20)
            return super().judge(prompt, response)

    check_verifier(lambda section: Paired(), CASES)


def test_a_verifier_is_closed_twice_even_where_it_fails():
    closed = []

    class Closing(Refusing):
        def close(self):
            closed.append(True)
            super().close()

    with pytest.raises(VerifierError):
        check_verifier(lambda section: Closing(), CASES)
    assert len(closed) == 2
