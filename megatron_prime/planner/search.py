"""Layouts of a configuration on given GPUs: all that can run, the fastest first."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, replace

from megatron_prime.config.checks import check_config
from megatron_prime.config.schema import AnyConfig, PrimeConfig
from megatron_prime.errors import ConfigError
from megatron_prime.planner.hardware import PROFILES, Hardware
from megatron_prime.planner.plan import Plan, make_plan
from megatron_prime.weights.architecture import ModelArchitecture

_GPUS = re.compile(r"(?:(\d+)x)?(\d+)x(\d+)GB", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutCandidate:
    """A layout that can run."""

    config: AnyConfig
    plan: Plan

    def overrides(self) -> list[str]:
        """What to add to the command to get it."""
        parallel = self.config.parallel
        result = [
            f"parallel.world_size={parallel.world_size}",
            f"parallel.tensor_model_parallel_size={parallel.tensor_model_parallel_size}",
            f"parallel.pipeline_model_parallel_size={parallel.pipeline_model_parallel_size}",
            f"parallel.sequence_parallel={str(parallel.sequence_parallel).lower()}",
            f"parallel.use_distributed_optimizer={str(parallel.use_distributed_optimizer).lower()}",
            f"model.recompute_granularity={self.config.model.recompute_granularity}",
        ]
        if isinstance(self.config, PrimeConfig) and self.config.rollout.uses_vllm:
            result.append(f"rollout.vllm.tensor_parallel_size={self.config.rollout.vllm.tensor_parallel_size}")
        return result

    def reason(self) -> str:
        """Where its time goes and how much memory is left."""
        slowest = max(self.plan.seconds, key=lambda stage: self.plan.seconds[stage])
        free = self.plan.hardware.memory_gib - self.plan.peak_gib
        return (
            f"{self.plan.step_seconds:.0f} s per step, most of it {slowest} ({self.plan.seconds[slowest]:.0f} s); "
            f"peak {self.plan.peak_gib:.1f} GiB in {self.plan.peak.name}, {free:.1f} GiB free"
        )


def hardware_of(gpus: str, profile: Hardware) -> tuple[int, Hardware]:
    """Reads ``8x80GB`` or ``4x8x80GB`` (nodes x GPUs x memory).

    Args:
        gpus: number and size.
        profile: everything else about the machine.

    Returns:
        GPUs in all, and the machine with that memory and node size.

    Raises:
        ConfigError: it is not of this form.
    """
    match = _GPUS.fullmatch(gpus)
    if match is None or not all(int(number) for number in match.groups() if number):
        raise ConfigError(f"--gpus: {gpus!r} is no number of GPUs; write 8x80GB, or 4x8x80GB for 4 nodes of 8")
    nodes, number, gigabytes = match.groups()
    per_node = int(number) if nodes else min(int(number), profile.num_gpus_per_node)
    known = [p.memory_gib for p in PROFILES.values() if round(p.memory_gib * 1.0737 / 10) == round(int(gigabytes) / 10)]
    # 80 GB on the label are 79.1 GiB to CUDA; an unknown size is taken as decimal gigabytes.
    memory_gib = profile.memory_gib if profile.memory_gib in known else int(gigabytes) * 1e9 / 2**30
    machine = replace(profile, memory_gib=memory_gib, num_gpus_per_node=per_node)
    return int(nodes or 1) * int(number), machine


def search_layouts(
    config: AnyConfig,
    architecture: ModelArchitecture,
    hardware: Hardware,
    num_gpus: int,
    *,
    mean_response_tokens: float | None = None,
) -> list[LayoutCandidate]:
    """Every layout that passes the checks and fits, by estimated step time.

    Tensor parallelism and engines stay inside a node; recomputation is taken only where nothing else fits.

    Args:
        config: what to run; its own layout does not matter.
        architecture: shape of the model.
        hardware: the machine.
        num_gpus: processes.
        mean_response_tokens: see `workload_of`.

    Raises:
        ConfigError: nothing fits; names the layout that comes closest and by how much it fails.
    """
    fitting: list[LayoutCandidate] = []
    smallest: Plan | None = None
    for candidate in _layouts(config, architecture, hardware, num_gpus):
        if check_config(candidate, architecture, check_files=False):
            continue
        plan = make_plan(candidate, architecture, hardware, mean_response_tokens=mean_response_tokens)
        if smallest is None or plan.peak_gib < smallest.peak_gib:
            smallest = plan
        if plan.fits:
            fitting.append(LayoutCandidate(config=candidate, plan=plan))
    if fitting:
        return sorted(fitting, key=lambda candidate: candidate.plan.step_seconds)
    if smallest is None:
        raise ConfigError(f"--gpus: no layout of {num_gpus} GPUs divides the model and the batch; try another number")
    raise ConfigError(
        f"--gpus: no layout of {num_gpus} GPUs fits {hardware.memory_gib:.0f} GiB each; the smallest needs"
        f" {smallest.peak_gib:.0f} GiB in {smallest.peak.name} and {smallest.host_bytes / 2**30:.0f} GiB of host memory"
        "; use more GPUs, rollout.engine=vllm, reference.source=policy or smaller micro_batch.micro_batch_tokens"
    )


def _layouts(config: AnyConfig, a: ModelArchitecture, hardware: Hardware, num_gpus: int) -> list[AnyConfig]:
    per_node = min(num_gpus, hardware.num_gpus_per_node)
    found: list[AnyConfig] = []
    for tensor in _divisors(per_node):
        for pipeline in _divisors(num_gpus // tensor):
            if a.num_layers % pipeline or pipeline > 16:
                continue
            for recompute in ("none", "full"):
                for engine in _engine_sizes(config, tensor * pipeline, per_node):
                    found.append(_with_layout(config, num_gpus, tensor, pipeline, recompute, engine))
    return found


def _engine_sizes(config: AnyConfig, group: int, per_node: int) -> list[int]:
    if not isinstance(config, PrimeConfig) or not config.rollout.uses_vllm:
        return [1]
    return [size for size in _divisors(per_node) if size <= group]


def _with_layout(
    config: AnyConfig, num_gpus: int, tensor: int, pipeline: int, recompute: str, engine: int
) -> AnyConfig:
    changed = copy.deepcopy(config)
    parallel = changed.parallel
    parallel.world_size = num_gpus
    parallel.tensor_model_parallel_size = tensor
    parallel.pipeline_model_parallel_size = pipeline
    parallel.sequence_parallel = tensor > 1
    parallel.use_distributed_optimizer = num_gpus > tensor * pipeline
    changed.model.recompute_granularity = "full" if recompute == "full" else "none"
    if isinstance(changed, PrimeConfig):
        changed.rollout.vllm.tensor_parallel_size = engine
    return changed


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
