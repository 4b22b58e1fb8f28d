"""What every model of a run is built from, and what an optimizer step of one shows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from megatron_prime.config.schema import MicroBatchSection, ModelSection, ParallelSection
from megatron_prime.kernels import HeadOptions
from megatron_prime.mcore.parallel import Layout
from megatron_prime.weights.architecture import ModelArchitecture


@dataclass(frozen=True, kw_only=True)
class RoleSetup:
    """Everything that a model of a run is built from."""

    architecture: ModelArchitecture
    model: ModelSection
    parallel: ParallelSection
    micro_batch: MicroBatchSection
    layout: Layout
    head: HeadOptions = field(default_factory=HeadOptions)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """Results of one optimizer step, the same on every rank."""

    metrics: dict[str, float]
    """Metrics of the loss, with ``grad_norm``, ``lr`` and ``max_imbalance`` (of data-parallel ranks)."""
    logprobs: torch.Tensor | None
    """float32 [B, R] of the selected rows from before the step, 0 elsewhere; None unless asked for."""
