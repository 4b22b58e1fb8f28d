"""Collects the groups that a step trains on: samples, verifies, filters, and repeats while too few are kept."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megatron_prime.algorithm.filtering import GroupCollector
from megatron_prime.batch import Group, SamplingParams, Verdict
from megatron_prime.config.schema import PrimeConfig, RolloutSection
from megatron_prime.errors import TrainingError
from megatron_prime.interfaces import Engine, PromptSource, Verifier
from megatron_prime.trainer.evaluation import derive_seed, sample_and_verify
from megatron_prime.trainer.stages import Stages
from megatron_prime.trainer.verdicts import rollout_metrics, verdict_metrics

_MAX_EMPTY_STEPS = 5
_MIN_ACCEPTANCE = 0.05
"""Share of groups that the filter is expected to keep at least, when the number of prompts to sample is chosen."""

logger = logging.getLogger(__name__)


def sampling_params(section: RolloutSection, seed: int) -> SamplingParams:
    """Returns the sampling parameters of a step."""
    return SamplingParams(
        num_responses=section.num_responses,
        temperature=section.temperature,
        top_p=section.top_p,
        max_response_tokens=section.max_response_tokens,
        seed=seed,
        stop_token_ids=tuple(section.stop_token_ids),
    )


class GroupSampler:
    """Makes the batch of groups of each step; groups kept beyond a batch wait for the next step.

    Args:
        config: the checked configuration.
        engine: samples; asleep whenever nothing is being sampled.
        verifier: grades.
        prompts: in their fixed order.
        stages: times what is done.
        min_groups: fewest groups that a step can train on.
    """

    def __init__(
        self,
        config: PrimeConfig,
        engine: Engine,
        verifier: Verifier,
        prompts: PromptSource,
        stages: Stages,
        min_groups: int,
    ) -> None:
        self.collector = GroupCollector(config.filter, num_groups=config.rollout.num_prompts)
        self.position = 0
        """Number of prompts sampled since the start of training."""
        self.acceptance = 1.0
        """Share of groups that were kept lately."""
        self.num_empty_steps = 0
        """Consecutive steps without a batch, up to now."""
        self._config = config
        self._engine = engine
        self._verifier = verifier
        self._prompts = prompts
        self._stages = stages
        self._min_groups = min_groups

    def collect(self) -> tuple[list[Group], dict[str, float]]:
        """Samples, verifies and filters until the batch is full or the attempts are used up.

        Each round samples as many prompts as should fill the batch by the latest share of kept groups.

        Returns:
            The groups and metrics of all that was sampled. Too few for a training step: an empty list, and they wait.

        Raises:
            TrainingError: several consecutive steps without a batch.
        """
        wanted = self._config.rollout.num_prompts
        sampled: list[Group] = []
        verdicts: list[Verdict] = []
        for _ in range(self._config.filter.max_attempts):
            if self.collector.is_full:
                break
            counts = self.collector.counts
            if counts.num_seen > 0:
                self.acceptance = counts.num_kept / counts.num_seen
            # Sample as many prompts as should leave `missing` groups after the filter, but no more than a batch. The
            # floor avoids a division by 0 after a round in which nothing was kept.
            missing = wanted - len(self.collector)
            fresh, judged = self._sample(min(wanted, math.ceil(missing / max(self.acceptance, _MIN_ACCEPTANCE))))
            sampled += fresh
            verdicts += judged
            self.collector.add(fresh)
        # The models that train next may need the accelerator's memory.
        self._engine.sleep()
        counts = self.collector.take_counts()
        metrics = rollout_metrics(sampled) | verdict_metrics(verdicts)
        metrics |= {f"filter/{name}": float(n) for name, n in asdict(counts).items()}
        metrics["filter/kept"] = counts.num_kept / max(counts.num_seen, 1)
        if len(self.collector) >= self._min_groups:
            self.num_empty_steps = 0
            return self.collector.take(), metrics
        self.num_empty_steps += 1
        shortage = (
            f"without enough groups between filter.min_accuracy and filter.max_accuracy "
            f"({len(self.collector)} wait, {self._min_groups} are needed; the last: {counts})"
        )
        if self.num_empty_steps >= _MAX_EMPTY_STEPS:
            raise TrainingError(
                f"{_MAX_EMPTY_STEPS} steps {shortage}; use easier or harder prompts, or widen the filter"
            )
        logger.warning("step %d trains nothing, %s", self._stages.step, shortage)
        return [], metrics

    def _sample(self, num_prompts: int) -> tuple[list[Group], list[Verdict]]:
        """Samples groups for the next prompts; returns them and all verdicts. Answers without a reward are left out."""
        with self._stages("data"):
            prompts = self._prompts.take(self.position, num_prompts)
        # The seed follows the position, not the step: a resumed run samples what the uninterrupted one would have.
        seed = derive_seed(self._config.run.seed, "rollout", self.position)
        sampling = sampling_params(self._config.rollout, seed)
        self.position += num_prompts
        with self._stages("rollout"):
            self._engine.wake()
            answers = sample_and_verify(self._engine, self._verifier, prompts, sampling)
        groups: list[Group] = []
        for prompt, row in zip(prompts, answers, strict=True):
            graded = [(response, verdict.reward) for response, verdict in row if verdict.reward is not None]
            groups.append(
                Group(prompt=prompt, responses=tuple(r for r, _ in graded), rewards=tuple(x for _, x in graded))
            )
        return groups, [verdict for row in answers for _, verdict in row]

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that a resumed run needs."""
        return {
            "position": self.position,
            "acceptance": self.acceptance,
            "num_empty_steps": self.num_empty_steps,
            "collector": self.collector.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned; other entries are ignored."""
        self.position = state["position"]
        self.acceptance = state["acceptance"]
        self.num_empty_steps = state["num_empty_steps"]
        self.collector.load_state_dict(state["collector"])
