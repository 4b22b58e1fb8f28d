"""The process group, Megatron's parallel state and the layout that all three models share."""

from __future__ import annotations

import gc
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_prime import collectives
from megatron_prime.config.schema import ParallelSection
from megatron_prime.errors import ConfigError
from megatron_prime.mcore.cpu import megatron_platform
from megatron_prime.weights.stream import ParallelGroups

logger = logging.getLogger(__name__)

_REPORT_SECONDS = 60.0
"""Time for a watchdog to name the hanging rank before a collective times out."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """This process's coordinates and groups in the parallel layout."""

    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    ep_rank: int
    ep_size: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    ep_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    """All ranks with the same weights, experts aside: data- and context-parallel ones."""
    last_stage_rank: int
    """Global rank of the last pipeline stage of this process's pipeline."""
    device: torch.device

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def num_copies(self) -> int:
        """Copies of the whole model."""
        return self.dp_size * self.cp_size * self.tp_size // self.export_groups().stage_size

    @property
    def copy_index(self) -> int:
        """Index of the model copy that this rank holds a part of."""
        rank = (self.dp_rank * self.cp_size + self.cp_rank) * self.tp_size + self.tp_rank
        return rank // self.export_groups().stage_size

    def export_groups(self) -> ParallelGroups:
        """The groups over which a model's weights are gathered."""
        return ParallelGroups(
            tp_group=self.tp_group,
            pp_group=self.pp_group,
            ep_group=self.ep_group,
            tp_rank=self.tp_rank,
            tp_size=self.tp_size,
            pp_rank=self.pp_rank,
            pp_size=self.pp_size,
            ep_rank=self.ep_rank,
            ep_size=self.ep_size,
        )

    def sum_over_data(self, values: torch.Tensor) -> torch.Tensor:
        """Sums a CPU tensor that last stages know parts of over data and context; the result is on every rank."""
        return self._reduce_over_data(values, dist.ReduceOp.SUM)

    def max_over_data(self, values: torch.Tensor) -> torch.Tensor:
        """`sum_over_data` with the maximum instead of the sum."""
        return self._reduce_over_data(values, dist.ReduceOp.MAX)

    def _reduce_over_data(self, values: torch.Tensor, operation: Any) -> torch.Tensor:
        moved = values.to(self.device)
        if self.is_last_stage and self.dp_size * self.cp_size > 1:
            dist.all_reduce(moved, op=operation, group=self.data_group)
        if self.pp_size > 1:
            dist.broadcast(moved, src=self.last_stage_rank, group=self.pp_group)
        return moved.cpu()


def _local_device() -> torch.device:
    # Megatron relies on it to start communication before the computation that it overlaps with: with one hardware
    # queue, kernels run in the order of their launches. CUDA reads the variable once, at its first use.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # A launcher may show each process its own GPU only (srun --gpus-per-task=1).
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@contextmanager
def parallel_layout(config: ParallelSection, seed: int) -> Iterator[Layout]:
    """Sets up torch.distributed and Megatron for a ``with`` block and takes them down after it.

    Args:
        config: sizes; the started number of processes must equal ``world_size``.
        seed: for Megatron's random states (initialisation).

    Raises:
        ConfigError: when another number of processes was started.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != config.world_size:
        raise ConfigError(
            f"parallel.world_size: {config.world_size} in the configuration but {started} processes were started; "
            f"start {config.world_size} with torchrun, or set parallel.world_size={started}"
        )
    device = _local_device()
    # A single process needs no rendezvous; more of them find MASTER_ADDR in their environment.
    store = dist.HashStore() if started == 1 else None  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=int(os.environ.get("RANK", "0")),
        world_size=started,
        timeout=timedelta(seconds=config.timeout_seconds + _REPORT_SECONDS),
    )
    with megatron_platform():
        from megatron.core import parallel_state as megatron_state
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        # By their types Megatron's getters may also return integers (fake groups in its tests), which no run has.
        parallel_state: Any = megatron_state
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor_model_parallel_size,
            pipeline_model_parallel_size=config.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
            context_parallel_size=config.context_parallel_size,
            expert_model_parallel_size=config.expert_model_parallel_size,
            # Experts stay whole: cut ones would multiply narrower matrices and exchange tokens twice (ADR 15).
            expert_tensor_parallel_size=1,
            distributed_timeout_minutes=math.ceil((config.timeout_seconds + _REPORT_SECONDS) / 60),
        )
        model_parallel_cuda_manual_seed(seed)
        layout = Layout(
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            tp_size=parallel_state.get_tensor_model_parallel_world_size(),
            pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
            pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
            cp_rank=parallel_state.get_context_parallel_rank(),
            cp_size=parallel_state.get_context_parallel_world_size(),
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
            ep_rank=parallel_state.get_expert_model_parallel_rank(),
            ep_size=parallel_state.get_expert_model_parallel_world_size(),
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            pp_group=parallel_state.get_pipeline_model_parallel_group(),
            cp_group=parallel_state.get_context_parallel_group(),
            ep_group=parallel_state.get_expert_model_parallel_group(),
            data_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
            last_stage_rank=parallel_state.get_pipeline_model_parallel_last_rank(),
            device=device,
        )
    try:
        with collectives.control_group():
            yield layout
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        # Models hold groups in reference cycles, and the threads of a gloo group wake up a hundred times a second.
        gc.collect()
