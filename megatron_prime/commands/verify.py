"""`megatron-prime verify`: verdicts for a file of answers."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megatron_prime.commands.arguments import Commands, add_command
from megatron_prime.config.loader import load_verifier_section


def add_parser(commands: Commands) -> None:
    parser = add_command(commands, "verify", "grade a file of answers, math or code", run)
    text = "JSONL: response, ground_truth, ability (math, code), optionally data_source, extra_info"
    parser.add_argument("source", metavar="IN.jsonl", type=Path, help=text)
    text = "the same rows with status, reward and seconds; goes on where an earlier call has stopped"
    parser.add_argument("target", metavar="OUT.jsonl", type=Path, help=text)
    parser.add_argument("overrides", nargs="*", metavar="verifier.KEY=VALUE", help="docs/reference/configuration.md")
    parser.add_argument("--config", help="YAML file whose section `verifier` says how to grade")


def run(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from megatron_prime.verify.offline import verify_file

    given = options.overrides
    if options.config is None and not any(item.startswith("verifier.num_workers=") for item in given):
        given = [*given, f"verifier.num_workers={os.cpu_count() or 1}"]
    section = load_verifier_section(options.config, given)
    columns = TextColumn("graded"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("graded", total=None)
        summary = verify_file(
            options.source,
            options.target,
            section,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    print("\n".join([*summary.lines(), f"wrote {options.target}"]))
    return 0
