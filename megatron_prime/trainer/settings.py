"""Sections of the configuration as the arguments of what they configure."""

from __future__ import annotations

from megatron_prime.algorithm.advantage import AdvantageOptions
from megatron_prime.batch import SamplingParams
from megatron_prime.config.schema import AdvantageSection, RolloutSection


def sampling_params(section: RolloutSection, seed: int) -> SamplingParams:
    """How a step's answers are sampled."""
    return SamplingParams(
        num_responses=section.num_responses,
        temperature=section.temperature,
        top_p=section.top_p,
        max_response_tokens=section.max_response_tokens,
        seed=seed,
        stop_token_ids=tuple(section.stop_token_ids),
    )


def advantage_options(section: AdvantageSection, gate: float) -> AdvantageOptions:
    """How rewards become advantages while the gate stands so."""
    return AdvantageOptions(
        estimator=section.estimator,  # type: ignore[arg-type]
        process_baseline=section.process_baseline,
        outcome_coef=section.outcome_coef,
        process_coef=section.process_coef,
        outcome_gamma=section.outcome_gamma,
        process_gamma=section.process_gamma,
        process_scale=section.process_scale,
        whiten=section.whiten,
        process_gate=gate,
    )


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after this one."""
    return every > 0 and step % every == 0
