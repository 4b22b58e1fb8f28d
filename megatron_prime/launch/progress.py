"""Newest complete checkpoint of a run: ``python -m megatron_prime.launch.progress train CONFIG [key=value ...]``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_prime.config import load_config


def newest_step(config_path: str, overrides: Sequence[str]) -> int:
    """Step of the newest complete checkpoint, -1 without one."""
    run = load_config(config_path, list(overrides)).run
    folder = Path(run.directory) / run.name / "checkpoints"
    steps = [int(path.name.removeprefix("step_")) for path in folder.glob("step_*") if path.suffix == ""]
    return max(steps, default=-1)


if __name__ == "__main__":
    print(newest_step(sys.argv[2], sys.argv[3:]))
