"""The range of every number in the schema, in one table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``; an open end is excluded."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, number: float) -> bool:
        above = number > self.low if self.low_open else number >= self.low
        below = number < self.high if self.high_open else number <= self.high
        return above and below

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{'>' if self.low_open else '>='} {self.low:.10g}"
        return f"in {'(' if self.low_open else '['}{self.low:.10g}, {self.high:.10g}{')' if self.high_open else ']'}"


POSITIVE = Range(0, low_open=True)
NOT_NEGATIVE = Range(0)
AT_LEAST_ONE = Range(1)
FRACTION = Range(0, 1)
BELOW_ONE = Range(0, 1, high_open=True)
ABOVE_ZERO_TO_ONE = Range(0, 1, low_open=True)

OPTIMIZER = {
    "lr": POSITIVE,
    "min_lr": NOT_NEGATIVE,
    "lr_warmup_steps": NOT_NEGATIVE,
    "adam_beta1": BELOW_ONE,
    "adam_beta2": BELOW_ONE,
    "adam_eps": POSITIVE,
    "weight_decay": NOT_NEGATIVE,
    "clip_grad": NOT_NEGATIVE,
    "max_skipped_steps": NOT_NEGATIVE,
}

RANGES: dict[str, Range] = {
    "run.num_steps": AT_LEAST_ONE,
    # NumPy takes seeds of 32 bits.
    "run.seed": Range(0, 2**32, high_open=True),
    "run.num_threads": AT_LEAST_ONE,
    "model.make_vocab_size_divisible_by": AT_LEAST_ONE,
    "parallel.world_size": AT_LEAST_ONE,
    "parallel.context_parallel_size": AT_LEAST_ONE,
    "parallel.expert_model_parallel_size": AT_LEAST_ONE,
    "parallel.virtual_pipeline_model_parallel_size": Range(2),
    "parallel.tensor_model_parallel_size": AT_LEAST_ONE,
    "parallel.pipeline_model_parallel_size": AT_LEAST_ONE,
    "parallel.timeout_seconds": POSITIVE,
    "micro_batch.micro_batch_size": AT_LEAST_ONE,
    "micro_batch.micro_batch_tokens": AT_LEAST_ONE,
    "policy.micro_batch_tokens": AT_LEAST_ONE,
    "prm.micro_batch_tokens": AT_LEAST_ONE,
    "reference.micro_batch_tokens": AT_LEAST_ONE,
    "head.workspace_mib": POSITIVE,
    "data.min_operations": AT_LEAST_ONE,
    "data.max_operations": AT_LEAST_ONE,
    "data.max_operand": AT_LEAST_ONE,
    "data.max_start": AT_LEAST_ONE,
    "data.step_error_rate": BELOW_ONE,
    "data.wrong_fact_share": FRACTION,
    "data.wrong_fact_rate": FRACTION,
    "data.num_problems": AT_LEAST_ONE,
    "data.max_prompt_tokens": AT_LEAST_ONE,
    "data.max_response_tokens": AT_LEAST_ONE,
    "rollout.max_logprob_gap": POSITIVE,
    "rollout.vllm.tensor_parallel_size": AT_LEAST_ONE,
    "rollout.vllm.max_model_len": AT_LEAST_ONE,
    "rollout.vllm.max_num_seqs": AT_LEAST_ONE,
    "rollout.vllm.bucket_mib": AT_LEAST_ONE,
    "rollout.vllm.abort_after_seconds": POSITIVE,
    "rollout.vllm.kv_cache_gib": POSITIVE,
    "rollout.vllm.gpu_memory_utilization": ABOVE_ZERO_TO_ONE,
    "rollout.vllm.num_threads": AT_LEAST_ONE,
    "rollout.vllm.timeout_seconds": POSITIVE,
    "rollout.vllm.max_restarts": NOT_NEGATIVE,
    "rollout.num_prompts": AT_LEAST_ONE,
    # One answer has nothing to be compared with, and the filter keeps no such group.
    "rollout.num_responses": Range(2),
    # The policy is trained at the sampling temperature, so greedy sampling is for evaluation only.
    "rollout.temperature": POSITIVE,
    "rollout.top_p": ABOVE_ZERO_TO_ONE,
    "rollout.max_response_tokens": AT_LEAST_ONE,
    "rollout.stop_token_ids": NOT_NEGATIVE,
    "rollout.max_batch_size": AT_LEAST_ONE,
    "verifier.num_workers": AT_LEAST_ONE,
    "verifier.timeout_seconds": POSITIVE,
    "verifier.memory_gib": POSITIVE,
    "verifier.cache_size": NOT_NEGATIVE,
    "verifier.code.test_seconds": POSITIVE,
    "verifier.code.total_seconds": POSITIVE,
    "verifier.code.memory_gib": POSITIVE,
    "filter.min_accuracy": FRACTION,
    "filter.max_accuracy": FRACTION,
    "filter.max_attempts": AT_LEAST_ONE,
    "prm.beta": POSITIVE,
    "prm.num_minibatches": AT_LEAST_ONE,
    "prm.num_window_batches": AT_LEAST_ONE,
    "prm.warmup_steps": NOT_NEGATIVE,
    "advantage.outcome_coef": NOT_NEGATIVE,
    "advantage.process_coef": NOT_NEGATIVE,
    "advantage.outcome_gamma": FRACTION,
    "advantage.process_gamma": FRACTION,
    "advantage.gate_smoothing": BELOW_ONE,
    "policy.clip_ratio_low": ABOVE_ZERO_TO_ONE,
    "policy.clip_ratio_high": POSITIVE,
    "policy.dual_clip": Range(1, low_open=True),
    "policy.kl_coef": NOT_NEGATIVE,
    "policy.importance_cap": POSITIVE,
    "policy.max_sequence_ratio": Range(1, low_open=True),
    "policy.num_minibatches": AT_LEAST_ONE,
    "policy.num_epochs": AT_LEAST_ONE,
    "evaluation.every_steps": NOT_NEGATIVE,
    "evaluation.num_prompts": NOT_NEGATIVE,
    "evaluation.num_responses": AT_LEAST_ONE,
    "evaluation.temperature": NOT_NEGATIVE,
    "checkpoint.every_steps": NOT_NEGATIVE,
    "sft.log_every_steps": AT_LEAST_ONE,
    "checkpoint.keep_last": AT_LEAST_ONE,
    "checkpoint.keep_best": AT_LEAST_ONE,
    "checkpoint.export_every_saves": NOT_NEGATIVE,
    "sft.batch_size": AT_LEAST_ONE,
    **{f"{section}.optimizer.{name}": r for section in ("prm", "policy", "sft") for name, r in OPTIMIZER.items()},
}


def numbers(section: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a configuration with its key path; each number of a list comes under the list's key."""
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from numbers(value, f"{key}.")
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, int | float) and not isinstance(item, bool):
                yield key, item


def out_of_range(config: Any) -> list[str]:
    """One line for every number outside its range."""
    return [
        f"{key}: {number} is out of range; must be {RANGES[key]}"
        for key, number in numbers(config)
        if number not in RANGES[key]
    ]
