"""The roles of a PRIME run (policy, reference, process reward model) and the SFT model.

Each applies the pure functions of `algorithm/` to one Megatron model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megatron_prime.algorithm.groups import group_sum
from megatron_prime.algorithm.policy_loss import loss_weights
from megatron_prime.algorithm.prm_loss import opponent_logits, outcome_labels, sequence_logits
from megatron_prime.batch import PrmBatch, RolloutBatch, ScoredBatch, SftExample, UpdateResult
from megatron_prime.config.schema import PolicySection, PrmSection
from megatron_prime.errors import NonFiniteError
from megatron_prime.mcore.losses import PolicyTokenLoss, PrmTokenLoss, SftTokenLoss
from megatron_prime.mcore.packing import TokenRows, split_minibatches
from megatron_prime.mcore.role import ModelRole, RoleSetup, TrainableRole
from megatron_prime.sockets import resolve

Metrics = dict[str, float]


def _mean(reports: Sequence[Mapping[str, float]]) -> Metrics:
    """Mean over optimizer steps; ``max_*`` keys take the largest."""
    return {
        key: max(r[key] for r in reports) if key.startswith("max_") else sum(r[key] for r in reports) / len(reports)
        for key in reports[0]
    }


class ReferenceRole(ModelRole):
    """A frozen model that only scores."""

    def score(self, batch: RolloutBatch) -> torch.Tensor:
        """Log-probs of the response tokens without temperature, float32 [B, R]."""
        return self.logprobs(TokenRows.from_rollout(batch))


class PolicyRole(TrainableRole):
    """The model that learns to answer.

    Args:
        setup: shape, layout and batching of the model.
        section: of the configuration.
        num_steps: steps of the run in which it trains; PRM warm-up steps do not count.
    """

    def __init__(self, setup: RoleSetup, section: PolicySection, *, num_steps: int) -> None:
        super().__init__(
            setup,
            section.optimizer,
            num_optimizer_steps=num_steps * section.num_minibatches * section.num_epochs,
        )
        self.section = section
        self._surrogate = resolve("policy.loss", section.loss)

    def score(self, batch: RolloutBatch, *, temperature: float) -> torch.Tensor:
        """Log-probs at the sampling temperature, float32 [B, R]."""
        return self.logprobs(TokenRows.from_rollout(batch), temperature=temperature)

    def update(
        self,
        batch: RolloutBatch,
        advantages: torch.Tensor,
        *,
        old_logprobs: torch.Tensor | None,
        reference_logprobs: torch.Tensor | None,
        temperature: float,
        seed: int,
    ) -> UpdateResult:
        """Trains on one batch.

        Args:
            batch: rollouts.
            advantages: float32 [B, R].
            old_logprobs: [B, R], of the policy as it is now. None: the first forward pass of training supplies them,
                for there the policy still is the old one; only with one mini-batch, which is the whole batch.
            reference_logprobs: [B, R]; needed where `kl_coef` is not 0.
            temperature: of the sampling; ratios are taken at it.
            seed: of the mini-batch order.

        Returns:
            Loss, clip fraction, KL estimates, entropy, gradient norm and learning rate; the old policy's log-probs.

        Raises:
            NonFiniteError: see `TrainableRole.optimizer_step`; with the old policy's log-probs.
        """
        rows, section = TokenRows.from_rollout(batch), self.section
        reports: list[Metrics] = []
        old = old_logprobs
        try:
            for epoch in range(section.num_epochs):
                for selected in split_minibatches(batch.group_index, section.num_minibatches, seed + epoch):
                    loss = self._loss(batch, advantages, old, reference_logprobs, selected)
                    result = self.optimizer_step(
                        rows, selected, loss, temperature=temperature, keep_logprobs=old is None
                    )
                    reports.append(result.metrics)
                    # The first forward pass ran before any weight changed, so its log-probs are the old policy's.
                    old = result.logprobs if old is None else old
        except NonFiniteError as error:
            raise NonFiniteError(str(error), error.logprobs if old is None else old) from error
        self.settle()
        assert old is not None  # there is at least one epoch
        return UpdateResult(metrics=_mean(reports), logprobs=old)

    def measure_rows(self, batch: ScoredBatch, advantages: torch.Tensor, *, temperature: float) -> list[Metrics]:
        """Each response's part of the loss over the whole batch and of its gradient; nothing changes.

        Args:
            batch: rollouts with the log-probs that the update had.
            advantages: float32 [B, R].
            temperature: of the sampling.

        Returns:
            Metrics of `TrainableRole.measure` per response.
        """
        rollout, everything = batch.rollout, range(batch.rollout.num_responses)
        loss = self._loss(rollout, advantages, batch.policy_logprobs, batch.reference_logprobs, everything)
        return self._measure_each(TokenRows.from_rollout(rollout), loss, temperature)

    def _loss(
        self,
        batch: RolloutBatch,
        advantages: torch.Tensor,
        old: torch.Tensor | None,
        reference: torch.Tensor | None,
        selected: Sequence[int],
    ) -> PolicyTokenLoss:
        """The loss of a mini-batch."""
        selected, weights = list(selected), torch.zeros_like(advantages)
        weights[selected] = loss_weights(batch.mask[selected], self.section.loss_normalization).float()
        return PolicyTokenLoss(
            section=self.section,
            surrogate=self._surrogate,
            weights=weights,
            advantages=advantages,
            old_logprobs=old,
            reference_logprobs=reference,
        )


class PrmRole(TrainableRole):
    """The implicit process reward model.

    Args:
        setup: shape, layout and batching of the model.
        section: of the configuration.
        num_steps: steps of the run; it trains in all of them.
    """

    def __init__(self, setup: RoleSetup, section: PrmSection, *, num_steps: int) -> None:
        super().__init__(
            setup,
            section.optimizer,
            num_optimizer_steps=num_steps * section.num_minibatches * section.num_window_batches,
        )
        self.section = section
        self._loss_function = resolve("prm.loss", section.loss)
        self._needs_scores: bool = getattr(self._loss_function, "needs_scores", False)

    @property
    def scores_in_update(self) -> bool:
        """True if `update` needs no scores, because its forward pass sees the whole batch before any weight changes."""
        return self.section.num_minibatches * self.section.num_window_batches == 1 and not self._needs_scores

    def score(self, batch: RolloutBatch) -> torch.Tensor:
        """Log-probs of the response tokens without temperature, float32 [B, R]; never trains."""
        return self.logprobs(TokenRows.from_rollout(batch))

    def update(
        self,
        batch: RolloutBatch,
        *,
        reference_logprobs: torch.Tensor,
        prm_logprobs: torch.Tensor | None,
        window: Sequence[PrmBatch],
        seed: int,
    ) -> UpdateResult:
        """One pass over the window of older batches, oldest first, and then over a new one.

        Args:
            batch: the new one.
            reference_logprobs: [B, R], of the new one.
            prm_logprobs: [B, R], of this PRM as it is now; None, where `scores_in_update`: the update's own forward
                pass supplies them.
            window: older batches.
            seed: of the mini-batch order.

        Returns:
            Loss, gradient norm and learning rate; the log-probs that this PRM had of the new batch before the update.

        Raises:
            NonFiniteError: see `TrainableRole.optimizer_step`; with these log-probs.
        """
        reports: list[Metrics] = []
        before = prm_logprobs
        parts = [(older.rollout, older.reference_logprobs, older.prm_logprobs) for older in window]
        try:
            for number, part in enumerate([*parts, (batch, reference_logprobs, prm_logprobs)]):
                rows, group_index = TokenRows.from_rollout(part[0]), part[0].group_index
                for selected in split_minibatches(group_index, self.section.num_minibatches, seed + number):
                    loss = self._loss(*part, num_responses=len(selected))
                    result = self.optimizer_step(rows, selected, loss, keep_logprobs=before is None)
                    reports.append(result.metrics)
                    # Without scores there is one optimizer step only (`scores_in_update`), so these are from before it.
                    before = result.logprobs if before is None else before
        except NonFiniteError as error:
            raise NonFiniteError(str(error), error.logprobs if before is None else before) from error
        self.settle()
        assert before is not None  # there is at least one mini-batch
        return UpdateResult(metrics=_mean(reports), logprobs=before)

    def measure_rows(self, batch: PrmBatch) -> list[Metrics]:
        """Each response's part of the loss over the whole batch and of its gradient; nothing changes.

        Returns:
            Metrics of `TrainableRole.measure` per response.
        """
        rollout = batch.rollout
        loss = self._loss(rollout, batch.reference_logprobs, batch.prm_logprobs, num_responses=rollout.num_responses)
        return self._measure_each(TokenRows.from_rollout(rollout), loss)

    def _loss(
        self, batch: RolloutBatch, reference: torch.Tensor, scores: torch.Tensor | None, *, num_responses: int
    ) -> PrmTokenLoss:
        """The loss of a mini-batch of so many responses."""
        labels = outcome_labels(batch.outcomes, soft_labels=self.section.soft_labels)
        sizes = group_sum(torch.ones_like(labels), batch.group_index)
        opponents = None
        if self._needs_scores:
            assert scores is not None
            logits = sequence_logits(
                scores, reference, batch.mask, beta=self.section.beta, aggregation=self.section.aggregation
            )
            opponents = opponent_logits(logits, labels, batch.group_index)
        return PrmTokenLoss(
            section=self.section,
            loss=self._loss_function,
            reference_logprobs=reference,
            mask=batch.mask,
            labels=labels,
            group_accuracy=group_sum(labels, batch.group_index) / sizes,
            group_size=sizes,
            opponents=opponents,
            num_responses=num_responses,
        )


class SftRole(TrainableRole):
    """A model that imitates given answers (SFT)."""

    def update(self, examples: Sequence[SftExample]) -> Metrics:
        """One optimizer step on the token-mean negative log-likelihood of the answers."""
        rows = TokenRows.from_examples(examples)
        loss = SftTokenLoss(num_tokens=int(rows.mask.sum()))
        metrics = self.optimizer_step(rows, range(len(examples)), loss).metrics
        self.settle()
        return metrics
