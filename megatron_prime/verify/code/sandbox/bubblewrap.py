"""Programs in bubblewrap, one start of an interpreter each: for machines that allow namespaces to it alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_prime.verify.code.sandbox import lockdown, namespaces
from megatron_prime.verify.code.sandbox.launch import (
    ROOT,
    Descriptors,
    Process,
    SandboxError,
    environment,
    python_command,
    spare_user,
    stack_limit,
)

_SIGNAL_BASE = 128
"""bubblewrap exits with this plus the number of the signal that ended the program."""


class _Wrapped:
    def __init__(self, process: subprocess.Popen[Any]) -> None:
        self._process = process
        self._handle = os.pidfd_open(process.pid)

    def fileno(self) -> int:
        return self._handle

    def cpu_seconds(self) -> float | None:
        # The program is a grandchild; the kernel's own limit is all there is.
        return None

    def kill(self) -> None:
        self._process.kill()

    def reap(self) -> int:
        os.close(self._handle)
        status = self._process.wait()
        return _SIGNAL_BASE - status if status > _SIGNAL_BASE else status


class Bubblewrap:
    """One bubblewrap per process (`launch.Launcher`).

    Args:
        memory_bytes: address space of a program beyond the interpreter's own.

    Raises:
        SandboxError: bubblewrap is not installed.
    """

    def __init__(self, memory_bytes: int) -> None:
        if shutil.which("bwrap") is None:
            raise SandboxError("bubblewrap (bwrap) is not installed")
        self._memory_bytes = memory_bytes
        self._user = _usable(spare_user())

    def start(self, role: str, slot: int, cpu_seconds: int, descriptors: Descriptors) -> Process:
        """See `launch.Launcher.start`."""
        numbers = [str(number) for number in (*descriptors, self._memory_bytes, cpu_seconds)]
        # The worker's own module path: site's search for more takes longer than the interpreter's start.
        module = "megatron_prime.verify.code.sandbox.wrapped"
        command = python_command(module, role, *numbers, module_path=sys.path)
        with stack_limit():
            process = subprocess.Popen(
                [*_walls(), "--", *command],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment(),
                cwd="/",
                start_new_session=True,
                **({"user": self._user + slot, "group": self._user + slot, "extra_groups": []} if self._user else {}),
            )
        return _Wrapped(process)

    def close(self) -> None:
        """Nothing outlives its program."""


def _usable(user: int) -> int:
    """The user, where it may execute this interpreter; an interpreter in root's home folder is root's alone."""
    if user == 0:
        return 0
    try:
        subprocess.run([sys.executable, "-c", ""], user=user, group=user, extra_groups=[], check=True)
    except (OSError, subprocess.CalledProcessError):
        return 0
    return user


def _walls() -> list[str]:
    own = Path(ROOT) / "megatron_prime"
    readable = [*namespaces.python_files(), sys.executable, os.path.realpath(sys.executable)]
    readable += [str(own / "__init__.py"), str(own / "verify" / "__init__.py"), str(own / "verify" / "code")]
    readable += [str(path) for path in [Path(sys.prefix) / "pyvenv.cfg"] if path.exists()]
    arguments = ["bwrap", "--unshare-all", "--die-with-parent", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL"]
    for path in dict.fromkeys(readable):
        arguments += ["--dev-bind" if path.startswith("/dev/") else "--ro-bind", path, path]
    scratch = ["--size", str(lockdown.SCRATCH_BYTES), "--tmpfs", namespaces.SCRATCH, "--chdir", namespaces.SCRATCH]
    return [*arguments, *scratch, "--remount-ro", "/"]
