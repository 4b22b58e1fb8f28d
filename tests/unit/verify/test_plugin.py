"""A verifier of one's own by its import path: found or named, and its failures end no run."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from own_verifiers import CASES, Crashing, Exact, Generous, Refusing

from megatron_prime.batch import Prompt, Response
from megatron_prime.config.schema_verifier import VerifierSection
from megatron_prime.errors import ConfigError, VerifierError
from megatron_prime.verify.contract import check_verifier
from megatron_prime.verify.routing import build_verifier


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
