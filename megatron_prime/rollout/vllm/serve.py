"""How a vLLM server is started that a trainer on another host can use."""

from __future__ import annotations

import json
import os
import sys

import torch

from megatron_prime.rollout.vllm.messages import BACKENDS, PLAIN, EngineOptions
from megatron_prime.rollout.vllm.process import engine_environment
from megatron_prime.rollout.vllm.server import STEP_TOKENS


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
    command += ["--worker-extension-cls", "megatron_prime.rollout.vllm.transfer.WorkerExtension"]
    command += ["--weight-transfer-config", json.dumps({"backend": BACKENDS["servers"]})]
    command += ["--host", host, "--port", str(port), "--disable-uvicorn-access-log"]
    if options.kv_cache_bytes is not None:
        command += ["--kv-cache-memory-bytes", str(options.kv_cache_bytes)]
    else:
        command += ["--gpu-memory-utilization", str(options.gpu_memory_utilization)]
    if not torch.cuda.is_available():  # see `server.build`
        command += ["--enforce-eager", "--no-enable-chunked-prefill"]
        command += ["--max-num-batched-tokens", str(max(options.max_model_len, STEP_TOKENS))]
    environment = os.environ | engine_environment(on_gpu=torch.cuda.is_available())
    environment |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    environment[PLAIN] = "0" if options.pack_weights else "1"
    if num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    return command, environment
