"""Outcome labels of math responses."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from types import TracebackType

from megatron_prime.batch import Prompt, Response, Verdict
from megatron_prime.errors import VerifierError
from megatron_prime.verify.math_answer import decide, extract_answer
from megatron_prime.verify.normalize import clean_unicode
from megatron_prime.verify.pool import GraderPool

_REWARDS: Mapping[str, float | None] = {
    "correct": 1.0,
    "wrong": 0.0,
    "no_answer": 0.0,
    "malformed": 0.0,
    "too_long": 0.0,
    # The verifier's failures say nothing about the response: its outcome is missing, neither 0 nor 1.
    "timeout": None,
    "grader_error": None,
}


class MathVerifier:
    """Compares the last boxed answer of each response with the ground truth.

    Exact rules decide nearly all cases in microseconds; the rest goes to math-verify in worker processes that
    start on first need and are killed at their limits. Model text is never evaluated as code.

    Args:
        num_workers: grader processes at the most.
        timeout_seconds: wall-clock limit of a symbolic comparison.
        memory_gib: address space of a grader process.
    """

    def __init__(self, num_workers: int, timeout_seconds: float, memory_gib: float) -> None:
        self._pool = GraderPool(num_workers, timeout_seconds, memory_gib)
        self._counts: Counter[str] = Counter()

    @property
    def counts(self) -> Mapping[str, int]:
        """How often each status was given since the start."""
        return dict(self._counts)

    def verify(self, items: Sequence[tuple[Prompt, Response]]) -> list[Verdict]:
        """Judges responses, on this process alone.

        Args:
            items: prompts, each with one of its responses.

        Returns:
            One verdict per item, in the same order.

        Raises:
            VerifierError: a prompt that is no math problem, or workers that cannot start.
        """
        verdicts: list[Verdict | None] = []
        open_cases: dict[tuple[str, str], list[int]] = {}
        for index, (prompt, response) in enumerate(items):
            if prompt.ability != "math":
                raise VerifierError(
                    f"prompt {prompt.prompt_id}: the math verifier cannot judge ability '{prompt.ability}'; "
                    "leave such rows out of data.train and data.evaluation"
                )
            gold = clean_unicode(prompt.ground_truth).strip()
            verdict, answer = _judge_exactly(gold, response.text)
            verdicts.append(verdict)
            if verdict is None:
                # Equal answers to one problem are common; each is worth one comparison.
                open_cases.setdefault((gold, answer), []).append(index)
        for case, outcome in zip(open_cases, self._pool.run(list(open_cases)), strict=True):
            for index in open_cases[case]:
                verdicts[index] = _verdict(outcome.status, case[1], outcome.seconds)
        result = [verdict for verdict in verdicts if verdict is not None]
        assert len(result) == len(items)
        self._counts.update(verdict.status for verdict in result)
        return result

    def close(self) -> None:
        """Ends the grader processes."""
        self._pool.close()

    def __enter__(self) -> MathVerifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _judge_exactly(gold: str, text: str) -> tuple[Verdict | None, str]:
    """The verdict where exact rules suffice, and the answer found."""
    start = time.perf_counter()
    found = extract_answer(text)
    if found.status != "found":
        return _verdict(found.status, found.answer or None, time.perf_counter() - start), found.answer
    equal = decide(gold, found.answer)
    if equal is None:
        return None, found.answer
    return _verdict("correct" if equal else "wrong", found.answer, time.perf_counter() - start), found.answer


def _verdict(status: str, extracted: str | None, seconds: float) -> Verdict:
    return Verdict(status=status, reward=_REWARDS[status], extracted=extracted, seconds=seconds)
