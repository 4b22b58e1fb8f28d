"""Baselines beside those of the paper: Dr. GRPO's plain group mean and REINFORCE++'s moments of the batch.

Outcomes are rows of one token, as in `advantage.py`. Every function first subtracts a value that it has seen, so that
equal rewards give advantages that are exactly 0.
"""

from __future__ import annotations

from typing import Literal

import torch

from megatron_prime.algorithm.groups import group_max, group_sum
from megatron_prime.config.schema import AdvantageSection

RELATIVE_NOISE = 1e-6
"""A spread below this share of the values' magnitude is float32 rounding, not a signal."""


def _row_means(rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean reward of each response [B]; 0 for one without tokens."""
    return torch.where(mask, rewards, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def _minus_group_mean(rewards: torch.Tensor, mask: torch.Tensor, group_index: torch.Tensor) -> torch.Tensor:
    present = mask.any(dim=1)
    minimum = -group_max(-rewards.masked_fill(~mask, torch.inf).amin(dim=1), group_index)
    shifted = torch.where(mask, rewards - minimum[:, None], 0.0)
    size = group_sum(present.to(rewards.dtype), group_index).clamp(min=1)
    mean = group_sum(_row_means(shifted, mask), group_index) / size
    return torch.where(mask, shifted - mean[:, None], 0.0)


def dr_grpo_process(rewards: torch.Tensor, mask: torch.Tensor, group_index: torch.Tensor) -> torch.Tensor:
    """Subtracts the mean of the group's mean rewards, own one included, and divides by nothing.

    With one token per response this is Dr. GRPO's advantage o_i - mean_j o_j, (K - 1) / K of the leave-one-out one.
    Source: arXiv 2503.20783; its other half, a constant length in the loss, is `constant_loss_weights`.

    Args:
        rewards: [B, R].
        mask: bool [B, R].
        group_index: int64 [B]; sizes may differ. A response without tokens does not count.

    Returns:
        [B, R], 0 on padding and for groups of one token reward.
    """
    return _minus_group_mean(rewards, mask, group_index)


def reinforce_pp_process(
    rewards: torch.Tensor, mask: torch.Tensor, group_index: torch.Tensor, *, baseline: Literal["batch", "group"]
) -> torch.Tensor:
    """Standardises token rewards by the mean and standard deviation of responses' mean rewards over the whole batch.

    `batch`: (r_t - mean_j m_j) / std_j m_j over all responses j of the batch (REINFORCE++); `group`: the same of
    rewards from which the mean of their group was subtracted (REINFORCE++-baseline). Unlike GRPO's, the divisor is one
    for all groups, so easy and hard prompts keep their proportion. Source: arXiv 2501.03262, with the sample standard
    deviation.

    Args:
        rewards: [B, R].
        mask: bool [B, R].
        group_index: int64 [B]; matters for `group` only.
        baseline: which of the two.

    Returns:
        [B, R], 0 on padding and where responses' means do not differ.

    Raises:
        ValueError: unknown baseline.
    """
    if baseline == "group":
        centred = _minus_group_mean(rewards, mask, group_index)
    elif baseline == "batch":
        centred = _minus_group_mean(rewards, mask, torch.zeros_like(group_index))
    else:
        raise ValueError(f"baseline: {baseline!r} is neither 'batch' nor 'group'")
    present = mask.any(dim=1)
    size = int(present.sum())
    if size < 2:
        return torch.zeros_like(centred)
    means = _row_means(centred, mask)
    centre = means.sum() / size
    std = (torch.where(present, means - centre, 0.0).square().sum() / (size - 1)).sqrt()
    if std <= RELATIVE_NOISE * centred.abs().max():
        return torch.zeros_like(centred)
    return torch.where(mask, (centred - centre) / std, 0.0)


def constant_loss_weights(mask: torch.Tensor, *, max_length: int) -> torch.Tensor:
    """Gives every token the same weight whatever the lengths in the batch: 1 / (B * max_length).

    A mean over tokens or responses lets long answers of a batch weigh less per token; a constant does not.
    Source: arXiv 2503.20783 (Dr. GRPO), the second of its two corrections.

    Args:
        mask: bool [B, R], of the whole mini-batch.
        max_length: longest response that may be sampled, in tokens.

    Returns:
        float32 [B, R], 0 on padding; the sum is 1 only for responses of the full length.
    """
    num_responses = int(mask.any(dim=1).sum())
    return mask.to(torch.float32) / max(1, num_responses * max_length)


def overlong_penalty(lengths: torch.Tensor, *, max_length: int, buffer: int) -> torch.Tensor:
    """Takes reward from answers that come close to the length limit, so that being cut off is no surprise.

    0 up to max_length - buffer, then falling linearly to -1 at max_length, -1 from there on.
    Source: arXiv 2503.14476 (DAPO), soft overlong punishment.

    Args:
        lengths: [B], response tokens.
        max_length: where the penalty is full, in tokens.
        buffer: over how many tokens it grows, in 1 .. max_length.

    Returns:
        float32 [B], in [-1, 0]; to be added to outcomes.

    Raises:
        ValueError: a buffer outside of its range.
    """
    if not 1 <= buffer <= max_length:
        raise ValueError(f"buffer: {buffer} is not in 1 .. max_length ({max_length})")
    return ((max_length - buffer - lengths.to(torch.float32)) / buffer).clamp(-1.0, 0.0)


def dr_grpo(
    rewards: torch.Tensor, mask: torch.Tensor, group_index: torch.Tensor, section: AdvantageSection
) -> torch.Tensor:
    """Subtracts the group's mean: `dr_grpo_process` (`advantage.estimator: dr_grpo`)."""
    return dr_grpo_process(rewards, mask, group_index)


def reinforce_pp(
    rewards: torch.Tensor, mask: torch.Tensor, group_index: torch.Tensor, section: AdvantageSection
) -> torch.Tensor:
    """Standardises over the batch: `reinforce_pp_process` with baseline `batch`."""
    return reinforce_pp_process(rewards, mask, group_index, baseline="batch")


def reinforce_pp_baseline(
    rewards: torch.Tensor, mask: torch.Tensor, group_index: torch.Tensor, section: AdvantageSection
) -> torch.Tensor:
    """Standardises what is above the group's mean over the batch: `reinforce_pp_process` with baseline `group`."""
    return reinforce_pp_process(rewards, mask, group_index, baseline="group")
