import logging

import pytest

from megatron_prime.batch import Verdict
from megatron_prime.trainer.verdicts import verdict_metrics


def test_shares_and_percentiles():
    verdicts = [Verdict(status="correct", reward=1.0, seconds=float(n)) for n in range(150)]
    verdicts += [Verdict(status="pass", reward=1.0, seconds=1000.0), Verdict(status="wrong", reward=0.0)] * 25
    metrics = verdict_metrics(verdicts[::-1])
    assert metrics["verdict/correct"] == 0.75 and metrics["verdict/pass"] == metrics["verdict/wrong"] == 0.125
    assert metrics["verdict/missing"] == 0.0
    # 25 zeros come first.
    assert metrics["time/verdict_seconds/p50"] == 75.0
    assert metrics["time/verdict_seconds/p90"] == metrics["time/verdict_seconds/longest"] == 1000.0
    assert verdict_metrics([]) == {}


@pytest.mark.parametrize(("num_missing", "warned"), [(1, False), (2, True)])
def test_more_than_one_percent_missing_is_a_warning(caplog, num_missing, warned):
    verdicts = [Verdict(status="wrong", reward=0.0)] * (100 - num_missing)
    verdicts += [Verdict(status="grader_error", reward=None)] * num_missing
    with caplog.at_level(logging.WARNING):
        assert verdict_metrics(verdicts)["verdict/missing"] == num_missing / 100
    assert ("answers have no verdict: {'grader_error': 2}" in caplog.text) == warned
