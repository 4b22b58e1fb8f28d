"""PRIME's mathematics: pure functions of whole-batch tensors, without models, ranks or configuration."""

from megatron_prime.algorithm.advantage import (
    AdvantageOptions,
    AdvantageResult,
    compute_advantages,
    discounted_returns,
    grpo_process,
    leave_one_out,
    rloo_process,
    scale_process,
    whiten,
)
from megatron_prime.algorithm.evidence import GroupedAuc, auc, auc_gate, grouped_auc, step_scores
from megatron_prime.algorithm.filtering import FilterCounts, GroupCollector, keep_group
from megatron_prime.algorithm.implicit_reward import implicit_rewards
from megatron_prime.algorithm.policy_loss import PolicyLossMetrics, PolicyLossOptions, loss_weights, ppo_clip_loss
from megatron_prime.algorithm.prm_loss import (
    cross_entropy_loss,
    opponent_logits,
    outcome_labels,
    pairwise_loss,
    sequence_logits,
)

__all__ = [
    "AdvantageOptions",
    "AdvantageResult",
    "FilterCounts",
    "GroupCollector",
    "GroupedAuc",
    "PolicyLossMetrics",
    "PolicyLossOptions",
    "auc",
    "auc_gate",
    "compute_advantages",
    "cross_entropy_loss",
    "discounted_returns",
    "grouped_auc",
    "grpo_process",
    "implicit_rewards",
    "keep_group",
    "leave_one_out",
    "loss_weights",
    "opponent_logits",
    "outcome_labels",
    "pairwise_loss",
    "ppo_clip_loss",
    "rloo_process",
    "scale_process",
    "sequence_logits",
    "step_scores",
    "whiten",
]
