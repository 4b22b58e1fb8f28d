"""Checks that the engine samples from the policy that trains, and corrects for the difference."""

from __future__ import annotations

import torch

from megatron_prime.algorithm.mismatch import importance_weights, measure_mismatch
from megatron_prime.batch import RolloutBatch
from megatron_prime.config.schema import PolicySection, RolloutSection
from megatron_prime.errors import TrainingError


def compare_logprobs(
    batch: RolloutBatch, policy_logprobs: torch.Tensor, weight_version: int, section: RolloutSection
) -> dict[str, float]:
    """Measures how far the engine's log-probs of the sampled tokens are from the trainer's, in nats.

    Every batch is thus a canary for the refit before it, over all of its tokens and at no cost. Answers sampled with
    older weights (`rollout/stale`) are expected to differ and are left out.

    Args:
        batch: rollouts.
        policy_logprobs: [B, R], of the policy before its update, at the sampling temperature.
        weight_version: of that policy.
        section: rollout settings.

    Raises:
        TrainingError: they differ so much that the engine cannot be sampling with the trainer's weights.
    """
    is_fresh = batch.weight_versions == weight_version
    metrics = {"rollout/stale": 1.0 - float(is_fresh.double().mean())}
    if not bool(is_fresh.any()):
        return metrics
    found = measure_mismatch(policy_logprobs, batch.rollout_logprobs, batch.mask & is_fresh[:, None])
    # Top-p below 1 rescales the engine's log-probs.
    if found.mean > section.max_logprob_gap and section.top_p == 1.0:
        raise TrainingError(
            f"rollout.max_logprob_gap: the engine's log-probs are {found.mean:.3g} nats from the trainer's on average "
            f"(limit {section.max_logprob_gap:g}); the engine does not compute what the policy computes, so no weights "
            "trained on these answers are kept"
        )
    return metrics | {
        "rollout/logprob_gap_mean": found.mean,
        "rollout/logprob_gap_max": found.max,
        "rollout/logprob_kl": found.kl,
    }


def advantage_weights(
    batch: RolloutBatch, policy_logprobs: torch.Tensor | None, section: PolicySection
) -> torch.Tensor:
    """Factors [B, R] for advantages that correct for the engine's distribution; all 1 unless switched on.

    Args:
        batch: rollouts.
        policy_logprobs: [B, R] as in `compare_logprobs`; None is fine if neither correction is on.
        section: `importance_cap` and `max_sequence_ratio`.
    """
    if section.importance_cap is None and section.max_sequence_ratio is None:
        return torch.ones_like(batch.rollout_logprobs)
    if policy_logprobs is None:
        raise ValueError("policy.importance_cap and policy.max_sequence_ratio need the policy's log-probs")
    return importance_weights(
        policy_logprobs,
        batch.rollout_logprobs,
        batch.mask,
        cap=section.importance_cap,
        max_sequence_ratio=section.max_sequence_ratio,
    )
