"""Plans context parallelism: which tokens of a micro-batch a rank computes, and which answers reach its head.

Every sequence is cut into two chunks per rank, of which rank r takes the r-th from the front and the r-th from the end,
so that under a causal mask all ranks have the same work (Transformer Engine cuts in the same way). Losses may want
whole answers: in front of the head, hidden states of response tokens go to the rank that owns their answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextPart:
    """One context-parallel rank's part of a micro-batch; all places count along its (padded) lines."""

    places: torch.Tensor
    """int64 [T / size], this rank's tokens."""
    gathered: torch.Tensor
    """int64 [T], tokens in the order of all ranks' parts, one after the other."""
    send_order: torch.Tensor
    """int64, this rank's response tokens by the rank that owns their answer."""
    send_counts: tuple[int, ...]
    """Number of these tokens that go to each rank."""
    receive_counts: tuple[int, ...]
    receive_order: torch.Tensor
    """int64, received tokens in the order of this rank's answers."""


def zigzag_places(lengths: Sequence[int], rank: int, size: int) -> torch.Tensor:
    """Places of a rank's tokens where sequences lie one after the other.

    Args:
        lengths: of the sequences, multiples of ``2 * size``.
        rank: context-parallel rank.
        size: context-parallel ranks.
    """
    places: list[torch.Tensor] = []
    start = 0
    for length in lengths:
        chunk = length // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            places.append(torch.arange(start + number * chunk, start + (number + 1) * chunk))
        start += length
    return torch.cat(places)


def context_part(
    predicts: torch.Tensor, owners: torch.Tensor, lengths: Sequence[int], rank: int, size: int
) -> ContextPart:
    """Plans one rank's part.

    Args:
        predicts: bool [lines, T], positions whose next token is a response token.
        owners: int64 [n], rank that owns the answer of each of the n true positions, line after line.
        lengths: of the sequences in a line.
        rank: context-parallel rank.
        size: context-parallel ranks.
    """
    parts = [zigzag_places(lengths, r, size) for r in range(size)]
    numbers = torch.full(predicts.shape, -1)
    numbers[predicts] = torch.arange(len(owners))
    held = [numbers[:, places][predicts[:, places]] for places in parts]
    received = [mine[owners[mine] == rank] for mine in held]
    # Sending sorts by destination and keeps the order within it; the receiver's `argsort` over token numbers then
    # restores the order of whole answers, whichever rank each token came from.
    destinations = owners[held[rank]]
    return ContextPart(
        places=parts[rank],
        gathered=torch.cat(parts),
        send_order=destinations.argsort(stable=True),
        send_counts=tuple(torch.bincount(destinations, minlength=size).tolist()),
        receive_counts=tuple(len(tokens) for tokens in received),
        receive_order=torch.cat(received).argsort(),
    )
