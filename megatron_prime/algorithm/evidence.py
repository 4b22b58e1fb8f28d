"""Measures how well the PRM orders answers it has not trained on, and derives the weight of its rewards from that.

A PRM that cannot tell right from wrong is not neutral: it rewards the policy for unlikely tokens. So its rewards are
scaled by a lower bound on its measured skill on fresh rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from megatron_prime.batch import StepSpan


class GroupedAuc(NamedTuple):
    """Ordering within groups and how much it rests on."""

    auc: float
    """NaN without pairs."""
    num_pairs: int


def _won_pairs(scores: torch.Tensor, right: torch.Tensor) -> float:
    """Pairs (right, wrong) in which the right one scores higher; ties count half (Mann-Whitney U)."""
    # Mann-Whitney U by ranks, in O(N log N): tied scores share the mean of their ranks, which counts a tie as half.
    _, index, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = counts.cumsum(0) - (counts - 1) / 2.0
    num_right = int(right.sum())
    return float(mean_rank[index][right].sum(dtype=torch.float64)) - num_right * (num_right + 1) / 2.0


def auc(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Computes the area under the ROC curve: how often a right item scores higher than a wrong one.

    Args:
        scores: [N].
        labels: [N]; above 0.5 (or True) is right.

    Returns:
        In [0, 1], ties counted half; NaN if only one kind is present.
    """
    right = labels > 0.5 if labels.is_floating_point() else labels.bool()
    num_pairs = int(right.sum()) * int((~right).sum())
    return _won_pairs(scores, right) / num_pairs if num_pairs else math.nan


def grouped_auc(scores: torch.Tensor, labels: torch.Tensor, group_index: torch.Tensor) -> GroupedAuc:
    """Computes the share of well-ordered (right, wrong) pairs among answers to the same prompt.

    Pairs across prompts are left out: a score that only knew which prompts are hard would win those.

    Args:
        scores: [B], for instance `sequence_logits`.
        labels: [B]; above 0.5 (or True) is right.
        group_index: int64 [B].

    Returns:
        The share over the pairs of all groups (ties half) and their number.
    """
    right = labels > 0.5 if labels.is_floating_point() else labels.bool()
    won, num_pairs = 0.0, 0
    for group in group_index.unique():
        members = group_index == group
        num_right = int(right[members].sum())
        pairs = num_right * (int(members.sum()) - num_right)
        if pairs:
            won += _won_pairs(scores[members], right[members])
            num_pairs += pairs
    return GroupedAuc(won / num_pairs if num_pairs else math.nan, num_pairs)


def auc_gate(auc: float, num_pairs: int, *, z: float = 1.645) -> float:
    """Turns measured ordering into the weight of the process source.

    The weight is max(0, 2 L - 1), where L is Wilson's lower confidence bound of the AUC taken as a share of
    `num_pairs` trials: 0 up to chance, 1 for an AUC of 1 seen on many pairs, linear in the bound between. Pairs of
    one group share responses, so they are fewer independent trials than counted; the bound leans on a 95% level for
    that, and the caller averages over steps.

    Args:
        auc: from `grouped_auc`, may be nan.
        num_pairs: pairs behind it.
        z: normal quantile of the one-sided bound; 0 takes the AUC at face value.

    Returns:
        In [0, 1]; 0 without pairs.
    """
    if num_pairs == 0 or math.isnan(auc):
        return 0.0
    # Wilson's score interval (1927); `shrink` pulls the estimate towards 1/2, the more the fewer pairs there are.
    shrink = z * z / num_pairs
    deviation = z * math.sqrt(auc * (1.0 - auc) / num_pairs + shrink / (4 * num_pairs))
    lower_bound = (auc + shrink / 2 - deviation) / (1.0 + shrink)
    return max(0.0, 2.0 * lower_bound - 1.0)


def step_scores(process_rewards: torch.Tensor, spans: Sequence[StepSpan]) -> torch.Tensor:
    """Averages process rewards over each reasoning step of one response.

    Args:
        process_rewards: [R], of one response.
        spans: its steps, as half-open token ranges.

    Returns:
        [number of spans], in the order of `spans`.

    Raises:
        ValueError: a span that is empty or outside of the response.
    """
    for span in spans:
        if not 0 <= span.start < span.stop <= process_rewards.shape[0]:
            raise ValueError(f"span {span.start}:{span.stop} does not fit a row of {process_rewards.shape[0]} tokens")
    if not spans:
        return process_rewards.new_zeros(0)
    return torch.stack([process_rewards[span.start : span.stop].mean() for span in spans])
