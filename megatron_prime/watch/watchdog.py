"""Finds a rank that hangs while the others wait for it, says which one and what it does, and ends the job.

A thread of every rank checks the main thread: is it inside a collective, does it use the CPU, and does what it waits
for make progress (`heartbeat`)? A rank that has waited for longer than the limit reads the status files of the others
(`rank_status`), which needs no collective.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from megatron_prime import heartbeat
from megatron_prime.watch.exit_status import STALLED
from megatron_prime.watch.hang_report import stall_report
from megatron_prime.watch.host_memory import host_memory_gib
from megatron_prime.watch.rank_status import RankStatus, StatusFile, read_statuses

logger = logging.getLogger(__name__)

_WAITING_MODULES = ("torch.distributed", "megatron.core")
"""Where the innermost Python frame of an idle thread is that waits for a collective or for a pipeline stage."""
_MAX_CPU_SHARE = 0.05
"""Of one core: who waits uses less, who computes between quick collectives more."""
_PATIENT_PHASES = frozenset({"start", "rollout", "evaluation", "refit"})
"""They may be idle without a collective: engines, which start in the first, and verifiers have limits of their own. The
other ranks wait there for one whose engine or verifier makes progress, however long it takes."""
_NUM_CHECKS = 20
"""Within the time limit."""
_MIN_CHECK_SECONDS, _MAX_CHECK_SECONDS = 0.1, 10.0
_SLOWEST_CHECKS = 2.5
"""Checks of this rank in which every other one that runs has checked as well."""
_STACK_SECONDS = 2.0
_FAILURE_CHECK_SECONDS = 0.1
_LOW_MEMORY_SHARE = 0.04
_STACK_SIGNAL = signal.SIGUSR2


class Watchdog:
    """Writes this rank's status and reads those of the others.

    Args:
        folder: of the ranks' status files, the same on every rank.
        rank: of this process.
        world_size: number of ranks.
        timeout_seconds: how long to wait for others, or for data.
    """

    def __init__(self, folder: Path, *, rank: int, world_size: int, timeout_seconds: float) -> None:
        self.rank = rank
        self._folder = folder
        self._world_size = world_size
        self._timeout_seconds = timeout_seconds
        self._check_seconds = min(_MAX_CHECK_SECONDS, max(_MIN_CHECK_SECONDS, timeout_seconds / _NUM_CHECKS))
        self._main_thread = threading.main_thread().ident
        self._lock = threading.Lock()
        self._phase, self._step, self._phase_start = "start", 0, time.monotonic()
        self._phase_with_stack = 0.0
        self._waits_in: str | None = None
        self._idle_start, self._idle_cpu_seconds = self._phase_start, 0.0
        self._num_checks = 0
        self._failure: str | None = None
        self._has_warned = False
        self._ended = threading.Event()
        self._file = StatusFile(folder, rank)
        if rank == 0:
            self._report_path.unlink(missing_ok=True)
        self._write()

    @property
    def _report_path(self) -> Path:
        return self._folder / "stall_report.txt"

    def _stack_path(self, rank: int, kind: Literal["asked", "late"]) -> Path:
        # A file for each writer: the signal's handler may write while the watchdog does.
        return self._folder / f"rank_{rank:05}.{kind}_stack"

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Checks for as long as the ``with`` block runs, which must be in the main thread."""
        with self._stack_path(self.rank, "asked").open("w") as stack_file:
            faulthandler.register(_STACK_SIGNAL, file=stack_file, all_threads=True)
            thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            thread.start()
            try:
                with heartbeat.listening(self.beat):
                    yield
            finally:
                self._ended.set()
                thread.join()
                faulthandler.unregister(_STACK_SIGNAL)
                self._file.close()

    def enter(self, phase: str, step: int) -> None:
        """Notes the phase that the main thread begins."""
        with self._lock:
            self._phase, self._step, self._phase_start = phase, step, time.monotonic()
            self._waits_in, self._idle_start = None, self._phase_start
            self._write()

    def beat(self) -> None:
        """Notes that what the main thread waits for makes progress."""
        self._idle_start = time.monotonic()

    def fail(self, reason: str) -> None:
        """Says that this rank ends, and why, before the others notice."""
        with self._lock:
            self._failure = reason
            self._write()

    def place(self) -> str:
        """Phase and step of this rank, for a message."""
        return self._status().place()

    def peers(self) -> dict[int, RankStatus]:
        """The last status of every other rank."""
        return {
            r: status for r, status in read_statuses(self._folder).items() if r != self.rank and r < self._world_size
        }

    def wait_for_failure(self, seconds: float) -> tuple[list[RankStatus], list[RankStatus]]:
        """Waits until a rank has said that it fails.

        Args:
            seconds: how long at the most.

        Returns:
            Ranks that fail; without any, those whose watchdog has not checked in the meantime.
        """
        before, deadline = self.peers(), time.monotonic() + seconds
        while time.monotonic() < deadline:
            if failed := [status for status in self.peers().values() if status.failure]:
                return failed, []
            time.sleep(_FAILURE_CHECK_SECONDS)
        now = self.peers()
        return [], [status for r, status in now.items() if r in before and status.num_checks == before[r].num_checks]

    def _status(self) -> RankStatus:
        return RankStatus(
            rank=self.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            phase=self._phase,
            step=self._step,
            phase_seconds=time.monotonic() - self._phase_start,
            num_checks=self._num_checks,
            idle_seconds=time.monotonic() - self._idle_start,
            waits_in=self._waits_in,
            failure=self._failure,
        )

    def _write(self) -> None:
        # A full disk is for the checkpoint to report, not for every phase.
        with contextlib.suppress(OSError):
            self._file.write(self._status())

    def _watch(self) -> None:
        while not self._ended.wait(self._check_seconds):
            with self._lock:
                self._num_checks += 1
                idle_seconds = self._idle_time()
                self._write()
            self._watch_memory()
            self._write_late_stack()
            if idle_seconds > self._timeout_seconds:
                before = self._everyone()
                time.sleep(_SLOWEST_CHECKS * self._check_seconds)
                if self._is_stalled(before):
                    self._end_stalled_job(before)

    def _idle_time(self) -> float:
        """How long the main thread has been waiting, 0 while it works."""
        now, cpu_seconds = time.monotonic(), self._main_cpu_seconds()
        place = _waiting_place(self._main_thread)
        used = cpu_seconds - self._idle_cpu_seconds
        if used > _MAX_CPU_SHARE * max(now - self._idle_start, self._check_seconds):
            self._idle_start, self._idle_cpu_seconds = now, cpu_seconds
        idle_seconds = now - self._idle_start
        self._waits_in = place if idle_seconds > 0 else None
        return 0.0 if place is None and self._phase in _PATIENT_PHASES else idle_seconds

    def _is_stalled(self, before: Mapping[int, RankStatus]) -> bool:
        """Whether this rank still waits, and for none that makes progress with what may take its time.

        Args:
            before: status by rank, from before every watchdog should have checked again.
        """
        with self._lock:
            if self._idle_time() <= self._timeout_seconds:
                return False
            if self._phase not in _PATIENT_PHASES:
                return True
        return not any(
            status.phase in _PATIENT_PHASES
            and status.waits_in is None
            and status.idle_seconds < self._timeout_seconds
            and rank in before
            and status.num_checks > before[rank].num_checks
            for rank, status in self.peers().items()
        )

    def _main_cpu_seconds(self) -> float:
        assert self._main_thread is not None
        return time.clock_gettime(time.pthread_getcpuclockid(self._main_thread))

    def _write_late_stack(self) -> None:
        """Leaves the stack of a phase that lasts beyond the limit, for a rank on another host that asks for it."""
        if self._phase_start != self._phase_with_stack and time.monotonic() - self._phase_start > self._timeout_seconds:
            self._phase_with_stack = self._phase_start
            with self._stack_path(self.rank, "late").open("w") as stack_file:
                faulthandler.dump_traceback(stack_file, all_threads=True)

    def _watch_memory(self) -> None:
        """Warns once per phase and host that its memory is nearly used up."""
        found = host_memory_gib() if os.environ.get("LOCAL_RANK", "0") == "0" else None
        if found is None or self._has_warned == (found[0] < _LOW_MEMORY_SHARE * found[1]):
            return
        self._has_warned = not self._has_warned
        if self._has_warned:
            logger.warning(
                "host %s has %.2f GiB of its %.1f GiB memory left in %s: expect a rank to be killed; use smaller "
                "micro-batches, shorter answers, more hosts, or reference.source=policy",
                *(socket.gethostname(), *found, self._status().place()),
            )

    def _end_stalled_job(self, before: Mapping[int, RankStatus]) -> None:
        """Reports once for all ranks and ends this process; `before` as in `_is_stalled`."""
        try:
            report = os.open(self._report_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            # Another rank reports; its exit ends this one where a launcher watches over both.
            time.sleep(3 * self._check_seconds + 2 * _STACK_SECONDS)
            os._exit(STALLED)
        text = stall_report(before, self._everyone(), self._stack_of) + "\n"
        os.write(report, text.encode())
        sys.stderr.write(text)
        sys.stderr.flush()
        os._exit(STALLED)

    def _everyone(self) -> dict[int, RankStatus]:
        with self._lock:
            self._num_checks += 1
            return self.peers() | {self.rank: self._status()}

    def _stack_of(self, status: RankStatus) -> str:
        """Python stacks of a rank: asked for on this host, where it may be stopped; else what its watchdog wrote."""
        path = self._stack_path(status.rank, "asked")
        with contextlib.suppress(OSError):
            if status.host == socket.gethostname() and _catches(status.pid, _STACK_SIGNAL):
                written = path.stat().st_size
                os.kill(status.pid, _STACK_SIGNAL)
                os.kill(status.pid, signal.SIGCONT)
                deadline = time.monotonic() + _STACK_SECONDS
                while path.stat().st_size == written and time.monotonic() < deadline:
                    time.sleep(_FAILURE_CHECK_SECONDS)
                time.sleep(_FAILURE_CHECK_SECONDS)
                return path.read_text()[written:]
            return self._stack_path(status.rank, "late").read_text()
        return ""


def _catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process of this host handles a signal, which would end it otherwise."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def _waiting_place(thread: int | None) -> str | None:
    """The function in which a thread waits for other ranks, if it is idle; None where it is not in such a function."""
    frame = sys._current_frames().get(thread or 0)
    if frame is None or not frame.f_globals.get("__name__", "").startswith(_WAITING_MODULES):
        return None
    return frame.f_code.co_name
