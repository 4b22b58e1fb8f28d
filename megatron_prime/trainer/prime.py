"""The PRIME loop: every rank runs this same program on the same whole batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from megatron_prime.algorithm.advantage import compute_advantages
from megatron_prime.algorithm.implicit_reward import step_rewards
from megatron_prime.batch import (
    Group,
    PolicyUpdate,
    PrmBatch,
    PrmUpdate,
    ProcessInputs,
    RolloutBatch,
    ScoredBatch,
)
from megatron_prime.config.schema import PrimeConfig
from megatron_prime.sockets import resolve
from megatron_prime.trainer.evaluation import Accuracy, accuracy, derive_seed, evaluation_sampling, sample_and_verify
from megatron_prime.trainer.evidence import Evidence, measure_evidence, recent_step_auc
from megatron_prime.trainer.group_sampler import GroupSampler
from megatron_prime.trainer.loop import Loop, is_due
from megatron_prime.trainer.mismatch import advantage_weights, compare_logprobs
from megatron_prime.trainer.nonfinite import update_or_keep
from megatron_prime.trainer.parts import PrimeParts, Scores

_NUM_EVIDENCE = 8


class PrimeTrainer(Loop):
    """Trains one run.

    Args:
        config: the checked configuration.
        parts: models, engine, verifier, data and where results go.
    """

    def __init__(self, config: PrimeConfig, parts: PrimeParts) -> None:
        super().__init__(
            config.run.num_steps,
            config.checkpoint,
            parts.checkpoints,
            parts.logger,
            should_stop=parts.should_stop,
            enter=parts.enter,
        )
        self.config = config
        self.parts = parts
        self.groups = GroupSampler(config, parts.engine, parts.verifier, parts.prompts, self.stages, parts.min_groups)
        self.process_source = resolve("advantage.process_source", config.advantage.process_source)
        self.weight_version = -1
        """Version of the engine's weights: the number of steps that they have seen."""
        self.gate = 0.0
        self.window: list[PrmBatch] = []
        """Batches that the PRM trains on again, oldest first."""
        self.evaluations: dict[int, Accuracy] = {}
        self.evidence: list[Evidence] = []
        """Measurements of the latest batches, oldest first."""
        self.metrics: dict[str, float] = {}
        """Metrics of the running step."""

    def train(self) -> dict[str, Any]:
        """See `Loop.train`."""
        # Engine and models may share an accelerator's memory; now it belongs to the models.
        self.parts.engine.sleep()
        return super().train()

    def begin(self, *, is_resumed: bool) -> None:
        """See `Loop.begin`: the engine gets its weights, and a new run is evaluated."""
        self.refit(max(self.weight_version, 0))
        if not is_resumed and (before := self.measure_accuracy()):
            self.parts.logger.log(0, before)

    def step(self) -> dict[str, float]:
        """One PRIME step; returns its metrics."""
        self.metrics = {}
        groups = self.collect()
        if not groups:
            return self.metrics
        batch = RolloutBatch.from_groups(groups)
        scores = self.score(batch)
        prm = self.train_prm(batch, scores)
        rewards = self.judge(groups, batch, prm)
        advantages = self.advantages(batch, rewards)
        if not self._policy_waits():
            self.train_policy(batch, scores, prm, advantages)
            self.refit(self.num_steps_done + 1)
        return self.metrics

    def collect(self) -> list[Group]:
        """Samples, verifies and filters until the step has its groups; empty where there are too few."""
        groups, found = self.groups.collect()
        self.metrics |= found
        return groups

    def score(self, batch: RolloutBatch) -> Scores:
        """Computes the models' log-probs, except those that the update's own forward pass will give; nothing trains.

        Raises:
            TrainingError: the policy's log-probs differ too much from the engine's.
        """
        config, parts = self.config, self.parts
        temperature = config.rollout.temperature
        policy = reference = prm = None
        if self._policy_waits() or not config.policy_scores_in_update:
            with self.stages("score", parts.policy):
                policy = parts.policy.score(batch, temperature=temperature)
            self._compare(batch, policy)
        if parts.reference is not None:
            with self.stages("score", parts.reference):
                reference = parts.reference.score(batch)
        elif config.reference.source == "policy":
            # The reference is scored without temperature; at temperature 1 the policy's scores already are that.
            reference = policy
            if policy is None or temperature != 1.0:
                with self.stages("score", parts.policy):
                    reference = parts.policy.score(batch, temperature=1.0)
        if parts.prm is not None and not parts.prm.scores_in_update:
            with self.stages("score", parts.prm):
                prm = parts.prm.score(batch)
        return Scores(policy=policy, reference=reference, prm=prm)

    def train_prm(self, batch: RolloutBatch, scores: Scores) -> PrmBatch | None:
        """Trains the PRM on the batch and its window; returns its scores of the batch from before the update."""
        model, reference, window = self.parts.prm, scores.reference, tuple(self.window)
        if model is None or reference is None:
            return None
        seed = self._seed("prm order")

        def seen(logprobs: Any) -> PrmBatch:
            return PrmBatch(rollout=batch, reference_logprobs=reference, prm_logprobs=logprobs)

        def record(logprobs: object) -> PrmUpdate:
            return PrmUpdate(step=self.num_steps_done + 1, batches=(*window, seen(logprobs)), seed=seed)

        train = partial(
            model.update,
            batch,
            reference_logprobs=reference,
            prm_logprobs=scores.prm,
            window=window,
            seed=seed,
        )
        with self.stages("prm_update", model, training=True):
            updated = update_or_keep(train, record, self.parts.failed_updates)
        self.metrics |= {f"prm/{name}": value for name, value in updated.metrics.items()}
        result = seen(updated.logprobs)
        # The window keeps scores of each batch from when it was new; `pairwise` takes its opponents from them.
        num_older = self.config.prm.num_window_batches - 1
        self.window = [*self.window, result][-num_older:] if num_older else []
        return result

    def judge(self, groups: Sequence[Group], batch: RolloutBatch, prm: PrmBatch | None) -> torch.Tensor | None:
        """Computes process rewards [B, R], and updates the gate from rewards of before any training on this batch."""
        config = self.config
        if config.advantage.process_coef == 0.0:
            return None
        inputs = ProcessInputs(groups=tuple(groups), rollout=batch, prm=prm, beta=config.prm.beta)
        # Evidence comes before the optional second scoring: the updated PRM has trained on this batch.
        rewards = self._rewards(inputs)
        evidence = measure_evidence(inputs, rewards, config.prm, self.parts.prompts.step_spans)
        smoothing = config.advantage.gate_smoothing
        self.gate = smoothing * self.gate + (1 - smoothing) * evidence.gate
        self.evidence = [*self.evidence, evidence][-_NUM_EVIDENCE:]
        recent = {"prm/step_auc_recent": recent_step_auc(self.evidence), "prm/gate": self._gate()}
        self.metrics |= evidence.metrics() | recent
        if prm is not None and self.parts.prm is not None and config.prm.update == "before":
            with self.stages("score", self.parts.prm):
                updated = replace(prm, prm_logprobs=self.parts.prm.score(batch))
            rewards = self._rewards(replace(inputs, prm=updated))
        return rewards

    def advantages(self, batch: RolloutBatch, rewards: torch.Tensor | None) -> torch.Tensor:
        """Computes advantages [B, R] from outcomes and process rewards."""
        with self.stages("advantage"):
            result = compute_advantages(
                batch.outcomes, rewards, batch.mask, batch.group_index, self.config.advantage, gate=self._gate()
            )
        self.metrics |= {f"advantage/{name}": value for name, value in result.metrics.items()}
        return result.advantages

    def train_policy(self, batch: RolloutBatch, scores: Scores, prm: PrmBatch | None, advantages: torch.Tensor) -> None:
        """Trains the policy.

        Raises:
            TrainingError: its log-probs from before the update differ too much from the engine's.
        """
        config, model = self.config, self.parts.policy
        advantages = advantages * advantage_weights(batch, scores.policy, config.policy)
        seed = self._seed("policy order")

        def record(logprobs: Any) -> PolicyUpdate:
            scored = ScoredBatch(
                rollout=batch,
                policy_logprobs=logprobs,
                reference_logprobs=scores.reference,
                prm_logprobs=None if prm is None else prm.prm_logprobs,
            )
            return PolicyUpdate(step=self.num_steps_done + 1, batch=scored, advantages=advantages, seed=seed)

        train = partial(
            model.update,
            batch,
            advantages,
            old_logprobs=scores.policy,
            reference_logprobs=scores.reference,
            temperature=config.rollout.temperature,
            seed=seed,
        )
        with self.stages("policy_update", model, training=True):
            updated = update_or_keep(train, record, self.parts.failed_updates)
        self.metrics |= {f"policy/{name}": value for name, value in updated.metrics.items()}
        # Without a scoring pass the canary can only run now, on the log-probs from before the update.
        if scores.policy is None:
            self._compare(batch, updated.logprobs)

    def refit(self, version: int) -> None:
        """Sends the policy's weights to the engine, which verifies what it received.

        Args:
            version: number of steps that the weights have seen.

        Raises:
            RolloutError: the engine's weights are not the trainer's; it then samples nothing.
        """
        with self.stages("refit", self.parts.policy):
            self.parts.engine.load_weights(self.parts.policy.export_weights(), version)
        self.weight_version = version

    def evaluate(self, *, is_last: bool) -> dict[str, float]:
        """See `Loop.evaluate`."""
        if is_last or is_due(self.num_steps_done, self.config.evaluation.every_steps):
            return self.measure_accuracy()
        return {}

    def measure_accuracy(self) -> dict[str, float]:
        """Measures avg@k on the held-out prompts with the engine's current weights; {} if evaluation is off."""
        if self.config.evaluation.num_prompts == 0:
            return {}
        prompts = self.parts.prompts.evaluation(self.config.evaluation.num_prompts)
        with self.stages("evaluation"):
            self.parts.engine.wake()
            answers = sample_and_verify(
                self.parts.engine, self.parts.verifier, prompts, evaluation_sampling(self.config)
            )
        result = accuracy([[verdict for _, verdict in row] for row in answers])
        self.evaluations[self.num_steps_done] = result
        return result.metrics()

    def before_save(self) -> float | None:
        """See `Loop.before_save`."""
        self.parts.engine.sleep()  # a model needs an accelerator's memory to be saved
        evaluated = self.evaluations.get(self.num_steps_done)
        return _finite(evaluated.value) if evaluated else None

    def summary(self) -> dict[str, Any]:
        """Returns the contents of summary.json, without the launcher's part (commit, machine)."""
        first, last = self.evaluations.get(0), self.evaluations.get(self.num_steps_done)
        latest = self.evidence[-1] if self.evidence else None
        return {
            "accuracy_before": first.value if first else None,
            "accuracy_before_interval": [first.low, first.high] if first else None,
            "accuracy_after": last.value if last else None,
            "accuracy_after_interval": [last.low, last.high] if last else None,
            "process_reward_auc": _finite(recent_step_auc(self.evidence)),
            "prm_fresh_accuracy": latest.accuracy if latest else None,
            "prm_fresh_auc": _finite(latest.auc) if latest else None,
            "num_steps": self.num_steps_done,
            "num_prompts_sampled": self.groups.position,
            "wall_seconds": self.seconds,
        }

    def state_dict(self) -> dict[str, Any]:
        """See `Loop.state_dict`."""
        return {
            "weight_version": self.weight_version,
            "gate": self.gate,
            "window": self.window,
            "evaluations": self.evaluations,
            "evidence": self.evidence,
            **self.groups.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Loop.load_state_dict`."""
        self.weight_version = state["weight_version"]
        self.gate = state["gate"]
        self.groups.load_state_dict(state)
        num_older = self.config.prm.num_window_batches - 1
        # More data-parallel ranks may need more groups than an old batch has.
        fitting = [batch for batch in state["window"] if batch.rollout.num_groups >= self.parts.min_groups]
        self.window = [
            PrmBatch(rollout=b.rollout, reference_logprobs=b.reference_logprobs, prm_logprobs=b.prm_logprobs)
            for b in fitting[len(fitting) - min(num_older, len(fitting)) :]
        ]
        self.evaluations = dict(state["evaluations"])
        self.evidence = list(state["evidence"])

    def _compare(self, batch: RolloutBatch, policy_logprobs: torch.Tensor) -> None:
        self.metrics |= compare_logprobs(batch, policy_logprobs, self.weight_version, self.config.rollout)

    def _policy_waits(self) -> bool:
        """Returns whether only the PRM trains in this step."""
        return self.parts.prm is not None and self.num_steps_done < self.config.prm.warmup_steps

    def _rewards(self, inputs: ProcessInputs) -> torch.Tensor:
        rewards = self.process_source(inputs)
        if isinstance(rewards, torch.Tensor):
            return torch.where(inputs.rollout.mask, rewards, 0.0)
        return step_rewards(rewards, inputs.rollout.mask)

    def _gate(self) -> float:
        return self.gate if self.config.advantage.process_gate == "auc" else 1.0

    def _seed(self, purpose: str) -> int:
        return derive_seed(self.config.run.seed, purpose, self.num_steps_done)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
