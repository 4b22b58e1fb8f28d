"""Ranks talk in a group of their own, in which they wait as long as it takes."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_prime import collectives
from megatron_prime.config.schema import ParallelSection
from megatron_prime.mcore.parallel import parallel_layout


def talk_beside_the_default_group() -> list[int]:
    with parallel_layout(ParallelSection(world_size=2, timeout_seconds=2), seed=1):
        # In one group these two would be each other's partners.
        busy = torch.ones(1)
        first = dist.all_reduce(busy, async_op=True) if collectives.is_main() else None
        ranks = collectives.all_gather(collectives.rank())
        assert (
            collectives.any_process(collectives.rank() == 1)
            and collectives.broadcast("x" if collectives.is_main() else "") == "x"
        )
        if first is None:
            dist.all_reduce(busy)
        else:
            first.wait()
        assert busy.item() == 2
        collectives.barrier()
        assert dist.get_backend(collectives._group) == "gloo"
    assert collectives._group is None
    return ranks


def test_the_ranks_talk_beside_the_default_group(gloo_pool) -> None:
    assert gloo_pool.run(2, talk_beside_the_default_group) == [[0, 1]] * 2
