"""How much of a GPU's memory engines take: decided without one."""

from __future__ import annotations

from dataclasses import replace

from megatron_prime.config.schema import VllmSection
from megatron_prime.rollout.vllm.worker.engine_loop import memory_limits


def test_an_engine_with_a_cache_of_its_own_size_starts_on_a_gpu_that_is_nearly_full() -> None:
    section = VllmSection(kv_cache_gib=1.0, gpu_memory_utilization=0.4)
    assert memory_limits(section, on_gpu=False) == {"kv_cache_memory_bytes": 2**30}
    assert memory_limits(section, on_gpu=True) == {"kv_cache_memory_bytes": 2**30, "gpu_memory_utilization": 0.01}
    by_share = replace(section, kv_cache_gib=None)
    assert memory_limits(by_share, on_gpu=True) == {"gpu_memory_utilization": 0.4}
