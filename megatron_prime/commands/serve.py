"""`megatron-prime serve`: a vLLM server for the runs of a configuration."""

from __future__ import annotations

import argparse
import os

from megatron_prime.assembly.preflight import check
from megatron_prime.commands.arguments import Commands, add_command, add_configuration, load_kind, port
from megatron_prime.config.schema import PrimeConfig


def add_parser(commands: Commands) -> None:
    text = "a vLLM server for runs with rollout.vllm.servers; it gets its weights from them"
    parser = add_command(commands, "serve", text, run)
    add_configuration(parser, "YAML file of the run")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this host only)")
    parser.add_argument("--port", type=port, default=8000)


def run(options: argparse.Namespace) -> int:
    """Becomes the server; returns only if it cannot."""
    import torch

    from megatron_prime.rollout.vllm.serve_command import server_command, server_section
    from megatron_prime.rollout.vllm.trainer.base import engine_options

    config = load_kind(options, PrimeConfig)
    config.rollout.engine = "vllm"
    # A server needs none of the trainer's GPUs or data.
    section, architecture = config.rollout.vllm, check(config, check_files=False)
    section = server_section(section, options.overrides, on_gpu=torch.cuda.is_available())
    engine = engine_options(config.model.path, config.model.dtype, section, architecture)
    command, environment = server_command(engine, options.host, options.port)
    print(f"vLLM of {config.model.path} on http://{options.host}:{options.port}, without weights yet", flush=True)
    os.execvpe(command[0], command, environment)
