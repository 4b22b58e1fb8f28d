"""What a run will take: memory by phase, host memory, disk, traffic and time per step, without a GPU.

Everything here is arithmetic over a configuration and a model's shape; nothing imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_prime.config.schema import AnyConfig, PrimeConfig
from megatron_prime.planner import footprint
from megatron_prime.planner.engines import plan_engine
from megatron_prime.planner.footprint import LayoutSizes
from megatron_prime.planner.hardware import GIB, Hardware
from megatron_prime.planner.speed import step_seconds, traffic_bytes
from megatron_prime.planner.workload import Workload, has_reference, micro_batch_tokens, workload_of
from megatron_prime.weights.architecture import ModelArchitecture

_PROCESS_BYTES = 3 * GIB
"""Host memory of one rank with torch and CUDA libraries loaded; an assumption."""
_GRADER_BYTES = GIB // 4
"""Host memory of one grader worker with sympy loaded; an assumption."""
_BATCH_FIELDS = 10
"""Whole-batch [B, R] tensors of up to 8 bytes that a rank holds at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseMemory:
    """Memory of the fullest GPU in one phase, in bytes by what it is for."""

    name: str
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        """All parts."""
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a configuration takes on a kind of machine."""

    hardware: Hardware
    workload: Workload
    phases: tuple[PhaseMemory, ...]
    host_bytes: float
    """Of a full node."""
    checkpoint_bytes: float
    disk_bytes: float
    traffic: Mapping[str, float]
    """Bytes that one GPU sends per step, by purpose."""
    seconds: Mapping[str, float]
    """Of a step, by stage."""

    @property
    def peak(self) -> PhaseMemory:
        """The fullest phase."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak_gib(self) -> float:
        """Memory of the fullest GPU in the fullest phase, what the machine reserves included."""
        return self.peak.total / GIB + self.hardware.reserved_gib

    @property
    def fits(self) -> bool:
        """Whether GPU and host memory suffice."""
        return self.peak_gib <= self.hardware.memory_gib and self.host_bytes <= self.hardware.host_memory_gib * GIB

    @property
    def step_seconds(self) -> float:
        """All stages."""
        return sum(self.seconds.values())


def make_plan(
    config: AnyConfig,
    architecture: ModelArchitecture,
    hardware: Hardware,
    *,
    mean_response_tokens: float | None = None,
) -> Plan:
    """Plans a checked configuration for a kind of machine.

    Args:
        config: a configuration without problems.
        architecture: shape of the model.
        hardware: the machine.
        mean_response_tokens: see `workload_of`.
    """
    layout = LayoutSizes.of(config, on_cpu=hardware.name == "cpu")
    work = workload_of(config, mean_response_tokens)
    stages = [_phases(config, architecture, layout, work, hardware, stage) for stage in range(layout.pipeline)]
    phases = tuple(max(same, key=lambda phase: phase.total) for same in zip(*stages, strict=True))
    checkpoint = footprint.checkpoint_bytes(config, architecture, layout)
    return Plan(
        hardware=hardware,
        workload=work,
        phases=phases,
        host_bytes=_host_bytes(config, architecture, layout, work, checkpoint, hardware),
        checkpoint_bytes=checkpoint,
        disk_bytes=footprint.num_checkpoints(config) * checkpoint
        + footprint.exported_bytes(config, architecture, layout),
        traffic=traffic_bytes(config, architecture, layout, work),
        seconds=step_seconds(config, architecture, layout, work, hardware),
    )


def _phases(
    config: AnyConfig,
    architecture: ModelArchitecture,
    layout: LayoutSizes,
    work: Workload,
    hardware: Hardware,
    stage: int,
) -> list[PhaseMemory]:
    """Every phase's memory on a rank of one pipeline stage."""
    planned = plan_engine(config, architecture, layout, work, hardware) if isinstance(config, PrimeConfig) else None
    engine = planned.resident if planned else {}
    whole = micro_batch_tokens(config, work)
    tokens = math.ceil(whole / layout.context)
    last = stage == layout.pipeline - 1
    workspace = config.head.workspace_mib * 2**20

    def resident(computing: str | None, training: bool = False) -> dict[str, float]:
        return _model_parts(config, architecture, layout, stage, computing, training) | engine

    def update(name: str, model: str, num_rows: int, num_steps: int) -> PhaseMemory:
        num_micro_batches = math.ceil(num_rows * work.row_tokens / max(num_steps, 1) / layout.data / whole)
        kept = footprint.kept_bytes(architecture, layout, stage, tokens, num_micro_batches)
        layer = footprint.backward_bytes(architecture, layout, tokens)
        logits = footprint.head_bytes(architecture, layout, tokens, workspace, backward=True) if last else 0
        # The head's backward pass is over when the layers' begins.
        passing = {"logits": logits} if logits > layer else {"layer workspace": layer}
        return PhaseMemory(name=name, parts=resident(model, training=True) | {"activations": kept} | passing)

    if not isinstance(config, PrimeConfig) or planned is None:
        return [update("update", "policy", work.num_rows, 1)]
    score = {"layer workspace": footprint.forward_bytes(architecture, layout, tokens)}
    if last:
        score["logits"] = footprint.head_bytes(architecture, layout, tokens, workspace, backward=False)
    phases = [
        PhaseMemory(name="rollout", parts=resident(None) | planned.sampling),
        PhaseMemory(name="score", parts=resident("policy") | score),
    ]
    if config.uses_prm:
        phases.append(update("prm_update", "PRM", work.num_prm_rows, work.num_prm_optimizer_steps))
    return [
        *phases,
        update("policy_update", "policy", work.num_rows * config.policy.num_epochs, work.num_optimizer_steps),
    ]


def _models(config: AnyConfig) -> tuple[list[str], list[str]]:
    """Names of the trained and of the frozen models."""
    if not isinstance(config, PrimeConfig):
        return ["policy"], []
    return ["policy", "PRM"] if config.uses_prm else ["policy"], ["reference"] if has_reference(config) else []


def _model_parts(
    config: AnyConfig,
    architecture: ModelArchitecture,
    layout: LayoutSizes,
    stage: int,
    computing: str | None,
    training: bool,
) -> dict[str, float]:
    """What lies on a rank of the models while one of them computes, or none."""
    size = footprint.model_bytes(architecture, layout, stage, trained=True)
    given_away = config.parallel.offload_idle
    trained, frozen = _models(config)
    parts: dict[str, float] = {}
    for name in [*trained, *frozen]:
        trains = training and name == computing
        if given_away != "all" or name == computing:
            parts[f"{name} weights"] = size.weights
        if name in trained and (given_away == "none" or trains):
            parts[f"{name} gradients"] = size.gradients
        if name in trained and (given_away != "all" or trains):
            parts[f"{name} optimizer"] = size.optimizer
        if layout.fp8 and (given_away == "none" or name == computing):
            # Kept from pass to pass, those of a trained model with what backward took.
            kept = trains or (given_away == "none" and name in trained)
            parts[f"{name} FP8 copies"] = footprint.fp8_copy_bytes(architecture, layout, training=kept)
    return parts


def _host_bytes(
    config: AnyConfig,
    architecture: ModelArchitecture,
    layout: LayoutSizes,
    work: Workload,
    checkpoint: float,
    hardware: Hardware,
) -> float:
    """Host memory of a full node: processes, whole batches, graders, the refit's copies, a checkpoint on its way."""
    ranks = min(hardware.num_gpus_per_node, config.parallel.world_size)
    num_nodes = math.ceil(config.parallel.world_size / hardware.num_gpus_per_node)
    process = _PROCESS_BYTES if hardware.name != "cpu" else 0
    batches = 8 * _BATCH_FIELDS * work.num_rows * work.max_response_tokens
    total = ranks * (process + batches)
    # The last one of a run is written without a copy.
    if config.checkpoint.asynchronous and 0 < config.checkpoint.every_steps < config.run.num_steps:
        total += checkpoint / num_nodes
    if config.parallel.offload_idle == "all":
        trained, frozen = _models(config)
        size = footprint.model_bytes(architecture, layout, 0, trained=True)
        total += ranks * (len(trained) * (size.weights + size.optimizer) + len(frozen) * size.weights)
    if isinstance(config, PrimeConfig):
        total += ranks * config.verifier.num_workers * _GRADER_BYTES
        total += plan_engine(config, architecture, layout, work, hardware).host_bytes
    return total
