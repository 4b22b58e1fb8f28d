"""The losses of the trained models, as the head calls them: whole-batch tensors in, some response tokens at a time.

A loss gets from `trainer/` to the head in four hops: role.update -> `TrainableRole.optimizer_step` -> Megatron's
schedule -> `kernels.loss`, which calls it (through `reports.ReportingLoss`) with the log-probs of one chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_prime.algorithm.policy_loss import PolicyTokens, Surrogate, policy_loss
from megatron_prime.algorithm.prm_loss import PrmLoss, PrmResponses
from megatron_prime.config.schema import PolicySection, PrmSection
from megatron_prime.mcore.packing import ResponseTokens

Terms = tuple[torch.Tensor, Mapping[str, torch.Tensor]]
"""A loss that sums over the parts of a mini-batch, and metrics that sum (``max_*``: take the largest)."""


class TokenLoss(Protocol):
    """A loss of response tokens."""

    @property
    def whole_sequences(self) -> bool:
        """True if all tokens of a response must arrive in one call."""
        ...

    @property
    def with_entropy(self) -> bool:
        """True if the loss wants entropies."""
        ...

    def __call__(self, logprobs: torch.Tensor, entropy: torch.Tensor | None, tokens: ResponseTokens) -> Terms:
        """Computes the part of some tokens.

        Args:
            logprobs: [n], with gradient.
            entropy: [n], without gradient.
            tokens: which ones they are.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyTokenLoss:
    """The policy's loss of one mini-batch; tensors are those of the whole batch, [B, R]."""

    section: PolicySection
    surrogate: Surrogate
    weights: torch.Tensor
    """Each token's share of the mini-batch; 0 for the others."""
    advantages: torch.Tensor
    old_logprobs: torch.Tensor | None
    """None: the policy still is the old one."""
    reference_logprobs: torch.Tensor | None

    @property
    def whole_sequences(self) -> bool:
        return getattr(self.surrogate, "whole_sequences", False)

    @property
    def with_entropy(self) -> bool:
        return True

    def __call__(self, logprobs: torch.Tensor, entropy: torch.Tensor | None, tokens: ResponseTokens) -> Terms:
        """Loss, and metrics of the policy's drift."""
        assert entropy is not None
        device, old, reference = logprobs.device, self.old_logprobs, self.reference_logprobs
        weights = tokens.take(self.weights).to(device)
        part = PolicyTokens(
            logprobs=logprobs,
            old_logprobs=logprobs.detach() if old is None else tokens.take(old).to(device),
            advantages=tokens.take(self.advantages).to(device),
            weights=weights,
            reference_logprobs=None if reference is None else tokens.take(reference).to(device),
            sequences=tokens.rows.to(device),
        )
        value, metrics = policy_loss(part, self.section, self.surrogate)
        return value, {
            "clip_fraction": metrics.clip_fraction,
            "kl": metrics.approx_kl,
            "reference_kl": metrics.reference_kl,
            "max_ratio": metrics.max_ratio,
            "entropy": (entropy * weights).sum(),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class PrmTokenLoss:
    """The PRM's loss of one mini-batch; tensors are those of the whole batch."""

    section: PrmSection
    loss: PrmLoss
    reference_logprobs: torch.Tensor
    """[B, R]."""
    mask: torch.Tensor
    """bool [B, R]."""
    labels: torch.Tensor
    """[B]."""
    group_accuracy: torch.Tensor
    """[B]."""
    group_size: torch.Tensor
    """[B]."""
    opponents: torch.Tensor | None
    """[B]."""
    num_responses: int
    """Responses of the mini-batch."""

    @property
    def whole_sequences(self) -> bool:
        return True

    @property
    def with_entropy(self) -> bool:
        return False

    def __call__(self, logprobs: torch.Tensor, entropy: torch.Tensor | None, tokens: ResponseTokens) -> Terms:
        """Loss, and the share of responses on whose side of 0 their logit is."""
        device, mine = logprobs.device, tokens.unique_rows()
        responses = PrmResponses(
            prm_logprobs=tokens.to_rows(logprobs, self.mask.shape[1]),
            reference_logprobs=self.reference_logprobs[mine].to(device),
            mask=self.mask[mine].to(device),
            labels=self.labels[mine].to(device),
            group_accuracy=self.group_accuracy[mine].to(device),
            group_size=self.group_size[mine].to(device),
            opponents=None if self.opponents is None else self.opponents[mine].to(device),
            num_responses=self.num_responses,
            section=self.section,
        )
        correct = ((responses.logits > 0) == (responses.labels > 0.5)).float().sum() / self.num_responses
        return self.loss(responses), {"train_accuracy": correct}


@dataclass(frozen=True, kw_only=True, slots=True)
class SftTokenLoss:
    """Token-mean negative log-likelihood of a mini-batch of so many response tokens."""

    num_tokens: int

    @property
    def whole_sequences(self) -> bool:
        return False

    @property
    def with_entropy(self) -> bool:
        return True

    def __call__(self, logprobs: torch.Tensor, entropy: torch.Tensor | None, tokens: ResponseTokens) -> Terms:
        """Loss and mean entropy."""
        assert entropy is not None
        return -logprobs.sum() / self.num_tokens, {"entropy": entropy.sum() / self.num_tokens}
