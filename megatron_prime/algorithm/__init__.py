"""PRIME's mathematics: pure functions of whole-batch tensors, without models or ranks."""

from megatron_prime.algorithm.advantage import (
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
from megatron_prime.algorithm.implicit_reward import implicit_rewards, step_rewards
from megatron_prime.algorithm.policy_loss import PolicyLossMetrics, PolicyTokens, loss_weights, policy_loss, ppo_clip
from megatron_prime.algorithm.prm_loss import (
    PrmResponses,
    cross_entropy_loss,
    opponent_logits,
    outcome_labels,
    pairwise_loss,
    sequence_logits,
)

__all__ = [
    "AdvantageResult",
    "FilterCounts",
    "GroupCollector",
    "GroupedAuc",
    "PolicyLossMetrics",
    "PolicyTokens",
    "PrmResponses",
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
    "policy_loss",
    "ppo_clip",
    "rloo_process",
    "scale_process",
    "sequence_logits",
    "step_rewards",
    "step_scores",
    "whiten",
]
