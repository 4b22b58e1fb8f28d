"""PRIME reinforcement learning on Megatron-Core, from a CPU to a cluster.

The names here are looked up on first use: importing the package loads nothing else, and configurations
can be read and checked without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_prime import algorithm
    from megatron_prime.algorithm.policy_loss import PolicyTokens
    from megatron_prime.algorithm.prm_loss import PrmResponses
    from megatron_prime.batch import ProcessInputs, StepReward
    from megatron_prime.config import PrimeConfig, SftConfig, load_config
    from megatron_prime.config.schema import AdvantageSection, PolicySection, PrmSection
    from megatron_prime.errors import PrimeError

__all__ = [
    "AdvantageSection",
    "PolicySection",
    "PolicyTokens",
    "PrimeConfig",
    "PrimeError",
    "PrmResponses",
    "PrmSection",
    "ProcessInputs",
    "SftConfig",
    "StepReward",
    "algorithm",
    "load_config",
]

_MODULES = {
    "AdvantageSection": "config.schema",
    "PolicySection": "config.schema",
    "PolicyTokens": "algorithm.policy_loss",
    "PrimeConfig": "config",
    "PrimeError": "errors",
    "PrmResponses": "algorithm.prm_loss",
    "PrmSection": "config.schema",
    "ProcessInputs": "batch",
    "SftConfig": "config",
    "StepReward": "batch",
    "load_config": "config",
}


def __getattr__(name: str) -> Any:
    if name == "algorithm":
        return import_module("megatron_prime.algorithm")
    if name in _MODULES:
        return getattr(import_module(f"megatron_prime.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
