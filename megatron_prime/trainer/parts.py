"""The parts that a PRIME run is assembled from, and the models' scores of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_prime.interfaces import (
    Checkpoints,
    Engine,
    FailedUpdates,
    Logger,
    Policy,
    PromptSource,
    Reference,
    RewardModel,
    Verifier,
)


@dataclass(frozen=True, kw_only=True)
class PrimeParts:
    """The parts of a run, as the loop sees them."""

    policy: Policy
    reference: Reference | None
    """None: the policy before its update is the reference."""
    prm: RewardModel | None
    """None: outcome rewards only."""
    engine: Engine
    verifier: Verifier
    prompts: PromptSource
    checkpoints: Checkpoints
    logger: Logger
    failed_updates: FailedUpdates
    """Keeps updates that had NaN or Inf."""
    enter: Callable[[str, int], None] = lambda phase, step: None
    """Called with where the run is, and the step, whenever a stage starts or ends."""
    should_stop: Callable[[], bool] = bool
    """Asked after every step, by all ranks together; true on one is true on all."""
    min_groups: int
    """Fewest groups of which every rank gets a share in every mini-batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Log-probs [B, R] from before the step's updates. None: there is no such model, or its own update gives them."""

    policy: torch.Tensor | None
    """At the sampling temperature."""
    reference: torch.Tensor | None
    """Without temperature, like the PRM's."""
    prm: torch.Tensor | None
