"""Outcomes and process rewards -> one advantage per response token.

Two sources, each with its own baseline, discount and coefficient; the whole batch at once, on one device:

    A = whiten(outcome_coef * G_outcome + process_coef * gate * G_process)

Constants cancel exactly: every baseline first subtracts a value of the group itself, so that equal rewards
give advantages that *are* zero, and whitening finds no rounding noise to blow up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_prime.algorithm.credit import scale_by_rms, spare_right_steps
from megatron_prime.algorithm.groups import group_max, group_sum
from megatron_prime.config.schema import AdvantageSection
from megatron_prime.sockets import resolve

Estimator = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AdvantageSection], torch.Tensor]
"""(rewards [B, R], mask [B, R], group_index [B], section) -> rewards above their baseline [B, R], 0 on padding. It is
called for the process rewards, and for outcomes as [B, 1]."""

RELATIVE_NOISE = 1e-6
"""A spread below this share of the values' magnitude is float32 rounding, not a signal."""
MIN_PROCESS_SCALE = 1e-6
"""Process returns that nowhere exceed this come from a PRM that still equals its reference."""
WHITEN_EPSILON = 1e-8
"""Added to the variance, as in the released code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdvantageResult:
    """Advantages with the returns that they are made of, each [B, R] and 0 on padding."""

    advantages: torch.Tensor
    outcome_returns: torch.Tensor
    """Before coefficients."""
    process_returns: torch.Tensor
    """Before coefficients and gate."""
    metrics: Mapping[str, float]
    """`outcome_std`, `process_std`: of the returns over response tokens. `outcome_share`, `process_share`: of each
    source in the summed magnitude of both, after coefficients and gate, adding up to 1 (0 where nothing has a
    magnitude). `process_scale`: what process rewards were divided by (1: not scaled); at or below
    `MIN_PROCESS_SCALE` they were dropped."""


def _from_group_minimum(
    rewards: torch.Tensor, mask: torch.Tensor, group_index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards above their group's smallest one [B, R], their means [B], and the group's non-empty responses [B]."""
    # Any constant may be subtracted from a group's rewards without changing a baselined advantage. Subtracting the
    # minimum makes equal rewards exactly 0, so that no rounding is left for later normalisation to amplify.
    lengths = mask.sum(dim=1)
    minimum = -group_max(-rewards.masked_fill(~mask, torch.inf).amin(dim=1), group_index)
    shifted = torch.where(mask, rewards - minimum[:, None], 0.0)
    size = group_sum((lengths > 0).to(rewards.dtype), group_index)
    return shifted, shifted.sum(dim=1) / lengths.clamp(min=1), size


def rloo_process(
    rewards: torch.Tensor, mask: torch.Tensor, group_index: torch.Tensor, *, baseline: Literal["strict", "group"]
) -> torch.Tensor:
    """Subtracts from every token reward what the other responses of the group get per token.

    With m_j the mean token reward of response j and K responses in the group:
    `strict`: r_t - mean_{j != i} m_j (arXiv 2502.01456, Eq. 5);
    `group`: r_t * K / (K - 1) - sum_j m_j / (K - 1) (the released code). With one token per response both
    are the leave-one-out advantage.

    Args:
        rewards: [B, R].
        mask: bool [B, R].
        group_index: int64 [B]; sizes may differ. A group of one gets 0; a response without tokens does not count.
        baseline: which of the two.

    Returns:
        [B, R], 0 on padding.
    """
    shifted, means, size = _from_group_minimum(rewards, mask, group_index)
    num_others = (size - 1).clamp(min=1)
    total = group_sum(means, group_index)
    if baseline == "strict":
        centred = shifted - ((total - means) / num_others)[:, None]
    elif baseline == "group":
        centred = (shifted * size[:, None] - total[:, None]) / num_others[:, None]
    else:
        raise ValueError(f"baseline: {baseline!r} is neither 'strict' nor 'group'")
    return torch.where(mask & (size > 1)[:, None], centred, 0.0)


def leave_one_out(values: torch.Tensor, group_index: torch.Tensor) -> torch.Tensor:
    """Computes v_i - mean_{j != i} v_j over the other members of the group.

    Source: arXiv 2502.01456, Eq. 5, outcome term.

    Args:
        values: [B].
        group_index: int64 [B].

    Returns:
        [B]; 0 for a group of one, exactly 0 where all members are equal.
    """
    # With one token per response the process baseline is the leave-one-out baseline of the outcomes.
    everywhere = torch.ones_like(values, dtype=torch.bool)[:, None]
    return rloo_process(values[:, None], everywhere, group_index, baseline="strict").squeeze(1)


def grpo_process(rewards: torch.Tensor, mask: torch.Tensor, group_index: torch.Tensor) -> torch.Tensor:
    """Standardises token rewards by mean and standard deviation of the responses' mean rewards.

    Source: arXiv 2502.01456, Eq. 7, with the sample standard deviation (K - 1).

    Args:
        rewards: [B, R].
        mask: bool [B, R].
        group_index: int64 [B].

    Returns:
        [B, R], 0 on padding, for groups of one, and where the responses' means do not differ.
    """
    shifted, means, size = _from_group_minimum(rewards, mask, group_index)
    centre = group_sum(means, group_index) / size.clamp(min=1)
    squares = torch.where(mask.any(dim=1), (means - centre).square(), 0.0)
    std = (group_sum(squares, group_index) / (size - 1).clamp(min=1)).sqrt()
    spread = group_max(shifted.amax(dim=1), group_index)
    # A zero test on std would miss means that differ by float32 rounding only.
    all_equal = std <= RELATIVE_NOISE * spread
    standardised = (shifted - centre[:, None]) / torch.where(all_equal, 1.0, std)[:, None]
    return torch.where(mask & ~all_equal[:, None], standardised, 0.0)


def discounted_returns(rewards: torch.Tensor, mask: torch.Tensor, gamma: float) -> torch.Tensor:
    """Computes G_t = sum_{s >= t} gamma^(s - t) r_s along each response.

    Doubles the summed horizon in every pass: log2(R) passes over whole rows, for any gamma, with the small
    rounding error of a tree sum.

    Args:
        rewards: [B, R].
        mask: bool [B, R], right-padded.
        gamma: discount per token, in [0, 1].

    Returns:
        [B, R], 0 on padding.
    """
    returns = torch.where(mask, rewards, 0.0)
    horizon, factor = 1, gamma
    # Invariant: returns[t] holds the discounted sum of r[t] .. r[t + horizon - 1], and factor is gamma^horizon.
    while horizon < returns.shape[1] and factor != 0.0:
        returns[:, :-horizon] += factor * returns[:, horizon:]
        horizon, factor = 2 * horizon, factor * factor
    return returns


def scale_process(
    rewards: torch.Tensor, mask: torch.Tensor, *, mode: Literal["none", "max", "rms"], gamma: float
) -> tuple[torch.Tensor, float]:
    """Divides process rewards by one number for the whole batch, so that their returns have the size of outcomes.

    Args:
        rewards: [B, R].
        mask: bool [B, R].
        mode: `max` divides by the largest absolute return (the released code, there per rank), `rms` by
            the root mean square of the returns over response tokens.
        gamma: discount of the returns.

    Returns:
        The scaled rewards [B, R] and the divisor. A divisor of `MIN_PROCESS_SCALE` or less is noise: rewards are 0.
    """
    if mode == "none":
        return torch.where(mask, rewards, 0.0), 1.0
    returns = discounted_returns(rewards, mask, gamma)
    if mode == "max":
        scale = float(returns.abs().max()) if returns.numel() else 0.0
    elif mode == "rms":
        scale = float(returns.square().sum(dtype=torch.float64) / mask.sum().clamp(min=1)) ** 0.5
    else:
        raise ValueError(f"mode: {mode!r} is none of 'none', 'max', 'rms'")
    if scale <= MIN_PROCESS_SCALE:
        return torch.zeros_like(rewards), scale
    return torch.where(mask, rewards / scale, 0.0), scale


def _mean_and_std(values: torch.Tensor, mask: torch.Tensor) -> tuple[float, float]:
    """Mean and sample standard deviation over valid tokens, accumulated in float64."""
    num_tokens = int(mask.sum())
    if num_tokens < 2:
        return 0.0, 0.0
    mean = float(torch.where(mask, values, 0.0).sum(dtype=torch.float64)) / num_tokens
    squares = torch.where(mask, values - mean, 0.0).square().sum(dtype=torch.float64)
    return mean, (float(squares) / (num_tokens - 1)) ** 0.5


def whiten(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Shifts and scales values to zero mean and unit sample variance over all response tokens of the batch.

    Source: the released code; not in the paper.

    Args:
        values: [B, R].
        mask: bool [B, R].

    Returns:
        [B, R], 0 on padding; all 0 where the values differ by no more than rounding.
    """
    mean, std = _mean_and_std(values, mask)
    largest = float(torch.where(mask, values, 0.0).abs().max()) if values.numel() else 0.0
    if std <= RELATIVE_NOISE * largest:
        return torch.zeros_like(values)
    return torch.where(mask, (values - mean) * (std * std + WHITEN_EPSILON) ** -0.5, 0.0)


def rloo(
    rewards: torch.Tensor, mask: torch.Tensor, group_index: torch.Tensor, section: AdvantageSection
) -> torch.Tensor:
    """Subtracts a leave-one-out baseline: `rloo_process` with ``process_baseline``."""
    return rloo_process(rewards, mask, group_index, baseline=section.process_baseline)


def grpo(
    rewards: torch.Tensor, mask: torch.Tensor, group_index: torch.Tensor, section: AdvantageSection
) -> torch.Tensor:
    """Standardises within the group: `grpo_process`."""
    return grpo_process(rewards, mask, group_index)


def reinforce(
    rewards: torch.Tensor, mask: torch.Tensor, group_index: torch.Tensor, section: AdvantageSection
) -> torch.Tensor:
    """Subtracts nothing (arXiv 2502.01456, Eq. 8)."""
    return torch.where(mask, rewards, 0.0)


def _outcome_returns(
    outcomes: torch.Tensor,
    mask: torch.Tensor,
    group_index: torch.Tensor,
    section: AdvantageSection,
    estimator: Estimator,
) -> torch.Tensor:
    """Baselined outcomes, put on the last token of each response and discounted backwards from there, [B, R]."""
    everywhere = torch.ones_like(outcomes, dtype=torch.bool)[:, None]
    values = estimator(outcomes[:, None], everywhere, group_index, section)
    # Right padding: the last token of a response of n tokens is column n - 1 (none for an empty response).
    is_last = torch.arange(mask.shape[1], device=mask.device) == mask.sum(dim=1, keepdim=True) - 1
    return discounted_returns(torch.where(is_last, values, 0.0), mask, section.outcome_gamma)


def _normalised(values: torch.Tensor, mask: torch.Tensor, section: AdvantageSection) -> torch.Tensor:
    if not section.whiten:
        return values
    # A shift would push down the tokens that were spared.
    return scale_by_rms(values, mask) if section.wrong_answers == "spare" else whiten(values, mask)


def compute_advantages(
    outcomes: torch.Tensor,
    process_rewards: torch.Tensor | None,
    mask: torch.Tensor,
    group_index: torch.Tensor,
    section: AdvantageSection,
    *,
    gate: float = 1.0,
) -> AdvantageResult:
    """Turns the batch's outcomes and process rewards into advantages.

    Source: arXiv 2502.01456, Eq. 5 (rloo), 7 (grpo), 8 (reinforce), with a coefficient per source.

    Args:
        outcomes: [B], in [0, 1].
        process_rewards: [B, R], for instance from `implicit_rewards`; None for outcome-only training.
        mask: bool [B, R], right-padded.
        group_index: int64 [B].
        section: estimator, coefficients, discounts, scaling.
        gate: multiplies the process source; `evidence.auc_gate` computes it.

    Returns:
        Advantages, the returns of both sources, and their metrics.

    Raises:
        ValueError: shapes that do not belong together.
        ConfigError: an estimator that there is not.
    """
    if outcomes.shape != mask.shape[:1] or group_index.shape != outcomes.shape:
        raise ValueError(f"outcomes {outcomes.shape}, mask {mask.shape}, group_index {group_index.shape}: B differs")
    if process_rewards is not None and process_rewards.shape != mask.shape:
        raise ValueError(f"process_rewards {process_rewards.shape} and mask {mask.shape} differ in shape")

    estimator: Estimator = resolve("advantage.estimator", section.estimator)
    outcome_returns = _outcome_returns(outcomes, mask, group_index, section, estimator)
    if section.wrong_answers == "spare":
        outcome_returns = spare_right_steps(outcome_returns, torch.zeros_like(outcome_returns), mask)
    process_returns, scale = torch.zeros_like(outcome_returns), 1.0
    if process_rewards is not None:
        scaled, scale = scale_process(process_rewards, mask, mode=section.process_scale, gamma=section.process_gamma)
        # One divisor for the whole batch keeps the groups' rewards comparable; the estimator then works within groups.
        centred = estimator(scaled, mask, group_index, section)
        process_returns = discounted_returns(centred, mask, section.process_gamma)

    outcome_part = section.outcome_coef * outcome_returns
    process_part = section.process_coef * gate * process_returns
    total = outcome_part + process_part
    outcome_size, process_size = (float(part.abs().sum(dtype=torch.float64)) for part in (outcome_part, process_part))
    size = outcome_size + process_size or 1.0  # shares of nothing are 0, not NaN
    return AdvantageResult(
        advantages=_normalised(total, mask, section),
        outcome_returns=outcome_returns,
        process_returns=process_returns,
        metrics={
            "outcome_std": _mean_and_std(outcome_returns, mask)[1],
            "process_std": _mean_and_std(process_returns, mask)[1],
            "outcome_share": outcome_size / size,
            "process_share": process_size / size,
            "process_scale": scale,
        },
    )
