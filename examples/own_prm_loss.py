"""A loss of your own for the implicit PRM: cross-entropy that leaves confident answers alone (a focal loss).

PYTHONPATH=examples megatron-prime train CONFIG prm.loss=own_prm_loss:focal
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_prime import PrmResponses


def focal(responses: PrmResponses) -> torch.Tensor:
    """Focal loss with exponent 2 (arXiv 1708.02002): a sum over responses, divided by those of the mini-batch."""
    logits, labels = responses.logits, responses.labels
    losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    missed = 1 - torch.exp(-losses)
    return (missed.square() * losses).sum() / responses.num_responses
