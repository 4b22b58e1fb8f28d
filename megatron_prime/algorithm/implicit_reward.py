"""Process rewards that no one had to label: the PRM's log-ratio to the reference."""

from __future__ import annotations

import torch


def implicit_rewards(
    prm_logprobs: torch.Tensor, reference_logprobs: torch.Tensor, mask: torch.Tensor, *, beta: float
) -> torch.Tensor:
    """Computes r_t = beta * (log p_prm(y_t) - log p_ref(y_t)) for every response token, the end token included.

    Source: arXiv 2502.01456, the implicit process reward. Differentiable in `prm_logprobs`.

    Args:
        prm_logprobs: [B, R], without temperature; whatever stands on padding is ignored.
        reference_logprobs: [B, R], without temperature.
        mask: bool [B, R], true on response tokens.
        beta: scale of the log-ratio.

    Returns:
        [B, R], exactly 0 on padding.
    """
    return torch.where(mask, beta * (prm_logprobs - reference_logprobs), 0.0)
