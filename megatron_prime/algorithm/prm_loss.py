"""Losses of the implicit PRM, which learns token rewards from outcome labels.

Every loss is a sum over the responses it is given divided by the responses of the whole mini-batch, so
the losses (and gradients) of micro-batches and of data-parallel ranks add up to those of the mini-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from megatron_prime.algorithm.groups import group_sum
from megatron_prime.algorithm.implicit_reward import implicit_rewards
from megatron_prime.config.schema import PrmSection


@dataclass(frozen=True, kw_only=True, slots=True)
class PrmResponses:
    """Some whole responses of a mini-batch as a PRM loss sees them."""

    prm_logprobs: torch.Tensor
    """[b, R], with gradient, without temperature."""
    reference_logprobs: torch.Tensor
    """[b, R]."""
    mask: torch.Tensor
    """bool [b, R]."""
    labels: torch.Tensor
    """[b], in [0, 1]."""
    group_accuracy: torch.Tensor
    """[b], mean label of all answers to the response's prompt."""
    group_size: torch.Tensor
    """[b], how many these are."""
    opponents: torch.Tensor | None
    """[b], `opponent_logits` of the PRM before its update; None unless the loss has the attribute ``needs_scores``."""
    num_responses: int
    """Responses of the whole mini-batch."""
    section: PrmSection

    @property
    def logits(self) -> torch.Tensor:
        """`sequence_logits` [b], with gradient."""
        return sequence_logits(
            self.prm_logprobs,
            self.reference_logprobs,
            self.mask,
            beta=self.section.beta,
            aggregation=self.section.aggregation,
        )


PrmLoss = Callable[[PrmResponses], torch.Tensor]
"""The function that `prm.loss` names: its scalars sum over micro-batches to the loss of the mini-batch."""


def sequence_logits(
    prm_logprobs: torch.Tensor,
    reference_logprobs: torch.Tensor,
    mask: torch.Tensor,
    *,
    beta: float,
    aggregation: Literal["sum", "mean"],
) -> torch.Tensor:
    """Turns token log-ratios into one logit per response.

    Source: arXiv 2502.01456, the outcome score of the implicit PRM (`sum`); `mean` divides by the response's
    length, so that long responses do not saturate the sigmoid.

    Args:
        prm_logprobs: [B, R].
        reference_logprobs: [B, R].
        mask: bool [B, R].
        beta: scale of the log-ratio.
        aggregation: sum or mean over the response's tokens.

    Returns:
        [B]; 0 for a response without tokens.
    """
    totals = implicit_rewards(prm_logprobs, reference_logprobs, mask, beta=beta).sum(dim=1)
    return totals / mask.sum(dim=1).clamp(min=1) if aggregation == "mean" else totals


def outcome_labels(outcomes: torch.Tensor, *, soft_labels: bool) -> torch.Tensor:
    """Turns verifier rewards into labels of the PRM.

    Args:
        outcomes: [B], in [0, 1]; fractional where only some tests of a program pass.
        soft_labels: keep fractions; otherwise only a full reward counts as right.

    Returns:
        [B], same dtype as `outcomes`.
    """
    return outcomes if soft_labels else (outcomes >= 1.0).to(outcomes.dtype)


def cross_entropy_loss(logits: torch.Tensor, labels: torch.Tensor, *, num_responses: int) -> torch.Tensor:
    """Computes the binary cross-entropy of outcome labels.

    Source: arXiv 2502.01456, the loss of the implicit PRM; on logits, so that a confident PRM neither overflows nor
    loses its gradient.

    Args:
        logits: [b], from `sequence_logits`.
        labels: [b], in [0, 1].
        num_responses: responses of the whole mini-batch.

    Returns:
        Scalar; sums over micro-batches to the mini-batch mean.
    """
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum") / num_responses


def opponent_logits(logits: torch.Tensor, labels: torch.Tensor, group_index: torch.Tensor) -> torch.Tensor:
    """Averages the logits of the other side: for a right answer the wrong ones of its group, and the reverse.

    Args:
        logits: [B], of the whole batch, since a group may be spread over micro-batches and ranks.
        labels: [B]; above 0.5 counts as right.
        group_index: int64 [B].

    Returns:
        [B], without gradient; NaN where the group has no answer of the other side.
    """
    logits = logits.detach()
    right = (labels > 0.5).to(logits.dtype)
    wrong = 1.0 - right
    # A group without answers of one side divides 0 by 0: the NaN marks rows without opponents for `pairwise_loss`.
    right_mean = group_sum(logits * right, group_index) / group_sum(right, group_index)
    wrong_mean = group_sum(logits * wrong, group_index) / group_sum(wrong, group_index)
    return torch.where(labels > 0.5, wrong_mean, right_mean)


def pairwise_loss(
    logits: torch.Tensor, labels: torch.Tensor, opponent_logits: torch.Tensor, *, num_responses: int
) -> torch.Tensor:
    """Computes the DPO-style loss -log sigmoid(+-(logit - mean logit of the other side)), detached opponents.

    Source: arXiv 2502.01456, appendix C.2, in the detached form of verl's recipe. The sign follows the label here,
    where the recipe took any partial credit for right; responses without opponents add nothing.

    Args:
        logits: [b], with gradient.
        labels: [b]; above 0.5 counts as right.
        opponent_logits: [b], the micro-batch's rows of what `opponent_logits` returned for the whole batch.
        num_responses: responses of the whole mini-batch.

    Returns:
        Scalar; sums over micro-batches to the mini-batch mean.
    """
    has_opponent = ~opponent_logits.isnan()
    # Replace NaN before the subtraction, not after: `where` would still pass NaN gradients through the other branch.
    margin = logits - torch.where(has_opponent, opponent_logits, 0.0).detach()
    losses = -F.logsigmoid(torch.where(labels > 0.5, margin, -margin))
    return torch.where(has_opponent, losses, 0.0).sum() / num_responses


def cross_entropy(responses: PrmResponses) -> torch.Tensor:
    """The published loss: `cross_entropy_loss` of the sequence logits."""
    return cross_entropy_loss(responses.logits, responses.labels, num_responses=responses.num_responses)


def pairwise(responses: PrmResponses) -> torch.Tensor:
    """The DPO-style loss: `pairwise_loss` against the other side of the group."""
    if responses.opponents is None:
        raise ValueError("pairwise: needs the logits of opponents")
    return pairwise_loss(responses.logits, responses.labels, responses.opponents, num_responses=responses.num_responses)


pairwise.needs_scores = True
