"""The few collectives that every room needs, over the group of `control_group` or else torch's default one.

Without a process group (unit tests, `generate` on one process) everything acts as a world of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")

_PATIENCE = timedelta(days=30)
_group: Any = None


@contextmanager
def control_group() -> Iterator[None]:
    """Gives the functions below a gloo group of their own for a ``with`` block; collective.

    A rank that waits here may wait for a rollout of an hour: NCCL would fill its GPU with a kernel that waits, on which
    the engine samples, and every backend would give up after its time-out. The watchdog finds who is stuck.
    """
    global _group
    if world_size() == 1:
        yield
        return
    _group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        _group = None


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
        dist.barrier(group=_group)


def any_process(flag: bool) -> bool:
    """Whether the flag is true on any process; the same answer on all."""
    if world_size() == 1:
        return flag
    votes = torch.tensor(int(flag))
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=_group)
    return bool(votes)


def all_gather(value: Item) -> list[Item]:
    """Every process's picklable value, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_group)
    return values


def broadcast(value: Item, source: int = 0) -> Item:
    """The picklable value of rank ``source``, on every process."""
    if world_size() == 1:
        return value
    box: list[Any] = [value if rank() == source else None]
    dist.broadcast_object_list(box, src=source, group=_group)
    return box[0]


def my_share(items: Sequence[Item]) -> list[Item]:
    """Every ``world_size``-th item, starting at this process's rank (undone by `interleave`)."""
    return list(items[rank() :: world_size()])


def interleave(shares: Sequence[Sequence[Item]]) -> list[Item]:
    """Undoes `my_share` after `all_gather`: the items in their original order."""
    total = sum(len(share) for share in shares)
    return [shares[i % len(shares)][i // len(shares)] for i in range(total)]
