"""`megatron-prime sft`: a supervised run."""

from __future__ import annotations

import argparse

from megatron_prime.commands import train
from megatron_prime.commands.arguments import Commands, add_command, add_configuration, load_kind
from megatron_prime.config.schema import SftConfig


def add_parser(commands: Commands) -> None:
    add_configuration(add_command(commands, "sft", "make the starting model by supervised fine-tuning", run))


def run(options: argparse.Namespace) -> int:
    return train.start(load_kind(options, SftConfig), options.arguments)
