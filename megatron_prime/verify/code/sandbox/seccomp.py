"""The system calls that a program may make, as a BPF filter written by hand: no library to install.

An allow-list: what is not named answers EPERM. There is no way to a new process, program, namespace or connection.
Threads are allowed, since deep recursion needs the stack of one. Numbers are from the kernel's unistd headers.
"""

from __future__ import annotations

import ctypes
import platform
import struct
from collections.abc import Sequence
from functools import lru_cache

from megatron_prime.verify.code.sandbox.libc import call, prctl

_ALLOWED = """
read 0 63, write 1 64, close 3 57, fstat 5 80, lseek 8 62, mmap 9 222, mprotect 10 226, munmap 11 215,
brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136,
rt_sigtimedwait 128 137, rt_sigsuspend 130 133, sigaltstack 131 132, pread64 17 67, pwrite64 18 68, readv 19 65,
writev 20 66, preadv 295 69, pwritev 296 70, dup 32 23, dup3 292 24, fcntl 72 25, flock 73 32, ftruncate 77 46,
truncate 76 45, fsync 74 82, fdatasync 75 83, fallocate 285 47, fadvise64 221 223, sendfile 40 71,
copy_file_range 326 285, openat 257 56, newfstatat 262 79, statx 332 291, faccessat 269 48, faccessat2 439 439,
readlinkat 267 78, getdents64 217 61, getcwd 79 17, chdir 80 49, fchdir 81 50, mkdirat 258 34, unlinkat 263 35,
renameat 264 38, renameat2 316 276, linkat 265 37, symlinkat 266 36, umask 95 166,
statfs 137 43, fstatfs 138 44, ppoll 271 73, pselect6 270 72, epoll_create1 291 20,
epoll_ctl 233 21, epoll_pwait 281 22, eventfd2 290 19, pipe2 293 59, socketpair 53 199, sendto 44 206,
recvfrom 45 207, getsockopt 55 209, setsockopt 54 208, shutdown 48 210, mremap 25 216, msync 26 227,
madvise 28 233, mincore 27 232, membarrier 324 283, nanosleep 35 101, clock_nanosleep 230 115,
clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169, getitimer 36 102, setitimer 38 103,
times 100 153, getpid 39 172, getppid 110 173, gettid 186 178, getuid 102 174, geteuid 107 175, getgid 104 176,
getegid 108 177, getgroups 115 158, getresuid 118 148, getresgid 120 150, getpgid 121 155, getsid 124 156,
getrlimit 97 163, getrusage 98 165, sysinfo 99 179, uname 63 160, sched_yield 24 124, sched_getaffinity 204 123,
sched_getparam 143 121, sched_getscheduler 145 120, getcpu 309 168, set_tid_address 218 96,
set_robust_list 273 99, get_robust_list 274 100, futex 202 98, futex_waitv 449 449, rseq 334 293,
restart_syscall 219 128, getrandom 318 278, exit 60 93, exit_group 231 94
"""
"""Name, number on x86_64, number on aarch64."""
_ALLOWED_X86 = """
stat 4, lstat 6, open 2, creat 85, access 21, poll 7, select 23, epoll_create 213,
epoll_wait 232, eventfd 284, pipe 22, dup2 33, readlink 89, getdents 78, mkdir 83, rmdir 84,
unlink 87, rename 82, link 86, symlink 88, alarm 37, pause 34, time 201, getpgrp 111,
arch_prctl 158"""
"""Older forms that aarch64 never had."""

_PRETENDED = ((91, 52), (268, 53), (452, 452), (280, 88))
"""fchmod, fchmodat, fchmodat2, utimensat: copying a file asks for them. They answer that all is well and do nothing, so
that what a program was given to read from and write to stays as it is."""
_PRETENDED_X86 = (90, 132, 235, 261)
"""chmod, utime, utimes, futimesat."""
_CLONE, _CLONE3, _IOCTL, _PRCTL, _PRLIMIT, _KILL, _TGKILL = (
    (56, 220),
    (435, 435),
    (16, 29),
    (157, 167),
    (302, 261),
    (62, 129),
    (234, 131),
)
_TERMINAL_REQUESTS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX: what opening and reading files asks for."""
_NAME_REQUESTS = (15, 16)
"""PR_SET_NAME, PR_GET_NAME: of threads."""
_CLONE_THREAD = 0x10000

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the tables and AUDIT_ARCH of `platform.machine()`."""

_LOAD, _JUMP_EQUAL, _JUMP_BITS, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_DONE, _EPERM, _ENOSYS = 0, 1, 38
_NUMBER_OFFSET, _ARCH_OFFSET, _ARGUMENTS_OFFSET = 0, 4, 16
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def supported() -> bool:
    """Whether there is a table for this machine."""
    return platform.machine() in _ARCHITECTURES


def build_filter(pid: int | None) -> bytes:
    """The filter for a process, an array of ``struct sock_filter``.

    Args:
        pid: the process, which may send signals to itself; nobody may where None.
    """
    column, _ = _ARCHITECTURES[platform.machine()]
    own = [] if pid is None else [pid]
    program = [_plain_part()]
    program += _when(_CLONE[column], [_instruction(_LOAD, _ARGUMENTS_OFFSET), *_any_bit(_CLONE_THREAD)])
    # The C library falls back to clone, whose flags a filter can read.
    program += _when(_CLONE3[column], [_instruction(_RETURN, _ERRNO | _ENOSYS)])
    program += _when(_IOCTL[column], _argument_in(1, _TERMINAL_REQUESTS))
    program += _when(_PRCTL[column], _argument_in(0, _NAME_REQUESTS))
    program += _when(_PRLIMIT[column], _argument_in(0, [0, *own]))
    program += _when(_KILL[column], _argument_in(0, own))
    program += _when(_TGKILL[column], _argument_in(0, own))
    program.append(_instruction(_RETURN, _ERRNO | _EPERM))
    return b"".join(program)


def install_filter(instructions: bytes) -> None:
    """Puts a filter on the calling process for good; ``no_new_privs`` must be set.

    Raises:
        OSError: the kernel refuses.
    """
    program = _Program(len(instructions) // 8, instructions)
    call(prctl, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program), 0, 0)


@lru_cache(maxsize=1)
def _plain_part() -> bytes:
    """The check of the architecture and the calls that are allowed whatever their arguments."""
    column, audit = _ARCHITECTURES[platform.machine()]
    program = [
        _instruction(_LOAD, _ARCH_OFFSET),
        _instruction(_JUMP_EQUAL, audit, 1, 0),
        _instruction(_RETURN, _KILL_PROCESS),
        _instruction(_LOAD, _NUMBER_OFFSET),
    ]
    numbers = [int(entry.split()[1 + column]) for entry in _ALLOWED.split(",")]
    if column == 0:
        numbers += [int(entry.split()[1]) for entry in _ALLOWED_X86.split(",")]
    for number in numbers:
        program += _when(number, [_instruction(_RETURN, _ALLOW)])
    for number in [entry[column] for entry in _PRETENDED] + list(_PRETENDED_X86 if column == 0 else ()):
        program += _when(number, [_instruction(_RETURN, _ERRNO | _DONE)])
    return b"".join(program)


def _when(number: int, body: Sequence[bytes]) -> list[bytes]:
    return [_instruction(_JUMP_EQUAL, number, 0, len(body)), *body]


def _argument_in(position: int, values: Sequence[int]) -> list[bytes]:
    """Allows the call where the low word of an argument is one of the values."""
    body = [_instruction(_LOAD, _ARGUMENTS_OFFSET + 8 * position)]
    for value in values:
        body += [_instruction(_JUMP_EQUAL, value, 0, 1), _instruction(_RETURN, _ALLOW)]
    return [*body, _instruction(_RETURN, _ERRNO | _EPERM)]


def _any_bit(bits: int) -> list[bytes]:
    return [
        _instruction(_JUMP_BITS, bits, 0, 1),
        _instruction(_RETURN, _ALLOW),
        _instruction(_RETURN, _ERRNO | _EPERM),
    ]


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
