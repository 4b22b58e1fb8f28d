"""Reductions over the responses of one prompt, for groups of any size in any row order."""

from __future__ import annotations

import torch


def group_sum(values: torch.Tensor, group_index: torch.Tensor) -> torch.Tensor:
    """Sums values over each row's group.

    Args:
        values: [B].
        group_index: int64 [B]; any labels, rows of a group need not be neighbours.

    Returns:
        [B]: for every row the sum over its group.
    """
    labels, index = torch.unique(group_index, return_inverse=True)
    return values.new_zeros(labels.numel()).index_add(0, index, values)[index]


def group_max(values: torch.Tensor, group_index: torch.Tensor) -> torch.Tensor:
    """Takes the maximum over each row's group.

    Args:
        values: [B].
        group_index: int64 [B].

    Returns:
        [B]: for every row the maximum over its group.
    """
    labels, index = torch.unique(group_index, return_inverse=True)
    return values.new_full((labels.numel(),), -torch.inf).scatter_reduce(0, index, values, "amax")[index]
