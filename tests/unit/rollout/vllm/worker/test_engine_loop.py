"""How much of a GPU's memory engines and servers take: decided without one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_prime.rollout.vllm.wire.messages import EngineOptions
from megatron_prime.rollout.vllm.worker.engine_loop import memory_limits
from megatron_prime.rollout.vllm.worker.serve_command import of_a_server, server_command

OPTIONS = EngineOptions(
    folder="model",
    dtype="bfloat16",
    tensor_parallel_size=1,
    max_model_len=512,
    max_num_seqs=8,
    kv_cache_bytes=2**30,
    gpu_memory_utilization=0.4,
    pack_weights=True,
    transfer="shared_memory",
)


def test_an_engine_with_a_cache_of_its_own_size_starts_on_a_gpu_that_is_nearly_full() -> None:
    assert memory_limits(OPTIONS, on_gpu=False) == {"kv_cache_memory_bytes": 2**30}
    assert memory_limits(OPTIONS, on_gpu=True) == {"kv_cache_memory_bytes": 2**30, "gpu_memory_utilization": 0.01}
    by_share = replace(OPTIONS, kv_cache_bytes=None)
    assert memory_limits(by_share, on_gpu=True) == {"gpu_memory_utilization": 0.4}


@pytest.mark.parametrize("override", ["rollout.vllm.kv_cache_gib=1", "rollout.vllm.gpu_memory_utilization=0.4"])
def test_a_server_has_its_gpus_to_itself_unless_it_is_told_otherwise(override: str) -> None:
    alone = of_a_server(OPTIONS, ["rollout.vllm.max_num_seqs=8"], on_gpu=True)
    assert (alone.kv_cache_bytes, alone.gpu_memory_utilization) == (None, 0.9)
    assert of_a_server(OPTIONS, [override], on_gpu=True) == OPTIONS
    assert of_a_server(OPTIONS, [], on_gpu=False) == OPTIONS


def test_a_server_is_started_with_these_limits() -> None:
    command, _ = server_command(OPTIONS, "127.0.0.1", 8000, None)
    assert command[command.index("--kv-cache-memory-bytes") + 1] == str(2**30)
    command, _ = server_command(replace(OPTIONS, kv_cache_bytes=None), "127.0.0.1", 8000, None)
    assert command[command.index("--gpu-memory-utilization") + 1] == "0.4"
