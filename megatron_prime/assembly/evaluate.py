"""A configuration's model on its own evaluation prompts, without a trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron_prime.assembly.engines import loaded_engine
from megatron_prime.assembly.run import configured_prompts, configured_verifier
from megatron_prime.config.checks import check_config, raise_for_problems
from megatron_prime.config.schema import PrimeConfig
from megatron_prime.trainer.evaluation import accuracy, evaluation_sampling, sample_and_verify


def evaluate(config: PrimeConfig) -> Mapping[str, Any]:
    """avg@k of the model in ``model.path`` on the evaluation prompts of a configuration, in this process."""
    raise_for_problems(check_config(config))
    torch.set_num_threads(config.run.num_threads)
    section = config.evaluation
    loaded = loaded_engine(config.model.path, config.model.dtype, config.rollout, config.run.num_threads)
    with loaded as (engine, _), configured_verifier(config) as verifier:
        prompts = configured_prompts(config).evaluation(section.num_prompts)
        sampling = evaluation_sampling(config)
        answers = sample_and_verify(engine, verifier, prompts, sampling)
    result = accuracy([[verdict for _, verdict in row] for row in answers])
    return {
        "model": config.model.path,
        "accuracy": result.value,
        "accuracy_interval": [result.low, result.high],
        "num_prompts": result.num_prompts,
        "num_responses": section.num_responses,
        "num_missing": result.num_missing,
    }
