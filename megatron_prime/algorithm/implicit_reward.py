"""Process rewards: the implicit ones, which no one had to label, and those that come per reasoning step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_prime.batch import ProcessInputs, StepReward


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


def implicit_source(inputs: ProcessInputs) -> torch.Tensor:
    """Process rewards [B, R] of the implicit PRM (`advantage.process_source: implicit`)."""
    if inputs.prm is None:
        raise ValueError("process_source: implicit rewards need a PRM")
    prm = inputs.prm
    return implicit_rewards(prm.prm_logprobs, prm.reference_logprobs, inputs.rollout.mask, beta=inputs.beta)


def step_rewards(rows: Sequence[Sequence[StepReward]], mask: torch.Tensor) -> torch.Tensor:
    """Puts rewards of reasoning steps onto tokens: each on the last token of its step.

    A return then credits a step's reward to all of its tokens and, with discount 1, to those before it.

    Args:
        rows: for each response its steps, in any order; several that end on one token add up.
        mask: bool [B, R].

    Returns:
        float32 [B, R], 0 where no step ends.

    Raises:
        ValueError: a step that is empty or outside of its response, or other than B rows.
    """
    if len(rows) != mask.shape[0]:
        raise ValueError(f"step rewards of {len(rows)} responses for a batch of {mask.shape[0]}")
    rewards = torch.zeros(mask.shape, dtype=torch.float32)
    for row, (steps, length) in enumerate(zip(rows, mask.sum(dim=1).tolist(), strict=True)):
        for step in steps:
            if not 0 <= step.start < step.stop <= length:
                raise ValueError(f"response {row}: step {step.start}:{step.stop} does not fit {length} tokens")
            rewards[row, step.stop - 1] += step.reward
    return rewards
