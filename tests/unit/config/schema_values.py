"""The smallest run, and what is said of one that is changed."""

from __future__ import annotations

import pytest

from megatron_prime.config.schema import AnyConfig, PrimeConfig
from megatron_prime.config.validation import validate
from megatron_prime.errors import ConfigError

PRIME = {
    "kind": "prime",
    "run": {"name": "a", "num_steps": 3},
    "model": {"path": "m"},
    "data": {"kind": "arithmetic"},
    "rollout": {"num_prompts": 4},
}


def made(changes: dict) -> PrimeConfig:
    config = validate(AnyConfig, {**PRIME, **changes})
    assert isinstance(config, PrimeConfig)
    return config


def problems_of(changes: dict) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        validate(AnyConfig, {**PRIME, **changes})
    return caught.value.problems
