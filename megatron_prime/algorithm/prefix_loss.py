"""The prefix-value loss of the implicit PRM: every prefix of an answer predicts its outcome.

Source: IPVRM, arXiv 2604.13197, with its two repairs for training online: the difficulty baseline and the label
weights, both from the accuracy of the answer's group. Sums over responses divided by those of the mini-batch, as in
`prm_loss.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_prime.algorithm.groups import group_sum
from megatron_prime.algorithm.implicit_reward import implicit_rewards
from megatron_prime.algorithm.prm_loss import PrmResponses

_PRIOR = 0.5
"""Answers of either kind that every group is taken to have had before: keeps the logit of 0 of 4 finite."""


def difficulty_baseline(labels: torch.Tensor, group_index: torch.Tensor) -> torch.Tensor:
    """Logit of the share of right answers in each group: what a PRM that knows the prompt alone would say.

    Args:
        labels: [B], in [0, 1].
        group_index: int64 [B].

    Returns:
        [B], log((n_right + 1/2) / (n_wrong + 1/2)).
    """
    right = group_sum(labels, group_index)
    wrong = group_sum(1.0 - labels, group_index)
    return (right + _PRIOR).log() - (wrong + _PRIOR).log()


def label_weights(labels: torch.Tensor, group_index: torch.Tensor) -> torch.Tensor:
    """Weights by which right and wrong answers of a group count the same, with mean 1 over each group of both kinds.

    With mu the share of right answers: 1 / (2 mu) for right ones, 1 / (2 (1 - mu)) for wrong ones.

    Args:
        labels: [B]; above 0.5 counts as right.
        group_index: int64 [B].

    Returns:
        [B]; 0 in groups of one kind, which have nothing to tell apart.
    """
    is_right = (labels > 0.5).to(labels.dtype)
    right = group_sum(is_right, group_index)
    wrong = group_sum(1.0 - is_right, group_index)
    mine = torch.where(labels > 0.5, right, wrong)
    return torch.where((right > 0) & (wrong > 0), (right + wrong) / (2.0 * mine), 0.0)


def prefix_cross_entropy_loss(
    rewards: torch.Tensor,
    mask: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_responses: int,
    margin: float = 0.0,
    baseline: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes the cross-entropy of the outcome at every prefix, averaged over the prefixes of each answer.

    With v_t the mean of r_1 .. r_t, V the baseline and m the margin:
    -w / L * sum_t [y log sigmoid(v_t - m + V) + (1 - y) log sigmoid(-(v_t + m + V))].

    Args:
        rewards: [b, R] of whole responses, from `implicit_rewards`, with gradient.
        mask: bool [b, R].
        labels: [b], in [0, 1].
        num_responses: responses of the whole mini-batch.
        margin: by how much a prefix has to be on its side before its loss is small.
        baseline: [b], from `difficulty_baseline`; None: 0.
        weights: [b], from `label_weights`; None: 1.

    Returns:
        Scalar; sums over micro-batches to the mini-batch mean.
    """
    counts = torch.arange(1, mask.shape[1] + 1, device=rewards.device, dtype=rewards.dtype)
    values = torch.where(mask, rewards, 0.0).cumsum(dim=1) / counts
    if baseline is not None:
        values = values + baseline[:, None]
    labels = labels.to(values.dtype)[:, None]
    losses = -labels * F.logsigmoid(values - margin) - (1.0 - labels) * F.logsigmoid(-values - margin)
    losses = torch.where(mask, losses, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    return (losses if weights is None else losses * weights).sum() / num_responses


def prefix(responses: PrmResponses) -> torch.Tensor:
    """The prefix-value loss with its difficulty baseline and label weights, margin 0 (`prm.loss: prefix`).

    Groups of one kind, whose label weight is 0, teach nothing. Wants a `prm.beta` of about 10, since a prefix value is
    a mean over tokens.
    """
    mean = responses.group_accuracy
    size = responses.group_size
    rewards = implicit_rewards(
        responses.prm_logprobs, responses.reference_logprobs, responses.mask, beta=responses.section.beta
    )
    baseline = (mean * size + _PRIOR).log() - ((1.0 - mean) * size + _PRIOR).log()
    share = torch.where(responses.labels > 0.5, mean, 1.0 - mean)
    weights = torch.where((mean > 0) & (mean < 1), 0.5 / share.clamp(min=1e-6), 0.0)
    return prefix_cross_entropy_loss(
        rewards,
        responses.mask,
        responses.labels,
        num_responses=responses.num_responses,
        baseline=baseline,
        weights=weights,
    )
