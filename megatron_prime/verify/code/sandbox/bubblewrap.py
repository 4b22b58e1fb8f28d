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
        self._user = spare_user()
        if os.geteuid() == 0 and not self._user:
            raise SandboxError("programs would run as root: this user namespace has no other users")
        self._changes_inside = self._user != 0 and not _usable(self._user)
        """Whether root starts the interpreter, which is in its home folder, and another user goes on."""
        if self._changes_inside and not _may_unshare():
            raise SandboxError(
                f"programs would run as root: only root can execute {sys.executable}, and it lacks CAP_SYS_ADMIN; use"
                " an interpreter that every user can execute"
            )

    def start(self, role: str, slot: int, cpu_seconds: int, descriptors: Descriptors) -> Process:
        """See `launch.Launcher.start`."""
        user = self._user + slot if self._user else 0
        outside, inside = (0, user) if self._changes_inside else (user, 0)
        numbers = [str(number) for number in (*descriptors, self._memory_bytes, cpu_seconds, inside)]
        # The worker's own module path: site's search for more takes longer than the interpreter's start.
        module = "megatron_prime.verify.code.sandbox.wrapped"
        command = python_command(module, role, *numbers, module_path=namespaces.library_folders())
        with stack_limit():
            process = subprocess.Popen(
                [*_walls(self._changes_inside), "--", *command],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment(),
                cwd="/",
                start_new_session=True,
                **({"user": outside, "group": outside, "extra_groups": []} if outside else {}),
            )
        return _Wrapped(process)

    def close(self) -> None:
        """Nothing outlives its program."""


def _usable(user: int) -> bool:
    """Whether a user may execute this interpreter; one in root's home folder is root's alone."""
    try:
        subprocess.run([sys.executable, "-c", ""], user=user, group=user, extra_groups=[], check=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def _may_unshare() -> bool:
    """Whether this process has CAP_SYS_ADMIN, which bubblewrap as root works with."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return bool(int(status["CapEff"], 16) >> _CAP_SYS_ADMIN & 1)


_CAP_SYS_ADMIN = 21
_AS_USER = ["--unshare-all", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL"]
_AS_ROOT = [f"--unshare-{kind}" for kind in ("ipc", "pid", "net", "uts", "cgroup-try")]
_AS_ROOT += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]


def _walls(changes_inside: bool) -> list[str]:
    own = Path(ROOT) / "megatron_prime"
    readable = [*namespaces.python_files(), sys.executable, os.path.realpath(sys.executable)]
    readable += [str(own / "__init__.py"), str(own / "verify" / "__init__.py"), str(own / "verify" / "code")]
    readable += [str(path) for path in [Path(sys.prefix) / "pyvenv.cfg"] if path.exists()]
    arguments = ["bwrap", *(_AS_ROOT if changes_inside else _AS_USER), "--die-with-parent"]
    # First, or it would hide an interpreter that is below it.
    arguments += ["--size", str(lockdown.SCRATCH_BYTES), "--tmpfs", namespaces.SCRATCH]
    if changes_inside:
        # The user that goes on is not the one that makes them.
        arguments += ["--chmod", "1777", namespaces.SCRATCH]
        parents = {str(parent) for path in readable for parent in Path(path).parents} - {"/", namespaces.SCRATCH}
        for path in sorted(parents):
            arguments += ["--perms", "0755", "--dir", path]
    for path in dict.fromkeys(readable):
        arguments += ["--dev-bind" if path.startswith("/dev/") else "--ro-bind", path, path]
    return [*arguments, "--chdir", namespaces.SCRATCH, "--remount-ro", "/"]
