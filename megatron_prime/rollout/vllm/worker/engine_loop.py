"""One vLLM engine in this process, serving one trainer over a socket."""

from __future__ import annotations

import logging
import math
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from megatron_prime.rollout.vllm.wire.messages import (
    BACKENDS,
    EngineOptions,
    EngineRequest,
    Failed,
    Finished,
    Generate,
    Loaded,
    LoadWeights,
    Message,
    Progress,
    Ready,
)

logger = logging.getLogger(__name__)

_STEP_TOKENS = 8192
"""Prompt tokens that a CPU engine reads in one step, where no prompt is longer."""

_SMALLEST_SHARE = 0.01


def serve(connection: Connection, options: EngineOptions) -> None:
    """Builds an engine and does what the trainer says until it hangs up.

    Whatever goes wrong is reported and ends the process: a new one with the current weights is ready in seconds,
    and nothing is ever sampled from an engine in an unknown state.
    """
    try:
        llm = build(options)
        connection.send(Ready())
        while (message := _receive(connection)) is not None:
            if isinstance(message, LoadWeights):
                connection.send(load(llm, message))
            else:
                generate(llm, message, connection.send, _progress_reporter(connection, message.progress_seconds))
    except Exception as error:
        # The last line says what; the trainer's log gets the rest.
        connection.send(Failed(text=f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


def build(options: EngineOptions, *, in_ranks: bool = False) -> Any:
    """A vLLM engine with arbitrary weights.

    Args:
        options: what it is built from.
        in_ranks: this process is a rank of the trainer and becomes a worker; its neighbours are the others.
    """
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    from megatron_prime.rollout.vllm.worker.transfer import leave_matrices_plain

    if not options.section.pack_weights:
        leave_matrices_plain()
    on_gpu = not current_platform.is_cpu()
    arguments = engine_arguments(options, options.transfer, on_gpu=on_gpu)
    if on_gpu:
        arguments["enable_sleep_mode"] = in_ranks
    if in_ranks:
        arguments["distributed_executor_backend"] = "external_launcher"
    llm = LLM(**arguments, disable_log_stats=True)
    llm.init_weight_transfer_engine({"init_info": {}})
    # What this machine or model cannot do shows here, not in the middle of the first step.
    llm.generate({"prompt_token_ids": [0]}, SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    return llm


def engine_arguments(options: EngineOptions, transfer: str, *, on_gpu: bool) -> dict[str, Any]:
    """vLLM's arguments for an engine with arbitrary weights; a server's command line has the same.

    Args:
        options: what it is built from.
        transfer: how weights come, of `BACKENDS`.
        on_gpu: whether it runs on GPUs.
    """
    section = options.section
    arguments = {
        "model": options.folder,
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "dtype": options.dtype,
        "tensor_parallel_size": section.tensor_parallel_size,
        "max_model_len": options.max_model_len,
        "max_num_seqs": section.max_num_seqs,
        "enable_prefix_caching": True,
        # Log-probs of the distribution that the token was drawn from, as the loss compares them.
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "seed": 0,
        "worker_extension_cls": "megatron_prime.rollout.vllm.worker.transfer.WorkerExtension",
        "weight_transfer_config": {"backend": BACKENDS[transfer]},
    }
    if section.kv_cache_gib is None:
        arguments["gpu_memory_utilization"] = section.gpu_memory_utilization
    else:
        arguments["kv_cache_memory_bytes"] = int(section.kv_cache_gib * 2**30)
        if on_gpu:
            # It is not used for anything else then, but vLLM does not start where less is free.
            arguments["gpu_memory_utilization"] = _SMALLEST_SHARE
    if not on_gpu:
        arguments["enforce_eager"] = True
        # vLLM takes the draw of a half-read prompt back by the generator's offset, which CPU generators do not have.
        arguments["enable_chunked_prefill"] = False
        arguments["max_num_batched_tokens"] = max(options.max_model_len, _STEP_TOKENS)
    return arguments


def load(llm: Any, message: LoadWeights) -> Loaded:
    """Replaces all weights and everything that was computed with the old ones."""
    llm.start_weight_update()
    # Nothing is sampled until all is done: the cache goes first, while the trainer writes.
    llm.collective_rpc("prime_zero_kv_cache")
    llm.update_weights({"update_info": {"update": message.update}})
    llm.finish_weight_update(weight_version=str(message.version))
    if not llm.reset_prefix_cache():
        raise RuntimeError("the prefix cache of the old weights could not be reset")
    (num_columns, *_) = llm.collective_rpc("prime_num_probed_columns")
    return Loaded(version=message.version, num_probed_columns=num_columns)


def generate(
    llm: Any, message: Generate, send: Callable[[Finished], None], report: Callable[[], None] | None = None
) -> None:
    """Samples all requests and hands over each answer when it is finished, or cut off when time is up.

    Args:
        llm: samples.
        message: the requests.
        send: takes answers.
        report: is called after every step that gave tokens, before `send`: the trainer does not listen after the last
            answer.
    """
    engine = llm.llm_engine
    version, limit = llm.get_weight_version(), message.abort_after_seconds
    deadline = math.inf if limit is None else time.monotonic() + limit
    for request in message.requests:
        engine.add_request(
            request.request_id, {"prompt_token_ids": list(request.prompt_token_ids)}, sampling_params(request)
        )
    while engine.has_unfinished_requests():
        outputs = engine.step()
        if outputs and report is not None:
            report()
        # A request that has not begun yet gets a first token, so that no answer is empty.
        late = [] if time.monotonic() < deadline else [output for output in outputs if not output.finished]
        engine.abort_request([output.request_id for output in late])
        for output in outputs:
            if output.finished or late:
                send(_finished(output, version))


def sampling_params(request: EngineRequest) -> Any:
    """vLLM's form of a request's settings."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=request.temperature,
        top_p=request.top_p,
        max_tokens=request.max_tokens,
        seed=request.seed,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        # The end tokens are among the stop tokens; which ones they are is the trainer's to say.
        ignore_eos=True,
        stop_token_ids=list(request.stop_token_ids),
    )


def _finished(output: Any, version: str) -> Finished:
    (completion,) = output.outputs
    return Finished(
        request_id=output.request_id,
        token_ids=tuple(completion.token_ids),
        logprobs=tuple(_sampled_logprobs(completion)),
        finish_reason=completion.finish_reason if completion.finish_reason in ("stop", "length") else "abort",
        # vLLM says it of whole answers only, and nothing is loaded while answers are sampled.
        weight_versions=tuple(int(span.version) for span in completion.weight_versions or ()) or (int(version),),
    )


def _sampled_logprobs(completion: Any) -> list[float]:
    """Of the sampled token at each position: the first of the position's entries."""
    flat = completion.logprobs
    return [flat.logprobs[start] for start in flat.start_indices]


def _progress_reporter(connection: Connection, seconds: float) -> Callable[[], None]:
    """Says that there is progress whenever it is asked to, but not more often than this."""
    last = time.monotonic()

    def report() -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= seconds:
            last = now
            connection.send(Progress())

    return report


def _receive(connection: Connection) -> Message | None:
    try:
        return connection.recv()
    except EOFError:
        return None
