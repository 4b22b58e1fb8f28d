"""A run's configuration for one process."""

from __future__ import annotations

from dataclasses import replace

from megatron_prime.config.schema import ParallelSection, PrimeConfig


def single_process(config: PrimeConfig) -> PrimeConfig:
    """The same for one process that samples and trains nothing; a vLLM engine keeps its tensor parallelism."""
    parallel = ParallelSection(timeout_seconds=config.parallel.timeout_seconds)
    rollout = replace(config.rollout, vllm=replace(config.rollout.vllm, in_ranks=False))
    return replace(config, parallel=parallel, rollout=rollout)
