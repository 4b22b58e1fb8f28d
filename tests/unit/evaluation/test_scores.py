"""avg@k, pass@k and their intervals against enumeration and theory."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from megatron_prime.evaluation.scores import mean_of_benchmarks, mean_score, pass_at_k, score_answers
from megatron_prime.trainer.evaluation import wilson_interval


@pytest.mark.parametrize("num_answers", range(1, 8))
def test_pass_at_k_is_the_share_of_draws_with_a_correct_answer(num_answers: int) -> None:
    for num_correct in range(num_answers + 1):
        marks = [1] * num_correct + [0] * (num_answers - num_correct)
        for k in range(1, num_answers + 1):
            draws = list(itertools.combinations(marks, k))
            expected = sum(max(draw) for draw in draws) / len(draws)
            assert pass_at_k(num_answers, num_correct, k) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("bad", [(3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)])
def test_pass_at_k_of_too_few_answers_is_not_defined(bad: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError):
        pass_at_k(*bad)


def test_scores_of_answers_by_hand() -> None:
    scores = score_answers([[1.0, 0.0, 0.0], [1.0, None, 1.0], [None, None, None], [0.0, 0.0, 0.5]])
    assert list(scores) == ["avg@3", "pass@2", "pass@3"]
    assert scores["avg@3"].value == pytest.approx((1 / 3 + 1 + 0.5 / 3) / 3)
    # Two of three draws of two answers of the first problem hold its correct one; half right is not right.
    assert scores["pass@2"].value == pytest.approx((2 / 3 + 1 + 0) / 3) and scores["pass@2"].num_problems == 3
    assert scores["pass@3"].value == pytest.approx(1 / 2) and scores["pass@3"].num_problems == 2
    assert list(score_answers([[1.0], [0.0]])) == ["avg@1"]
    assert list(score_answers([[1.0] * 10])) == ["avg@10", "pass@2", "pass@4", "pass@8", "pass@10"]


def test_interval_is_that_of_the_mean_of_many_problems() -> None:
    values = np.random.default_rng(3).beta(0.5, 0.5, 400)
    score = mean_score(values.tolist())
    half = 1.959964 * values.std() / math.sqrt(len(values))
    assert score.value == pytest.approx(values.mean(), rel=1e-12)
    # 10,000 resamples know a 2.5% quantile to about 2% of the interval's half width.
    assert (score.low, score.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.06 * half)
    assert mean_score(values.tolist()) == score


def test_interval_of_few_problems_is_the_exact_binomial_one() -> None:
    # Means of resamples of 5 ones and 5 zeros are binomial: P(X <= 1) = 1.1%, P(X <= 2) = 5.5%.
    score = mean_score([1.0] * 5 + [0.0] * 5)
    assert (score.low, score.high) == (pytest.approx(0.2), pytest.approx(0.8))


def test_problems_that_all_end_alike_still_have_an_interval() -> None:
    score = mean_score([0.0] * 10)
    assert (score.low, score.high) == wilson_interval(0.0, 10) == (0.0, pytest.approx(0.2775, abs=5e-5))
    assert mean_score([]).num_problems == 0
    everything = mean_of_benchmarks({"a": [1.0] * 4, "b": [1.0] * 6})
    assert (everything.low, everything.high) == wilson_interval(1.0, 10)


def test_average_weighs_benchmarks_alike() -> None:
    few, many = [0.0, 1.0] * 50, [1.0, 1.0, 1.0, 0.0] * 100
    score = mean_of_benchmarks({"few": few, "many": many, "empty": []})
    assert score.value == pytest.approx((0.5 + 0.75) / 2)
    half = 1.959964 * 0.5 * math.sqrt(0.25 / 100 + 0.1875 / 400)
    assert score.high - score.low == pytest.approx(2 * half, rel=0.05)
