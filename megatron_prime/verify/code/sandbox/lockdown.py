"""The last steps before a program's text runs: no rights, hard limits, few system calls. None can be undone."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
from dataclasses import dataclass

from megatron_prime.verify.code.sandbox import seccomp
from megatron_prime.verify.code.sandbox.libc import (
    PR_SET_DUMPABLE,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_PDEATHSIG,
    call,
    set_process_option,
    syscall,
)

SCRATCH_BYTES = 64 * 2**20
MAX_OPEN_FILES = 64
MAX_THREADS = 32
_SYS_CAPSET = {"x86_64": 126, "aarch64": 91}
_CAPABILITY_HEADER = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))
_NO_CAPABILITIES = ctypes.create_string_buffer(24)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a process may use."""

    address_space_bytes: int
    cpu_seconds: int
    count_threads: bool
    """Whether to limit threads, which the kernel counts per user: only where no one else is this user."""


def address_space_bytes() -> int:
    """Of the calling process, now."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def lock(bounds: Bounds, *, strict: bool) -> None:
    """Locks the calling process in.

    Args:
        bounds: its limits.
        strict: raise where the kernel has no seccomp; otherwise go on without.

    Raises:
        OSError: the kernel refuses.
    """
    call(syscall, _SYS_CAPSET[os.uname().machine], _CAPABILITY_HEADER, _NO_CAPABILITIES)
    # A change of user, which comes before, forgets this one.
    set_process_option(PR_SET_PDEATHSIG, signal.SIGKILL)
    set_process_option(PR_SET_DUMPABLE, 0)
    for limit, value in (
        (resource.RLIMIT_AS, bounds.address_space_bytes),
        (resource.RLIMIT_FSIZE, SCRATCH_BYTES),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    # The second one is for programs that ignore the signal of the first.
    resource.setrlimit(resource.RLIMIT_CPU, (bounds.cpu_seconds, bounds.cpu_seconds + 1))
    if bounds.count_threads:
        resource.setrlimit(resource.RLIMIT_NPROC, (MAX_THREADS, MAX_THREADS))
    set_process_option(PR_SET_NO_NEW_PRIVS, 1)
    try:
        seccomp.install_filter(seccomp.build_filter(os.getpid()))
    except OSError:
        if strict:
            raise
