"""Traffic and seconds of a step, estimated from shapes and a machine's data sheet.

Training costs 6 floating-point operations per parameter and token and scoring 2 (Kaplan et al., arXiv 2001.08361,
section 2.1), attention 12 or 4 more per layer, channel and pair of positions; full recomputation adds a forward pass.
Decoding reads the weights once per position and every answer's keys and values once per token.
"""

from __future__ import annotations

import math

from megatron_prime.config.schema import AnyConfig, PrimeConfig
from megatron_prime.planner import footprint
from megatron_prime.planner.engines import plan_engine
from megatron_prime.planner.footprint import LayoutSizes
from megatron_prime.planner.hardware import Hardware
from megatron_prime.planner.workload import Workload, micro_batch_tokens
from megatron_prime.weights.architecture import ModelArchitecture

_COLLECTIVE_SECONDS = 15e-6
"""Start of one collective inside a node; what a decoded layer pays twice under tensor parallelism."""
_DISK_BYTES_PER_SECOND = 2e9
"""Of a node's share of a parallel file system; an assumption."""
_PCIE_BYTES_PER_SECOND = 20e9
"""Between a GPU and host memory; an assumption."""


def traffic_bytes(
    config: AnyConfig, architecture: ModelArchitecture, layout: LayoutSizes, work: Workload
) -> dict[str, float]:
    """Bytes that one GPU sends per step, by purpose (ring collectives: Patarasuk and Yuan, 2009)."""
    per_gpu = footprint.stage_parameters(architecture, layout, 0)
    steps = work.num_optimizer_steps + work.num_prm_optimizer_steps
    train_tokens, score_tokens = _tokens_per_replica(config, layout, work)
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
    if isinstance(config, PrimeConfig):
        result["refit"] = per_gpu * layout.item_bytes
    return result


def _ring_share(size: int) -> float:
    return (size - 1) / size


def _tokens_per_replica(config: AnyConfig, layout: LayoutSizes, work: Workload) -> tuple[float, float]:
    """Tokens that a rank's tensor and pipeline group trains on (policy and PRM) and scores, per step."""
    epochs = config.policy.num_epochs if isinstance(config, PrimeConfig) else 1
    trained = work.num_rows * epochs + work.num_prm_rows
    scored = work.num_rows * work.num_scored
    # Context-parallel ranks share a replica's tokens; what they exchange for it is not counted.
    shares = layout.data * layout.context
    return trained * work.row_tokens / shares, scored * work.row_tokens / shares


def step_seconds(
    config: AnyConfig,
    architecture: ModelArchitecture,
    layout: LayoutSizes,
    work: Workload,
    hardware: Hardware,
) -> dict[str, float]:
    """Seconds of a step by stage.

    Args:
        config: a configuration without problems.
        architecture: shape of the model.
        layout: how it is sharded.
        work: sizes of the step.
        hardware: the machine.
    """
    traffic = traffic_bytes(config, architecture, layout, work)
    train_tokens, score_tokens = _tokens_per_replica(config, layout, work)
    model_gpus = layout.tensor * layout.pipeline
    peak = hardware.peak_tflops * 1e12 * model_gpus
    per_token = _flops(architecture, work)
    # Narrow shards multiply less efficiently; the tensor traffic comes on top.
    factor = 4 if layout.recompute == "full" else 3
    bubble = _bubble(config, layout, work)
    in_node = hardware.node_gb_per_second * 1e9 * hardware.network_efficiency
    tensor = traffic["tensor"] / in_node
    trained_share = train_tokens * factor / max(train_tokens * factor + score_tokens, 1)
    seconds = {}
    if isinstance(config, PrimeConfig):
        seconds["rollout"] = _rollout_seconds(config, architecture, layout, work, hardware)
        seconds["score"] = score_tokens * per_token / peak / hardware.score_efficiency + tensor * (1 - trained_share)
    seconds["update"] = train_tokens * per_token * factor / peak / hardware.train_efficiency * bubble
    seconds["update"] += tensor * trained_share
    seconds["update"] += traffic.get("data", 0.0) / _data_bandwidth(config, layout, hardware)
    if isinstance(config, PrimeConfig):
        whole = footprint.num_parameters(architecture) * layout.item_bytes
        # The refit goes through host memory, written by the ranks and read by the engine: two copies at PCIe's pace.
        seconds["refit"] = 2 * whole / _PCIE_BYTES_PER_SECOND
    if config.checkpoint.every_steps:
        ranks = config.parallel.world_size
        num_nodes = math.ceil(ranks / hardware.num_gpus_per_node)
        # In the background only the copy to host memory holds training up.
        pace = ranks * _PCIE_BYTES_PER_SECOND if config.checkpoint.asynchronous else num_nodes * _DISK_BYTES_PER_SECOND
        state = footprint.checkpoint_bytes(config, architecture, layout)
        seconds["checkpoint"] = state / pace / config.checkpoint.every_steps
    return seconds


def _flops(a: ModelArchitecture, work: Workload) -> float:
    """Of a forward pass, per token."""
    pairs = 4 * a.num_layers * a.num_attention_heads * a.kv_channels * work.row_tokens / 2
    embedding = 0 if a.tied_embeddings else a.vocab_size * a.hidden_size
    return 2 * (footprint.active_parameters(a) - embedding) + pairs


def _bubble(config: AnyConfig, layout: LayoutSizes, work: Workload) -> float:
    """Factor by which an idle pipeline stretches an update (Narayanan et al., arXiv 2104.04473, section 2.2)."""
    tokens = work.num_rows * work.row_tokens / work.num_optimizer_steps / layout.data
    num_micro_batches = max(math.ceil(tokens / micro_batch_tokens(config, work)), 1)
    return 1 + (layout.pipeline - 1) / (num_micro_batches * layout.virtual)


def _data_bandwidth(config: AnyConfig, layout: LayoutSizes, hardware: Hardware) -> float:
    inside = config.parallel.world_size <= hardware.num_gpus_per_node
    rate = hardware.node_gb_per_second if inside else hardware.network_gb_per_second
    return rate * 1e9 * hardware.network_efficiency


def _rollout_seconds(
    config: PrimeConfig, a: ModelArchitecture, layout: LayoutSizes, work: Workload, hardware: Hardware
) -> float:
    """Decoding: every wave reads the weights once per position up to the longest answer, and all keys and values."""
    engine = plan_engine(config, a, layout, work, hardware)
    tensor = engine.tensor
    rows = work.num_sampled / engine.num_engines
    bandwidth = hardware.memory_gb_per_second * 1e9 * hardware.decode_efficiency * tensor
    # Finished answers make room at once: only the last ones decode in a batch that empties.
    positions = max(rows / engine.batch, 1) * work.response_tokens + work.max_response_tokens - work.response_tokens
    weights = positions * footprint.num_parameters(a) * layout.item_bytes
    context = work.prompt_tokens + work.response_tokens / 2
    cache = rows * work.response_tokens * context * footprint.kv_token_bytes(a, layout.item_bytes, 1)
    starts = positions * 2 * a.num_layers * _COLLECTIVE_SECONDS if tensor > 1 else 0.0
    compute = rows * work.row_tokens * _flops(a, work)
    compute /= hardware.peak_tflops * 1e12 * tensor * hardware.score_efficiency
    return (weights + cache) / bandwidth + starts + compute
