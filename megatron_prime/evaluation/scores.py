"""Scores a model by its graded answers: avg@k and pass@k with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_prime.trainer.evaluation import wilson_interval

_NUM_RESAMPLES = 10_000
_SEED = 20250203
_CHUNK = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A mean over problems with its 95% interval."""

    value: float
    low: float
    high: float
    num_problems: int
    """Problems that the mean is over."""

    def row(self) -> dict[str, float | int]:
        """Returns the score as it is written to JSON."""
        return {"value": self.value, "low": self.low, "high": self.high, "num_problems": self.num_problems}


def pass_at_k(num_answers: int, num_correct: int, k: int) -> float:
    """Chance that one of k answers, drawn without replacement from those seen, is correct.

    The unbiased estimator 1 - C(n - c, k) / C(n, k) of Chen et al., "Evaluating Large Language Models Trained on
    Code" (2021), eq. 1.

    Args:
        num_answers: n, answers with a verdict; at least k.
        num_correct: c.
        k: answers drawn.
    """
    if not 0 <= num_correct <= num_answers or not 1 <= k <= num_answers:
        raise ValueError(f"pass@{k} of {num_correct} correct among {num_answers} answers is not defined")
    return 1.0 - math.comb(num_answers - num_correct, k) / math.comb(num_answers, k)


def score_answers(rewards: Sequence[Sequence[float | None]]) -> dict[str, Score]:
    """avg@k, and pass@j for each power of two j < k and for k.

    Args:
        rewards: per problem, of its k answers; None where there is no verdict. A problem with fewer than j verdicts
            takes no part in pass@j, and one with none in nothing.

    Returns:
        By name, ``avg@k`` first. With one answer per problem only that.
    """
    k = max((len(row) for row in rewards), default=0)
    graded = [[reward for reward in row if reward is not None] for row in rewards]
    scores = {f"avg@{k}": mean_score([sum(row) / len(row) for row in graded if row])}
    for j in sorted({*(2**power for power in range(1, k.bit_length()) if 2**power < k), k} - {0, 1}):
        passed = [pass_at_k(len(row), sum(r == 1.0 for r in row), j) for row in graded if len(row) >= j]
        scores[f"pass@{j}"] = mean_score(passed)
    return scores


def mean_score(values: Sequence[float]) -> Score:
    """Mean of one value per problem with the 95% percentile interval of resampled problems.

    A bootstrap of values that are all 0 or all 1 says nothing; there the interval is Wilson's.
    """
    if not values:
        return Score(value=0.0, low=0.0, high=1.0, num_problems=0)
    value = math.fsum(values) / len(values)
    if value in (0.0, 1.0):
        low, high = wilson_interval(value, len(values))
    else:
        low, high = np.percentile(_resampled_means(values), [2.5, 97.5]).tolist()
    return Score(value=value, low=low, high=high, num_problems=len(values))


def mean_of_benchmarks(values: Mapping[str, Sequence[float]]) -> Score:
    """Mean of the benchmarks' means, each benchmark's problems resampled on their own.

    Args:
        values: by benchmark, one value per problem; benchmarks without any are left out.
    """
    kept = [row for row in values.values() if row]
    if not kept:
        return mean_score([])
    value = math.fsum(math.fsum(row) / len(row) for row in kept) / len(kept)
    num_problems = sum(map(len, kept))
    if value in (0.0, 1.0):
        low, high = wilson_interval(value, num_problems)
    else:
        means = np.mean([_resampled_means(row, stream) for stream, row in enumerate(kept)], axis=0)
        low, high = np.percentile(means, [2.5, 97.5]).tolist()
    return Score(value=value, low=low, high=high, num_problems=num_problems)


def _resampled_means(values: Sequence[float], stream: int = 0) -> np.ndarray:
    """Means of `_NUM_RESAMPLES` bootstrap samples; equal input gives equal output."""
    generator = np.random.default_rng([_SEED, stream])
    array = np.asarray(values, dtype=np.float64)
    shares = np.full(len(array), 1 / len(array))
    chunks = (generator.multinomial(len(array), shares, size=_CHUNK) for _ in range(_NUM_RESAMPLES // _CHUNK))
    return np.concatenate([chunk @ array for chunk in chunks]) / len(array)
