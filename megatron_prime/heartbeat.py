"""Signs that something slow gets on, from whoever hears them to whoever watches this process.

A rank that waits for its engine or for verdicts uses no CPU, and other ranks may wait for it in a collective: only what
it hears tells that nobody is stuck.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGN_SECONDS = 1.0
"""How often whoever waits says so."""
_listeners: list[Callable[[], None]] = []


def heard() -> None:
    """What this process waits for has got on, or has a time limit of its own that is not yet up."""
    for listener in _listeners:
        listener()


@contextmanager
def listening(listener: Callable[[], None]) -> Iterator[None]:
    """Calls a function at every `heard`, from whatever thread, for as long as the ``with`` block runs."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
