"""Sizes of one step of a configuration: how many answers, of how many tokens, through how many models."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_prime.config.schema import AnyConfig, ArithmeticData, PrimeConfig
from megatron_prime.planner.footprint import LayoutSizes
from megatron_prime.planner.hardware import Hardware
from megatron_prime.weights.architecture import ModelArchitecture

_ARITHMETIC_PROMPT_TOKENS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Sizes of one step."""

    num_rows: int
    """Responses that train."""
    num_sampled: int
    """Responses that are sampled to get them: twice as many with a filter, as long as attempts allow."""
    prompt_tokens: float
    response_tokens: float
    """Mean."""
    max_response_tokens: int
    num_optimizer_steps: int
    """Of the policy."""
    num_prm_optimizer_steps: int
    num_prm_rows: int
    """Responses that the PRM trains on."""
    num_scored: int
    """Models that score every response."""

    @property
    def row_tokens(self) -> float:
        """Mean length of prompt and response."""
        return self.prompt_tokens + self.response_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanInputs:
    """What a plan is made from."""

    config: AnyConfig
    architecture: ModelArchitecture
    layout: LayoutSizes
    work: Workload
    hardware: Hardware


def workload_of(config: AnyConfig, mean_response_tokens: float | None = None) -> Workload:
    """Sizes of a configuration's step.

    Args:
        config: a configuration without problems.
        mean_response_tokens: what answers are expected to have; a third of the limit where None.
    """
    data = config.data
    prompt_tokens = _ARITHMETIC_PROMPT_TOKENS if isinstance(data, ArithmeticData) else data.max_prompt_tokens / 4
    if not isinstance(config, PrimeConfig):
        longest = 64 if isinstance(data, ArithmeticData) else data.max_response_tokens
        num_rows = config.sft.batch_size
        return Workload(
            num_rows=num_rows,
            num_sampled=0,
            prompt_tokens=prompt_tokens,
            response_tokens=mean_response_tokens or longest / 3,
            max_response_tokens=longest,
            num_optimizer_steps=1,
            num_prm_optimizer_steps=0,
            num_prm_rows=0,
            num_scored=0,
        )
    num_rows = config.rollout.num_prompts * config.rollout.num_responses
    window = config.prm.num_window_batches if config.uses_prm else 0
    return Workload(
        num_rows=num_rows,
        num_sampled=num_rows * min(config.filter.max_attempts, 2) if config.filter.enabled else num_rows,
        prompt_tokens=prompt_tokens,
        response_tokens=mean_response_tokens or config.rollout.max_response_tokens / 3,
        max_response_tokens=config.rollout.max_response_tokens,
        num_optimizer_steps=config.policy.num_minibatches * config.policy.num_epochs,
        num_prm_optimizer_steps=config.prm.num_minibatches * window,
        num_prm_rows=num_rows * window,
        num_scored=1 + int(config.uses_prm) + int(has_reference(config)),
    )


def has_reference(config: PrimeConfig) -> bool:
    """Whether a frozen copy of the start takes memory."""
    return config.reference.source == "sft" and (config.uses_prm or config.policy.kl_coef > 0)


def micro_batch_tokens(config: AnyConfig, work: Workload) -> int:
    """Tokens of the largest micro-batch: a sequence of full length is never cut."""
    longest = math.ceil(work.prompt_tokens) + work.max_response_tokens
    section = config.micro_batch
    if section.micro_batch_tokens is not None:
        return max(section.micro_batch_tokens, longest)
    return (section.micro_batch_size or 1) * longest
