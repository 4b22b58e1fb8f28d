"""A step that futures lack."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_A = TypeVar("_A")
_B = TypeVar("_B")


def mapped(source: Future[_A], function: Callable[[_A], _B]) -> Future[_B]:
    """The future of ``function`` of another future's result; an error of either is its error."""
    target: Future[_B] = Future()

    def forward(done: Future[_A]) -> None:
        try:
            target.set_result(function(done.result()))
        except Exception as error:
            target.set_exception(error)

    source.add_done_callback(forward)
    return target
