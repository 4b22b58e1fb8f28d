"""The two commands that `megatron-prime demo` runs: SFT and then PRIME, with the shipped configurations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import megatron_prime
from megatron_prime.config.checks import check_config, raise_for_problems
from megatron_prime.config.loader import load_config
from megatron_prime.errors import ConfigError

_CONFIGS = Path(megatron_prime.__file__).resolve().parents[1] / "configs"


def demo_commands(overrides: Sequence[str]) -> list[list[str]]:
    """Arguments of both commands; whatever is set has run folders of its own.

    Args:
        overrides: ``run.seed=N`` and keys of section ``rollout``.

    Raises:
        ConfigError: another key, or a wrong value: told of before the first command has taken its minutes.
    """
    if any(not override.startswith(("run.seed=", "rollout.")) for override in overrides):
        raise ConfigError("demo: takes only run.seed=N and rollout.*; use sft and train for anything else")
    # Supervised runs sample nothing and have no rollout section.
    seed = [override for override in overrides if override.startswith("run.seed=")]
    start, folder = "demo/sft" + folder_suffix(seed), "demo" + folder_suffix(overrides)
    train = [*overrides, f"run.name={folder}", f"model.path=runs/{start}/hf"]
    raise_for_problems(check_config(load_config(_CONFIGS / "arithmetic.yaml", train), None, check_files=False))
    return [
        ["sft", str(_CONFIGS / "arithmetic_sft.yaml"), *seed, f"run.name={start}"],
        ["train", str(_CONFIGS / "arithmetic.yaml"), *train],
    ]


def folder_suffix(overrides: Sequence[str]) -> str:
    """Overrides as part of a folder's name."""
    short = (override.removeprefix("run.").removeprefix("rollout.") for override in sorted(overrides))
    return "".join("_" + re.sub(r"[^\w.-]+", "-", name) for name in short)
