"""`megatron-prime demo`: SFT and then PRIME, with the shipped configurations."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from megatron_prime.assets import ASSETS
from megatron_prime.commands import train
from megatron_prime.commands.arguments import Commands, add_command
from megatron_prime.config.checks import check_config, raise_for_problems
from megatron_prime.config.loader import load_config
from megatron_prime.errors import ConfigError


def add_parser(commands: Commands) -> None:
    text = "the whole story in minutes on a CPU: SFT, then PRIME, in runs/demo/"
    parser = add_command(commands, "demo", text, run)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="run.seed=N, rollout.engine=vllm")


def run(options: argparse.Namespace) -> int:
    for command in demo_commands(options.overrides):
        print(f"megatron-prime {' '.join(command)}", flush=True)
        _, config, *overrides = command
        if status := train.start(load_config(config, overrides), command):
            return status
    return 0


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
    train_overrides = [*overrides, f"run.name={folder}", f"model.path=runs/{start}/hf"]
    config = load_config(ASSETS / "arithmetic.yaml", train_overrides)
    raise_for_problems(check_config(config, None, check_files=False))
    return [
        [
            "sft",
            str(ASSETS / "arithmetic_sft.yaml"),
            *seed,
            f"run.name={start}",
            f"model.path={ASSETS / 'models' / 'arithmetic'}",
        ],
        ["train", str(ASSETS / "arithmetic.yaml"), *train_overrides],
    ]


def folder_suffix(overrides: Sequence[str]) -> str:
    """Overrides as part of a folder's name."""
    short = (override.removeprefix("run.").removeprefix("rollout.") for override in sorted(overrides))
    return "".join("_" + re.sub(r"[^\w.-]+", "-", name) for name in short)
