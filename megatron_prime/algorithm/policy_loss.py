"""Policy losses, normalised over the whole mini-batch.

The token weights carry the normalisation: they are computed once for the mini-batch, and the loss of any part of it is
a weighted sum. Losses, gradients and metrics of micro-batches and ranks therefore add up to those of the mini-batch,
however it is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import torch

from megatron_prime.config.schema import PolicySection

MAX_LOG_RATIO = 20.0
"""Log-ratios are cut here so that exp stays finite; a ratio of e^20 has left every trust region."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyTokens:
    """Any part of a mini-batch as a policy loss sees it: all tensors [n], or all [B, R]."""

    logprobs: torch.Tensor
    """With gradient, at the sampling temperature."""
    old_logprobs: torch.Tensor
    """Log-probs of the policy before this step's update."""
    advantages: torch.Tensor
    weights: torch.Tensor
    """The part's rows of `loss_weights`; tokens of weight 0 (padding) are ignored entirely."""
    reference_logprobs: torch.Tensor | None = None
    """Needed where `kl_coef` is not 0."""
    sequences: torch.Tensor | None = None
    """int64, the response of each token; all tokens of a response are here where the loss has the attribute
    ``whole_sequences``."""

    @property
    def log_ratio(self) -> torch.Tensor:
        """log(policy / old policy) with gradient, cut at +-`MAX_LOG_RATIO`, 0 on padding."""
        return _log_ratio(self.logprobs, self.old_logprobs, self.weights > 0)


Surrogate = Callable[[PolicyTokens, PolicySection], tuple[torch.Tensor, torch.Tensor]]
"""The function that `policy.loss` names. It returns the loss of each token, with gradient, and whether a clip has cut
its gradient, both in the tokens' shape. Weights, KL and metrics are `policy_loss`'s."""


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


def ppo_clip(tokens: PolicyTokens, section: PolicySection) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate.

    Per token, with rho = exp(logprob - old_logprob): max(-A rho, -A clip(rho, 1 - low, 1 + high)); with dual clip,
    tokens of negative advantage lose at most c |A|. Source: PPO, arXiv 1707.06347; dual clip: arXiv 1912.09729.

    Args:
        tokens: any part of a mini-batch.
        section: clipping.

    Returns:
        Loss of each token and whether the clip has cut its gradient.
    """
    ratio = tokens.log_ratio.exp()
    # Advantages of padding are not trusted to be finite: 0 times a weight of 0 is 0, NaN times 0 is NaN.
    advantages = torch.where(tokens.weights > 0, tokens.advantages, 0.0)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - section.clip_ratio_low, 1.0 + section.clip_ratio_high)
    # The maximum of the two losses is pessimistic: it clips moves that would improve the surrogate, never others.
    losses = torch.maximum(unclipped, clipped)
    if section.dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -advantages * section.dual_clip), losses)
    # Where the clipped branch won, the loss no longer depends on the ratio and the token's gradient is 0.
    return losses, losses != unclipped


def policy_loss(
    tokens: PolicyTokens, section: PolicySection, surrogate: Surrogate = ppo_clip
) -> tuple[torch.Tensor, PolicyLossMetrics]:
    """Computes the weighted sum of a surrogate's token losses over any part of a mini-batch.

    Plus kl_coef times the k3 estimate of the KL to the reference (http://joschu.net/blog/kl-approx.html).

    Args:
        tokens: any part of a mini-batch.
        section: clipping and KL. `loss_normalization` already is in the weights.
        surrogate: what `policy.loss` names.

    Returns:
        Scalar loss and metrics; both add up over the parts of a mini-batch.

    Raises:
        ValueError: `kl_coef` is set and there is no reference.
    """
    if section.kl_coef != 0.0 and tokens.reference_logprobs is None:
        raise ValueError(f"kl_coef is {section.kl_coef} and reference_logprobs is None: a KL needs a reference")
    weights, valid = tokens.weights, tokens.weights > 0
    losses, is_cut = surrogate(tokens, section)
    loss = (weights * losses).sum()

    reference_kl = loss.new_zeros(())
    if tokens.reference_logprobs is not None:
        reference_kl = (weights * _k3(_log_ratio(tokens.reference_logprobs, tokens.logprobs, valid))).sum()
        if section.kl_coef != 0.0:
            loss = loss + section.kl_coef * reference_kl

    with torch.no_grad():
        log_ratio = tokens.log_ratio
        largest = torch.where(valid, log_ratio.exp(), 0.0).max() if log_ratio.numel() else loss.new_zeros(())
        metrics = PolicyLossMetrics(
            clip_fraction=(weights * is_cut).sum(),
            approx_kl=(weights * _k3(log_ratio)).sum(),
            reference_kl=reference_kl.detach(),
            max_ratio=largest,
        )
    return loss, metrics
