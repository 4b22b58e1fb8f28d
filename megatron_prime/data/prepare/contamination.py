"""Training problems that are in a benchmark."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from megatron_prime.data.prepare.similarity import ngrams, words

NUM_WORDS = 8
MIN_SHARE = 0.5


class Contamination:
    """Finds benchmark problems in texts by common runs of words.

    A text is contaminated if it holds at least half of a problem's runs of 8 words. A single common run, the usual
    rule, would take every AIME problem for known that ends in "m and n are relatively prime positive integers, find
    m + n". Of a problem shorter than that the text must have exactly the words.

    Args:
        problems: (id, text) of each benchmark problem.
    """

    def __init__(self, problems: Iterable[tuple[str, str]]) -> None:
        self._ids: list[str] = []
        self._num_runs: list[int] = []
        self._places: dict[int, list[int]] = {}
        for number, (problem_id, text) in enumerate(problems):
            runs = ngrams(words(text), NUM_WORDS).tolist()
            self._ids.append(problem_id)
            self._num_runs.append(len(runs))
            for run in runs:
                self._places.setdefault(run, []).append(number)

    def __len__(self) -> int:
        """Benchmark problems."""
        return len(self._ids)

    def find(self, text: str) -> str | None:
        """Id of the benchmark problem that a text holds most of, if that is at least half; None: there is none."""
        hits: Counter[int] = Counter()
        for run in ngrams(words(text), NUM_WORDS).tolist():
            hits.update(self._places.get(run, ()))
        shares = [(-count / self._num_runs[number], number) for number, count in hits.items()]
        best = min(shares, default=(0.0, -1))
        return self._ids[best[1]] if -best[0] >= MIN_SHARE else None
