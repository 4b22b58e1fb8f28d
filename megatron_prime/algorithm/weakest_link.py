"""An answer is right when all of its steps are: a PRM loss and credit that follow from saying just that.

With s_k the logit of step k being right, P(answer right) = prod_k sigmoid(s_k). A right answer then certifies each of
its steps by itself; a wrong one blames the steps that nothing else speaks for. The sum of token rewards, PRIME's
logit, does neither: one good step makes up for a bad one there.

Source of the idea: multiple-instance learning with a noisy AND, as arXiv 2606.27739 does for explicit PRMs ("weakest
link"); here s_k is made of implicit rewards, s_k = bias + sum of r_t over the step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_LARGEST_LOG_PROBABILITY = -1e-6
"""log P(answer right) is held below this, so that the loss of a wrong answer stays finite."""


def log_all_right(step_logits: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Log-probability that every step is right: sum_k log sigmoid(s_k).

    Args:
        step_logits: [b, S].
        present: bool [b, S].

    Returns:
        [b], at most 0; 0 for an answer without steps.
    """
    return torch.where(present, F.logsigmoid(step_logits), 0.0).sum(dim=1)


def weakest_link_loss(
    step_logits: torch.Tensor, present: torch.Tensor, labels: torch.Tensor, *, num_responses: int
) -> torch.Tensor:
    """Binary cross-entropy of the outcome label under `log_all_right`.

    -y log P - (1 - y) log(1 - P). A step of a right answer has the gradient -(1 - sigmoid(s_k)), whatever the others;
    of a wrong one (1 - sigmoid(s_k)) P / (1 - P).

    Args:
        step_logits: [b, S], with gradient.
        present: bool [b, S].
        labels: [b], in [0, 1].
        num_responses: responses of the whole mini-batch.

    Returns:
        Scalar; sums over micro-batches to the mini-batch mean.
    """
    log_right = log_all_right(step_logits, present)
    bounded = log_right.clamp(max=_LARGEST_LOG_PROBABILITY)
    # log(1 - e^x) in the form that is exact on either side of e^x = 1/2.
    log_wrong = torch.where(bounded > -0.6931, (-torch.expm1(bounded)).log(), torch.log1p(-bounded.exp()))
    return -(labels * log_right + (1.0 - labels) * log_wrong).sum() / num_responses


def step_blame(step_logits: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Probability of each step being wrong, given that the answer is.

    P(step k wrong | answer wrong) = (1 - sigmoid(s_k)) / (1 - prod_j sigmoid(s_j)). Over the steps of an answer it adds
    up to the expected number of wrong steps, at least 1.

    Args:
        step_logits: [B, S].
        present: bool [B, S].

    Returns:
        [B, S], in [0, 1], 0 where there is no step; without gradient.
    """
    step_logits = step_logits.detach()
    log_right = log_all_right(step_logits, present).clamp(max=_LARGEST_LOG_PROBABILITY)
    blame = torch.sigmoid(-step_logits) / -torch.expm1(log_right)[:, None]
    return torch.where(present, blame.clamp(max=1.0), 0.0)


def step_evidence(step_logits: torch.Tensor, present: torch.Tensor, *, bias: float) -> torch.Tensor:
    """What the PRM adds to the knowledge that the answer is wrong, per step.

    With w the blame and w0 the blame of a PRM that says nothing (every logit the bias): 1 - w / w0 where w is smaller,
    -(w - w0) / (1 - w0) where it is larger. 1: certainly right, -1: certainly wrong, exactly 0: nothing known, so that
    a PRM that equals its reference gives no credit at all. A step also gains when another one explains the failure.

    Args:
        step_logits: [B, S], bias + sum of the step's rewards.
        present: bool [B, S].
        bias: the logit of a step that the PRM says nothing about.

    Returns:
        [B, S], in [-1, 1], 0 where there is no step and for answers of one step; without gradient.
    """
    blame = step_blame(step_logits, present)
    uninformed = step_blame(torch.full_like(step_logits, bias), present)
    spoken_for = (1.0 - blame / uninformed.clamp(min=1e-12)).clamp(min=0.0)
    blamed = ((blame - uninformed) / (1.0 - uninformed).clamp(min=1e-6)).clamp(0.0, 1.0)
    several = present.sum(dim=1, keepdim=True) > 1
    return torch.where(present & several, spoken_for - blamed, 0.0)
