"""A rank forked from a process that has imported everything: it starts in a moment, where a new one takes seconds."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping

from megatron_prime.watch.exit_status import FAILED

_POLL_SECONDS = 0.02


class ForkedProcess:
    """As much of `subprocess.Popen` as `launch_local` needs, for a function instead of a command.

    Args:
        function: what the process does; returns its exit status.
        environment: variables the process has besides this one's.
    """

    def __init__(self, function: Callable[[], int], environment: Mapping[str, str]) -> None:
        self.returncode: int | None = None
        # Whatever is still in a buffer would be written by both.
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.environ.update(environment)
            _run_and_exit(function)

    def poll(self) -> int | None:
        """The exit status, -n where signal n ended it, None as long as it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid != 0:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> int:
        """`poll`, once the process has ended."""
        while (status := self.poll()) is None:
            time.sleep(_POLL_SECONDS)
        return status

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run_and_exit(function: Callable[[], int]) -> None:
    """Never returns: the caller's frames belong to the other process."""
    status = FAILED
    try:
        status = function()
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else FAILED
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
