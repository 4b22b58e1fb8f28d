"""Verdicts to come: what futures lack, and waiting for many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from megatron_prime.batch import Prompt, Response, Verdict
from megatron_prime.interfaces import Verifier

_A = TypeVar("_A")
_B = TypeVar("_B")


def settled(result: _A) -> Future[_A]:
    """The future of something that is there already."""
    target: Future[_A] = Future()
    target.set_result(result)
    return target


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


def followed(source: Future[_A], function: Callable[[_A], Future[_B]]) -> Future[_B]:
    """The future that ``function`` makes of another future's result; an error of any of them is its error."""
    target: Future[_B] = Future()

    def settle(done: Future[_B]) -> None:
        error = done.exception()
        if error is None:
            target.set_result(done.result())
        else:
            target.set_exception(error)

    def forward(done: Future[_A]) -> None:
        try:
            function(done.result()).add_done_callback(settle)
        except Exception as error:
            target.set_exception(error)

    source.add_done_callback(forward)
    return target


def verify(verifier: Verifier, items: Sequence[tuple[Prompt, Response]]) -> list[Verdict]:
    """Judges responses side by side.

    Args:
        verifier: any.
        items: prompts, each with one of its responses.

    Returns:
        One verdict per item, in the same order.

    Raises:
        VerifierError: the verifier cannot work at all.
    """
    pending = [verifier.submit(prompt, response) for prompt, response in items]
    return [future.result() for future in pending]


def known(verdict: Verdict) -> Future[Verdict]:
    """Returns a future that already has its verdict."""
    future: Future[Verdict] = Future()
    future.set_result(verdict)
    return future
