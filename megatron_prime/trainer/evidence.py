"""Measures how well the PRM judges rollouts that it has not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_prime.algorithm.evidence import auc, auc_gate, grouped_auc, step_scores
from megatron_prime.algorithm.prm_loss import cross_entropy_loss, outcome_labels, sequence_logits
from megatron_prime.batch import ProcessInputs, Prompt, Response, StepSpan
from megatron_prime.config.schema import PrmSection


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """Measured on a fresh, filtered batch before the PRM trains on it."""

    loss: float
    """Cross-entropy on the outcomes."""
    accuracy: float
    """Share of responses on whose outcome the sign of the sequence logit agrees."""
    auc: float
    """Share of (right, wrong) answer pairs of a group that the PRM orders rightly; NaN without pairs."""
    gate: float
    """Weight in [0, 1] that this AUC earns process rewards."""
    step_auc: float
    """AUC of mean process rewards per step against true step correctness; NaN where steps are unknown."""
    num_step_pairs: int
    """(Right, wrong) pairs of steps behind it."""

    def metrics(self) -> dict[str, float]:
        """Returns the values under their names in the metrics log."""
        return {
            "prm/fresh_loss": self.loss,
            "prm/fresh_accuracy": self.accuracy,
            "prm/fresh_auc": self.auc,
            "prm/step_auc": self.step_auc,
        }


def recent_step_auc(history: Sequence[Evidence]) -> float:
    """Returns the step AUC over the pairs of several batches, each pair within its own batch; NaN without pairs."""
    num_pairs = sum(e.num_step_pairs for e in history)
    won = sum(e.step_auc * e.num_step_pairs for e in history if e.num_step_pairs)
    return won / num_pairs if num_pairs else math.nan


def measure_evidence(
    inputs: ProcessInputs,
    rewards: torch.Tensor,
    section: PrmSection,
    step_spans: Callable[[Prompt, Response], tuple[StepSpan, ...] | None],
) -> Evidence:
    """Judges process rewards, by a PRM that has not yet trained on the batch or by any other source.

    Args:
        inputs: the batch, with the PRM's log-probs where there is one. Without a PRM the sum of a response's rewards
            takes the place of its logit.
        rewards: process rewards [B, R] of that PRM or source.
        section: PRM settings.
        step_spans: the true steps of a response, or None.
    """
    rollout, prm = inputs.rollout, inputs.prm
    # Logits come from log-probs, not from `rewards`: with prm.aggregation the PRM is trained on sum or mean.
    if prm is None:
        logits = rewards.sum(dim=1)
    else:
        logits = sequence_logits(
            prm.prm_logprobs,
            prm.reference_logprobs,
            rollout.mask,
            beta=section.beta,
            aggregation=section.aggregation,
        )
    labels = outcome_labels(rollout.outcomes, soft_labels=False)
    pair_auc, num_pairs = grouped_auc(logits, labels, rollout.group_index)
    scores: list[torch.Tensor] = []
    correct: list[bool] = []
    responses = [(group.prompt, response) for group in inputs.groups for response in group.responses]
    for row, (prompt, response) in enumerate(responses):
        spans = step_spans(prompt, response)
        if spans:
            scores.append(step_scores(rewards[row], spans))
            correct += [span.correct for span in spans]
    return Evidence(
        loss=float(cross_entropy_loss(logits, labels, num_responses=len(labels))),
        accuracy=float(((logits > 0) == (labels > 0.5)).float().mean()),
        auc=pair_auc,
        gate=auc_gate(pair_auc, num_pairs),
        step_auc=auc(torch.cat(scores), torch.tensor(correct)) if scores else math.nan,
        num_step_pairs=sum(correct) * (len(correct) - sum(correct)),
    )
