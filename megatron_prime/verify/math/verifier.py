"""Outcome labels of math responses."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future
from fractions import Fraction
from pathlib import Path

from megatron_prime.batch import Prompt, Response, Verdict
from megatron_prime.verify.futures import known, mapped
from megatron_prime.verify.math.answer import decide, extract_answer
from megatron_prime.verify.math.normalize import clean_unicode
from megatron_prime.verify.pool import Outcome, WorkerKind, WorkerPool

REWARDS: Mapping[str, float | None] = {
    "correct": 1.0,
    "wrong": 0.0,
    "no_answer": 0.0,
    "malformed": 0.0,
    "too_long": 0.0,
    # The verifier's failures say nothing about the response: its outcome is missing, neither 0 nor 1.
    "timeout": None,
    "resource": None,
    "grader_error": None,
}
"""Every status of a math response, and what it is worth."""
KIND = "math"
KILL_MARGIN_SECONDS = 1.0
"""A worker that has not said so itself this much after the limit of its case is killed."""
_CERTAIN = ("correct", "wrong", "malformed")
_WORKER_SCRIPT = Path(__file__).with_name("worker.py")


def math_worker_kind(timeout_seconds: float, memory_gib: float) -> WorkerKind:
    """Workers that compare two answers symbolically.

    Args:
        timeout_seconds: wall-clock limit of a comparison.
        memory_gib: address space of a worker.
    """
    limits = [str(int(memory_gib * 2**30)), str(timeout_seconds)]
    return WorkerKind(
        name=KIND,
        # `-P` keeps this folder off the module path.
        command=lambda descriptor: [sys.executable, "-P", str(_WORKER_SCRIPT), str(descriptor), *limits],
        version=f"math-verify {memory_gib} GiB",
        advice=f"install math-verify, or raise verifier.memory_gib (now {memory_gib})",
        cacheable=lambda reply: reply in _CERTAIN,
    )


class MathVerifier:
    """Compares the last boxed answer of each response with the ground truth (`protocol.Verifier`).

    Exact rules decide nearly all cases in microseconds; the rest goes to math-verify in worker processes. Model text
    is never evaluated as code. Where a prompt's `extra_info` has a number under `tolerance`, answers may be so far off.

    Args:
        pool: with workers of `math_worker_kind`.
        timeout_seconds: wall-clock limit of a symbolic comparison.
    """

    def __init__(self, pool: WorkerPool, timeout_seconds: float) -> None:
        self._pool = pool
        self._timeout_seconds = timeout_seconds

    def submit(self, prompt: Prompt, response: Response) -> Future[Verdict]:
        """See `protocol.Verifier.submit`."""
        start = time.perf_counter()
        gold = clean_unicode(prompt.ground_truth).strip()
        found = extract_answer(response.text)
        if found.status != "found":
            return known(_verdict(found.status, found.answer or None, time.perf_counter() - start))
        equal = decide(gold, found.answer, _tolerance(prompt))
        if equal is not None:
            return known(_verdict("correct" if equal else "wrong", found.answer, time.perf_counter() - start))
        outcome = self._pool.submit(KIND, [gold, found.answer], self._timeout_seconds + KILL_MARGIN_SECONDS)
        return mapped(outcome, lambda outcome: _verdict(_status(outcome), found.answer, outcome.seconds))

    def close(self) -> None:
        """The pool belongs to whoever made it."""


def _tolerance(prompt: Prompt) -> Fraction | None:
    value = prompt.extra_info.get("tolerance")
    # As decimal text: the nearest float of 0.1 is not 1/10.
    return Fraction(str(value)) if isinstance(value, int | float) and math.isfinite(value) else None


def _status(outcome: Outcome) -> str:
    if outcome.end == "answered":
        return str(outcome.reply)
    return "timeout" if outcome.end == "timeout" else "grader_error"


def _verdict(status: str, extracted: str | None, seconds: float) -> Verdict:
    return Verdict(status=status, reward=REWARDS[status], extracted=extracted, seconds=seconds)
