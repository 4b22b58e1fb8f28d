"""How much of a GPU's memory engines take: decided without one."""

from __future__ import annotations

from dataclasses import replace

from megatron_prime.config.schema import VllmSection
from megatron_prime.rollout.vllm.wire.messages import EngineOptions
from megatron_prime.rollout.vllm.worker.engine_loop import engine_arguments

OPTIONS = EngineOptions(
    folder="model",
    dtype="bfloat16",
    section=VllmSection(kv_cache_gib=1.0, gpu_memory_utilization=0.4),
    max_model_len=512,
    transfer="shared_memory",
)


def memory(options: EngineOptions, *, on_gpu: bool) -> dict[str, object]:
    arguments = engine_arguments(options, "ipc", on_gpu=on_gpu)
    return {name: value for name, value in arguments.items() if "memory" in name}


def test_an_engine_with_a_cache_of_its_own_size_starts_on_a_gpu_that_is_nearly_full() -> None:
    assert memory(OPTIONS, on_gpu=False) == {"kv_cache_memory_bytes": 2**30}
    assert memory(OPTIONS, on_gpu=True) == {"kv_cache_memory_bytes": 2**30, "gpu_memory_utilization": 0.01}
    by_share = replace(OPTIONS, section=replace(OPTIONS.section, kv_cache_gib=None))
    assert memory(by_share, on_gpu=True) == {"gpu_memory_utilization": 0.4}


def test_only_a_gpu_reads_prompts_in_pieces() -> None:
    assert engine_arguments(OPTIONS, "ipc", on_gpu=False)["enable_chunked_prefill"] is False
    assert "enable_chunked_prefill" not in engine_arguments(OPTIONS, "ipc", on_gpu=True)
