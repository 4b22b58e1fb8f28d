"""The roles of a PRIME run: policy, reference, process reward model; and the SFT model.

Each puts the pure functions of `algorithm/` onto one Megatron model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from megatron_prime.algorithm.policy_loss import PolicyLossOptions, loss_weights, ppo_clip_loss
from megatron_prime.algorithm.prm_loss import (
    cross_entropy_loss,
    opponent_logits,
    outcome_labels,
    pairwise_loss,
    sequence_logits,
)
from megatron_prime.batch import RolloutBatch, ScoredBatch, SftExample, UpdateResult
from megatron_prime.config.schema import PolicySection, PrmSection
from megatron_prime.mcore.packing import ResponseTokens, TokenRows, split_minibatches
from megatron_prime.mcore.reports import TokenLoss
from megatron_prime.mcore.role import ModelRole, RoleSetup, TrainableRole

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
        setup: as for every model.
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
        self.options = PolicyLossOptions(
            clip_ratio_low=section.clip_ratio_low,
            clip_ratio_high=section.clip_ratio_high,
            dual_clip=section.dual_clip,
            loss_normalization=section.loss_normalization,
            kl_coef=section.kl_coef,
        )

    def score(self, batch: RolloutBatch, *, temperature: float) -> torch.Tensor:
        """Log-probs at the sampling temperature, float32 [B, R]."""
        return self.logprobs(TokenRows.from_rollout(batch), temperature=temperature)

    def update(
        self,
        batch: ScoredBatch,
        advantages: torch.Tensor,
        *,
        temperature: float,
        seed: int,
        check: Callable[[torch.Tensor], None] | None = None,
    ) -> UpdateResult:
        """PPO updates on one scored batch.

        Args:
            batch: rollouts with log-probs. Without those of the policy, the first forward pass of training supplies
                them: there the policy still is the old one. Only with one mini-batch, which is the whole batch.
            advantages: float32 [B, R].
            temperature: of the sampling; ratios are taken at it.
            seed: of the mini-batch order.
            check: sees log-probs that the batch came without before any weight changes, and may raise.

        Returns:
            Loss, clip fraction, KL estimates, entropy, gradient norm and learning rate; the old policy's log-probs
            where the batch came without.
        """
        assert batch.policy_logprobs is not None or self.section.num_minibatches == 1
        rows = TokenRows.from_rollout(batch.rollout)
        section = self.section
        results: list[UpdateResult] = []
        old = batch.policy_logprobs
        for epoch in range(section.num_epochs):
            for selected in split_minibatches(batch.rollout.group_index, section.num_minibatches, seed + epoch):
                result = self.optimizer_step(
                    rows,
                    selected,
                    self._loss(batch, advantages, old, selected),
                    temperature=temperature,
                    with_entropy=True,
                    keep_logprobs=old is None,
                    check=check,
                )
                results.append(result)
                old = result.logprobs if old is None else old
        self.settle()
        return UpdateResult(metrics=_mean([r.metrics for r in results]), logprobs=results[0].logprobs)

    def measure_rows(self, batch: ScoredBatch, advantages: torch.Tensor, *, temperature: float) -> list[Metrics]:
        """Each response's part of the loss over the whole batch and of its gradient; nothing changes.

        Args:
            batch: as for `update`.
            advantages: as for `update`.
            temperature: as for `update`.

        Returns:
            Metrics of `TrainableRole.measure` per response.
        """
        loss = self._loss(batch, advantages, batch.policy_logprobs, range(batch.rollout.num_responses))
        return self._measure_each(
            TokenRows.from_rollout(batch.rollout), loss, temperature=temperature, with_entropy=True
        )

    def _loss(
        self, batch: ScoredBatch, advantages: torch.Tensor, old: torch.Tensor | None, selected: Sequence[int]
    ) -> TokenLoss:
        """PPO's loss of a mini-batch."""
        selected, weights = list(selected), torch.zeros_like(advantages)
        weights[selected] = loss_weights(batch.rollout.mask[selected], self.section.loss_normalization).float()
        return _ppo_loss(self.options, weights, advantages, old, batch.reference_logprobs)


def _ppo_loss(
    options: PolicyLossOptions,
    weights: torch.Tensor,
    advantages: torch.Tensor,
    old: torch.Tensor | None,
    reference: torch.Tensor | None,
) -> TokenLoss:
    """PPO's loss on whole-batch tensors [B, R]; without old log-probs the policy is the old one."""

    def loss(
        logprobs: torch.Tensor, entropy: torch.Tensor | None, tokens: ResponseTokens
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        assert entropy is not None
        device = logprobs.device
        weight = tokens.take(weights).to(device)
        value, metrics = ppo_clip_loss(
            logprobs,
            logprobs.detach() if old is None else tokens.take(old).to(device),
            tokens.take(advantages).to(device),
            weight,
            options,
            reference_logprobs=None if reference is None else tokens.take(reference).to(device),
        )
        return value, {
            "clip_fraction": metrics.clip_fraction,
            "kl": metrics.approx_kl,
            "reference_kl": metrics.reference_kl,
            "max_ratio": metrics.max_ratio,
            "entropy": (entropy * weight).sum(),
        }

    return loss


class PrmRole(TrainableRole):
    """The implicit process reward model.

    Args:
        setup: as for every model.
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

    def score(self, batch: RolloutBatch) -> torch.Tensor:
        """Log-probs of the response tokens without temperature, float32 [B, R]; never trains."""
        return self.logprobs(TokenRows.from_rollout(batch))

    def update(self, batches: Sequence[ScoredBatch], *, seed: int) -> UpdateResult:
        """One pass over the window of batches, oldest first.

        Args:
            batches: scored batches; their reference log-probs are used, not their PRM ones
                (those only say which opponents the pairwise loss has).
            seed: of the mini-batch order.

        Returns:
            Loss, gradient norm and learning rate; where the newest batch came without PRM log-probs, those that
            this PRM had before the update, which needs a window of one batch and one mini-batch.
        """
        results = [
            self._minibatch(batch, selected)
            for number, batch in enumerate(batches)
            for selected in split_minibatches(batch.rollout.group_index, self.section.num_minibatches, seed + number)
        ]
        assert batches[-1].prm_logprobs is not None or len(results) == 1
        self.settle()
        return UpdateResult(metrics=_mean([r.metrics for r in results]), logprobs=results[-1].logprobs)

    def _minibatch(self, batch: ScoredBatch, selected: Sequence[int]) -> UpdateResult:
        return self.optimizer_step(
            TokenRows.from_rollout(batch.rollout),
            selected,
            self._loss(batch, len(selected)),
            whole_sequences=True,
            keep_logprobs=batch.prm_logprobs is None,
        )

    def measure_rows(self, batch: ScoredBatch) -> list[Metrics]:
        """Each response's part of the loss over the whole batch and of its gradient; nothing changes.

        Returns:
            Metrics of `TrainableRole.measure` per response.
        """
        loss = self._loss(batch, batch.rollout.num_responses)
        return self._measure_each(TokenRows.from_rollout(batch.rollout), loss, whole_sequences=True)

    def _loss(self, batch: ScoredBatch, num_responses: int) -> TokenLoss:
        """The loss of a mini-batch of so many responses."""
        section, rollout, reference = self.section, batch.rollout, batch.reference_logprobs
        assert reference is not None
        width = rollout.mask.shape[1]
        labels = outcome_labels(rollout.outcomes, soft_labels=section.soft_labels)
        opponents = self._opponents(batch, labels) if section.loss == "pairwise" else None

        def loss(
            logprobs: torch.Tensor, entropy: torch.Tensor | None, tokens: ResponseTokens
        ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
            device = logprobs.device
            mine = tokens.unique_rows()
            logits = sequence_logits(
                tokens.to_rows(logprobs, width),
                reference[mine].to(device),
                rollout.mask[mine].to(device),
                beta=section.beta,
                aggregation=section.aggregation,
            )
            label = labels[mine].to(device)
            if opponents is not None:
                value = pairwise_loss(logits, label, opponents[mine].to(device), num_responses=num_responses)
            else:
                value = cross_entropy_loss(logits, label, num_responses=num_responses)
            correct = ((logits > 0) == (label > 0.5)).float().sum() / num_responses
            return value, {"train_accuracy": correct}

        return loss

    def _opponents(self, batch: ScoredBatch, labels: torch.Tensor) -> torch.Tensor:
        assert batch.prm_logprobs is not None and batch.reference_logprobs is not None
        logits = sequence_logits(
            batch.prm_logprobs,
            batch.reference_logprobs,
            batch.rollout.mask,
            beta=self.section.beta,
            aggregation=self.section.aggregation,
        )
        return opponent_logits(logits, labels, batch.rollout.group_index)


class SftRole(TrainableRole):
    """A model that imitates."""

    def update(self, examples: Sequence[SftExample]) -> Metrics:
        """One optimizer step on the token-mean negative log-likelihood of the answers."""
        rows = TokenRows.from_examples(examples)
        num_tokens = int(rows.mask.sum())

        def loss(
            logprobs: torch.Tensor, entropy: torch.Tensor | None, tokens: ResponseTokens
        ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
            assert entropy is not None
            return -logprobs.sum() / num_tokens, {"entropy": entropy.sum() / num_tokens}

        metrics = self.optimizer_step(rows, range(len(examples)), loss, with_entropy=True).metrics
        self.settle()
        return metrics
