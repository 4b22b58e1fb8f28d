"""System calls that Python has no function for."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)

prctl = _libc.prctl
unshare = _libc.unshare
mount = _libc.mount
umount = _libc.umount2
syscall = _libc.syscall
prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
syscall.restype = ctypes.c_long

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38


def call(function: Callable[..., int], *arguments: Any) -> None:
    """Calls and raises an OSError where the result is negative."""
    if function(*arguments) < 0:
        number = ctypes.get_errno()
        name = getattr(function, "__name__", "system call")
        raise OSError(number, f"{name}: {os.strerror(number)}")


def set_process_option(option: int, value: int) -> None:
    """``prctl`` with one argument."""
    call(prctl, option, value, 0, 0, 0)
