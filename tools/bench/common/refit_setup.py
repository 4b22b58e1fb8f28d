"""The trainer ranks of `refit.py`."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from common.measuring import Row, peak_bytes
from megatron_prime.config.schema import VllmSection
from megatron_prime.interfaces import RankPlace
from megatron_prime.weights.architecture import read_architecture
from megatron_prime.weights.families import weight_specs
from megatron_prime.weights.hf_folder import HfFolder
from megatron_prime.weights.sharding import local_slice
from megatron_prime.weights.stream import ParallelGroups, WeightExport


def section(num_workers: int, pack: bool, verify: bool) -> VllmSection:
    return VllmSection(
        tensor_parallel_size=num_workers,
        max_model_len=256,
        max_num_seqs=8,
        kv_cache_gib=0.125,
        num_threads=1,
        pack_weights=pack,
        verify_refit=verify,
    )


def groups_of(rank: int, tp_size: int, pp_size: int) -> ParallelGroups:
    """The groups over which a bench rank's weights are gathered."""
    return ParallelGroups(
        tp_group=dist.group.WORLD if tp_size > 1 else None,
        pp_group=dist.group.WORLD if pp_size > 1 else None,
        tp_rank=rank % tp_size,
        tp_size=tp_size,
        pp_rank=rank // tp_size,
        pp_size=pp_size,
    )


def trainer_place(rank: int, sizes: tuple[int, int], folder: Path, port: int) -> tuple[RankPlace, WeightExport]:
    """Joins the other ranks."""
    torch.set_num_threads(1)
    world_size = sizes[0] * sizes[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    place = RankPlace(device=torch.device("cpu"), rank_in_copy=rank, ranks_per_copy=world_size)
    return place, export_of(folder, groups_of(rank, *sizes))


def shards_of(folder: Path, groups: ParallelGroups) -> dict[str, torch.Tensor]:
    """This rank's shards as a trainer holds them."""
    architecture, opened = read_architecture(folder), HfFolder(folder)
    local = {}
    for spec in weight_specs(architecture):
        last = groups.pp_size - 1
        stage = (
            spec.layer * groups.pp_size // architecture.num_layers
            if spec.layer is not None
            else 0
            if "embedding" in spec.megatron_name
            else last
        )
        if stage == groups.pp_rank:
            shard = local_slice(
                spec,
                architecture,
                opened.fetch,
                tp_rank=groups.tp_rank,
                tp_size=groups.tp_size,
                padded_vocab_size=architecture.padded_vocab_size(128, groups.tp_size),
            )
            local[spec.megatron_name] = shard.clone()
    return local


def export_of(folder: Path, groups: ParallelGroups) -> WeightExport:
    """This rank's shards on their way out."""
    architecture, local = read_architecture(folder), shards_of(folder, groups)
    return WeightExport(weight_specs(architecture), architecture, lambda: local, groups)


def peak_gb(process_id: int | str = "self") -> float:
    """The most memory that a process has had, in GB."""
    return peak_bytes(process_id) / 1e9


def timings(seconds: list[float]) -> Row:
    return {"seconds": min(seconds), "median_seconds": sorted(seconds)[len(seconds) // 2]}
