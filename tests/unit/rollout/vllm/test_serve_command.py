"""A server's command line follows from the configuration: decided without vLLM."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_prime.config.schema import VllmSection
from megatron_prime.rollout.vllm.serve_command import server_command, server_section
from megatron_prime.rollout.vllm.wire.messages import EngineOptions

SECTION = VllmSection(kv_cache_gib=1.0, gpu_memory_utilization=0.4, max_num_seqs=8, num_threads=3)


@pytest.mark.parametrize("override", ["rollout.vllm.kv_cache_gib=1", "rollout.vllm.gpu_memory_utilization=0.4"])
def test_a_server_has_its_gpus_to_itself_unless_it_is_told_otherwise(override: str) -> None:
    alone = server_section(SECTION, ["rollout.vllm.max_num_seqs=8"], on_gpu=True)
    assert (alone.kv_cache_gib, alone.gpu_memory_utilization) == (None, 0.9)
    assert server_section(SECTION, [override], on_gpu=True) == SECTION
    assert server_section(SECTION, [], on_gpu=False) == SECTION


def test_a_server_is_started_with_the_settings_of_its_section() -> None:
    def started(section: VllmSection) -> tuple[list[str], dict[str, str]]:
        options = EngineOptions(
            folder="model", dtype="bfloat16", section=section, max_model_len=512, transfer="shared_memory"
        )
        return server_command(options, "127.0.0.1", 8000)

    command, environment = started(SECTION)
    assert command[command.index("--kv-cache-memory-bytes") + 1] == str(2**30)
    assert command[command.index("--max-num-seqs") + 1] == "8"
    assert command[command.index("--weight-transfer-config") + 1] == '{"backend": "megatron_prime_broadcast"}'
    assert {"--skip-tokenizer-init", "--enable-prefix-caching"} <= set(command)
    assert environment["OMP_NUM_THREADS"] == "3"
    command, _ = started(replace(SECTION, kv_cache_gib=None))
    assert command[command.index("--gpu-memory-utilization") + 1] == "0.4"
