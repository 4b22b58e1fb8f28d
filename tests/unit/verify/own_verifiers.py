"""Verifiers as a user would write them: a good one, and others that each do one thing wrong."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from megatron_prime.batch import Verdict
from megatron_prime.verify.contract import Case

CASES = [Case("yes", "yes", 1.0), Case("no", "yes", 0.0)]


class Exact:
    """Right where the answer is the truth."""

    def __init__(self):
        self._threads = ThreadPoolExecutor(2)

    def submit(self, prompt, response):
        return self._threads.submit(self.judge, prompt, response)

    def judge(self, prompt, response):
        same = response.text == prompt.ground_truth
        return Verdict(status="correct" if same else "wrong", reward=float(same))

    def close(self):
        self._threads.shutdown()


class Crashing(Exact):
    def judge(self, prompt, response):
        return super().judge(prompt, response) if response.text in ("yes", "no") else [][0]


class Generous(Exact):
    def judge(self, prompt, response):
        return Verdict(status="fine", reward=2.0 if response.text == "yes" else 0.0)


class Fickle(Exact):
    calls = 0

    def judge(self, prompt, response):
        self.calls += 1
        return Verdict(status="correct", reward=float(self.calls == 1))


class Silent(Exact):
    def submit(self, prompt, response):
        return Future()


class Direct(Exact):
    def submit(self, prompt, response):
        return self.judge(prompt, response)


class Refusing(Exact):
    def submit(self, prompt, response):
        raise KeyError(response.text)
