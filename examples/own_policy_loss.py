"""A policy loss of your own: PPO without a minimum, which clips the ratio on both sides (as in CISPO, with gradient).

PYTHONPATH=examples megatron-prime train CONFIG policy.loss=own_policy_loss:truncated_weight
"""

from __future__ import annotations

import torch

from megatron_prime import PolicySection, PolicyTokens


def truncated_weight(tokens: PolicyTokens, section: PolicySection) -> tuple[torch.Tensor, torch.Tensor]:
    """REINFORCE with importance weights cut at 1 + clip_ratio_high; weights pass no gradient.

    Returns the loss of each token, and whether its weight was cut. Weighting over the mini-batch, KL and metrics are
    done around it.
    """
    ratio = tokens.log_ratio.detach().exp()
    limit = 1 + section.clip_ratio_high
    return -ratio.clamp(max=limit) * tokens.advantages * tokens.logprobs, ratio > limit
