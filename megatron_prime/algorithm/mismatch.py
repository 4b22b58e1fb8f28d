"""The engine that sampled and the model that trains are not the same function: measuring it, correcting for it.

d = log p_train(token) - log p_rollout(token), on sampled tokens. Kernels and dtypes differ, and answers that waited for
a step were sampled by older weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_prime.algorithm.policy_loss import MAX_LOG_RATIO


@dataclass(frozen=True, kw_only=True, slots=True)
class Mismatch:
    """Differences between the engine's and the trainer's log-probs of some tokens, in nats."""

    mean: float
    """Mean of |d|."""
    max: float
    kl: float
    """k3 estimate of KL(rollout, train): mean of exp(d) - 1 - d."""


def measure_mismatch(train_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, mask: torch.Tensor) -> Mismatch:
    """Compares two log-probs of the same sampled tokens.

    Args:
        train_logprobs: [B, R], of the model that trains, before its update.
        rollout_logprobs: [B, R], as the engine reported them.
        mask: bool [B, R], the tokens that count; at least one.
    """
    difference = (train_logprobs - rollout_logprobs)[mask].double().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    gap = difference.abs()
    kl = torch.expm1(difference) - difference
    return Mismatch(mean=float(gap.mean()), max=float(gap.max()), kl=float(kl.mean()))


def importance_weights(
    train_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    mask: torch.Tensor,
    *,
    cap: float | None,
    max_sequence_ratio: float | None,
) -> torch.Tensor:
    """Factors for advantages that make up for sampling from the engine's distribution.

    A factor in front of the advantage is a factor in front of the clipped loss of the token, which is linear in it.

    Args:
        train_logprobs: [B, R], of the policy before its update, at the sampling temperature.
        rollout_logprobs: [B, R], as the engine reported them.
        mask: bool [B, R], true on response tokens.
        cap: truncated importance sampling: a token's factor is min(exp(d), cap); None: no correction. Source:
            https://fengyao.notion.site/off-policy-rl (Yao et al., 2025), after Ionides (2008).
        max_sequence_ratio: a response whose geometric-mean ratio exp(mean d) is above this, or below its
            inverse, gets factor 0 throughout; None: all responses count.

    Returns:
        float32 [B, R], 1 on padding.
    """
    difference = torch.where(mask, train_logprobs - rollout_logprobs, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    factors = torch.ones_like(difference) if cap is None else difference.exp().clamp(max=cap)
    if max_sequence_ratio is not None:
        # The sequence ratio is a geometric mean, so that its limit does not depend on the length.
        mean = difference.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        outside = mean.abs() > torch.tensor(max_sequence_ratio, dtype=torch.float64).log()
        factors = torch.where(outside[:, None] & mask, 0.0, factors)
    return torch.where(mask, factors, 1.0)
