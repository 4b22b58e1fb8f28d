"""The clipped policy loss, normalised over the whole mini-batch.

Normalisation is in the weights: they are computed once for the mini-batch, and the loss of any part of it is a
weighted sum. Losses, gradients and metrics of micro-batches and ranks therefore add up to those of the mini-batch,
however it is cut.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch

MAX_LOG_RATIO = 20.0
"""Log-ratios are cut here so that exp stays finite; a ratio of e^20 has left every trust region."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyLossOptions:
    """Clipping, normalisation and KL of the policy loss (`PolicySection` has the meaning and the defaults)."""

    clip_ratio_low: float
    clip_ratio_high: float
    dual_clip: float | None
    loss_normalization: Literal["token", "sequence"]
    kl_coef: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyLossMetrics:
    """Detached scalars of one part of a mini-batch; all but `max_ratio` add up over the parts."""

    clip_fraction: torch.Tensor
    """Weight of the tokens whose gradient the clip has cut."""
    approx_kl: torch.Tensor
    """k3 estimate of KL(old policy, policy), in nats per token."""
    reference_kl: torch.Tensor
    """k3 estimate of KL(policy, reference), in nats per token; 0 without a reference."""
    max_ratio: torch.Tensor
    """Largest ratio of the policy to the old policy; 0 without tokens."""

    def as_dict(self) -> dict[str, torch.Tensor]:
        """The scalars by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def loss_weights(mask: torch.Tensor, normalization: Literal["token", "sequence"]) -> torch.Tensor:
    """Gives every token its share of the mini-batch's loss.

    Args:
        mask: bool [B, R], of the whole mini-batch (all ranks, all micro-batches).
        normalization: `token`: every token weighs the same; `sequence`: every response does.

    Returns:
        float32 [B, R], 0 on padding, summing to 1 (0 where there are no tokens).
    """
    lengths = mask.sum(dim=1, keepdim=True)
    if normalization == "token":
        shares = torch.ones_like(lengths, dtype=torch.float64) / lengths.sum().clamp(min=1)
    elif normalization == "sequence":
        shares = 1.0 / (lengths.clamp(min=1) * (lengths > 0).sum().clamp(min=1)).to(torch.float64)
    else:
        raise ValueError(f"normalization: {normalization!r} is neither 'token' nor 'sequence'")
    return torch.where(mask, shares.to(torch.float32), 0.0)


def _k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """exp(x) - 1 - x >= 0: for x = log q/p and samples of p, an unbiased estimate of KL(p, q) of low variance."""
    return torch.expm1(log_ratio) - log_ratio


def _log_ratio(numerator: torch.Tensor, denominator: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    return torch.where(valid, numerator - denominator, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _clipped_losses(
    ratio: torch.Tensor, advantages: torch.Tensor, options: PolicyLossOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each token and whether the clip has cut its gradient."""
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - options.clip_ratio_low, 1.0 + options.clip_ratio_high)
    losses = torch.maximum(unclipped, clipped)
    if options.dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -advantages * options.dual_clip), losses)
    return losses, losses != unclipped


def ppo_clip_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    options: PolicyLossOptions,
    *,
    reference_logprobs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, PolicyLossMetrics]:
    """Computes the weighted sum of PPO's clipped loss over any part of a mini-batch.

    Per token, with rho = exp(logprob - old_logprob): max(-A rho, -A clip(rho, 1 - low, 1 + high)); with dual clip,
    tokens of negative advantage lose at most c |A|; plus kl_coef times the k3 estimate of the KL to the reference.
    Source: PPO, arXiv 1707.06347; dual clip: arXiv 1912.09729; k3: http://joschu.net/blog/kl-approx.html.

    Args:
        logprobs: [T] or [B, R], with gradient, at the sampling temperature.
        old_logprobs: same shape, of the policy before this step's update.
        advantages: same shape.
        weights: same shape, the part's rows of `loss_weights`; tokens of weight 0 (padding) are ignored entirely.
        options: clipping and KL. `loss_normalization` already is in the weights.
        reference_logprobs: same shape; needed where `kl_coef` is not 0.

    Returns:
        Scalar loss and metrics; both add up over the parts of a mini-batch.

    Raises:
        ValueError: `kl_coef` is set and there is no reference.
    """
    if options.kl_coef != 0.0 and reference_logprobs is None:
        raise ValueError(f"kl_coef is {options.kl_coef} and reference_logprobs is None: a KL needs a reference")
    valid = weights > 0
    log_ratio = _log_ratio(logprobs, old_logprobs, valid)
    ratio = log_ratio.exp()
    losses, is_cut = _clipped_losses(ratio, torch.where(valid, advantages, 0.0), options)
    loss = (weights * losses).sum()

    reference_kl = loss.new_zeros(())
    if reference_logprobs is not None:
        reference_kl = (weights * _k3(_log_ratio(reference_logprobs, logprobs, valid))).sum()
        if options.kl_coef != 0.0:
            loss = loss + options.kl_coef * reference_kl

    with torch.no_grad():
        metrics = PolicyLossMetrics(
            clip_fraction=(weights * is_cut).sum(),
            approx_kl=(weights * _k3(log_ratio)).sum(),
            reference_kl=reference_kl.detach(),
            max_ratio=torch.where(valid, ratio, 0.0).max() if ratio.numel() else loss.new_zeros(()),
        )
    return loss, metrics
