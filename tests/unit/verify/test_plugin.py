"""A verifier of one's own: what the contract finds, and that its failures end no run."""

import json
import re
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_prime.batch import Prompt, Response, Verdict
from megatron_prime.config.schema_verifier import VerifierSection
from megatron_prime.errors import ConfigError, VerifierError
from megatron_prime.verify.contract import Case, check_verifier
from megatron_prime.verify.routing import build_verifier

CASES = [Case("yes", "yes", 1.0), Case("no", "yes", 0.0)]


class Exact:
    """Right where the answer is the truth."""

    def __init__(self):
        self._threads = ThreadPoolExecutor(2)

    def submit(self, prompt, response):
        return self._threads.submit(self.judge, prompt, response)

    def judge(self, prompt, response):
        same = response.text == prompt.ground_truth
        return Verdict(status="correct" if same else "wrong", reward=float(same))

    def close(self):
        self._threads.shutdown()


class Crashing(Exact):
    def judge(self, prompt, response):
        return super().judge(prompt, response) if response.text in ("yes", "no") else [][0]


class Generous(Exact):
    def judge(self, prompt, response):
        return Verdict(status="fine", reward=2.0 if response.text == "yes" else 0.0)


class Fickle(Exact):
    calls = 0

    def judge(self, prompt, response):
        self.calls += 1
        return Verdict(status="correct", reward=float(self.calls == 1))


class Silent(Exact):
    def submit(self, prompt, response):
        return Future()


class Direct(Exact):
    def submit(self, prompt, response):
        return self.judge(prompt, response)


class Refusing(Exact):
    def submit(self, prompt, response):
        raise KeyError(response.text)


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


@pytest.fixture
def grading(tmp_path, monkeypatch):
    """A module `grading` with the verifiers above."""
    (tmp_path / "grading.py").write_text("made = None\ndef make(section):\n    return made()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import grading

    yield grading
    del sys.modules["grading"]


def _judge(text):
    prompt = Prompt(prompt_id="p", text="", token_ids=(), ground_truth="yes", ability="any")
    response = Response(text=text, token_ids=(), logprobs=(), finish_reason="stop", weight_version=0)
    with build_verifier(VerifierSection(factory="grading:make"), ["any"]) as verifier:
        return verifier.verify([(prompt, response)])[0]


def test_by_import_path(grading):
    grading.made = Exact
    assert _judge("yes").reward == 1.0 and _judge("no").reward == 0.0
    check_verifier("grading:make", CASES)


def test_the_documented_one_keeps_the_contract(tmp_path, monkeypatch):
    document = Path(__file__).resolve().parents[3] / "docs" / "howto" / "own-verifier.md"
    example = next(
        text for text in re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL) if "make" in text
    )
    (tmp_path / "documented_grading.py").write_text(example)
    monkeypatch.syspath_prepend(str(tmp_path))
    check_verifier("documented_grading:make", CASES)


@pytest.mark.parametrize(("made", "text"), [(Crashing, "odd"), (Generous, "yes"), (Refusing, "yes")])
def test_its_failures_are_missing_verdicts(grading, caplog, made, text):
    grading.made = made
    verdict = _judge(text)
    assert (verdict.status, verdict.reward) == ("grader_error", None)
    assert "the verifier" in caplog.text


@pytest.mark.parametrize(
    ("factory", "complaint"),
    [
        ("no_such_module:make", "cannot be imported"),
        ("grading:no_such_name", "cannot be imported"),
        ("math:pi", "is of type float, not a function"),
    ],
)
def test_what_cannot_be_found_is_named(factory, complaint):
    with pytest.raises(ConfigError, match=f"verifier.factory: .*{complaint}"):
        build_verifier(VerifierSection(factory=factory), ["math"])


def test_what_is_no_verifier_is_named():
    with pytest.raises(VerifierError, match=r"verifier.factory: .*builtins:id returned has no submit and no close"):
        build_verifier(VerifierSection(factory="builtins:id"), ["math"])
