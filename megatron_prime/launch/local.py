"""Starting the processes of a run on this machine."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from megatron_prime.config.schema import AnyConfig, PrimeConfig
from megatron_prime.watch.exit_status import EXPLAINED, INTERRUPTED, PEER_LOST
from megatron_prime.watch.interrupt import STOP_SIGNALS, signal_handlers
from megatron_prime.watch.rank_status import read_statuses

_POLL_SECONDS = 0.05
_GRACE_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1
_SIGNALLED = 128


def is_launched() -> bool:
    """Whether torchrun, or anything else that sets torch's variables, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_main_rank() -> bool:
    """Whether this process prints for all ranks, or is the only one."""
    return os.environ.get("RANK", "0") == "0"


def command_of(config: AnyConfig) -> Literal["train", "sft"]:
    """The command that runs a configuration."""
    return "train" if isinstance(config, PrimeConfig) else "sft"


def local_command(config: AnyConfig, config_path: str, overrides: Sequence[str]) -> str:
    """What `launch_local` starts, one line per rank."""
    world_size, num_threads = config.parallel.world_size, config.run.num_threads
    command = shlex.join(["megatron-prime", command_of(config), config_path, *overrides])
    environments = [_rank_environment(rank, world_size, num_threads, "<free port>") for rank in range(world_size)]
    return "\n".join(" ".join([*map("=".join, variables.items()), command]) for variables in environments)


def _rank_environment(rank: int, world_size: int, num_threads: int, port: str) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": str(num_threads),
    }


def launch_local(arguments: Sequence[str], world_size: int, num_threads: int, ranks_folder: Path | None = None) -> int:
    """Runs ``megatron-prime`` with the same arguments on ``world_size`` processes of this machine.

    The first process to fail takes the others down; none outlives this one. One that could not say why is named with
    what it was doing. A stop signal is passed on to all, which then save and stop. A first Ctrl-C is such a signal, a
    second one ends all.

    Args:
        arguments: of the command line, without the program.
        world_size: processes.
        num_threads: CPU threads of each.
        ranks_folder: of the ranks' status files.

    Returns:
        The exit status: 0, or that of the process that failed first.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "megatron_prime", *arguments]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | _rank_environment(rank, world_size, num_threads, str(port)),
            preexec_fn=_die_with_parent,
        )
        for rank in range(world_size)
    ]
    try:
        with _forward_stop_signals(processes) as interrupted:
            rank, status = _wait(processes)
        if interrupted.is_set() and status > _SIGNALLED:
            # Ranks that do not save, or not yet.
            return _SIGNALLED + signal.SIGINT
        if status not in EXPLAINED | {0}:
            print(_how_it_ended(rank, processes[rank].pid, status, ranks_folder), file=sys.stderr, flush=True)
        if status == INTERRUPTED:
            _wait_for_the_rest(processes)
        return status
    except KeyboardInterrupt:
        return _SIGNALLED + signal.SIGINT
    finally:
        _end(processes)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> tuple[int, int]:
    """Rank and exit status of the first process that fails; the status is 0 when all have ended well."""
    while True:
        statuses = [process.poll() for process in processes]
        failed = [
            (rank, status if status > 0 else _SIGNALLED - status) for rank, status in enumerate(statuses) if status
        ]
        if failed:
            # Among those that ended at the same time, one that has lost another is not the reason.
            return min(failed, key=lambda end: end[1] == PEER_LOST)
        if all(status == 0 for status in statuses):
            return 0, 0
        time.sleep(_POLL_SECONDS)


def _how_it_ended(rank: int, pid: int, status: int, ranks_folder: Path | None) -> str:
    """One line about a rank that ended without a report."""
    if status > _SIGNALLED:
        number = status - _SIGNALLED
        known = number in {member.value for member in signal.Signals}
        how = f"was killed by {signal.Signals(number).name if known else f'signal {number}'}"
        how += " (often by the kernel, for want of memory)" if number == signal.SIGKILL else ""
    else:
        how = f"ended with status {status}"
    last = read_statuses(ranks_folder).get(rank) if ranks_folder is not None else None
    return f"rank {rank} {how}" + (f" in {last.place()}" if last is not None and last.pid == pid else "")


@contextmanager
def _forward_stop_signals(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[threading.Event]:
    """Yields whether there was a Ctrl-C."""
    interrupted = threading.Event()

    def forward(number: int, frame: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    def interrupt(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupted.set()
        # A terminal sends Ctrl-C to all processes, `kill` to this one only: a second SIGINT would end a rank.
        forward(signal.SIGTERM, frame)

    with signal_handlers(dict.fromkeys(STOP_SIGNALS, forward) | {signal.SIGINT: interrupt}):
        yield interrupted


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
