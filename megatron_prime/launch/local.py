"""Starting the processes of a run on this machine."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron_prime.launch.interrupt import INTERRUPTED, STOP_SIGNALS

_POLL_SECONDS = 0.05
_GRACE_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1


def is_launched() -> bool:
    """Whether torchrun, or anything else that sets torch's variables, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch_local(arguments: Sequence[str], world_size: int, num_threads: int) -> int:
    """Runs ``megatron-prime`` with the same arguments on ``world_size`` processes of this machine.

    The first process to fail takes the others down; none outlives this one. A stop signal is passed on to all, which
    then save and stop.

    Args:
        arguments: of the command line, without the program.
        world_size: processes.
        num_threads: CPU threads of each.

    Returns:
        The exit status: 0, or that of the process that failed first.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(num_threads),
    }
    command = [sys.executable, "-m", "megatron_prime.cli", *arguments]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            preexec_fn=_die_with_parent,
        )
        for rank in range(world_size)
    ]
    try:
        with _forward_stop_signals(processes):
            status = _wait(processes)
        if status == INTERRUPTED:
            _wait_for_the_rest(processes)
        return status
    except KeyboardInterrupt:
        # The terminal sent the interrupt to the processes as well.
        return 130
    finally:
        _end(processes)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Exit status of the first process that fails, 0 when all have ended well."""
    while True:
        statuses = [process.poll() for process in processes]
        for status in statuses:
            if status:
                return status if status > 0 else 128 - status
        if all(status == 0 for status in statuses):
            return 0
        time.sleep(_POLL_SECONDS)


@contextmanager
def _forward_stop_signals(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    def forward(number: int, frame: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_for_the_rest(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Gives ranks that have saved as well the time to end by themselves."""
    deadline = time.monotonic() + _GRACE_SECONDS
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    # SIGTERM would ask for a save, which ranks that miss one of them cannot make.
    for process in processes:
        if process.poll() is None:
            process.kill()
    for process in processes:
        process.wait()
