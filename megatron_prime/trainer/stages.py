"""Timing of the stages of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stages:
    """Adds up the seconds of named stages and announces the running one.

    Args:
        announce: called with a stage's name when it starts.
    """

    def __init__(self, announce: Callable[[str], None]) -> None:
        self._announce = announce
        self._seconds: dict[str, float] = {}
        self._step_start = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times a ``with`` block; the same name again adds to it."""
        self._announce(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def drain(self) -> dict[str, float]:
        """``time/<stage>_seconds`` since the last call, and all time since then as ``time/step_seconds``."""
        seconds, self._seconds = self._seconds, {}
        start, self._step_start = self._step_start, time.perf_counter()
        metrics = {f"time/{name}_seconds": value for name, value in seconds.items()}
        return metrics | {"time/step_seconds": self._step_start - start}
