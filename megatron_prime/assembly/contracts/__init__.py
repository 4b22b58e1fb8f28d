"""The parts of the user's own that a configuration names, tried before any process group or model exists.

Parts that are built in are neither imported nor tried here: the tests of this package hold them to the same.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_prime import sockets
from megatron_prime.assembly.contracts.loggers import check_own_loggers
from megatron_prime.assembly.contracts.prompts import check_own_prompts
from megatron_prime.assembly.contracts.verifier import check_own_verifier
from megatron_prime.config import AnyConfig, PrimeConfig
from megatron_prime.errors import ConfigError

ALGORITHM = ("advantage.estimator", "advantage.process_source", "prm.loss", "policy.loss")


def check_own_algorithm(config: AnyConfig) -> list[str]:
    """Tries estimators, process rewards and losses; torch is imported only where there is one."""
    if all(key not in ALGORITHM for key, _ in own_parts(config)):
        return []
    from megatron_prime.assembly.contracts import algorithm

    return algorithm.check_own_algorithm(config)


def check_own_engine(config: AnyConfig) -> list[str]:
    """Looks at an engine's factory, without building one."""
    if not isinstance(config, PrimeConfig) or not sockets.is_own("rollout.engine", config.rollout.engine):
        return []
    from megatron_prime.assembly.contracts.engine import check_engine

    return check_engine(config)


_CHECKS: tuple[Callable[[AnyConfig], list[str]], ...] = (
    check_own_algorithm,
    check_own_engine,
    check_own_prompts,
    check_own_verifier,
    check_own_loggers,
)


def own_parts(config: AnyConfig) -> list[tuple[str, str]]:
    """The parts of the user's own that a configuration names, as (key of the socket, import path)."""
    parts = []
    for key in sockets.BUILT_IN:
        value = config
        for name in key.split("."):
            # A supervised run lacks most sections, and `data.factory` belongs to one kind of data.
            value = getattr(value, name, None)
        names = value if isinstance(value, list) else [] if value is None else [value]
        # A name without a colon is no import path; `check_config` says so.
        parts += [(key, str(name)) for name in names if ":" in str(name) and sockets.is_own(key, str(name))]
    return parts


def check_imports(config: AnyConfig) -> list[str]:
    """Imports the user's own parts without calling any; one line per part that cannot be imported."""
    problems = []
    for key, name in own_parts(config):
        try:
            sockets.resolve(key, name)
        except ConfigError as error:
            problems += error.problems
    return problems


def check_sockets(config: AnyConfig) -> list[str]:
    """Imports and tries the user's own parts.

    Args:
        config: a configuration in which `check_config` finds nothing, and whose tokenizer can be loaded.

    Returns:
        One line ``key: problem; fix`` per problem.
    """
    return check_imports(config) or [problem for check in _CHECKS for problem in check(config)]
