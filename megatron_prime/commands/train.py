"""`megatron-prime train`: a PRIME run."""

from __future__ import annotations

import argparse
import faulthandler
from collections.abc import Sequence
from pathlib import Path

from megatron_prime.assembly.contracts import check_sockets
from megatron_prime.assembly.preflight import check
from megatron_prime.commands.arguments import Commands, add_command, add_configuration, load_kind
from megatron_prime.config.checks import raise_for_problems
from megatron_prime.config.schema import AnyConfig, PrimeConfig
from megatron_prime.launch.local import is_launched, is_main_rank, launch_local
from megatron_prime.watch.rank_status import RANKS_FOLDER


def add_parser(commands: Commands) -> None:
    add_configuration(add_command(commands, "train", "train by PRIME", run))


def run(options: argparse.Namespace) -> int:
    return start(load_kind(options, PrimeConfig), options.arguments)


def start(config: AnyConfig, arguments: Sequence[str]) -> int:
    """Runs a configuration, as one rank of it where a launcher has started this process.

    Args:
        config: the configuration.
        arguments: of the command that runs it; the ranks of this machine are started with them.
    """
    folder = Path(config.run.directory) / config.run.name
    if not is_launched() and config.parallel.world_size > 1:
        # The ranks look at files; to do it here too would import torch once more, for seconds.
        check(config, check_files=False)
        # Parts of the user's own are tried once and not by every rank.
        raise_for_problems(check_sockets(config))
        return launch_local(arguments, config.parallel.world_size, config.run.num_threads, folder / RANKS_FOLDER)
    from megatron_prime.assembly.run import run as run_ranks
    from megatron_prime.observe.report import final_table

    # A crash in native code then shows where Python was.
    faulthandler.enable()
    summary = run_ranks(config, ends_process=True)
    if is_main_rank():
        print(final_table(summary))
        print(f"everything is in {folder}/")
    return 0
