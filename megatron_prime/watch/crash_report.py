"""How a rank ends that fails: its traceback before anybody else's, and at once."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator

from megatron_prime.errors import PrimeError, RunInterrupted
from megatron_prime.watch.exit_status import FAILED, PEER_LOST
from megatron_prime.watch.watchdog import Watchdog

_REPORT_SECONDS = 10.0
"""How long a rank that has lost another one waits for that one to say why, and for a launcher to end both."""
_LAUNCHER_SECONDS = 2.0
_LOST_CONNECTION = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL communicator was")


@contextlib.contextmanager
def crash_report(watchdog: Watchdog, *, ends_process: bool) -> Iterator[None]:
    """Reports what comes out of a ``with`` block before anything is closed on the way out.

    Closing the process group makes every other rank fail, and closing anything else may wait for them.

    Args:
        watchdog: tells the other ranks through the status file.
        ends_process: the process is this rank's own. One with an unforeseen error, or without its peers, ends here.
    """
    try:
        yield
    except RunInterrupted:
        raise
    except PrimeError as error:
        watchdog.fail(f"{type(error).__name__}: {error}")
        raise
    except Exception as error:
        if not ends_process:
            raise
        if _is_lost_peer(error):
            _end(_lost_peer_report(watchdog, error), PEER_LOST)
        watchdog.fail(f"{type(error).__name__}: {error}")
        head = f"rank {watchdog.rank} failed in {watchdog.place()}:"
        _end("".join([head, "\n", *traceback.format_exception(error)]).rstrip(), FAILED)


def _is_lost_peer(error: Exception) -> bool:
    # Raised by torch, which a launcher does without.
    from torch.distributed import DistError

    return isinstance(error, DistError) or any(text in str(error) for text in _LOST_CONNECTION)


def _lost_peer_report(watchdog: Watchdog, error: Exception) -> str:
    """One line instead of the traceback of a collective, which says nothing about the rank that is gone."""
    failed, silent = watchdog.wait_for_failure(_REPORT_SECONDS)
    where = f"rank {watchdog.rank} lost a rank in {watchdog.place()}"
    if failed:
        first = failed[0]
        # Where a launcher ends this process, nothing needs to be said twice.
        time.sleep(_LAUNCHER_SECONDS)
        return f"{where}: rank {first.rank} on host {first.host} failed first, {first.failure}"
    if silent:
        names = ", ".join(f"rank {s.rank} on host {s.host} (last seen in {s.place()})" for s in silent)
        return f"{where}: {names} is gone without a report; killed, out of memory, or its host is lost"
    return f"{where}, though every rank still sends heartbeats: {error}"


def _end(text: str, status: int) -> None:
    sys.stderr.write(text + "\n")
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
