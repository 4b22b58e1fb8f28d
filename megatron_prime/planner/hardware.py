"""Machines that the planner knows: one table, each number with its source."""

from __future__ import annotations

from dataclasses import dataclass, replace

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """One kind of GPU in nodes of a usual kind.

    Peaks come from the vendor's data sheet. Efficiencies are what the runs named in `source` reached of the peaks; a
    plan's seconds are estimates with the error of these four numbers.
    """

    name: str
    memory_gib: float
    """What CUDA reports as total memory of one GPU."""
    reserved_gib: float
    """Of it: CUDA context, NCCL buffers and what the allocator cannot use. An assumption, no measurement."""
    peak_tflops: float
    """Dense bfloat16, float32 accumulation."""
    memory_gb_per_second: float
    node_gb_per_second: float
    """Between GPUs of a node, per GPU and direction."""
    network_gb_per_second: float
    """Between nodes, per GPU and direction, one adapter per GPU."""
    num_gpus_per_node: int
    host_memory_gib: float
    train_efficiency: float
    """Share of the peak in forward and backward passes."""
    score_efficiency: float
    """Share of the peak in forward passes."""
    decode_efficiency: float
    """Share of the memory bandwidth in decoding."""
    network_efficiency: float
    source: str


_SHARES = {"train_efficiency": 0.35, "score_efficiency": 0.35, "decode_efficiency": 0.5, "network_efficiency": 0.7}
_SHARES_SOURCE = (
    "shares: NeMo-RL's published step breakdown for Llama-3.1-8B (8 H100) and -70B (64 H100), whose training passes"
    " reach 42% and 27% of the peak and whose scoring passes about 40%"
)

_H100 = Hardware(
    name="h100",
    memory_gib=79.1,
    reserved_gib=3.0,
    peak_tflops=989.0,
    memory_gb_per_second=3350.0,
    node_gb_per_second=450.0,
    network_gb_per_second=50.0,
    num_gpus_per_node=8,
    host_memory_gib=2048.0,
    source=f"NVIDIA H100 SXM5 80GB and DGX H100 data sheets; {_SHARES_SOURCE}",
    **_SHARES,
)
_H200 = replace(
    _H100,
    name="h200",
    memory_gib=139.8,
    memory_gb_per_second=4800.0,
    source=f"NVIDIA H200 SXM 141GB and DGX H200 data sheets; {_SHARES_SOURCE}",
)
_A100 = replace(
    _H100,
    name="a100",
    memory_gib=79.2,
    peak_tflops=312.0,
    memory_gb_per_second=2039.0,
    node_gb_per_second=300.0,
    network_gb_per_second=25.0,
    host_memory_gib=1024.0,
    source=f"NVIDIA A100 SXM4 80GB and DGX A100 data sheets; {_SHARES_SOURCE}",
)
_CPU = Hardware(
    name="cpu",
    memory_gib=4.0,
    reserved_gib=0.4,
    peak_tflops=0.05,
    memory_gb_per_second=10.0,
    node_gb_per_second=2.0,
    network_gb_per_second=1.0,
    num_gpus_per_node=8,
    host_memory_gib=16.0,
    source="a process on one core of a laptop, in round numbers; for the order of magnitude only",
    **_SHARES,
)
PROFILES = {profile.name: profile for profile in (_H100, _H200, _A100, _CPU)}
