"""Asking a run to save and stop: signals in, one answer for all ranks out."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
"""Slurm sends the first before the time limit, as asked, and the second on preemption and cancellation."""


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Catches the stop signals for a ``with`` block.

    Yields:
        A collective that tells, the same on every rank, whether any rank has been signalled.
    """
    # Brings torch along, which a launcher does without.
    from megatron_prime import world

    signalled = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        # Python handles signals in the main thread only.
        yield lambda: world.any_process(False)
        return
    before = {number: signal.signal(number, lambda *_: signalled.set()) for number in STOP_SIGNALS}
    try:
        yield lambda: world.any_process(signalled.is_set())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
