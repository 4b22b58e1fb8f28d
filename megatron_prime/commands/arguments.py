"""What the commands' parsers share: numbers with a range, and a configuration with overrides."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

from megatron_prime.config.loader import load_config
from megatron_prime.config.schema import PrimeConfig, SftConfig
from megatron_prime.errors import ConfigError
from megatron_prime.sockets import names_problem

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What `add_subparsers` returns."""
_Number = TypeVar("_Number", int, float)
_Config = TypeVar("_Config", PrimeConfig, SftConfig)


def add_command(
    commands: Commands, name: str, text: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    """Adds a command.

    Args:
        commands: that it becomes one of.
        name: as it is typed.
        text: what it does, in one line.
        run: does it and returns the exit status.
    """
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run, command=name)
    return parser


def add_configuration(parser: argparse.ArgumentParser, text: str = "YAML file", **options: Any) -> None:
    """Adds a configuration and its overrides to what a command takes; `options` are those of the first argument."""
    parser.add_argument("config", help=text, **options)
    text = "override a key of the configuration, a.b=c"
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=text)


def load_kind(options: argparse.Namespace, kind: type[_Config]) -> _Config:
    """The configuration that `add_configuration` has asked for.

    Raises:
        ConfigError: see `load_config`; or it is one of the other kind.
    """
    config = load_config(options.config, options.overrides)
    if not isinstance(config, kind):
        wanted = "sft" if kind is SftConfig else "prime"
        raise ConfigError(
            f"kind: {options.config} is of kind {config.kind!r}, and `{options.command}` takes {wanted!r};"
            " name another file, or use `train` for prime and `sft` for sft"
        )
    return config


def _number(kind: type[_Number], holds: Callable[[_Number], bool], problem: str) -> Callable[[str], _Number]:
    """A type for argparse, which says what is wrong in words."""

    def parse(text: str) -> _Number:
        try:
            value = kind(text)
        except ValueError:
            # argparse would name the function here.
            whole = "whole " if kind is int else ""
            raise argparse.ArgumentTypeError(f"{text!r} is no {whole}number") from None
        if not holds(value):
            raise argparse.ArgumentTypeError(f"{text} {problem}")
        return value

    return parse


at_least_one = _number(int, lambda value: value >= 1, "is not 1 or more")
not_negative = _number(int, lambda value: value >= 0, "is not 0 or more")
port = _number(int, lambda value: 1 <= value < 2**16, "is not from 1 to 65535")
temperature = _number(float, lambda value: 0 <= value < float("inf"), "is not 0 or more")
probability = _number(float, lambda value: 0 < value <= 1, "is not in (0, 1]")
above_zero = _number(float, lambda value: value > 0, "is not above 0")


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers of 0 or more, each once, between commas."""
    found = tuple(not_negative(number) for number in text.split(","))
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text} names a number twice")
    return found


ENGINE_HELP = "transformers (default), vllm, or package.module:function of your own"


def engine(text: str) -> str:
    """Reads what `rollout.engine` can name."""
    if problem := names_problem("rollout.engine", text):
        raise argparse.ArgumentTypeError(problem)
    return text
