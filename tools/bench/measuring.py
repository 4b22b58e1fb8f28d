"""What every bench needs: memory of processes, a name for the machine, a place for results.

Importing this imports no library: some benches measure what those take.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "bench"

Row = dict[str, Any]
"""One line of a bench's table: its variant, seconds, and what else was measured."""


def machine(*details: str) -> str:
    """Processor, cores, torch's version and what else a bench has to say of its circumstances."""
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    processor = found.group(1) if found else platform.machine()
    return ", ".join([processor, f"{os.cpu_count()} cores", f"torch {importlib.metadata.version('torch')}", *details])


def write_result(name: str, machine: str, rows: Sequence[Row], **more: Any) -> None:
    """Writes build/bench/NAME.json.

    Args:
        name: of the bench.
        machine: where it ran.
        rows: `ours` and what stands beside it.
        more: what is the same for all rows.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    file = BUILD / f"{name}.json"
    file.write_text(json.dumps({"machine": machine, **more, "rows": rows}, indent=1) + "\n")
    print(f"wrote {file}")


def resident_bytes(process_id: int | str = "self") -> int:
    """Memory that a process has now.

    Raises:
        OSError: it has ended.
    """
    return _status_bytes(process_id, "VmRSS")


def peak_bytes(process_id: int | str = "self") -> int:
    """The most memory that a process has had since its start, or since `reset_peak`.

    Raises:
        OSError: it has ended.
    """
    return _status_bytes(process_id, "VmHWM")


def reset_peak(process_id: int | str = "self") -> None:
    """Begins anew with a process's peak."""
    Path(f"/proc/{process_id}/clear_refs").write_text("5")


def _status_bytes(process_id: int | str, field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{process_id}/status").read_text())
    if found is None:
        raise ProcessLookupError(f"process {process_id} has ended")  # and was not waited for
    return int(found.group(1)) << 10
