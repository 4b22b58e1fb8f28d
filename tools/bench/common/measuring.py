"""What every bench needs: its options, memory of processes, a name for the machine, a place for results.

Importing this imports no library: some benches measure what those take.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[3]
BUILD = ROOT / "build" / "bench"
NO_GPU_STATUS = 77
"""Exit status of a bench that needs a GPU where there is none."""

Row = dict[str, Any]
"""One line of a bench's table: its variant, seconds, and what else was measured."""


def bench_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of all benches: `--tiny` and `--output`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tiny", action="store_true", help="small models and few repeats: shows in seconds that the bench runs"
    )
    parser.add_argument(
        "--output", type=Path, default=BUILD, help="folder of the result and of scratch files (default: build/bench)"
    )
    return parser


def machine(*details: str) -> str:
    """Processor, cores, torch's version and what else a bench has to say of its circumstances."""
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    processor = found.group(1) if found else platform.machine()
    return ", ".join([processor, f"{os.cpu_count()} cores", f"torch {importlib.metadata.version('torch')}", *details])


def write_result(name: str, machine: str, rows: Sequence[Row], options: argparse.Namespace, **more: Any) -> None:
    """Writes NAME.json into the folder that `--output` names; a tiny run's says that it is one.

    Args:
        name: of the bench.
        machine: where it ran.
        rows: `ours` and what stands beside it.
        options: of `bench_parser`.
        more: what is the same for all rows.
    """
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / f"{name}.json"
    content = {"machine": machine, **({"tiny": True} if options.tiny else {}), **more, "rows": rows}
    file.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {file}")


def exit_without_gpu() -> NoReturn:
    """Says that this machine has no GPU and ends the bench with NO_GPU_STATUS."""
    print("no GPU here: nothing was measured (--host goes through the motions on the CPU)")
    sys.exit(NO_GPU_STATUS)


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
