"""The contract of a rollout engine of one's own, checked before anything starts and without building one."""

from __future__ import annotations

import inspect
import typing
from typing import Any

from megatron_prime.config.schema import PrimeConfig
from megatron_prime.errors import ConfigError
from megatron_prime.interfaces import Engine
from megatron_prime.sockets import is_own, resolve

_METHODS = ("generate", "load_weights", "sleep", "wake", "close")


def check_engine(config: PrimeConfig) -> list[str]:
    """Finds what is wrong with the factory that `rollout.engine` names, from its signature and what it says it makes.

    Args:
        config: of the run.

    Returns:
        One line ``key: problem; fix`` per problem; none for an engine that is built in.
    """
    name = config.rollout.engine
    if not is_own("rollout.engine", name):
        return []
    try:
        factory = resolve("rollout.engine", name)
    except ConfigError as error:
        return [str(error)]
    if not _takes(factory, 1):
        return [f"rollout.engine: {name} must take one argument, an interfaces.EngineSetup"]
    made = factory if isinstance(factory, type) else _annotated_result(factory)
    if made is None:
        return [
            f"rollout.engine: {name} does not say what it makes; annotate its result with the engine's class, as in "
            "`def make(setup: EngineSetup) -> MyEngine:`"
        ]
    return problems_with_engine(name, made)


def problems_with_engine(name: str, engine: Any) -> list[str]:
    """Finds what an engine, or a class of engines, lacks of `interfaces.Engine`.

    Args:
        name: value of `rollout.engine`.
        engine: the object or the class.

    Returns:
        One line per problem.
    """
    problems = []
    for method in _METHODS:
        expected = inspect.signature(getattr(Engine, method))
        arguments = [parameter for parameter in expected.parameters.values() if parameter.name != "self"]
        call = f"{method}({', '.join(parameter.name for parameter in arguments)})"
        found = getattr(engine, method, None)
        if not callable(found):
            problems.append(f"rollout.engine: what {name} makes has no {call}")
            continue
        num_required = sum(parameter.default is parameter.empty for parameter in arguments)
        num_self = int(isinstance(engine, type))
        if not all(_takes(found, num_self + count) for count in {num_required, len(arguments)}):
            problems.append(
                f"rollout.engine: {method} of what {name} makes cannot be called as {call}; see interfaces.Engine"
            )
    if not hasattr(engine, "weight_version") and "weight_version" not in _annotations(engine):
        problems.append(
            f"rollout.engine: what {name} makes has no weight_version; declare it in the class, as in "
            "`weight_version: int = -1`"
        )
    return problems


def _takes(function: Any, num_arguments: int) -> bool:
    """Whether it can be called with so many positional arguments; true where Python cannot know."""
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):
        return True
    try:
        signature.bind(*[None] * num_arguments)
    except TypeError:
        return False
    return True


def _annotated_result(factory: Any) -> type | None:
    try:
        result = typing.get_type_hints(factory).get("return")
    except (NameError, TypeError, AttributeError):
        return None
    return result if isinstance(result, type) and result is not type(None) else None


def _annotations(engine: Any) -> set[str]:
    """Names that the class and its bases annotate."""
    bases = inspect.getmro(engine if isinstance(engine, type) else type(engine))
    return {name for base in bases for name in inspect.get_annotations(base)}
