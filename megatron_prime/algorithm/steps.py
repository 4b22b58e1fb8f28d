"""Reasoning steps as the unit of credit: which step each token belongs to, and sums over steps.

A step is whatever lies between delimiters: a line, a paragraph, a `;`. Nothing here knows whether it is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Steps(NamedTuple):
    """One value per step of every response."""

    values: torch.Tensor
    """[B, S], 0 where the response has no such step."""
    present: torch.Tensor
    """bool [B, S]; steps are numbered from 0 without gaps."""


def step_index(response_ids: torch.Tensor, mask: torch.Tensor, delimiters: Sequence[int]) -> torch.Tensor:
    """Numbers the steps of every response.

    A step ends with its delimiters, however many stand in a row. The last token of a response never makes a step of
    its own: it is the end token, or it was cut off.

    Args:
        response_ids: int64 [B, R].
        mask: bool [B, R], right-padded.
        delimiters: tokens that end a step (for a newline, every token of the vocabulary that ends with one).

    Returns:
        int64 [B, R], from 0 in each response; -1 on padding. Without delimiters every response is one step.
    """
    ends = torch.isin(response_ids, response_ids.new_tensor(list(delimiters))) & mask
    starts = torch.zeros_like(ends)
    starts[:, 1:] = ends[:, :-1] & ~ends[:, 1:]
    last = mask.sum(dim=1) - 1
    columns = torch.arange(mask.shape[1], device=mask.device)
    starts &= columns < last[:, None]
    return torch.where(mask, starts.cumsum(dim=1), -1)


def step_sums(values: torch.Tensor, index: torch.Tensor) -> Steps:
    """Sums token values over each step; differentiable in the values.

    Args:
        values: [B, R]; whatever stands on padding is ignored.
        index: int64 [B, R], from `step_index`.

    Returns:
        The sums [B, S], where S is the largest number of steps (at least 1).
    """
    num_steps = max(1, int(index.max()) + 1) if index.numel() else 1
    valid = index >= 0
    sums = values.new_zeros(values.shape[0], num_steps)
    sums = sums.scatter_add(1, index.clamp(min=0), torch.where(valid, values, 0.0))
    present = torch.arange(num_steps, device=index.device) <= index.amax(dim=1, keepdim=True)
    return Steps(sums, present)


def to_tokens(steps: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Gives every token the value of its step.

    Args:
        steps: [B, S].
        index: int64 [B, R], from `step_index`.

    Returns:
        [B, R], 0 on padding.
    """
    return torch.where(index >= 0, steps.gather(1, index.clamp(min=0)), 0.0)
