"""Every metric that a run logs: its name, unit, meaning and healthy range.

docs/reference/metrics.md is generated from this table (`make docs`), and a test compares the table with the metrics of
real runs. ``<stage>`` and its like stand for one of `PLACEHOLDERS`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

STAGES = (
    "data",
    "rollout",
    "score",
    "prm_update",
    "advantage",
    "policy_update",
    "refit",
    "evaluation",
    "checkpoint",
    "update",
)
"""Stages of a step that are timed; `update` is the only one of a supervised run beside `data` and `checkpoint`."""

PLACEHOLDERS: Mapping[str, tuple[str, ...] | None] = {"stage": STAGES, "status": None}
"""Values of each placeholder; None: any word, because a user's verifier may have statuses of its own."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A row of the table; texts are Markdown."""

    name: str
    unit: str
    meaning: str
    healthy: str
    only: str = ""
    """When it is logged, where that is not always."""

    @property
    def pattern(self) -> re.Pattern[str]:
        """Matches the names that the row stands for."""
        text = re.escape(self.name)
        for word, choices in PLACEHOLDERS.items():
            text = text.replace(f"<{word}>", "|".join(choices).join("()") if choices else "[a-z0-9_]+")
        return re.compile(text)


GROUPS: Mapping[str, tuple[Metric, ...]] = {
    "evaluation": (
        Metric(
            "evaluation/accuracy",
            "share",
            "Mean reward on the held-out prompts (avg@k).",
            "Rises, in steps as wide as its interval. A fall below the value at step 0 means that training does harm.",
            "every `evaluation.every_steps`, at step 0 and at the end",
        ),
        Metric("evaluation/accuracy_low", "share", "Lower end of its 95% interval (Wilson).", "", "likewise"),
        Metric("evaluation/accuracy_high", "share", "Upper end.", "", "likewise"),
        Metric(
            "evaluation/missing",
            "share",
            "Answers without a verdict; accuracy counts them as wrong, the upper end of its interval as right.",
            "0. Above 0.01 a warning says so: the verifier, a truth or tests are broken.",
            "likewise",
        ),
    ),
    "rollout": (
        Metric(
            "rollout/accuracy",
            "share",
            "Mean reward of the step's answers before the filter; answers without a verdict are left out.",
            "0.2 to 0.8 at the start, then rising. At 0 or 1 there is nothing to learn.",
        ),
        Metric(
            "rollout/response_tokens",
            "tokens",
            "Mean length of the answers.",
            "Drifts slowly. A steady climb towards `rollout.max_response_tokens` is length hacking or rambling.",
        ),
        Metric(
            "rollout/truncated",
            "share",
            "Answers that were cut off: by `rollout.max_response_tokens`, the context or `abort_after_seconds`.",
            "Below 0.05. Above 0.2 raise `rollout.max_response_tokens` or set `filter.drop_truncated`.",
        ),
        Metric(
            "rollout/stale",
            "share",
            "Answers sampled with older weights than the policy's (surplus groups of an earlier step).",
            "0 to 0.5. Such answers are left out of the gap and the KL below.",
        ),
        Metric(
            "rollout/logprob_gap_mean",
            "nats",
            "Mean absolute difference between the engine's and the trainer's log-probs of the fresh answers' tokens.",
            "1e-6 in float32, 1e-2 in bfloat16. Above `rollout.max_logprob_gap` the run stops.",
            "steps with fresh answers",
        ),
        Metric(
            "rollout/logprob_gap_max",
            "nats",
            "The largest such difference.",
            "Up to 100 times the mean; single tokens may be far off in bfloat16.",
            "likewise",
        ),
        Metric(
            "rollout/logprob_kl",
            "nats per token",
            "Estimate (k3) of KL(engine, trainer) on these tokens.",
            "Below 1e-3. If it grows over the steps, set `policy.importance_cap`.",
            "likewise",
        ),
    ),
    "verdict": (
        Metric(
            "verdict/<status>",
            "share",
            "Sampled answers with this verdict; the statuses are in [verifiers](verifiers.md).",
            "`no_answer`, `malformed` and `no_code` near 0 after a few steps.",
            "statuses that occur",
        ),
        Metric(
            "verdict/missing",
            "share",
            "Answers without a reward, because the verifier or the data failed.",
            "0. Above 0.01 the log warns and names the statuses.",
        ),
    ),
    "filter": (
        Metric(
            "filter/kept",
            "share",
            "Groups whose accuracy lies between `filter.min_accuracy` and `filter.max_accuracy`.",
            "0.3 to 0.9, falling as the policy gets better. Near 0: see [the tutorial]"
            "(../tutorial/from-files-to-a-better-model.md#everything-is-filtered).",
        ),
        Metric("filter/num_seen", "groups", "Groups sampled in the step.", "At least `rollout.num_prompts`."),
        Metric("filter/num_kept", "groups", "Groups kept, some of them for later steps.", "`rollout.num_prompts`."),
        Metric("filter/num_too_easy", "groups", "Groups above `filter.max_accuracy`.", "Grows with accuracy."),
        Metric("filter/num_too_hard", "groups", "Groups below `filter.min_accuracy`.", "Falls with accuracy."),
        Metric(
            "filter/num_truncated",
            "groups",
            "Groups dropped because an answer was truncated (`filter.drop_truncated`).",
            "Small. As for `rollout/truncated`.",
        ),
        Metric(
            "filter/num_missing",
            "groups",
            "Groups dropped because fewer than two of their answers have a verdict.",
            "0.",
        ),
    ),
    "prm": (
        Metric(
            "prm/loss",
            "nats (cross-entropy)",
            "PRM loss over the window, mean over optimizer steps.",
            "Starts at 0.69 (log 2: the PRM equals its reference) and falls. Flat: raise its learning rate.",
            "runs that train a PRM",
        ),
        Metric(
            "prm/train_accuracy",
            "share",
            "Answers of the window whose outcome agrees with the sign of their sequence logit.",
            "0.6 to 0.95. Near 1 with `prm/fresh_accuracy` near 0.5: the PRM memorises.",
            "likewise",
        ),
        Metric(
            "prm/grad_norm",
            "norm",
            "Norm of the gradient before clipping.",
            "Steady. Spikes are clipped at `prm.optimizer.clip_grad`.",
            "likewise",
        ),
        Metric("prm/lr", "", "Learning rate.", "Follows the schedule.", "likewise"),
        Metric("prm/skipped", "share", "Optimizer steps left out because of NaN or Inf.", "0.", "likewise"),
        Metric(
            "prm/max_imbalance",
            "ratio",
            "Tokens of the fullest data-parallel rank over the ranks' mean.",
            "1.0 to 1.1. Above that, ranks wait: more answers per mini-batch, or fewer ranks.",
            "likewise",
        ),
        Metric(
            "prm/fresh_loss",
            "nats",
            "Cross-entropy of the outcomes on the new batch, before the PRM trains on it.",
            "Below 0.69. Above it, the PRM is confidently wrong: lower its learning rate.",
            "runs with process rewards",
        ),
        Metric(
            "prm/fresh_accuracy",
            "share",
            "Answers of the new batch whose outcome agrees with the sign of their logit.",
            "Above 0.5 and rising.",
            "likewise",
        ),
        Metric(
            "prm/fresh_auc",
            "share",
            "(Right, wrong) pairs of answers to one prompt that the PRM orders rightly, on the new batch.",
            "0.5 at first (chance), above 0.6 after some steps; scatters with few groups. It decides the gate.",
            "likewise; null without such pairs",
        ),
        Metric(
            "prm/step_auc",
            "share",
            "(Right, wrong) pairs of reasoning steps that their mean process rewards order rightly, on the new batch.",
            "Above 0.8 in the demo. At 0.5 process rewards are noise.",
            "likewise; null unless the prompt source knows the steps (`step_spans`)",
        ),
        Metric(
            "prm/step_auc_recent",
            "share",
            "The same over the pairs of the last 8 batches.",
            "As `prm/step_auc`, with less scatter.",
            "likewise",
        ),
        Metric(
            "prm/gate",
            "share",
            "Weight that the process rewards get (`advantage.process_gate`); 1 where there is no gate.",
            "0 in the first step, then 0.1 to 0.9.",
            "runs with process rewards",
        ),
    ),
    "advantage": (
        Metric(
            "advantage/outcome_std",
            "reward",
            "Standard deviation of the outcome returns over response tokens, before coefficients.",
            "0.2 to 0.6. At 0 all answers of each prompt end alike.",
        ),
        Metric(
            "advantage/process_std",
            "reward",
            "The same of the process returns, before coefficient and gate.",
            "0 at the first step of a PRM that equals its reference, then 0.05 to 0.5.",
        ),
        Metric("advantage/outcome_share", "share", "Outcomes' share of the summed magnitude of both.", "0.3 to 1."),
        Metric(
            "advantage/process_share",
            "share",
            "Process rewards' share, after coefficients and gate.",
            "0 to 0.7. Above 0.8 they drown the outcomes: lower `advantage.process_coef`.",
        ),
        Metric(
            "advantage/process_scale",
            "reward",
            "What process rewards were divided by (`advantage.process_scale`); at or below 1e-6 they were dropped.",
            "Grows slowly as the PRM leaves its reference.",
        ),
    ),
    "policy": (
        Metric(
            "policy/loss",
            "",
            "Policy loss, mean over optimizer steps.",
            "Around 0. Its level says little; NaN or Inf stops the run.",
        ),
        Metric(
            "policy/kl",
            "nats per token",
            "Estimate (k3) of KL(policy before the step, policy) during the update.",
            "Below 0.01. Above 0.1 the steps are too large: lower the learning rate.",
        ),
        Metric(
            "policy/reference_kl",
            "nats per token",
            "Estimate (k3) of KL(policy, reference).",
            "Grows slowly; below 0.5. If it runs away, set `policy.kl_coef`.",
        ),
        Metric(
            "policy/clip_fraction",
            "share",
            "Tokens whose gradient the clip has cut.",
            "0 to 0.1; 0 with one mini-batch and epoch.",
        ),
        Metric(
            "policy/max_ratio",
            "ratio",
            "Largest probability ratio of the policy to the one before the step.",
            "1 to 10; 1 with one mini-batch and epoch.",
        ),
        Metric(
            "policy/entropy",
            "nats per token",
            "Mean entropy of the policy's next-token distribution.",
            "Falls slowly. Below a tenth of its start, answers of a group become equal and learning ends.",
        ),
        Metric("policy/grad_norm", "norm", "Norm of the gradient before clipping.", "Steady, without growth."),
        Metric("policy/lr", "", "Learning rate.", "Follows the schedule."),
        Metric("policy/skipped", "share", "Optimizer steps left out because of NaN or Inf.", "0."),
        Metric("policy/max_imbalance", "ratio", "As `prm/max_imbalance`.", "1.0 to 1.1."),
    ),
    "sft": (
        Metric(
            "sft/loss", "nats per token", "Negative log-likelihood of the answers' tokens.", "Falls, then flattens."
        ),
        Metric("sft/entropy", "nats per token", "Mean entropy of the next-token distribution.", "Falls with the loss."),
        Metric("sft/grad_norm", "norm", "Norm of the gradient before clipping.", "Steady, without growth."),
        Metric("sft/lr", "", "Learning rate.", "Follows the schedule."),
        Metric("sft/skipped", "share", "1 where the optimizer step was left out because of NaN or Inf.", "0."),
        Metric("sft/max_imbalance", "ratio", "As `prm/max_imbalance`.", "1.0 to 1.1."),
    ),
    "time": (
        Metric(
            "time/<stage>_seconds",
            "s",
            "Time of the main process in a stage since the row before.",
            "Rollouts take half of a step or more. `checkpoint` is what training waits, not what writing takes.",
            "stages that ran",
        ),
        Metric(
            "time/step_seconds",
            "s",
            "All time since the row before.",
            "The stages and little else. `--save-seconds` must be above it.",
        ),
        Metric(
            "time/verdict_seconds/p50",
            "s",
            "Median of what a worker spent on an answer; cached verdicts count as 0.",
            "Math: below 0.001. Code: below 1.",
        ),
        Metric("time/verdict_seconds/p90", "s", "90th percentile.", "Likewise, up to ten times as much."),
        Metric("time/verdict_seconds/p99", "s", "99th percentile.", "Below the limit."),
        Metric(
            "time/verdict_seconds/longest",
            "s",
            "The longest.",
            "Below `verifier.timeout_seconds` or `verifier.code.total_seconds`; at the limit, answers hang the grader.",
        ),
    ),
    "memory": (
        Metric(
            "memory/<stage>_gib",
            "GiB",
            "Peak resident memory in a stage, of the rank that used most.",
            "Flat over the steps, and what `megatron-prime check` plans.",
            "stages that ran; Linux",
        ),
        Metric(
            "memory/<stage>_gpu_gib",
            "GiB",
            "The same of CUDA's allocations.",
            "Likewise; 10% of the GPU free.",
            "runs on GPUs",
        ),
    ),
}
"""Rows by the part of the name before the slash, in the order of the page."""


def metric_of(name: str) -> Metric | None:
    """The row that a logged name belongs to; None where the table has none."""
    matching = [row for rows in GROUPS.values() for row in rows if row.pattern.fullmatch(name)]
    # A name of its own goes before a placeholder that would match it too (verdict/missing).
    return min(matching, key=lambda row: "<" in row.name, default=None)
