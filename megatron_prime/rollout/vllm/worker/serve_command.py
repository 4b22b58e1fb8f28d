"""How a vLLM server is started that a trainer on another host can use."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_prime.rollout.vllm.trainer.process import engine_environment
from megatron_prime.rollout.vllm.wire.messages import BACKENDS, PLAIN, EngineOptions
from megatron_prime.rollout.vllm.worker.engine_loop import STEP_TOKENS, memory_limits

_SERVER_SHARE = 0.9


def of_a_server(options: EngineOptions, overrides: Sequence[str], *, on_gpu: bool) -> EngineOptions:
    """The engine of a server, which has its GPUs to itself, while the configuration describes one beside a trainer.

    Args:
        options: by the configuration.
        overrides: of the command line; memory that is asked for there is what the server takes.
        on_gpu: whether there is a GPU.
    """
    sizes = ("rollout.vllm.kv_cache_gib=", "rollout.vllm.gpu_memory_utilization=")
    if not on_gpu or any(override.startswith(sizes) for override in overrides):
        return options
    return replace(options, kv_cache_bytes=None, gpu_memory_utilization=_SERVER_SHARE)


def server_command(
    options: EngineOptions, host: str, port: int, num_threads: int | None
) -> tuple[list[str], dict[str, str]]:
    """The command of a server without weights, and its environment.

    Its control endpoints ask for no password: it belongs into a network of one's own.

    Args:
        options: of the engine.
        host: address to listen on.
        port: to listen on.
        num_threads: of the engine on a CPU; None leaves it to vLLM.
    """
    # `vllm serve` of the CPU build stops at its own version number.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", options.folder, "--skip-tokenizer-init", "--load-format", "dummy", "--dtype", options.dtype]
    command += ["--tensor-parallel-size", str(options.tensor_parallel_size)]
    command += ["--max-model-len", str(options.max_model_len), "--max-num-seqs", str(options.max_num_seqs)]
    command += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", "--seed", "0"]
    command += ["--enable-prefix-caching", "--enable-scale-out"]
    command += ["--worker-extension-cls", "megatron_prime.rollout.vllm.worker.transfer.WorkerExtension"]
    command += ["--weight-transfer-config", json.dumps({"backend": BACKENDS["servers"]})]
    command += ["--host", host, "--port", str(port), "--disable-uvicorn-access-log"]
    for name, value in memory_limits(options, on_gpu=torch.cuda.is_available()).items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    if not torch.cuda.is_available():  # see `server.build`
        command += ["--enforce-eager", "--no-enable-chunked-prefill"]
        command += ["--max-num-batched-tokens", str(max(options.max_model_len, STEP_TOKENS))]
    environment = os.environ | engine_environment(on_gpu=torch.cuda.is_available())
    environment |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    environment[PLAIN] = "0" if options.pack_weights else "1"
    if num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    return command, environment
