"""Outcome labels of math responses."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future
from fractions import Fraction
from pathlib import Path
from typing import Any

import megatron_prime
from megatron_prime.batch import Prompt, Response, Verdict
from megatron_prime.verify.futures import followed, known, mapped, settled
from megatron_prime.verify.math.answer import decide, extract_answer, restates, truth_text
from megatron_prime.verify.pool import Outcome, WorkerKind, WorkerPool

REWARDS: Mapping[str, float | None] = {
    "correct": 1.0,
    "wrong": 0.0,
    "no_answer": 0.0,
    "malformed": 0.0,
    "too_long": 0.0,
    # What an answer does to its grader is the answer's doing.
    "timeout": 0.0,
    "resource": 0.0,
    # A failure of the verifier or of the truth says nothing about the response: its outcome is missing.
    "grader_error": None,
}
"""Every status of a math response, and what it is worth."""
KIND = "math"
VERSION = 2
"""Counts up with every change after which an answer may be judged differently."""
KILL_MARGIN_SECONDS = 1.0
"""A worker that has not said so itself this much after the limit of its case is killed."""
_CERTAIN = ("correct", "wrong", "malformed")
ANY_FORM = "any"
"""Of `extra_info`'s `answer_form`: an answer need not be evaluated."""
_ANY_NUMBER = "7"
_ROOT = str(Path(megatron_prime.__file__).resolve().parents[1])
# The module that stands beside this one. `-P` keeps the current folder off the module path.
_BOOT = "import sys; sys.path.insert(0, {root!r}); from {module} import main; main({arguments})"


def math_worker_kind(timeout_seconds: float, memory_gib: float) -> WorkerKind:
    """Workers that compare two answers symbolically.

    Args:
        timeout_seconds: wall-clock limit of a comparison.
        memory_gib: address space of a worker.
    """
    limits = f"{int(memory_gib * 2**30)}, {timeout_seconds}"

    def command(descriptor: int) -> list[str]:
        module = f"{__name__.rpartition('.')[0]}.worker"
        boot = _BOOT.format(root=_ROOT, module=module, arguments=f"{descriptor}, {limits}")
        return [sys.executable, "-P", "-c", boot]

    return WorkerKind(
        name=KIND,
        command=command,
        version=f"{VERSION} {memory_gib} GiB",
        advice=f"install math-verify, or raise verifier.memory_gib (now {memory_gib})",
        cacheable=lambda reply: reply in _CERTAIN,
    )


class MathVerifier:
    """Compares the last boxed answer of each response with the ground truth (`protocol.Verifier`).

    Exact rules decide nearly all cases in microseconds; the rest is compared by value in worker processes. Model text
    is never evaluated as code. An answer must be in a final form and no formula of the question
    (docs/reference/verifiers.md),
    unless its prompt's `extra_info` has `answer_form: any`. By a number under `tolerance` numbers may be off.

    Args:
        pool: with workers of `math_worker_kind`.
        timeout_seconds: wall-clock limit of a comparison.
    """

    def __init__(self, pool: WorkerPool, timeout_seconds: float) -> None:
        self._pool = pool
        self._limit_seconds = timeout_seconds + KILL_MARGIN_SECONDS

    def submit(self, prompt: Prompt, response: Response) -> Future[Verdict]:
        """See `protocol.Verifier.submit`."""
        start = time.perf_counter()
        gold = truth_text(prompt.ground_truth)
        found = extract_answer(response.text)
        if found.status != "found":
            return known(_verdict(found.status, found.answer or None, time.perf_counter() - start))
        tolerance, any_form = _tolerance(prompt), prompt.extra_info.get("answer_form") == ANY_FORM

        def verdict(status: str, seconds: float) -> Verdict:
            if status == "correct" and not any_form and restates(prompt.text, gold, found.answer):
                status = "wrong"
            return _verdict(status, found.answer, seconds)

        equal = decide(gold, found.answer, tolerance)
        if equal is not None and (equal or not any_form):
            return known(verdict("correct" if equal else "wrong", time.perf_counter() - start))
        case = [gold, found.answer, None if tolerance is None else str(tolerance), any_form]
        outcome = self._pool.submit(KIND, case, self._limit_seconds)
        compared = followed(outcome, lambda outcome: self._second_try(case, outcome))
        return mapped(compared, lambda pair: verdict(*pair))

    def _second_try(self, case: list[Any], outcome: Outcome) -> Future[tuple[str, float]]:
        """Status and seconds, after another try where the worker died."""
        if outcome.end != "died":
            return self._blamed(case, outcome)
        again = self._pool.submit(KIND, case, self._limit_seconds, patient=False)
        return followed(again, lambda outcome: self._blamed(case, outcome))

    def _blamed(self, case: list[Any], outcome: Outcome) -> Future[tuple[str, float]]:
        """Whose fault it is that there was no comparison: the truth's, where no number compares with it."""
        status = str(outcome.reply) if outcome.end == "answered" else outcome.end
        if status not in ("timeout", "resource", "died"):
            return settled((status, outcome.seconds))
        gold, _, *rules = case
        alone = self._pool.submit(KIND, [gold, _ANY_NUMBER, *rules], self._limit_seconds, patient=False)

        def blame(truth: Outcome) -> tuple[str, float]:
            if truth.end != "answered" or truth.reply in ("timeout", "resource", "grader_error"):
                return "grader_error", outcome.seconds
            return ("timeout" if status == "timeout" else "resource"), outcome.seconds

        return mapped(alone, blame)

    def close(self) -> None:
        """The pool belongs to whoever made it."""


def _tolerance(prompt: Prompt) -> Fraction | None:
    value = prompt.extra_info.get("tolerance")
    # As decimal text: the nearest float of 0.1 is not 1/10.
    return Fraction(str(value)) if isinstance(value, int | float) and math.isfinite(value) else None


def _verdict(status: str, extracted: str | None, seconds: float) -> Verdict:
    reason = "the ground truth cannot be read or compared" if status == "grader_error" else ""
    return Verdict(status=status, reward=REWARDS[status], extracted=extracted, seconds=seconds, reason=reason)
