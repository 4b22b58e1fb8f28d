"""Values of the command line, for argparse; what is wrong with one is said in words."""

from __future__ import annotations

import argparse
from typing import TypeVar

from megatron_prime.sockets import names_problem

_Number = TypeVar("_Number", int, float)
_Value = TypeVar("_Value")


def at_least_one(text: str) -> int:
    """A whole number of 1 or more."""
    return _required(number := _parsed(int, text), number >= 1, f"{text} is not 1 or more")


def not_negative(text: str) -> int:
    """A whole number of 0 or more."""
    return _required(number := _parsed(int, text), number >= 0, f"{text} is not 0 or more")


def engine(text: str) -> str:
    """What `rollout.engine` can name."""
    problem = names_problem("rollout.engine", text)
    return _required(text, problem is None, problem or "")


def port(text: str) -> int:
    """A port that a server can listen on."""
    return _required(number := _parsed(int, text), 1 <= number < 2**16, f"{text} is not from 1 to 65535")


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers of 0 or more, each once, between commas."""
    found = tuple(not_negative(number) for number in text.split(","))
    return _required(found, len(set(found)) == len(found), f"{text} names a number twice")


def temperature(text: str) -> float:
    """A number of 0 or more."""
    return _required(number := _parsed(float, text), 0 <= number < float("inf"), f"{text} is not 0 or more")


def probability(text: str) -> float:
    """A number above 0 and up to 1."""
    return _required(number := _parsed(float, text), 0 < number <= 1, f"{text} is not in (0, 1]")


def above_zero(text: str) -> float:
    """A number above 0."""
    return _required(number := _parsed(float, text), number > 0, f"{text} is not above 0")


def _parsed(kind: type[_Number], text: str) -> _Number:
    try:
        return kind(text)
    except ValueError:
        # argparse would name the function here.
        raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' if kind is int else ''}number") from None


def _required(value: _Value, holds: bool, problem: str) -> _Value:
    if not holds:
        raise argparse.ArgumentTypeError(problem)
    return value
