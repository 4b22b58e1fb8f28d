"""Which arrangement of vLLM a configuration asks for."""

from __future__ import annotations

import torch

from megatron_prime.config.engine_checks import NO_EXPERTS
from megatron_prime.errors import ConfigError
from megatron_prime.interfaces import Engine, EngineSetup
from megatron_prime.rollout.vllm.trainer.base import engine_options
from megatron_prime.rollout.vllm.trainer.beside import VllmBeside
from megatron_prime.rollout.vllm.trainer.beside_buckets import VllmBesideBuckets
from megatron_prime.rollout.vllm.trainer.process import EngineParent


def make_engine(setup: EngineSetup) -> Engine:
    """The engine of `rollout.engine: vllm`, without weights.

    Args:
        setup: what it is built from.

    Raises:
        ConfigError: vLLM cannot do it with this model or on this machine.
    """
    section = setup.section.vllm
    if setup.architecture.experts is not None:
        raise ConfigError(f"the rollout engine: {NO_EXPERTS}")
    if section.servers:
        # Most runs need no HTTP client.
        from megatron_prime.rollout.vllm.trainer.remote import VllmServers

        return VllmServers(setup)
    if section.kv_cache_gib is None and not torch.cuda.is_available():
        raise ConfigError("rollout.vllm.kv_cache_gib: null needs a GPU; on a CPU give the memory in GiB")
    if section.in_ranks:
        # It imports vLLM.
        from megatron_prime.rollout.vllm.in_ranks import VllmInRanks

        return VllmInRanks(setup)
    return engine_beside(setup)


def engine_beside(setup: EngineSetup, parent: EngineParent | None = None) -> VllmBeside:
    """The engine in a process beside the trainer that gets its weights as `rollout.vllm.transfer` says."""
    options = engine_options(setup.folder, setup.dtype, setup.section.vllm, setup.architecture)
    return (VllmBesideBuckets if options.transfer == "ipc" else VllmBeside)(setup, parent)
