"""Divides the head's vocabulary over tensor-parallel ranks and merges their statistics.

Rank r holds the rows from r * V_local. Four numbers per token (maximum, sum of exponentials, weighted sum, target
logit) are gathered and merged in rank order, so that every rank computes bitwise the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of the vocabulary that this rank holds."""

    first_id: int
    num_rows: int
    """Real rows; the padding rows behind them take no part. May be 0."""
    group: dist.ProcessGroup | None
    """None: this rank holds the whole vocabulary."""

    @classmethod
    def of(cls, weight: torch.Tensor, vocab_size: int, group: dist.ProcessGroup | None) -> Shard:
        """The shard of this rank, from its rows and the vocabulary's true size."""
        alone = group is None or dist.get_world_size(group) == 1
        first_id = 0 if alone else dist.get_rank(group) * weight.shape[0]
        return cls(first_id, min(max(vocab_size - first_id, 0), weight.shape[0]), None if alone else group)

    @property
    def size(self) -> int:
        """Ranks that share the vocabulary."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def local_rows(self, targets: torch.Tensor) -> torch.Tensor:
        """Row of each target in this shard, -1 where another rank has it: int64 [T]."""
        rows = targets.long() - self.first_id
        return torch.where((rows >= 0) & (rows < self.num_rows), rows, -1)

    def gather_statistics(self, statistics: torch.Tensor) -> torch.Tensor:
        """All ranks' statistics in rank order: [tp, T, 4]."""
        if self.group is None or statistics.shape[0] == 0:
            return statistics[None]
        gathered = statistics.new_empty(self.size, *statistics.shape)
        dist.all_gather_into_tensor(gathered.flatten(0, 1), statistics.contiguous(), group=self.group)
        return gathered

    def gather_sequence(self, hidden: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """The rows of all ranks, one rank's after the other's: [sum(counts), d]."""
        longest = max(counts)
        if self.group is None or longest == 0:
            return hidden
        # all_gather_into_tensor needs equal sizes: pad to the longest share, cut the padding off again below.
        padded = hidden.new_zeros(longest, hidden.shape[1])
        padded[: hidden.shape[0]] = hidden
        gathered = hidden.new_empty(self.size, *padded.shape)
        dist.all_gather_into_tensor(gathered.flatten(0, 1), padded, group=self.group)
        return torch.cat([rows[:count] for rows, count in zip(gathered, counts, strict=True)])

    def reduce_hidden(self, grad_hidden: torch.Tensor, counts: Sequence[int] | None) -> torch.Tensor:
        """Sums the ranks' parts of the gradient of `hidden`: all of it, or this rank's rows of the sequence."""
        if self.group is None or grad_hidden.shape[0] == 0:
            return grad_hidden
        if counts is None:
            dist.all_reduce(grad_hidden, group=self.group)
            return grad_hidden
        padded = grad_hidden.new_zeros(self.size, max(counts), grad_hidden.shape[1])
        for rows, part in zip(padded, grad_hidden.split(list(counts)), strict=True):
            rows[: part.shape[0]] = part
        mine = torch.empty_like(padded[0])
        dist.reduce_scatter_tensor(mine, padded.flatten(0, 1), group=self.group)
        return mine[: counts[dist.get_rank(self.group)]]


@dataclass(frozen=True, slots=True)
class Merged:
    """Statistics of the whole vocabulary, each [T]."""

    maximum: torch.Tensor
    """Largest logit. Kept apart from `log_total`: their sum would round away small differences under a large offset."""
    log_total: torch.Tensor
    """Logarithm of the sum of exp(logit - maximum)."""
    logprobs: torch.Tensor
    entropies: torch.Tensor
    """Meaningless where the weighted sums were not computed."""

    def take(self, tokens: slice) -> Merged:
        """The statistics of some of the tokens."""
        return Merged(self.maximum[tokens], self.log_total[tokens], self.logprobs[tokens], self.entropies[tokens])


def combine_statistics(parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Statistics of several parts of a vocabulary as those of one part.

    Differences to the common maximum are taken before anything is added, so that an offset common to all logits
    costs no precision.

    Args:
        parts: [parts, T, 4]: maximum m, sum of exp(z - m), sum of (z - m) exp(z - m), target logit (0 where the
            target is elsewhere). A part without rows has (-inf, 0, 0, 0).

    Returns:
        The same four, each [T].
    """
    maxima, sums, weighted_sums, target_logits = parts.unbind(dim=2)
    maximum = maxima.amax(dim=0)
    # A part without rows has a maximum of -inf, and -inf * 0 would be NaN.
    shifts = torch.where(sums > 0, maxima - maximum, 0.0)
    factors = shifts.exp()
    return (
        maximum,
        (factors * sums).sum(dim=0),
        (factors * (weighted_sums + shifts * sums)).sum(dim=0),
        target_logits.sum(dim=0),
    )


def merge_statistics(shards: torch.Tensor) -> Merged:
    """Log-prob and entropy of each token from what all shards know: [shards, T, 4], as in `combine_statistics`."""
    maximum, total, weighted_sum, target_logits = combine_statistics(shards)
    log_total = total.log()
    return Merged(
        maximum=maximum,
        log_total=log_total,
        logprobs=(target_logits - maximum) - log_total,
        entropies=log_total - weighted_sum / total,
    )
