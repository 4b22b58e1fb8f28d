"""Typed configuration: the schema, the loader, the checks. Never imports torch."""

from megatron_prime.config.checks import check_config, raise_for_problems
from megatron_prime.config.loader import load_config, save_config, to_dict
from megatron_prime.config.schema import AnyConfig, PrimeConfig, SftConfig

__all__ = [
    "AnyConfig",
    "PrimeConfig",
    "SftConfig",
    "check_config",
    "load_config",
    "raise_for_problems",
    "save_config",
    "to_dict",
]
