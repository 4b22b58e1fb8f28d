"""A verifier of your own: the answer is right where its last number is the truth.

    PYTHONPATH=examples megatron-prime train CONFIG verifier.factory=own_verifier:make

It takes all prompts of a run, whatever their ability. Each rank has its own and hands in many answers at a time:
`submit` returns at once and a thread does the work, so that judging may take long (a model, a service).
"""

from __future__ import annotations

import re
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from megatron_prime import Prompt, Response, Verdict

NUMBER = re.compile(r"-?\d+")


class LastNumber:
    """Compares the last number of an answer with the ground truth."""

    def __init__(self, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads)

    def submit(self, prompt: Prompt, response: Response) -> Future[Verdict]:
        """Hands in one answer; equal answers must get equal verdicts."""
        return self._threads.submit(self._judge, prompt, response)

    def _judge(self, prompt: Prompt, response: Response) -> Verdict:
        numbers = NUMBER.findall(response.text)
        if not numbers:
            return Verdict(status="no_answer", reward=0.0)
        right = numbers[-1] == prompt.ground_truth
        # A reward of None would mean: nobody knows, leave the answer out of training.
        return Verdict(status="correct" if right else "wrong", reward=float(right), extracted=numbers[-1])

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown()


def make(section: Any) -> LastNumber:
    """Called once on every rank, with section `verifier` of the configuration."""
    return LastNumber(section.num_workers)
