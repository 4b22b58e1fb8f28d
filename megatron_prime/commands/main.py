"""The command line: parses it, runs the command, and prints the errors that users can repair."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence

from megatron_prime.commands import (
    check,
    convert,
    demo,
    evaluate,
    generate,
    launch,
    prepare,
    replay,
    serve,
    sft,
    train,
    verify,
)
from megatron_prime.errors import PrimeError, RunInterrupted
from megatron_prime.launch.local import is_main_rank
from megatron_prime.watch.exit_status import FAILED, INTERRUPTED, INVALID_INPUT

_COMMANDS = (demo, train, sft, check, serve, launch, replay, evaluate, generate, prepare, verify, convert)
_OTHER_RANKS_WAIT_SECONDS = 2.0
_SAME_ON_ALL_RANKS = ("data", "trainer", "mcore", "kernels", "verify.code.verifier")
"""Modules that all ranks run on the same values: their warnings are logged by the main one alone."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run`, which takes the parsed options and returns the exit status."""
    parser = argparse.ArgumentParser(prog="megatron-prime", description="PRIME reinforcement learning on Megatron-Core")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status.

    Args:
        arguments: of the command line, without the program; by default those of this process.

    0: done. 1: `check` found that a plan does not fit. The others: `watch/exit_status.py`; 128 + n: ended by signal n.
    """
    options = build_parser().parse_args(arguments)
    # The ranks of a run are started with the same ones.
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    _set_up_logging()
    try:
        return options.run(options)
    except RunInterrupted as stop:
        if is_main_rank():
            print(f"{stop}; the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    except PrimeError as error:
        if not is_main_rank():
            # Most errors reach every rank alike; the main one's exit then ends this process before it prints.
            time.sleep(_OTHER_RANKS_WAIT_SECONDS)
        lines = "\n".join(f"  {line}" for line in str(error).splitlines())
        where = "" if is_main_rank() else f"rank {os.environ['RANK']}: "
        print(f"{where}{type(error).__name__}:\n{lines}", file=sys.stderr)
        return INVALID_INPUT
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception:
        traceback.print_exc()
        return FAILED


def _set_up_logging() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("megatron_prime").setLevel(logging.INFO if is_main_rank() else logging.WARNING)
    for name in () if is_main_rank() else _SAME_ON_ALL_RANKS:
        logging.getLogger(f"megatron_prime.{name}").setLevel(logging.ERROR)
