"""What a verifier is, for those who bring their own."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from megatron_prime.batch import Prompt, Response, Verdict


class Verifier(Protocol):
    """Judges responses. Every rank has its own and judges its own share; equal input must get equal verdicts."""

    def submit(self, prompt: Prompt, response: Response) -> Future[Verdict]:
        """Hands in one response and returns at once, or when there is room.

        Args:
            prompt: with its ground truth and ability.
            response: one of its answers.

        Returns:
            The verdict to come. Its reward is in [0, 1], or None where the verifier itself failed.
        """
        ...

    def close(self) -> None:
        """Ends what `submit` has started."""
        ...


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
