"""Heartbeats: whoever waits for something slow tells the watchdog of this process that it makes progress.

A rank that waits for its engine or for verdicts uses no CPU, and other ranks may wait for it in a collective: only a
heartbeat tells that nobody is stuck.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

BEAT_SECONDS = 1.0
"""How often whoever waits calls `beat`."""
_listeners: list[Callable[[], None]] = []


def beat() -> None:
    """Tells that what this process waits for makes progress, or has a time limit of its own that is not yet up."""
    for listener in _listeners:
        listener()


@contextmanager
def listening(listener: Callable[[], None]) -> Iterator[None]:
    """Calls a function at every `beat`, from whatever thread, for as long as the ``with`` block runs."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
