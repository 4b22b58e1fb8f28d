"""An advantage estimator of your own: rewards above the median of the group.

PYTHONPATH=examples megatron-prime train CONFIG advantage.estimator=own_estimator:median_baseline
"""

from __future__ import annotations

import torch

from megatron_prime import AdvantageSection


def median_baseline(
    rewards: torch.Tensor, mask: torch.Tensor, group_index: torch.Tensor, section: AdvantageSection
) -> torch.Tensor:
    """Rewards [B, R] less the median over the group's answers of their mean reward; 0 on padding.

    It is called twice a step: with process rewards [B, R], and with outcomes as [B, 1].
    """
    means = torch.where(mask, rewards, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    centred = torch.zeros_like(rewards)
    for group in group_index.unique():
        rows = group_index == group
        centred[rows] = rewards[rows] - means[rows].median()
    return torch.where(mask, centred, 0.0)
