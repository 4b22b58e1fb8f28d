"""Verdicts to come: what futures lack, and waiting for many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from megatron_prime.batch import Prompt, Response, Verdict
from megatron_prime.interfaces import Verifier

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
    """A verdict that is there already, as a future."""
    future: Future[Verdict] = Future()
    future.set_result(verdict)
    return future
