"""The PRIME loop: every rank runs this same program on the same whole batch."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from megatron_prime.algorithm.advantage import compute_advantages
from megatron_prime.algorithm.implicit_reward import implicit_rewards
from megatron_prime.batch import Group, ModelUpdate, RolloutBatch, ScoredBatch
from megatron_prime.config.schema import PrimeConfig
from megatron_prime.errors import RunInterrupted
from megatron_prime.interfaces import (
    Checkpoints,
    Engine,
    FailedUpdates,
    Logger,
    Policy,
    PromptSource,
    Reference,
    RewardModel,
    Verifier,
)
from megatron_prime.trainer.evaluation import Accuracy, accuracy, derive_seed, evaluation_sampling, sample_and_verify
from megatron_prime.trainer.evidence import Evidence, measure_evidence, recent_step_auc
from megatron_prime.trainer.group_sampler import GroupSampler
from megatron_prime.trainer.mismatch import advantage_weights, compare_logprobs
from megatron_prime.trainer.nonfinite import kept_if_nonfinite
from megatron_prime.trainer.settings import advantage_options, is_due
from megatron_prime.trainer.stages import Stages

logger = logging.getLogger(__name__)

_NUM_EVIDENCE = 8


@dataclass(frozen=True, kw_only=True)
class PrimeParts:
    """Everything the loop is put together from."""

    policy: Policy
    reference: Reference | None
    """None: the policy before its update is the reference."""
    prm: RewardModel | None
    """None: outcome rewards only."""
    engine: Engine
    verifier: Verifier
    prompts: PromptSource
    checkpoints: Checkpoints
    logger: Logger
    failed_updates: FailedUpdates
    """Where updates go that are not finite."""
    enter: Callable[[str, int], None] = lambda phase, step: None
    """Called with where the run is, and the step, whenever a stage starts or ends."""
    should_stop: Callable[[], bool] = bool
    """Asked after every step, by all ranks together; true on one is true on all."""
    min_groups: int
    """Fewest groups of which every rank gets a share in every mini-batch."""


class PrimeTrainer:
    """Trains one run.

    Args:
        config: the checked configuration.
        parts: models, engine, verifier, data and where results go.
    """

    def __init__(self, config: PrimeConfig, parts: PrimeParts) -> None:
        self.config = config
        self.parts = parts
        self.stages = Stages(parts.logger.progress, parts.enter)
        self.groups = GroupSampler(config, parts.engine, parts.verifier, parts.prompts, self.stages, parts.min_groups)
        self.num_steps_done = 0
        self.weight_version = -1
        """Of the engine."""
        self.gate = 0.0
        self.window: list[ScoredBatch] = []
        self.evaluations: dict[int, Accuracy] = {}
        self.evidence: list[Evidence] = []
        """Of the latest batches."""
        self.seconds_before = 0.0
        self.started = time.perf_counter()

    def train(self) -> dict[str, Any]:
        """Runs to the last step and returns the summary of the run."""
        config = self.config
        # Where engine and models take turns in one memory, it is the models' turn.
        self.parts.engine.sleep()
        with self.stages("restore"):
            state = self.parts.checkpoints.restore()
        if state is not None:
            self.load_state_dict(state)
            logger.info("resumed after step %d", self.num_steps_done)
        self.refit(max(self.weight_version, 0))
        if state is None and (before := self.evaluate()):
            self.parts.logger.log(0, before)
        self.stages.drain()
        while self.num_steps_done < config.run.num_steps:
            self.stages.step = self.num_steps_done + 1
            metrics = self.step()
            self.num_steps_done += 1
            last = self.num_steps_done == config.run.num_steps
            if last or is_due(self.num_steps_done, config.evaluation.every_steps):
                metrics |= self.evaluate()
            metrics |= self.stages.drain()
            self.parts.logger.log(self.num_steps_done, metrics)
            self.parts.checkpoints.check()
            stopping = not last and self.parts.should_stop()
            saving = last or stopping or is_due(self.num_steps_done, config.checkpoint.every_steps)
            if saving:
                self.save(background=not (last or stopping))
            # A request that came while it was saved needs no other step.
            stopping = stopping or (saving and not last and self.parts.should_stop())
            if last or stopping:
                with self.stages("checkpoint"):
                    self.parts.checkpoints.finish()
            if stopping:
                raise RunInterrupted(f"stopped as asked and saved after step {self.num_steps_done}")
        return self.summary()

    def step(self) -> dict[str, float]:
        """One PRIME step; returns its metrics."""
        groups, metrics = self.groups.collect()
        if not groups:
            return metrics
        batch = self.score(groups)
        if batch.policy_logprobs is not None:
            metrics |= compare_logprobs(batch, self.weight_version, self.config.rollout)
        rewards, prm_metrics = self.process_rewards(groups, batch)
        metrics |= prm_metrics
        options = advantage_options(self.config.advantage, self._gate())
        with self.stages("advantage"):
            result = compute_advantages(
                batch.rollout.outcomes, rewards, batch.rollout.mask, batch.rollout.group_index, options
            )
        metrics |= {f"advantage/{name}": value for name, value in result.metrics.items()}
        if not self._policy_waits():
            metrics |= self.update_policy(batch, result.advantages)
        return metrics

    def update_policy(self, batch: ScoredBatch, advantages: torch.Tensor) -> dict[str, float]:
        """Trains the policy, refits the engine and returns the metrics of both."""
        metrics: dict[str, float] = {}

        def check(logprobs: torch.Tensor) -> None:
            scored = replace(batch, policy_logprobs=logprobs)
            metrics.update(compare_logprobs(scored, self.weight_version, self.config.rollout))

        advantages = advantages * advantage_weights(batch, self.config.policy)
        update = self._update("policy", [batch], advantages)
        stage = self.stages("policy_update", self.parts.policy, training=True)
        with stage, kept_if_nonfinite(update, self.parts.failed_updates) as report:
            updated = self.parts.policy.update(
                batch,
                advantages,
                temperature=self.config.rollout.temperature,
                seed=update.seed,
                check=check if batch.policy_logprobs is None else None,
            )
            report(updated)
        self.refit(self.num_steps_done + 1)
        return metrics | {f"policy/{name}": value for name, value in updated.metrics.items()}

    def score(self, groups: Sequence[Group]) -> ScoredBatch:
        """Log-probs of the models for the batch, but for those that its update will compute; nothing trains."""
        config, parts = self.config, self.parts
        rollout = RolloutBatch.from_groups(groups)
        temperature = config.rollout.temperature
        policy = reference = prm = None
        if self._policy_waits() or not config.policy_scores_in_update:
            with self.stages("score", parts.policy):
                policy = parts.policy.score(rollout, temperature=temperature)
        if parts.reference is not None:
            with self.stages("score", parts.reference):
                reference = parts.reference.score(rollout)
        elif config.reference.source == "policy":
            reference = policy
            if policy is None or temperature != 1.0:
                with self.stages("score", parts.policy):
                    reference = parts.policy.score(rollout, temperature=1.0)
        if parts.prm is not None and not config.prm_scores_in_update:
            with self.stages("score", parts.prm):
                prm = parts.prm.score(rollout)
        return ScoredBatch(rollout=rollout, policy_logprobs=policy, reference_logprobs=reference, prm_logprobs=prm)

    def process_rewards(
        self, groups: Sequence[Group], batch: ScoredBatch
    ) -> tuple[torch.Tensor | None, dict[str, float]]:
        """Process rewards [B, R] of the batch; the evidence is about the PRM before it trains on the batch."""
        prm, section = self.parts.prm, self.config.prm
        if prm is None:
            return None, {}
        self.window = [*self.window, batch][-section.num_window_batches :]
        update = self._update("prm", self.window)
        stage = self.stages("prm_update", prm, training=True)
        with stage, kept_if_nonfinite(update, self.parts.failed_updates) as report:
            updated = prm.update(self.window, seed=update.seed)
            report(updated)
        if batch.prm_logprobs is None:
            batch = self.window[-1] = replace(batch, prm_logprobs=updated.logprobs)
        rewards = self._rewards(batch, batch.prm_logprobs)
        evidence = measure_evidence(groups, batch, rewards, section, self.parts.prompts.step_spans)
        smoothing = self.config.advantage.gate_smoothing
        self.gate = smoothing * self.gate + (1 - smoothing) * evidence.gate
        self.evidence = [*self.evidence, evidence][-_NUM_EVIDENCE:]
        if section.update == "before":
            with self.stages("score", prm):
                rescored = prm.score(batch.rollout)
            rewards = self._rewards(batch, rescored)
        metrics = {f"prm/{name}": value for name, value in updated.metrics.items()}
        recent = {"prm/step_auc_recent": recent_step_auc(self.evidence), "prm/gate": self._gate()}
        return rewards, metrics | evidence.metrics() | recent

    def refit(self, version: int) -> None:
        """Puts the policy's weights into the engine, which proves that they arrived.

        Args:
            version: steps that the weights have seen.

        Raises:
            RolloutError: the engine's weights are not the trainer's; it then samples nothing.
        """
        with self.stages("refit", self.parts.policy):
            self.parts.engine.load_weights(self.parts.policy.export_weights(), version)
        self.weight_version = version

    def evaluate(self) -> dict[str, float]:
        """avg@k on the held-out prompts with the engine's current weights; nothing where it is switched off."""
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

    def save(self, *, background: bool) -> None:
        """Saves everything, or begins to: in the background training goes on meanwhile."""
        evaluated = self.evaluations.get(self.num_steps_done)
        accuracy = _finite(evaluated.value) if evaluated else None
        self.parts.engine.sleep()  # a model needs an accelerator's memory to be saved
        with self.stages("checkpoint"):
            state = self.state_dict()
            self.parts.checkpoints.save(self.num_steps_done, state, accuracy=accuracy, background=background)

    def summary(self) -> dict[str, Any]:
        """What the run leaves in summary.json, less the launcher's part (commit, machine)."""
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
            "wall_seconds": self.seconds_before + time.perf_counter() - self.started,
        }

    def state_dict(self) -> dict[str, Any]:
        """The trainer's own state; models and optimizers are the checkpointer's."""
        return {
            "num_steps_done": self.num_steps_done,
            "weight_version": self.weight_version,
            "gate": self.gate,
            "window": self.window,
            "evaluations": self.evaluations,
            "evidence": self.evidence,
            "seconds": self.seconds_before + time.perf_counter() - self.started,
            **self.groups.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undoes `state_dict`."""
        self.num_steps_done = state["num_steps_done"]
        self.weight_version = state["weight_version"]
        self.gate = state["gate"]
        self.groups.load_state_dict(state)
        # More data-parallel ranks may need more groups than an old batch has.
        self.window = [batch for batch in state["window"] if batch.rollout.num_groups >= self.parts.min_groups]
        self.evaluations = dict(state["evaluations"])
        self.evidence = list(state["evidence"])
        self.seconds_before = state["seconds"]

    def _update(
        self, role: Literal["policy", "prm"], batches: Sequence[ScoredBatch], advantages: torch.Tensor | None = None
    ) -> ModelUpdate:
        seed = self._seed(f"{role} order")
        return ModelUpdate(
            role=role, step=self.num_steps_done + 1, batches=tuple(batches), advantages=advantages, seed=seed
        )

    def _policy_waits(self) -> bool:
        """Whether only the PRM trains in this step."""
        return self.parts.prm is not None and self.num_steps_done < self.config.prm.warmup_steps

    def _rewards(self, batch: ScoredBatch, prm_logprobs: torch.Tensor | None) -> torch.Tensor:
        assert prm_logprobs is not None and batch.reference_logprobs is not None
        return implicit_rewards(prm_logprobs, batch.reference_logprobs, batch.rollout.mask, beta=self.config.prm.beta)

    def _gate(self) -> float:
        return self.gate if self.config.advantage.process_gate == "auc" else 1.0

    def _seed(self, purpose: str) -> int:
        return derive_seed(self.config.run.seed, purpose, self.num_steps_done)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
