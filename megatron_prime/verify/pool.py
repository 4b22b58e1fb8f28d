"""Grader processes that can be killed.

A symbolic comparison may take forever or all memory, and no Python-level time limit stops a big-integer power.
So each comparison runs in a worker process with a wall-clock limit, after which the worker is killed and
replaced. Workers start when the first case needs them and stay for the next batch.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path

from megatron_prime.errors import VerifierError

STARTUP_SECONDS = 120.0
"""A worker that is not ready by then is broken, even on a busy machine."""
ORPHAN_MARGIN_SECONDS = 1.0
"""A worker whose parent died ends itself this much after the limit of its case."""

_WORKER_SCRIPT = Path(__file__).with_name("worker.py")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one case."""

    status: str
    """``correct``, ``wrong``, ``malformed``, ``timeout`` or ``grader_error``."""
    seconds: float


class _Worker:
    """One grader process and the case it is working on."""

    def __init__(self, timeout_seconds: float, memory_gib: float) -> None:
        self.connection, theirs = Pipe()
        # A plain subprocess: multiprocessing's spawn would import the trainer's main module, torch included.
        # `-P` keeps this folder off the module path; `kill` ends the process group that the worker leads.
        command = [sys.executable, "-P", str(_WORKER_SCRIPT), str(theirs.fileno()), str(int(memory_gib * 2**30))]
        self._process = subprocess.Popen(
            [*command, str(timeout_seconds + ORPHAN_MARGIN_SECONDS)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        self.ready = False
        self.case: int | None = None
        self.since = time.monotonic()
        self.deadline = self.since + STARTUP_SECONDS

    @property
    def idle(self) -> bool:
        return self.ready and self.case is None

    def assign(self, case: int, request: bytes, timeout_seconds: float) -> bool:
        """Sends a case; False where the process turns out to be dead."""
        try:
            self.connection.send_bytes(request)
        except OSError:
            return False
        self.case, self.since = case, time.monotonic()
        self.deadline = self.since + timeout_seconds
        return True

    def receive(self) -> str | None:
        """The message that has arrived; None where the process died instead."""
        try:
            return json.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            return None

    def kill(self) -> int:
        """Ends the process group at once and returns the exit status of the worker."""
        self.connection.close()
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()


class GraderPool:
    """Compares answers in worker processes, with a time and a memory limit for each case.

    Args:
        num_workers: processes at the most.
        timeout_seconds: wall-clock limit of a case.
        memory_gib: address space of a process.
    """

    def __init__(self, num_workers: int, timeout_seconds: float, memory_gib: float) -> None:
        self._num_workers = num_workers
        self._timeout_seconds = timeout_seconds
        self._memory_gib = memory_gib
        self._workers: list[_Worker] = []

    def run(self, cases: Sequence[tuple[str, str]]) -> list[Outcome]:
        """Grades the cases side by side.

        Args:
            cases: (ground truth, answer) pairs.

        Returns:
            One outcome per case, in the order of the cases.

        Raises:
            VerifierError: a worker cannot start.
        """
        outcomes: dict[int, Outcome] = {}
        waiting = deque(range(len(cases)))
        try:
            while len(outcomes) < len(cases):
                self._start_workers(len(cases) - len(outcomes))
                self._assign(waiting, cases)
                outcomes.update(self._collect())
        finally:
            # After an error or Ctrl-C nobody would read the replies of the workers that still compute.
            for worker in [w for w in self._workers if w.case is not None]:
                self._drop(worker)
        return [outcomes[index] for index in range(len(cases))]

    def close(self) -> None:
        """Ends all workers; the next `run` starts new ones."""
        for worker in list(self._workers):
            self._drop(worker)

    def _start_workers(self, num_open_cases: int) -> None:
        while len(self._workers) < min(self._num_workers, num_open_cases):
            self._workers.append(_Worker(self._timeout_seconds, self._memory_gib))

    def _assign(self, waiting: deque[int], cases: Sequence[tuple[str, str]]) -> None:
        for worker in [w for w in self._workers if w.idle]:
            if not waiting:
                return
            request = json.dumps(cases[waiting[0]]).encode()
            if worker.assign(waiting[0], request, self._timeout_seconds):
                waiting.popleft()
            else:
                _log.warning("a grader process was gone; a new one takes its place")
                self._drop(worker)

    def _collect(self) -> dict[int, Outcome]:
        """Waits for replies, at the longest until the nearest deadline; kills what is late."""
        active = {worker.connection: worker for worker in self._workers if not worker.idle}
        if not active:
            return {}
        patience = min(worker.deadline for worker in active.values()) - time.monotonic()
        arrived = {active[connection] for connection in wait(list(active), timeout=max(0.0, patience))}  # pyright: ignore[reportArgumentType]
        outcomes: dict[int, Outcome] = {}
        for worker in active.values():
            case, seconds = worker.case, time.monotonic() - worker.since
            if worker in arrived:
                status = self._take_reply(worker)
            elif time.monotonic() >= worker.deadline:
                status = self._kill_late(worker)
            else:
                continue
            if case is not None:
                outcomes[case] = Outcome(status, seconds)
        return outcomes

    def _take_reply(self, worker: _Worker) -> str:
        message = worker.receive()
        if not worker.ready and message != "ready":
            code = self._drop(worker)
            raise VerifierError(
                f"a grader process did not start (exit status {code}): {message or 'no message'}; "
                f"install math-verify, or raise verifier.memory_gib (now {self._memory_gib})"
            )
        worker.ready, worker.case = True, None
        if message is None:
            code = self._drop(worker)
            _log.warning("a grader process died of its case (exit status %s)", code)
            return "grader_error"
        return message

    def _kill_late(self, worker: _Worker) -> str:
        started = worker.ready
        self._drop(worker)
        if not started:
            raise VerifierError(f"a grader process was not ready within {STARTUP_SECONDS:.0f} s")
        return "timeout"

    def _drop(self, worker: _Worker) -> int:
        self._workers.remove(worker)
        return worker.kill()
