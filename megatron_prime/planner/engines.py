"""What a plan knows of each rollout engine: its memory, how many there are, and how they are described."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from megatron_prime.config.checks import data_parallel_size
from megatron_prime.config.schema import PrimeConfig
from megatron_prime.planner import footprint
from megatron_prime.planner.footprint import LayoutSizes
from megatron_prime.planner.hardware import GIB, Hardware
from megatron_prime.planner.workload import Workload
from megatron_prime.weights.architecture import ModelArchitecture


@dataclass(frozen=True, kw_only=True, slots=True)
class EnginePlan:
    """The engines of a run on a machine. Memory is in bytes."""

    num_engines: int
    tensor: int = 1
    """GPUs of each."""
    batch: int
    """Answers that one engine samples at the same time."""
    resident: dict[str, float] = field(default_factory=dict)
    """What lies on a rank in every phase."""
    sampling: dict[str, float] = field(default_factory=dict)
    """What lies there in the rollout beyond that."""
    host_bytes: float = 0.0
    """Host memory of a full node."""


def plan_engine(
    config: PrimeConfig,
    architecture: ModelArchitecture,
    layout: LayoutSizes,
    work: Workload,
    hardware: Hardware,
) -> EnginePlan:
    """Plans the engine of a checked configuration.

    Args:
        config: a configuration without problems.
        architecture: shape of the model.
        layout: how it is sharded.
        work: sizes of the step.
        hardware: the machine.
    """
    plan = _PLANS.get(config.rollout.engine, _own)
    return plan(config, architecture, layout, work, hardware)


def describe_engine(config: PrimeConfig) -> str:
    """Says in half a sentence where the answers are sampled."""
    vllm = config.rollout.vllm
    if config.rollout.engine not in _PLANS:
        return f"{config.rollout.engine} samples: its memory is not known and counts as none, its speed as built in"
    if not config.rollout.uses_vllm:
        return "the engine's whole model in every rank"
    if vllm.servers:
        return f"{len(vllm.servers)} vLLM servers on other hosts"
    if vllm.in_ranks:
        return f"every {vllm.tensor_parallel_size} of them a vLLM engine too"
    engines, size = data_parallel_size(config.parallel), vllm.tensor_parallel_size
    return f"{engines} vLLM {'engine' if engines == 1 else 'engines'} of {size}, one per replica"


def _own(
    config: PrimeConfig,
    architecture: ModelArchitecture,
    layout: LayoutSizes,
    work: Workload,
    hardware: Hardware,
) -> EnginePlan:
    return EnginePlan(num_engines=config.parallel.world_size, batch=config.rollout.max_batch_size)


def _embedded(
    config: PrimeConfig,
    architecture: ModelArchitecture,
    layout: LayoutSizes,
    work: Workload,
    hardware: Hardware,
) -> EnginePlan:
    world_size, batch = config.parallel.world_size, config.rollout.max_batch_size
    num_rows = min(batch, math.ceil(work.num_sampled / world_size))
    longest = work.prompt_tokens + work.max_response_tokens
    cache = num_rows * longest * footprint.kv_token_bytes(architecture, layout.item_bytes, 1)
    logits = footprint.FLOAT32 * 2 * num_rows * architecture.vocab_size
    return EnginePlan(
        num_engines=world_size,
        batch=batch,
        resident={"engine weights": footprint.num_parameters(architecture) * layout.item_bytes},
        sampling={"engine KV cache": cache, "engine logits": logits},
    )


def _vllm(
    config: PrimeConfig,
    architecture: ModelArchitecture,
    layout: LayoutSizes,
    work: Workload,
    hardware: Hardware,
) -> EnginePlan:
    section, world_size = config.rollout.vllm, config.parallel.world_size
    tensor, batch = section.tensor_parallel_size, section.max_num_seqs
    if section.servers:
        return EnginePlan(num_engines=len(section.servers), tensor=tensor, batch=batch)
    whole = footprint.num_parameters(architecture) * layout.item_bytes
    weights = whole / tensor
    if section.kv_cache_gib is not None:
        cache = section.kv_cache_gib * GIB
    else:
        cache = max(section.gpu_memory_utilization * hardware.memory_gib * GIB - weights, 0.0)
    parts = {"engine weights": weights, "engine KV cache": cache}
    # A copy of the weights per model copy of the node: for the refit.
    ranks = min(hardware.num_gpus_per_node, world_size)
    host_bytes = max(1, ranks // (layout.tensor * layout.pipeline * layout.context)) * whole
    if section.in_ranks:
        # They sleep in the other phases.
        num_engines = world_size // tensor
        return EnginePlan(num_engines=num_engines, tensor=tensor, batch=batch, sampling=parts, host_bytes=host_bytes)
    return EnginePlan(num_engines=layout.data, tensor=tensor, batch=batch, resident=parts, host_bytes=host_bytes)


_PLANS: Mapping[str, Callable[[PrimeConfig, ModelArchitecture, LayoutSizes, Workload, Hardware], EnginePlan]] = {
    "transformers": _embedded,
    "vllm": _vllm,
}
"""`rollout.engine` -> its plan; of any other engine nothing is known."""
