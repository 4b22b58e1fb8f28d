"""Whether a node can train: run once per node before a job, ``python -m megatron_prime.launch.health``.

Prints ``ok NODE`` or one line ``bad NODE: reason; fix`` per problem and exits with 0 or 1. Loads no torch.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_MAX_CLOCK_SKEW_SECONDS = 120.0


def problems_of_node(
    *, min_gpus: int, folder: Path, min_disk_gib: float, min_shm_mib: float, started: float | None
) -> list[str]:
    """Everything that is wrong here.

    Args:
        min_gpus: GPUs that must answer without uncorrected memory errors.
        folder: shared folder that must be writable and have room.
        min_disk_gib: room in it.
        min_shm_mib: room in /dev/shm, through which NCCL and data loaders exchange.
        started: seconds since 1970 on the first node when the check began; None checks no clock.
    """
    problems = _gpu_problems(min_gpus) if min_gpus else []
    problems += _disk_problems(folder, min_disk_gib)
    free_mib = shutil.disk_usage("/dev/shm").free / 2**20
    if free_mib < min_shm_mib:
        problems.append(f"/dev/shm has {free_mib:.0f} MiB free of the {min_shm_mib:.0f} needed; remove what fills it")
    if started is not None and abs(time.time() - started) > _MAX_CLOCK_SKEW_SECONDS:
        problems.append(f"the clock is {time.time() - started:+.0f} s from the first node's; synchronise it")
    return problems


def _gpu_problems(min_gpus: int) -> list[str]:
    query = ["nvidia-smi", "--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"nvidia-smi does not answer: {error}; repair the driver"]
    rows = [[cell.strip() for cell in line.split(",")] for line in result.stdout.splitlines() if "," in line]
    problems = [] if len(rows) >= min_gpus else [f"{len(rows)} of {min_gpus} GPUs answer; repair or drain the node"]
    broken = [index for index, errors in rows if errors.isdigit() and int(errors) > 0]
    if broken:
        problems.append(f"GPUs {', '.join(broken)} have uncorrected memory errors; reset or replace them")
    return problems


def _disk_problems(folder: Path, min_disk_gib: float) -> list[str]:
    probe = folder / f".health_{socket.gethostname()}_{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("written")
        written = probe.read_text()
        probe.unlink()
        free_gib = shutil.disk_usage(folder).free / 2**30
    except OSError as error:
        return [f"{folder} cannot be written: {error}; mount it or correct its rights"]
    if written != "written":
        return [f"{folder} does not give back what was written; check the file system"]
    if free_gib < min_disk_gib:
        return [f"{folder} has {free_gib:.1f} GiB free of the {min_disk_gib:g} needed; make room"]
    return []


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks this node."""
    parser = argparse.ArgumentParser(description="checks whether this node can train")
    parser.add_argument("--min-gpus", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--min-disk-gib", type=float, default=1.0)
    parser.add_argument("--min-shm-mib", type=float, default=256.0)
    parser.add_argument("--started", type=float)
    options = parser.parse_args(arguments)
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    problems = problems_of_node(**vars(options))
    print("\n".join(f"bad {node}: {problem}" for problem in problems) or f"ok {node}", flush=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
