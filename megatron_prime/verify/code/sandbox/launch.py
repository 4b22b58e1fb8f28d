"""The worker's side of the wall: starting a sandboxed process, watching it, ending it."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

ROOT = str(Path(__file__).resolve().parents[4])
"""The folder that the package is in."""
STACK_BYTES = 256 * 2**20
STARTUP_SECONDS = 60.0
Descriptors = tuple[int, int, int, int]
_BOOT = "import sys; {path}sys.path.insert(0, {root!r}); from {module} import main; main()"


class SandboxError(Exception):
    """This machine does not offer the isolation, or the fork server is gone."""


class Process(Protocol):
    """A sandboxed process."""

    def fileno(self) -> int:
        """Becomes readable when the process has ended."""
        ...

    def cpu_seconds(self) -> float | None:
        """CPU time so far, where it can be known."""
        ...

    def kill(self) -> None: ...

    def reap(self) -> int:
        """Waits for the end; the exit status, negative for a signal."""
        ...


class Launcher(Protocol):
    """One kind of isolation."""

    def start(self, role: str, slot: int, cpu_seconds: int, descriptors: Descriptors) -> Process:
        """Starts a process in a role of `program`.

        Args:
            role: ``script``, ``serve`` or ``test``.
            slot: 0 for the program, 1 for its tests; where there are users to spare each has its own.
            cpu_seconds: CPU time of the process, after which the kernel ends it.
            descriptors: standard input, standard output, control, calls; stay open here.
        """
        ...

    def close(self) -> None: ...


def python_command(module: str, *arguments: str, module_path: Sequence[str] | None = None) -> list[str]:
    """A command line that runs ``module.main``.

    Args:
        module: of this package.
        arguments: of the command line.
        module_path: where else modules are found; by default the standard library and site-packages.
    """
    flags, found = ("-sPB", "") if module_path is None else ("-sPBS", f"sys.path[:] = {list(module_path)!r}; ")
    return [sys.executable, flags, "-c", _BOOT.format(path=found, root=ROOT, module=module), *arguments]


def environment() -> dict[str, str]:
    """What programs see; the same hash seed every time, so that a program does the same every time."""
    return {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/tmp", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}


class _Forked:
    """A program of the fork server."""

    def __init__(self, server: ForkServer, pid: int, handle: int) -> None:
        self._server = server
        self._pid = pid
        self._handle = handle
        self._clock = _cpu_clock(handle)

    def fileno(self) -> int:
        return self._handle

    def cpu_seconds(self) -> float | None:
        try:
            return time.clock_gettime(self._clock)
        except OSError:
            return None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def reap(self) -> int:
        os.close(self._handle)
        return self._server.ask({"reap": self._pid})[0]["status"]


def _cpu_clock(handle: int) -> int:
    """The clock of a process, by the kernel's encoding of per-process CPU clocks (clock_getcpuclockid)."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/self/fdinfo/{handle}").read_text().splitlines())
    return (~int(fields["Pid"]) << 3) | 2


class ForkServer:
    """Programs forked from a warm interpreter.

    Args:
        walls: in namespaces of its own; without, the programs see this machine's files.
        memory_bytes: address space of a program beyond the interpreter's own.

    Raises:
        SandboxError: the machine refuses.
    """

    def __init__(self, walls: bool, memory_bytes: int) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        mode = "namespaces" if walls else "none"
        numbers = [str(number) for number in (theirs.fileno(), mode, spare_user(), memory_bytes)]
        # The room for a program's stack is fixed when the interpreter starts.
        with stack_limit():
            self._process = subprocess.Popen(
                python_command("megatron_prime.verify.code.sandbox.zygote", *numbers),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment(),
                cwd="/",
            )
        theirs.close()
        self._channel.settimeout(STARTUP_SECONDS)
        hello, _ = self._receive()
        if "ready" not in hello:
            self.close()
            raise SandboxError(str(hello.get("failed", "the fork server did not start")))

    def start(self, role: str, slot: int, cpu_seconds: int, descriptors: Descriptors) -> Process:
        """See `Launcher.start`."""
        reply, handles = self.ask({"start": role, "slot": slot, "cpu_seconds": cpu_seconds}, descriptors)
        return _Forked(self, reply["pid"], handles[0])

    def ask(self, request: dict[str, object], descriptors: tuple[int, ...] = ()) -> tuple[dict[str, int], list[int]]:
        """One request to the fork server and its reply."""
        try:
            socket.send_fds(self._channel, [json.dumps(request).encode()], descriptors)
        except OSError as error:
            raise SandboxError(f"the fork server is gone: {error}") from error
        return self._receive()

    def close(self) -> None:
        """Ends the fork server and all its programs."""
        self._channel.close()
        self._process.kill()
        self._process.wait()

    def _receive(self) -> tuple[dict[str, int], list[int]]:
        try:
            data, handles, _, _ = socket.recv_fds(self._channel, 4096, 1)
        except OSError as error:
            raise SandboxError(f"the fork server does not answer: {error}") from error
        if not data:
            raise SandboxError("the fork server is gone")
        return json.loads(data), handles


@contextlib.contextmanager
def stack_limit() -> Iterator[None]:
    """A larger main stack for the interpreters started inside the ``with`` block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = STACK_BYTES if hard == resource.RLIM_INFINITY else min(STACK_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))


def spare_user() -> int:
    """First of two user ids that nobody has, different for every process; 0 where this is not root's to choose."""
    if os.geteuid() != 0:
        return 0
    ranges = [[int(word) for word in line.split()] for line in Path("/proc/self/uid_map").read_text().splitlines()]
    first, _, size = max(ranges, key=lambda entry: entry[2])
    if size < 2**14:
        return 0
    last = min(first + size, 2**31) - 1
    num_pairs = min(size // 4, 2**22)
    return last - 1 - 2 * (os.getpid() % num_pairs)
