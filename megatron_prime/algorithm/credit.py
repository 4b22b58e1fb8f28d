"""Which tokens of an answer its outcome is about: blame for wrong answers, values of shared prefixes.

In `spare_right_steps` the outcome decides the sign of every advantage and the PRM only its size, so that a PRM which
knows nothing cannot reward a wrong answer; `evidence_advantages` trusts the PRM more, and needs its weight earned.
"""

from __future__ import annotations

import torch


def spare_right_steps(
    advantages: torch.Tensor, blame: torch.Tensor, mask: torch.Tensor, *, threshold: float = 0.0
) -> torch.Tensor:
    """Keeps the advantages of answers that did well and multiplies the negative ones by each token's blame.

    A_t where A_t >= 0, else A_t * w_t with w_t in [0, 1]. Blame 1 everywhere gives the outcome's own advantages; with
    blame 0 the policy learns from what went well alone.

    Args:
        advantages: [B, R], from outcomes.
        blame: [B, R], in [0, 1], for instance `weakest_link.step_blame` spread over the tokens of each step.
        mask: bool [B, R].
        threshold: blame below this counts as none.

    Returns:
        [B, R], 0 on padding.
    """
    share = torch.where(blame >= threshold, blame, 0.0)
    return torch.where(mask, torch.where(advantages < 0, advantages * share, advantages), 0.0)


def evidence_advantages(
    advantages: torch.Tensor,
    evidence: torch.Tensor,
    is_wrong: torch.Tensor,
    mask: torch.Tensor,
    *,
    reward: float,
    penalty: float,
    weight: float,
) -> torch.Tensor:
    """Puts the evidence about steps in the place of a wrong answer's advantage; right answers keep theirs.

    weight * (reward * max(e_t, 0) - penalty * max(-e_t, 0)) in wrong answers. Unlike an outcome's advantage this also
    speaks where all answers of a group are wrong. It can reward a step of a wrong answer, so it is only as good as the
    PRM: the weight has to be 0 until fresh answers have shown that it knows something.

    Args:
        advantages: [B, R], from outcomes.
        evidence: [B, R], in [-1, 1], `weakest_link.step_evidence` spread over tokens.
        is_wrong: bool [B].
        mask: bool [B, R].
        reward: for a step that is certainly right, in units of outcomes.
        penalty: for one that is certainly wrong.
        weight: of the evidence, in [0, 1]; 0 trains on right answers alone.

    Returns:
        [B, R], 0 on padding.
    """
    credit = weight * (reward * evidence.clamp(min=0.0) + penalty * evidence.clamp(max=0.0))
    return torch.where(mask, torch.where(is_wrong[:, None], credit, advantages), 0.0)


def scale_by_rms(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Divides by the root mean square over all response tokens of the batch, and shifts nothing.

    Whitening subtracts the batch's mean too. Where wrong answers are spared, that mean is positive, and subtracting it
    would push down the very tokens that are to be left alone.

    Args:
        values: [B, R].
        mask: bool [B, R].

    Returns:
        [B, R], 0 on padding; unchanged where all values are 0.
    """
    values = torch.where(mask, values, 0.0)
    square = float(values.square().sum(dtype=torch.float64)) / max(1, int(mask.sum()))
    return values / square**0.5 if square > 0 else values


def prefix_values(
    response_ids: torch.Tensor, mask: torch.Tensor, outcomes: torch.Tensor, group_index: torch.Tensor
) -> torch.Tensor:
    """Values every prefix by the answers of the group that share it: V(y_1 .. y_t) = their mean outcome.

    Source: prefix-to-tree estimation of TEMPO, arXiv 2509.18314. No model and no bias, but all answers of a group have
    parted after a few tokens, from where on V is the answer's own outcome.

    Args:
        response_ids: int64 [B, R].
        mask: bool [B, R].
        outcomes: [B].
        group_index: int64 [B].

    Returns:
        [B, R]: the value after each token, 0 on padding. `prefix_advantages` takes its differences.
    """
    values = torch.zeros(mask.shape, dtype=outcomes.dtype, device=outcomes.device)
    for group in group_index.unique():
        rows = (group_index == group).nonzero()[:, 0]
        ids, valid = response_ids[rows], mask[rows]
        equal = (ids[:, None] == ids[None]) & valid[:, None] & valid[None]
        shared = equal.cumprod(dim=2).to(outcomes.dtype)
        count = shared.sum(dim=1).clamp(min=1)
        values[rows] = (shared * outcomes[rows][None, :, None]).sum(dim=1) / count
    return values


def prefix_advantages(
    response_ids: torch.Tensor, mask: torch.Tensor, outcomes: torch.Tensor, group_index: torch.Tensor
) -> torch.Tensor:
    """Temporal differences of `prefix_values`: what each token has changed in the mean outcome of its branch.

    The first token starts from the mean of the group, so the differences of an answer add up to its outcome minus that
    mean (Dr. GRPO's advantage), unless another answer is the same to the last token.

    Args:
        response_ids: int64 [B, R].
        mask: bool [B, R].
        outcomes: [B].
        group_index: int64 [B].

    Returns:
        [B, R], 0 on padding and at every token where no answers part.
    """
    values = prefix_values(response_ids, mask, outcomes, group_index)
    root = torch.zeros_like(outcomes)
    for group in group_index.unique():
        rows = group_index == group
        root[rows] = outcomes[rows].mean()
    before = torch.cat([root[:, None], values[:, :-1]], dim=1)
    return torch.where(mask, values - before, 0.0)
