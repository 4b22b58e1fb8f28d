"""How a vLLM server is started that a trainer on another host can use."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_prime.config.schema import VllmSection
from megatron_prime.rollout.vllm.trainer.process import engine_environment
from megatron_prime.rollout.vllm.wire.messages import PLAIN, EngineOptions
from megatron_prime.rollout.vllm.worker.engine_loop import engine_arguments

_SERVER_SHARE = 0.9


def server_section(section: VllmSection, overrides: Sequence[str], *, on_gpu: bool) -> VllmSection:
    """The section for a server, which has its GPUs to itself, where the configuration is of an engine beside a trainer.

    Args:
        section: of the configuration.
        overrides: of the command line; memory that is asked for there is what the server takes.
        on_gpu: whether there is a GPU.
    """
    sizes = ("rollout.vllm.kv_cache_gib=", "rollout.vllm.gpu_memory_utilization=")
    if not on_gpu or any(override.startswith(sizes) for override in overrides):
        return section
    return replace(section, kv_cache_gib=None, gpu_memory_utilization=_SERVER_SHARE)


def server_command(options: EngineOptions, host: str, port: int) -> tuple[list[str], dict[str, str]]:
    """The command of a server without weights, and its environment.

    Its control endpoints ask for no password: it belongs into a network of one's own.

    Args:
        options: of the engine.
        host: address to listen on.
        port: to listen on.
    """
    on_gpu = torch.cuda.is_available()
    # `vllm serve` of the CPU build stops at its own version number.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--host", host, "--port", str(port), "--enable-scale-out", "--disable-uvicorn-access-log"]
    for name, value in engine_arguments(options, "servers", on_gpu=on_gpu).items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{option}" if value else f"--no-{option}")
        else:
            command += [f"--{option}", json.dumps(value) if isinstance(value, dict) else str(value)]
    environment = os.environ | engine_environment(on_gpu=on_gpu)
    environment |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    environment[PLAIN] = "0" if options.section.pack_weights else "1"
    if options.section.num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(options.section.num_threads)
    return command, environment
