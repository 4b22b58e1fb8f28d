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
from megatron_prime.rollout.vllm.wire.messages import BACKENDS, PLAIN, EngineOptions
from megatron_prime.rollout.vllm.worker.engine_loop import STEP_TOKENS, memory_limits

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
    section, on_gpu = options.section, torch.cuda.is_available()
    # `vllm serve` of the CPU build stops at its own version number.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", options.folder, "--skip-tokenizer-init", "--load-format", "dummy", "--dtype", options.dtype]
    command += ["--tensor-parallel-size", str(section.tensor_parallel_size)]
    command += ["--max-model-len", str(options.max_model_len), "--max-num-seqs", str(section.max_num_seqs)]
    command += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", "--seed", "0"]
    command += ["--enable-prefix-caching", "--enable-scale-out"]
    command += ["--worker-extension-cls", "megatron_prime.rollout.vllm.worker.transfer.WorkerExtension"]
    command += ["--weight-transfer-config", json.dumps({"backend": BACKENDS["servers"]})]
    command += ["--host", host, "--port", str(port), "--disable-uvicorn-access-log"]
    for name, value in memory_limits(section, on_gpu=on_gpu).items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    if not on_gpu:  # see `engine_loop.build`
        command += ["--enforce-eager", "--no-enable-chunked-prefill"]
        command += ["--max-num-batched-tokens", str(max(options.max_model_len, STEP_TOKENS))]
    environment = os.environ | engine_environment(on_gpu=on_gpu)
    environment |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    environment[PLAIN] = "0" if section.pack_weights else "1"
    if section.num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(section.num_threads)
    return command, environment
