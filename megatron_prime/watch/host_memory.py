"""Host memory: how much the machine, or the container, has left."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

_GIB = 2**30
_AVAILABLE = re.compile(r"MemAvailable:\s+(\d+) kB")
_TOTAL = re.compile(r"MemTotal:\s+(\d+) kB")
_CGROUP = Path("/sys/fs/cgroup")


def host_memory_gib() -> tuple[float, float] | None:
    """What is left of the host's memory, or of the container's where that is tighter, and the whole of it."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    available, total = _AVAILABLE.search(text), _TOTAL.search(text)
    if available is None or total is None:
        return None
    host = (int(available[1]) * 1024 / _GIB, int(total[1]) * 1024 / _GIB)
    return min([host, *_cgroup_gib()])


def _cgroup_gib() -> list[tuple[float, float]]:
    """The same of this process's control group and those above it (version 2)."""
    try:
        group = re.search(r"^0::/(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
    except OSError:
        return []
    if group is None:
        return []
    found = []
    folder = _CGROUP / group[1]
    while folder == _CGROUP or _CGROUP in folder.parents:
        # Not every group has a limit, and what is not mounted here cannot be read.
        with contextlib.suppress(OSError, ValueError):
            limit = int((folder / "memory.max").read_text())
            used = int((folder / "memory.current").read_text())
            files = re.search(r"^inactive_file (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
            # Cached files make room before anything is killed.
            left = limit - used + (int(files[1]) if files else 0)
            found.append((left / _GIB, limit / _GIB))
        folder = folder.parent
    return found
