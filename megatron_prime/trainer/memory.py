"""Peak memory of the stages of a run."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import torch

_GIB = 2**30
_PEAK = re.compile(rb"VmHWM:\s+(\d+) kB")


class PeakMemory:
    """Peak resident memory of this process, and of CUDA's allocations if there are any, since `reset`."""

    def reset(self) -> None:
        """Starts anew from the current sizes; if the system does not allow it, peaks are those of the whole run."""
        # 5 resets the peak resident size, and nothing else (man 5 proc).
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()

    def gib(self, name: str) -> dict[str, float]:
        """Returns the peaks as metrics of a stage; {} if the system does not report them."""
        found: dict[str, float] = {}
        with contextlib.suppress(OSError):
            if peak := _PEAK.search(Path("/proc/self/status").read_bytes()):
                found[f"memory/{name}_gib"] = int(peak[1]) * 1024 / _GIB
        if torch.cuda.is_initialized():
            found[f"memory/{name}_gpu_gib"] = torch.cuda.max_memory_allocated() / _GIB
        return found
