"""Newest complete checkpoint of a run: ``python -m megatron_prime.launch.newest_step train CONFIG [key=value ...]``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_prime.checkpoint.manifest import committed, step_of
from megatron_prime.config import load_config


def newest_step(config_path: str, overrides: Sequence[str]) -> int:
    """Step of the newest complete checkpoint, -1 without one."""
    run = load_config(config_path, list(overrides)).run
    found = committed(Path(run.directory) / run.name / "checkpoints")
    return step_of(found[-1]) if found else -1


if __name__ == "__main__":
    print(newest_step(sys.argv[2], sys.argv[3:]))
