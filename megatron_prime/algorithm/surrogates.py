"""Surrogates of the policy gradient beside PPO's clip: each gives a loss per token and says where it has cut.

They take the place of the clipped term in `policy_loss.py`: weights, KL and metrics are the same for all.
"""

from __future__ import annotations

import torch

from megatron_prime.algorithm.policy_loss import MAX_LOG_RATIO, PolicyTokens
from megatron_prime.config.schema import PolicySection


def _log_ratio(logprobs: torch.Tensor, old_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, logprobs - old_logprobs, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def gspo_losses(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips one ratio per response, the geometric mean of its tokens' ratios.

    Per token max(-A s, -A clip(s, 1 - low, 1 + high)), where s has the value (pi / pi_old)^(1 / L) of the whole
    response and the gradient of the token's own log-prob. Where the advantage is the same for all tokens, this is GSPO;
    where it is not, GSPO-token. Source: arXiv 2507.18071. To be weighed with `loss_weights(...,
    "sequence")`, as there.

    Args:
        logprobs: [b, R] of whole responses, with gradient.
        old_logprobs: [b, R].
        advantages: [b, R].
        mask: bool [b, R].
        clip_low: published 3e-4; of quite another size than PPO's, since the mean averages ratios out.
        clip_high: published 4e-4.

    Returns:
        Losses [b, R], 0 on padding, and bool [b, R], which tokens' gradient the clip has cut.
    """
    log_ratio = _log_ratio(logprobs, old_logprobs, mask)
    mean = log_ratio.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    # Of value exp(mean); its gradient is that of the token.
    ratio = mean.detach().exp() * (log_ratio - log_ratio.detach()).exp()
    advantages = torch.where(mask, advantages, 0.0)
    unclipped = -advantages * ratio
    losses = torch.maximum(unclipped, -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high))
    return losses, (losses != unclipped).detach()


def cispo_losses(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips the importance weight instead of the objective, so that no token loses its gradient.

    Per token -sg(clip(rho, 1 - low, 1 + high)) A log pi. Source: arXiv 2506.13585; a `clip_low` of 1
    switches the lower bound off, as there.

    Args:
        logprobs: any shape, with gradient.
        old_logprobs: same shape.
        advantages: same shape.
        mask: bool, same shape.
        clip_low: lower distance from 1.
        clip_high: upper distance from 1.

    Returns:
        Losses, 0 where the mask is false, and bool, which tokens' weight was clipped; both of the same shape.
    """
    ratio = _log_ratio(logprobs, old_logprobs, mask).exp().detach()
    weight = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    losses = -weight * torch.where(mask, advantages * logprobs, 0.0)
    return losses, (weight != ratio) & mask


def gspo(tokens: PolicyTokens, section: PolicySection) -> tuple[torch.Tensor, torch.Tensor]:
    """GSPO on whole responses (`policy.loss: gspo`): `gspo_losses` with `clip_ratio_low` and `clip_ratio_high`."""
    if tokens.sequences is None:
        raise ValueError("gspo: needs to know which response each token belongs to")
    _, rows, counts = torch.unique_consecutive(tokens.sequences, return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts
    columns = torch.arange(len(rows), device=rows.device) - first[rows]
    shape = (len(counts), int(counts.max()) if len(counts) else 0)

    def by_response(flat: torch.Tensor) -> torch.Tensor:
        return flat.new_zeros(shape).index_put((rows, columns), flat)

    losses, is_cut = gspo_losses(
        by_response(tokens.logprobs),
        by_response(tokens.old_logprobs),
        by_response(tokens.advantages),
        by_response(tokens.weights) > 0,
        clip_low=section.clip_ratio_low,
        clip_high=section.clip_ratio_high,
    )
    return losses[rows, columns], is_cut[rows, columns]


gspo.whole_sequences = True


def cispo(tokens: PolicyTokens, section: PolicySection) -> tuple[torch.Tensor, torch.Tensor]:
    """CISPO (`policy.loss: cispo`): `cispo_losses` with `clip_ratio_low` and `clip_ratio_high`."""
    return cispo_losses(
        tokens.logprobs,
        tokens.old_logprobs,
        tokens.advantages,
        tokens.weights > 0,
        clip_low=section.clip_ratio_low,
        clip_high=section.clip_ratio_high,
    )
