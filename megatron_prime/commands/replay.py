"""`megatron-prime replay`: an update that was not finite, run again response by response."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_prime.commands.arguments import Commands, add_command
from megatron_prime.launch.local import is_launched, is_main_rank, launch_local


def add_parser(commands: Commands) -> None:
    text = "run an update again that was not finite, response by response"
    parser = add_command(commands, "replay", text, run)
    parser.add_argument("file", type=Path, help="runs/NAME/failures/step_N_ROLE.pt")
    text = "newest checkpoint before the update, if any (default), or the run's starting model"
    parser.add_argument("--weights", choices=["checkpoint", "start"], default="checkpoint", help=text)


def run(options: argparse.Namespace) -> int:
    from megatron_prime.assembly.replay import replay, replay_config

    config = replay_config(options.file)
    if not is_launched() and config.parallel.world_size > 1:
        return launch_local(options.arguments, config.parallel.world_size, config.run.num_threads)
    lines = replay(options.file, options.weights)
    if is_main_rank():
        print("\n".join(lines))
    return 0
