"""From the verdicts on single tests to one status and one reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Mode = Literal["all_or_nothing", "fraction_all", "prime_fraction"]

NUM_PRIME_TESTS = 10
"""The released code's partial credit counts this many first tests."""
MISSING = ("harness_error", "bad_tests")
"""The verifier's or the data set's fault: the outcome is missing, not 0."""
STATUSES = (
    "pass",
    "wrong_answer",
    "runtime_error",
    "compile_error",
    "time_limit",
    "memory_limit",
    "output_limit",
    "no_code",
    *MISSING,
)
"""Every status of a program."""
UNCERTAIN = ("time_limit", "memory_limit", *MISSING)
"""Depend on the machine's load and are never cached."""
NOT_RUN = "not_run"
"""Of a test only: the verdict was certain, or the time used up, before its turn."""


def num_tests_to_run(num_tests: int, mode: Mode) -> int:
    """How many of a problem's first tests count."""
    return min(num_tests, NUM_PRIME_TESTS) if mode == "prime_fraction" else num_tests


def score(statuses: Sequence[str], mode: Mode) -> tuple[str, float | None]:
    """The status and the reward of a program.

    `all_or_nothing`: 1 where every test passes, else 0. `fraction_all`: the share of all tests. `prime_fraction`: the
    share of the first 10, which gives PRIME's released rule exactly: all tests passed is 1, and otherwise the first 10
    decide, also where only a later one failed.

    Args:
        statuses: of the tests that count, in order.
        mode: how to score.

    Returns:
        The first status that is not ``pass`` (or ``pass``), and the reward, None where it is missing.
    """
    failed = [status for status in statuses if status not in ("pass", NOT_RUN)]
    for status in failed:
        if status in MISSING:
            return status, None
    num_passed = sum(status == "pass" for status in statuses)
    if num_passed == len(statuses):
        return "pass", 1.0
    reward = 0.0 if mode == "all_or_nothing" else num_passed / len(statuses)
    return failed[0] if failed else "time_limit", reward
