"""Sockets: the parts of a run that a configuration names, built in or the user's own.

A socket is a configuration key whose value is a short name of something built in, or ``package.module:function`` for
a part of one's own. Short names are written down here as the same kind of path, so that one resolver serves both and
this module imports none of them: a configuration is read and checked without torch.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from megatron_prime.errors import ConfigError

BUILT_IN: Mapping[str, Mapping[str, str]] = {
    "advantage.estimator": {
        "rloo": "megatron_prime.algorithm.advantage:rloo",
        "grpo": "megatron_prime.algorithm.advantage:grpo",
        "reinforce": "megatron_prime.algorithm.advantage:reinforce",
        "reinforce_pp": "megatron_prime.algorithm.baselines:reinforce_pp",
        "reinforce_pp_baseline": "megatron_prime.algorithm.baselines:reinforce_pp_baseline",
        "dr_grpo": "megatron_prime.algorithm.baselines:dr_grpo",
    },
    "advantage.process_source": {
        "implicit": "megatron_prime.algorithm.implicit_reward:implicit_source",
    },
    "prm.loss": {
        "cross_entropy": "megatron_prime.algorithm.prm_loss:cross_entropy",
        "pairwise": "megatron_prime.algorithm.prm_loss:pairwise",
        "prefix": "megatron_prime.algorithm.prefix_loss:prefix",
    },
    "policy.loss": {
        "ppo_clip": "megatron_prime.algorithm.policy_loss:ppo_clip",
        "gspo": "megatron_prime.algorithm.surrogates:gspo",
        "cispo": "megatron_prime.algorithm.surrogates:cispo",
    },
    "rollout.engine": {
        "transformers": "megatron_prime.rollout.embedded.engine:make_engine",
        "vllm": "megatron_prime.rollout.vllm.engines:make_engine",
    },
    "data.factory": {},
    "run.loggers": {
        "tensorboard": "megatron_prime.observe.tensorboard:TensorBoardLogger",
        "wandb": "megatron_prime.observe.weights_and_biases:WandbLogger",
    },
    "verifier.factory": {},
}
"""Key -> short name -> path."""


def names_problem(key: str, name: str) -> str | None:
    """What is wrong with a socket's value as text, without importing it; None where nothing is."""
    built_in = BUILT_IN[key]
    if name in built_in:
        return None
    module, colon, function = name.partition(":")
    if colon and function.isidentifier() and all(part.isidentifier() for part in module.split(".")):
        return None
    near = difflib.get_close_matches(name, built_in, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    if not built_in:
        return f"{key}: {name!r} must be package.module:function"
    choices = "".join(f"{choice!r}, " for choice in built_in)
    return f"{key}: {name!r} is not a choice{hint}; choose one of {choices}or name your own as package.module:function"


def resolve(key: str, name: str) -> Callable[..., Any]:
    """Imports what a socket's value stands for.

    Args:
        key: of `BUILT_IN`.
        name: a short name, or ``package.module:function``. Modules are found as Python finds them: installed, or in a
            folder of ``PYTHONPATH``.

    Returns:
        The function or class; it has not been called.

    Raises:
        ConfigError: it is neither, cannot be imported, or cannot be called.
    """
    if problem := names_problem(key, name):
        raise ConfigError(problem)
    module_name, _, function_name = BUILT_IN[key].get(name, name).partition(":")
    try:
        found = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:
        fix = "; install it, or put its folder on PYTHONPATH" if isinstance(error, ModuleNotFoundError) else ""
        raise ConfigError(f"{key}: {name!r} cannot be imported: {type(error).__name__}: {error}{fix}") from error
    if not callable(found):
        raise ConfigError(f"{key}: {name!r} is of type {type(found).__name__}, not a function")
    return found


def is_own(key: str, name: str) -> bool:
    """Whether a socket's value names a part of the user's own."""
    return name not in BUILT_IN[key]
