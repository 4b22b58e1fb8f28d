"""Asking a run to save and stop: signals in, one answer for all ranks out."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
"""Slurm sends the first before the time limit, as asked, and the second on preemption and cancellation."""
_TOLD = b"stopping as soon as the running step is done and saved; Ctrl-C again ends at once, without saving\n"


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Catches the stop signals, and the first Ctrl-C, for a ``with`` block; a second Ctrl-C raises KeyboardInterrupt.

    Yields:
        A collective that tells, the same on every rank, whether any rank has been signalled.
    """
    # Brings torch along, which a launcher does without.
    from megatron_prime import collectives

    signalled = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        # Python handles signals in the main thread only.
        yield lambda: collectives.any_process(False)
        return

    def interrupted(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signalled.set()
        if os.environ.get("RANK", "0") == "0":
            # Unlike print, allowed in the middle of another one.
            os.write(2, _TOLD)

    handlers = dict.fromkeys(STOP_SIGNALS, lambda number, frame: signalled.set())
    with signal_handlers(handlers | {signal.SIGINT: interrupted}):
        yield lambda: collectives.any_process(signalled.is_set())


@contextmanager
def signal_handlers(handlers: Mapping[signal.Signals, Callable[[int, object], None]]) -> Iterator[None]:
    """Handles signals by these functions for a ``with`` block, in the main thread."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
