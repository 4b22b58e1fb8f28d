"""Metrics of a step's answers and their verdicts."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from megatron_prime.batch import Group, Verdict

_MAX_MISSING = 0.01
"""Share of answers without a verdict above which the log warns."""
_PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "longest": 1.0}

logger = logging.getLogger(__name__)


def verdict_metrics(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Shares of the statuses and of missing rewards, and percentiles of the seconds that verdicts took.

    More than 1% of missing rewards is logged as a warning.

    Args:
        verdicts: of all answers that were sampled in the step.
    """
    if not verdicts:
        return {}
    count = len(verdicts)
    missing = Counter(verdict.status for verdict in verdicts if verdict.reward is None)
    if missing.total() > _MAX_MISSING * count:
        logger.warning("%d of %d answers have no verdict: %s", missing.total(), count, dict(missing))
    metrics = {f"verdict/{status}": n / count for status, n in Counter(v.status for v in verdicts).items()}
    seconds = sorted(verdict.seconds for verdict in verdicts)
    for name, share in _PERCENTILES.items():
        metrics[f"time/verdict_seconds/{name}"] = seconds[min(count - 1, int(share * count))]
    return metrics | {"verdict/missing": missing.total() / count}


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Mean accuracy and length of the answers that have a verdict, and the share that was cut off."""
    responses = [r for group in groups for r in group.responses]
    if not responses:
        return {}
    rewards = [x for group in groups for x in group.rewards]
    return {
        "rollout/accuracy": sum(rewards) / len(rewards),
        "rollout/response_tokens": sum(len(r.token_ids) for r in responses) / len(responses),
        "rollout/truncated": sum(r.finish_reason != "stop" for r in responses) / len(responses),
    }
