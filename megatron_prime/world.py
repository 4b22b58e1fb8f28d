"""The few collectives that every room needs, over whatever process group `torch.distributed` has.

Without a process group (unit tests, `generate` on one process) everything acts as a world of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Global rank of this process, 0 without a process group."""
    return dist.get_rank() if _initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if _initialized() else 1


def is_main() -> bool:
    """True on the one process that writes files and prints."""
    return rank() == 0


def barrier() -> None:
    """Waits for every process."""
    if _initialized():
        dist.barrier()


def any_process(flag: bool) -> bool:
    """Whether the flag is true on any process; the same answer on all."""
    if world_size() == 1:
        return flag
    votes = torch.tensor(int(flag), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes)


def all_gather(value: Item) -> list[Item]:
    """Every process's picklable value, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Item, source: int = 0) -> Item:
    """The picklable value of rank ``source``, on every process."""
    if world_size() == 1:
        return value
    box: list[Any] = [value if rank() == source else None]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def my_share(items: Sequence[Item]) -> list[Item]:
    """Every ``world_size``-th item, starting at this process's rank (undone by `interleave`)."""
    return list(items[rank() :: world_size()])


def interleave(shares: Sequence[Sequence[Item]]) -> list[Item]:
    """Undoes `my_share` after `all_gather`: the items in their original order."""
    total = sum(len(share) for share in shares)
    return [shares[i % len(shares)][i // len(shares)] for i in range(total)]
