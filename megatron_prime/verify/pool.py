"""Worker processes that judge, and that can be killed.

A symbolic comparison may take forever or all memory, a program may be hostile, and no time limit inside a process
stops everything. So each case runs in a worker process with a wall-clock limit, after which the worker and all that
it has started are killed and replaced. A thread hands out cases and collects verdicts, so that they are reached while
the trainer samples. Workers start when the first case of their kind needs them and stay for the next ones.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Any, Literal

from megatron_prime.errors import VerifierError

STARTUP_SECONDS = 120.0
"""A worker that is not ready by then is broken, even on a busy machine."""
MAX_WAITING = 4096
"""Cases that wait for a worker at the most; whoever submits more has to wait too."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerKind:
    """How workers for one kind of case are started."""

    name: str
    command: Callable[[int], Sequence[str]]
    """Command line of a worker, given the descriptor of its pipe."""
    version: str
    """Of everything a verdict depends on beside the case: the grader, its limits, its isolation."""
    advice: str
    """What a user may do where a worker does not start."""
    cacheable: Callable[[Any], bool]
    """Whether a reply is certain, and the same the next time."""
    environment: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one case."""

    end: Literal["answered", "timeout", "died"]
    reply: Any
    """The worker's answer where it gave one."""
    seconds: float
    """Time that the worker spent on it; 0 where the answer was known already."""


@dataclass(slots=True)
class _Case:
    number: int
    key: bytes
    request: bytes
    limit_seconds: float
    future: Future[Outcome]


class _Worker:
    """One worker process and the case it is working on."""

    def __init__(self, kind: WorkerKind) -> None:
        self.kind = kind
        self.connection, theirs = Pipe()
        # A plain subprocess: multiprocessing's spawn would import the trainer's main module, torch included.
        self.process = subprocess.Popen(
            kind.command(theirs.fileno()),
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=kind.environment,
        )
        theirs.close()
        self.ready = False
        self.case: _Case | None = None
        self.since = time.monotonic()
        self.deadline = self.since + STARTUP_SECONDS

    @property
    def idle(self) -> bool:
        return self.ready and self.case is None

    def assign(self, case: _Case) -> bool:
        """Sends a case; False where the process turns out to be dead."""
        try:
            self.connection.send_bytes(case.request)
        except OSError:
            return False
        self.case, self.since = case, time.monotonic()
        self.deadline = self.since + case.limit_seconds
        return True

    def receive(self) -> tuple[bool, Any]:
        """Whether a message has arrived, and it; not where the process died instead."""
        try:
            return True, json.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            return False, None

    def kill(self) -> int:
        """Ends the process group that the worker leads and returns its exit status."""
        self.connection.close()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


class WorkerPool:
    """Judges cases in worker processes, a limited number at a time over all kinds.

    Args:
        kinds: of workers.
        num_workers: processes that work at the same time.
        cache_size: verdicts that are remembered; 0 for none.
    """

    def __init__(self, kinds: Sequence[WorkerKind], num_workers: int, cache_size: int) -> None:
        self._kinds = {kind.name: kind for kind in kinds}
        self._num_workers = num_workers
        self._cache: OrderedDict[bytes, Any] = OrderedDict()
        self._cache_size = cache_size
        self._lock = threading.Condition()
        self._open: dict[bytes, Future[Outcome]] = {}
        self._waiting: dict[str, deque[_Case]] = {kind.name: deque() for kind in kinds}
        self._num_cases = 0
        self._workers: list[_Worker] = []
        self._thread: threading.Thread | None = None
        self._closing = False
        self._bell, self._ringer = Pipe(duplex=False)

    def submit(self, kind: str, request: Any, limit_seconds: float, *, patient: bool = True) -> Future[Outcome]:
        """Hands in a case; blocks while too many wait.

        Args:
            kind: name of the workers that can judge it.
            request: plain data, sent as JSON.
            limit_seconds: wall-clock limit, after which the worker is killed.
            patient: whether to wait for room. What an outcome calls must not: it runs in the thread that makes room.

        Returns:
            The outcome to come, shared by equal cases; it raises VerifierError where workers cannot start.
        """
        data = json.dumps(request).encode()
        key = hashlib.sha256(f"{kind} {self._kinds[kind].version} {limit_seconds} ".encode() + data).digest()
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                known: Future[Outcome] = Future()
                known.set_result(Outcome("answered", self._cache[key], 0.0))
                return known
            if key in self._open:
                return self._open[key]
            if patient:
                self._lock.wait_for(lambda: sum(map(len, self._waiting.values())) < MAX_WAITING)
            future = self._open[key] = Future()
            self._waiting[kind].append(_Case(self._num_cases, key, data, limit_seconds, future))
            self._num_cases += 1
            self._start_thread()
        self._ringer.send_bytes(b"")
        return future

    def close(self) -> None:
        """Kills all workers and drops the cases that wait; the next `submit` starts anew."""
        with self._lock:
            thread, self._thread, self._closing = self._thread, None, True
        if thread is not None:
            self._ringer.send_bytes(b"")
            thread.join()
        self._closing = False

    def _start_thread(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._work, name="verifier pool", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        """The thread: until `close`."""
        try:
            while not self._closing:
                self._assign()
                self._collect()
        finally:
            under_way = [worker.case for worker in self._workers if worker.case is not None]
            for worker in list(self._workers):
                self._drop(worker)
            self._fail(under_way + self._take_waiting(list(self._kinds)), VerifierError("the verifier was closed"))

    def _assign(self) -> None:
        """Gives idle workers the cases that have waited longest, and starts workers while there is room."""
        with self._lock:
            queues = sorted((queue[0].number, name) for name, queue in self._waiting.items() if queue)
        for _, name in queues:
            while (case := self._head(name)) is not None and self._num_busy() < self._num_workers:
                idle = next((w for w in self._workers if w.idle and w.kind.name == name), None)
                if idle is None:
                    self._start_workers(name)
                    break
                if not idle.assign(case):
                    _log.warning("a %s worker was gone; a new one takes its place", name)
                    self._drop(idle)
                    continue
                with self._lock:
                    self._waiting[name].popleft()
                    self._lock.notify_all()

    def _head(self, name: str) -> _Case | None:
        with self._lock:
            return self._waiting[name][0] if self._waiting[name] else None

    def _num_busy(self) -> int:
        return sum(not worker.idle for worker in self._workers)

    def _start_workers(self, name: str) -> None:
        """As many as cases wait, less those that are starting already."""
        num_starting = sum(not worker.ready for worker in self._workers if worker.kind.name == name)
        num_wanted = len(self._waiting[name]) - num_starting
        for _ in range(min(num_wanted, self._num_workers - self._num_busy())):
            try:
                self._workers.append(_Worker(self._kinds[name]))
            except OSError as error:
                self._start_failed(self._kinds[name], error)
                return

    def _start_failed(self, kind: WorkerKind, error: OSError) -> None:
        """A machine that has no room for one more process may go on with those that there are."""
        if any(worker.kind is kind for worker in self._workers):
            _log.warning("no further %s worker could be started: %s", kind.name, error)
            return
        reason = f"a {kind.name} worker could not be started: {error}"
        self._fail(self._take_waiting([kind.name]), VerifierError(f"{reason}; {kind.advice}"))

    def _collect(self) -> None:
        """Waits for news, at the longest until the nearest deadline; kills what is late."""
        active = {worker.connection: worker for worker in self._workers if not worker.idle}
        deadlines = [worker.deadline for worker in active.values()]
        patience = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        arrived = set(wait([self._bell, *active], timeout=patience))  # pyright: ignore[reportArgumentType]
        if self._bell in arrived:
            while self._bell.poll():
                self._bell.recv_bytes()
        for connection, worker in active.items():
            if connection in arrived:
                self._take_message(worker)
            elif time.monotonic() >= worker.deadline:
                self._kill_late(worker)

    def _take_message(self, worker: _Worker) -> None:
        alive, message = worker.receive()
        case, worker.case = worker.case, None
        if not worker.ready:
            if message == "ready":
                worker.ready = True
                return
            code = self._drop(worker)
            reason = f"a {worker.kind.name} worker did not start (exit status {code}): {message or 'no message'}"
            self._fail(self._take_waiting([worker.kind.name]), VerifierError(f"{reason}; {worker.kind.advice}"))
            return
        if not alive:
            code = self._drop(worker)
            _log.warning("a %s worker died (exit status %s)", worker.kind.name, code)
        if case is not None:
            self._finish(worker, case, "answered" if alive else "died", message)

    def _kill_late(self, worker: _Worker) -> None:
        case = worker.case
        self._drop(worker)
        if case is not None:
            self._finish(worker, case, "timeout", None)
        else:
            error = f"a {worker.kind.name} worker was not ready within {STARTUP_SECONDS:.0f} s"
            self._fail(self._take_waiting([worker.kind.name]), VerifierError(error))

    def _finish(self, worker: _Worker, case: _Case, end: Literal["answered", "timeout", "died"], reply: Any) -> None:
        with self._lock:
            del self._open[case.key]
            if end == "answered" and self._cache_size > 0 and worker.kind.cacheable(reply):
                self._cache[case.key] = reply
                if len(self._cache) > self._cache_size:
                    self._cache.popitem(last=False)
        case.future.set_result(Outcome(end, reply, time.monotonic() - worker.since))

    def _take_waiting(self, names: Sequence[str]) -> list[_Case]:
        with self._lock:
            cases = [case for name in names for case in self._waiting[name]]
            for name in names:
                self._waiting[name].clear()
            self._lock.notify_all()
        return cases

    def _fail(self, cases: Sequence[_Case], error: VerifierError) -> None:
        with self._lock:
            for case in cases:
                del self._open[case.key]
        for case in cases:
            case.future.set_exception(error)

    def _drop(self, worker: _Worker) -> int:
        self._workers.remove(worker)
        return worker.kill()
