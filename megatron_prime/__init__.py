"""PRIME reinforcement learning on Megatron-Core, from a CPU to a cluster.

The names here are what programs and parts of your own build on. They are looked up on first use: importing the package
loads nothing else, and configurations can be read and checked without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_prime import algorithm
    from megatron_prime.algorithm.policy_loss import PolicyTokens
    from megatron_prime.algorithm.prm_loss import PrmResponses
    from megatron_prime.assembly.generate import generate
    from megatron_prime.assembly.run import run as train
    from megatron_prime.batch import (
        Group,
        ProcessInputs,
        Prompt,
        Response,
        RolloutBatch,
        SamplingParams,
        StepReward,
        StepSpan,
        Verdict,
    )
    from megatron_prime.collectives import is_main
    from megatron_prime.config import PrimeConfig, SftConfig, load_config
    from megatron_prime.config.schema import AdvantageSection, PolicySection, PrmSection
    from megatron_prime.data.own import PromptRequest, PromptSourceBase
    from megatron_prime.errors import PrimeError
    from megatron_prime.interfaces import (
        Engine,
        EngineSetup,
        ExportedWeights,
        MetricsLogger,
        PromptSource,
        Verifier,
    )
    from megatron_prime.observe.loggers import LoggerRequest
    from megatron_prime.sockets import resolve
    from megatron_prime.verify.contract import Case, check_verifier

__all__ = [
    "AdvantageSection",
    "Case",
    "Engine",
    "EngineSetup",
    "ExportedWeights",
    "Group",
    "LoggerRequest",
    "MetricsLogger",
    "PolicySection",
    "PolicyTokens",
    "PrimeConfig",
    "PrimeError",
    "PrmResponses",
    "PrmSection",
    "ProcessInputs",
    "Prompt",
    "PromptRequest",
    "PromptSource",
    "PromptSourceBase",
    "Response",
    "RolloutBatch",
    "SamplingParams",
    "SftConfig",
    "StepReward",
    "StepSpan",
    "Verdict",
    "Verifier",
    "algorithm",
    "check_verifier",
    "generate",
    "is_main",
    "load_config",
    "resolve",
    "train",
]

_PLACES = {
    "AdvantageSection": "config.schema",
    "Case": "verify.contract",
    "Engine": "interfaces",
    "EngineSetup": "interfaces",
    "ExportedWeights": "interfaces",
    "Group": "batch",
    "LoggerRequest": "observe.loggers",
    "MetricsLogger": "interfaces",
    "PolicySection": "config.schema",
    "PolicyTokens": "algorithm.policy_loss",
    "PrimeConfig": "config",
    "PrimeError": "errors",
    "PrmResponses": "algorithm.prm_loss",
    "PrmSection": "config.schema",
    "ProcessInputs": "batch",
    "Prompt": "batch",
    "PromptRequest": "data.own",
    "PromptSource": "interfaces",
    "PromptSourceBase": "data.own",
    "Response": "batch",
    "RolloutBatch": "batch",
    "SamplingParams": "batch",
    "SftConfig": "config",
    "StepReward": "batch",
    "StepSpan": "batch",
    "Verdict": "batch",
    "Verifier": "interfaces",
    "check_verifier": "verify.contract",
    "generate": "assembly.generate",
    "is_main": "collectives",
    "load_config": "config",
    "resolve": "sockets",
    "train": "assembly.run:run",
}
"""Name -> module, with a colon and the name there where it has another one."""


def __getattr__(name: str) -> Any:
    if name == "algorithm":
        return import_module("megatron_prime.algorithm")
    if name in _PLACES:
        module, _, there = _PLACES[name].partition(":")
        return getattr(import_module(f"megatron_prime.{module}"), there or name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
