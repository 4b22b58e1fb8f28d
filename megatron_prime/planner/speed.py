"""Traffic and seconds of a step, estimated from shapes and a machine's data sheet.

Training costs 6 floating-point operations per parameter and token and scoring 2 (Kaplan et al., arXiv 2001.08361,
section 2.1), attention 12 or 4 more per layer, channel and pair of positions; full recomputation adds a forward pass.
Decoding reads the weights once per position and every answer's keys and values once per token.
"""

from __future__ import annotations

import math

from megatron_prime.config.schema import PrimeConfig, RolloutSection
from megatron_prime.planner import footprint
from megatron_prime.planner.workload import PlanInputs, micro_batch_tokens

_COLLECTIVE_SECONDS = 15e-6
"""Start of one collective inside a node; what a decoded layer pays twice under tensor parallelism."""
_DISK_BYTES_PER_SECOND = 2e9
"""Of a node's share of a parallel file system; an assumption."""
_PCIE_BYTES_PER_SECOND = 20e9
"""Between a GPU and host memory; an assumption."""


def traffic_bytes(inputs: PlanInputs) -> dict[str, float]:
    """Bytes that one GPU sends per step, by purpose (ring collectives: Patarasuk and Yuan, 2009)."""
    architecture, layout, work = inputs.architecture, inputs.layout, inputs.work
    per_gpu = footprint.stage_parameters(architecture, layout, 0)
    steps = work.num_optimizer_steps + work.num_prm_optimizer_steps
    train_tokens, score_tokens = _tokens_per_replica(inputs)
    ring = _ring_share(layout.tensor)
    per_token = layout.item_bytes * architecture.hidden_size * architecture.num_layers / layout.pipeline
    # An all-reduce sends the message twice; two per layer forward, two backward, two more to recompute.
    passes = 6 if layout.recompute == "full" else 4
    result = {"tensor": 2 * ring * per_token * (passes * train_tokens + 2 * score_tokens)}
    if layout.pipeline > 1:
        boundary = layout.item_bytes * architecture.hidden_size
        result["pipeline"] = boundary * (2 * train_tokens + score_tokens)
    replicas = layout.data * layout.context
    if replicas > 1:
        reduced = footprint.FLOAT32 if layout.distributed_optimizer else 2 * footprint.FLOAT32
        gathered = layout.item_bytes if layout.distributed_optimizer else 0
        result["data"] = steps * _ring_share(replicas) * per_gpu * (reduced + gathered)
    if isinstance(inputs.config, PrimeConfig):
        result["refit"] = per_gpu * layout.item_bytes
    return result


def _ring_share(size: int) -> float:
    return (size - 1) / size


def _tokens_per_replica(inputs: PlanInputs) -> tuple[float, float]:
    """Tokens that a rank's tensor and pipeline group trains on (policy and PRM) and scores, per step."""
    config, layout, work = inputs.config, inputs.layout, inputs.work
    epochs = config.policy.num_epochs if isinstance(config, PrimeConfig) else 1
    trained = work.num_rows * epochs + work.num_prm_rows
    scored = work.num_rows * work.num_scored
    # Context-parallel ranks share a replica's tokens; what they exchange for it is not counted.
    shares = layout.data * layout.context
    return trained * work.row_tokens / shares, scored * work.row_tokens / shares


def step_seconds(inputs: PlanInputs) -> dict[str, float]:
    """Seconds of a step by stage."""
    config, layout, hardware = inputs.config, inputs.layout, inputs.hardware
    traffic = traffic_bytes(inputs)
    train_tokens, score_tokens = _tokens_per_replica(inputs)
    model_gpus = layout.tensor * layout.pipeline
    peak = hardware.peak_tflops * 1e12 * model_gpus
    per_token = _flops(inputs)
    # Narrow shards multiply less efficiently; the tensor traffic comes on top.
    factor = 4 if layout.recompute == "full" else 3
    bubble = _bubble(inputs)
    in_node = hardware.node_gb_per_second * 1e9 * hardware.network_efficiency
    tensor = traffic["tensor"] / in_node
    trained_share = train_tokens * factor / max(train_tokens * factor + score_tokens, 1)
    seconds = {}
    if isinstance(config, PrimeConfig):
        seconds["rollout"] = _rollout_seconds(inputs, config.rollout)
        seconds["score"] = score_tokens * per_token / peak / hardware.score_efficiency + tensor * (1 - trained_share)
    seconds["update"] = train_tokens * per_token * factor / peak / hardware.train_efficiency * bubble
    seconds["update"] += tensor * trained_share
    seconds["update"] += traffic.get("data", 0.0) / _data_bandwidth(inputs)
    if isinstance(config, PrimeConfig):
        whole = footprint.num_parameters(inputs.architecture) * layout.item_bytes
        # The refit goes through host memory, written by the ranks and read by the engine: two copies at PCIe's pace.
        seconds["refit"] = 2 * whole / _PCIE_BYTES_PER_SECOND
    if config.checkpoint.every_steps:
        ranks = config.parallel.world_size
        num_nodes = math.ceil(ranks / hardware.num_gpus_per_node)
        # In the background only the copy to host memory holds training up.
        pace = ranks * _PCIE_BYTES_PER_SECOND if config.checkpoint.asynchronous else num_nodes * _DISK_BYTES_PER_SECOND
        state = footprint.checkpoint_bytes(config, inputs.architecture, layout)
        seconds["checkpoint"] = state / pace / config.checkpoint.every_steps
    return seconds


def _flops(inputs: PlanInputs) -> float:
    """Of a forward pass, per token."""
    a = inputs.architecture
    pairs = 4 * a.num_layers * a.num_attention_heads * a.kv_channels * inputs.work.row_tokens / 2
    embedding = 0 if a.tied_embeddings else a.vocab_size * a.hidden_size
    return 2 * (footprint.active_parameters(a) - embedding) + pairs


def _bubble(inputs: PlanInputs) -> float:
    """Factor by which an idle pipeline stretches an update (Narayanan et al., arXiv 2104.04473, section 2.2)."""
    layout, work = inputs.layout, inputs.work
    tokens = work.num_rows * work.row_tokens / work.num_optimizer_steps / layout.data
    num_micro_batches = max(math.ceil(tokens / micro_batch_tokens(inputs.config, work)), 1)
    return 1 + (layout.pipeline - 1) / (num_micro_batches * layout.virtual)


def _data_bandwidth(inputs: PlanInputs) -> float:
    hardware = inputs.hardware
    inside = inputs.config.parallel.world_size <= hardware.num_gpus_per_node
    rate = hardware.node_gb_per_second if inside else hardware.network_gb_per_second
    return rate * 1e9 * hardware.network_efficiency


def _rollout_seconds(inputs: PlanInputs, rollout: RolloutSection) -> float:
    """Decoding: every wave reads the weights once per position up to the longest answer, and all keys and values."""
    a, layout, work, hardware = inputs.architecture, inputs.layout, inputs.work, inputs.hardware
    world_size = inputs.config.parallel.world_size
    if rollout.engine == "vllm":
        section = rollout.vllm
        tensor, batch = section.tensor_parallel_size, section.max_num_seqs
        num_engines = len(section.servers) or (world_size // tensor if section.in_ranks else layout.data)
    else:
        tensor, batch, num_engines = 1, rollout.max_batch_size, world_size
    rows = work.num_sampled / num_engines
    bandwidth = hardware.memory_gb_per_second * 1e9 * hardware.decode_efficiency * tensor
    # Finished answers make room at once: only the last ones decode in a batch that empties.
    positions = max(rows / batch, 1) * work.response_tokens + work.max_response_tokens - work.response_tokens
    weights = positions * footprint.num_parameters(a) * layout.item_bytes
    context = work.prompt_tokens + work.response_tokens / 2
    cache = rows * work.response_tokens * context * footprint.kv_token_bytes(a, layout.item_bytes, 1)
    starts = positions * 2 * a.num_layers * _COLLECTIVE_SECONDS if tensor > 1 else 0.0
    compute = rows * work.row_tokens * _flops(inputs)
    compute /= hardware.peak_tflops * 1e12 * tensor * hardware.score_efficiency
    return (weights + cache) / bandwidth + starts + compute
