"""The roles of a PRIME run: policy, reference, process reward model; and the SFT model.

Each puts the pure functions of `algorithm/` onto one Megatron model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megatron_prime.algorithm.policy_loss import PolicyLossOptions, loss_weights, ppo_clip_loss
from megatron_prime.algorithm.prm_loss import (
    cross_entropy_loss,
    opponent_logits,
    outcome_labels,
    pairwise_loss,
    sequence_logits,
)
from megatron_prime.batch import RolloutBatch, ScoredBatch, SftExample
from megatron_prime.config.schema import PolicySection, PrmSection
from megatron_prime.mcore.packing import MicroBatch, TokenRows, split_minibatches
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

    def score(self, batch: RolloutBatch, *, temperature: float) -> torch.Tensor:
        """Log-probs at the sampling temperature, float32 [B, R]."""
        return self.logprobs(TokenRows.from_rollout(batch), temperature=temperature)

    def update(self, batch: ScoredBatch, advantages: torch.Tensor, *, temperature: float, seed: int) -> Metrics:
        """PPO updates on one scored batch.

        Args:
            batch: rollouts with log-probs.
            advantages: float32 [B, R].
            temperature: of the sampling; ratios are taken at it.
            seed: of the mini-batch order.

        Returns:
            Loss, clip fraction, KL estimates, entropy, gradient norm and learning rate: means over the
            optimizer steps.
        """
        rows = TokenRows.from_rollout(batch.rollout)
        section = self.section
        options = PolicyLossOptions(
            clip_ratio_low=section.clip_ratio_low,
            clip_ratio_high=section.clip_ratio_high,
            dual_clip=section.dual_clip,
            loss_normalization=section.loss_normalization,
            kl_coef=section.kl_coef,
        )
        reports: list[Metrics] = []
        for epoch in range(section.num_epochs):
            for selected in split_minibatches(batch.rollout.group_index, section.num_minibatches, seed + epoch):
                weights = torch.zeros_like(advantages)
                weights[selected] = loss_weights(rows.mask[selected], section.loss_normalization).float()

                def loss(
                    logprobs: torch.Tensor, entropy: torch.Tensor, micro: MicroBatch, weights: torch.Tensor = weights
                ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
                    device = logprobs.device
                    weight = micro.take(weights).to(device)
                    value, metrics = ppo_clip_loss(
                        logprobs,
                        micro.take(batch.policy_logprobs).to(device),
                        micro.take(advantages).to(device),
                        weight,
                        options,
                        reference_logprobs=micro.take(batch.reference_logprobs).to(device),
                    )
                    return value, {
                        "clip_fraction": metrics.clip_fraction,
                        "kl": metrics.approx_kl,
                        "reference_kl": metrics.reference_kl,
                        "max_ratio": metrics.max_ratio,
                        "entropy": (entropy * weight).sum(),
                    }

                reports.append(self.optimizer_step(rows, selected, loss, temperature=temperature))
        return _mean(reports)


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

    def update(self, batches: Sequence[ScoredBatch], *, seed: int) -> Metrics:
        """One pass over the window of batches, oldest first.

        Args:
            batches: scored batches; their reference log-probs are used, not their PRM ones
                (those only say which opponents the pairwise loss has).
            seed: of the mini-batch order.

        Returns:
            Loss, gradient norm and learning rate: means over the optimizer steps.
        """
        reports = [
            self._minibatch(batch, selected)
            for number, batch in enumerate(batches)
            for selected in split_minibatches(batch.rollout.group_index, self.section.num_minibatches, seed + number)
        ]
        return _mean(reports)

    def _minibatch(self, batch: ScoredBatch, selected: Sequence[int]) -> Metrics:
        section, rollout = self.section, batch.rollout
        width = rollout.mask.shape[1]
        labels = outcome_labels(rollout.outcomes, soft_labels=section.soft_labels)
        opponents = self._opponents(batch, labels) if section.loss == "pairwise" else None

        def loss(
            logprobs: torch.Tensor, entropy: torch.Tensor, micro: MicroBatch
        ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
            device = logprobs.device
            mine = micro.unique_rows()
            logits = sequence_logits(
                micro.to_rows(logprobs, width),
                batch.reference_logprobs[mine].to(device),
                rollout.mask[mine].to(device),
                beta=section.beta,
                aggregation=section.aggregation,
            )
            label = labels[mine].to(device)
            if opponents is not None:
                value = pairwise_loss(logits, label, opponents[mine].to(device), num_responses=len(selected))
            else:
                value = cross_entropy_loss(logits, label, num_responses=len(selected))
            correct = ((logits > 0) == (label > 0.5)).float().sum() / len(selected)
            return value, {"train_accuracy": correct}

        return self.optimizer_step(TokenRows.from_rollout(rollout), selected, loss)

    def _opponents(self, batch: ScoredBatch, labels: torch.Tensor) -> torch.Tensor:
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
            logprobs: torch.Tensor, entropy: torch.Tensor, micro: MicroBatch
        ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
            return -logprobs.sum() / num_tokens, {"entropy": entropy.sum() / num_tokens}

        return self.optimizer_step(rows, range(len(examples)), loss)
