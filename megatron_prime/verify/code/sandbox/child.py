"""A sandboxed process as its judge sees it: requests in, events out, a clock, and an end."""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import socket
import time
from collections.abc import Sequence
from typing import Any, Protocol

from megatron_prime.verify.code.sandbox import wire
from megatron_prime.verify.code.sandbox.launch import Launcher

WALL_PER_CPU = 2.0
"""A test may last this many times its CPU limit: waiting for a busy machine is not the program's fault."""
MAX_SAID_BYTES = 4 * 2**20
"""Of events; more than the reports on 10,000 tests. Without an end a program could keep its judge reading for ever."""
_LONGEST_NAP_SECONDS = 0.25
_SHORTEST_NAP_SECONDS = 0.01
_FAREWELL_SECONDS = 1.0


class OutOfTime(Exception):
    """A limit of time has passed."""


class Child:
    """A process of a launcher. Use as a context manager: its end is certain.

    Args:
        launcher: starts it.
        role: of `program`.
        slot: whose user it is.
        cpu_seconds: its CPU time, enforced by the kernel.
        stdin, stdout, calls: descriptors; the null device where None.
    """

    def __init__(
        self,
        launcher: Launcher,
        role: str,
        slot: int,
        cpu_seconds: float,
        *,
        stdin: int | None = None,
        stdout: int | None = None,
        calls: int | None = None,
    ) -> None:
        self._control, theirs = socket.socketpair()
        self._locked_in = False
        self._num_said = 0
        self._frames = wire.Frames()
        self._events: list[dict[str, Any]] = []
        self._status: int | None = None
        self._cpu_limit = math.ceil(cpu_seconds)
        self._start = time.monotonic()
        null = os.open(os.devnull, os.O_RDWR)
        chosen = [null if number is None else number for number in (stdin, stdout, theirs.fileno(), calls)]
        try:
            self._process = launcher.start(role, slot, self._cpu_limit, (chosen[0], chosen[1], chosen[2], chosen[3]))
        except BaseException:
            self._control.close()
            raise
        finally:
            os.close(null)
            theirs.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def events_descriptor(self) -> int:
        """Readable when there are events, or when the process has closed its side."""
        return self._control.fileno()

    @property
    def end_descriptor(self) -> int:
        """Readable when the process has ended."""
        return self._process.fileno()

    def cpu_seconds(self) -> float | None:
        """CPU time so far, where it can be known."""
        return None if self._status is not None else self._process.cpu_seconds()

    def request(self, message: Any, patience_seconds: float) -> None:
        """Sends the request that the process waits for."""
        send_all(self._control, message, patience_seconds)

    def take_events(self) -> list[dict[str, Any]]:
        """What the process has said since the last time; nothing it says is sure to be true.

        A process that says more than `MAX_SAID_BYTES` is killed.
        """
        taken: list[dict[str, Any]] = []
        self._control.setblocking(False)
        with contextlib.suppress(OSError, wire.WireError):
            while self._num_said <= MAX_SAID_BYTES and (data := self._control.recv(2**18)):
                self._num_said += len(data)
                if not self._locked_in:
                    self._locked_in, data = True, data[len(wire.LOCKED_IN) :]
                taken += [message for message in self._frames.feed(data) if isinstance(message, dict)]
        self._events += taken
        if self._num_said > MAX_SAID_BYTES and self._status is None:
            self._process.kill()
        return taken

    def end(self) -> int:
        """Kills the process if it still runs; its exit status."""
        if self._status is None:
            # Should the launcher itself fail now, there is nothing left to end.
            self._status = -signal.SIGKILL
            self._process.kill()
            self._status = self._process.reap()
            self.take_events()
            self._control.close()
        return self._status

    def explain(self) -> str:
        """The status that the end of the process means: ``pass`` where it just ended.

        ``harness_error`` where it never was locked in, and so has run nothing; the exit status, which is the program's
        to choose, has no say in that.
        """
        if self._status is None:
            # Whoever notices that its pipe is closed comes a moment before the end of the process.
            _poll(self.end_descriptor).poll(1000 * _FAREWELL_SECONDS)
        spent = time.monotonic() - self._start
        status = self.end()
        if not self._locked_in:
            return "harness_error"
        if self._num_said > MAX_SAID_BYTES:
            return "output_limit"
        if status in (-signal.SIGXCPU, -signal.SIGKILL):
            # The kernel kills for two reasons, and one of them takes its time.
            return "time_limit" if status == -signal.SIGXCPU or spent >= self._cpu_limit else "memory_limit"
        for event in self._events:
            if event.get("event") == "compile_error":
                return "compile_error"
            if event.get("event") == "exception":
                return {"MemoryError": "memory_limit", "OutputLimit": "output_limit"}.get(
                    str(event.get("error")), "runtime_error"
                )
        return "pass" if status == 0 else "runtime_error"


class HasClock(Protocol):
    """Something with a CPU clock."""

    def cpu_seconds(self) -> float | None: ...


class Stopwatch:
    """Time left for one test: CPU time of some processes, wall time, and an end that comes before both.

    Args:
        processes: whose CPU time counts, from now on.
        cpu_seconds: limit of it.
        deadline: in `time.monotonic` seconds.
    """

    def __init__(self, processes: Sequence[HasClock], cpu_seconds: float, deadline: float) -> None:
        self._processes = processes
        self._cpu_end = cpu_seconds + self._cpu()
        self._deadline = min(deadline, time.monotonic() + WALL_PER_CPU * cpu_seconds)

    def _cpu(self) -> float:
        return sum(process.cpu_seconds() or 0.0 for process in self._processes)

    def wait(self, *descriptors: int) -> set[int]:
        """Waits until a descriptor is readable; those that are.

        Raises:
            OutOfTime: a limit has passed.
        """
        poll = _poll(*descriptors)
        while True:
            wall_left = self._deadline - time.monotonic()
            if wall_left <= 0:
                raise OutOfTime
            cpu_left = self._cpu_end - self._cpu()
            if cpu_left <= 0:
                raise OutOfTime
            nap = min(wall_left, max(_SHORTEST_NAP_SECONDS, min(_LONGEST_NAP_SECONDS, cpu_left)))
            if ready := poll.poll(1000 * nap):
                return {descriptor for descriptor, _ in ready}

    @property
    def wall_seconds(self) -> float:
        """Until the deadline, never 0."""
        return max(self._deadline - time.monotonic(), _SHORTEST_NAP_SECONDS)


def send_all(channel: socket.socket, message: Any, patience_seconds: float) -> None:
    """Sends a whole message to a process that may not care to read it.

    Raises:
        OutOfTime: it has not read it in time.
        WireError: it is gone.
    """
    channel.settimeout(patience_seconds)
    try:
        channel.sendall(wire.frame(message))
    except TimeoutError as error:
        raise OutOfTime from error
    except OSError as error:
        raise wire.WireError(f"nobody reads: {error}") from error


def _poll(*descriptors: int) -> select.poll:
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return poll
