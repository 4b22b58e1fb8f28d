"""The contract of the log-prob op: options, results, and checks of arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

BackendName = Literal["auto", "torch", "triton"]
EntropyMode = Literal["none", "metric", "grad"]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadOptions:
    """Options of the computation. None of them changes a result by more than rounding."""

    backend: BackendName = "auto"
    """`auto`: Triton on GPUs of compute capability 8.0 and up where it is installed, else torch."""
    gemm: Literal["mm", "onednn"] = "mm"
    """Matrix product of the torch backend for float32 on a CPU; `choose_gemm` finds the faster one."""
    workspace_bytes: int = 256 * 2**20
    """Logits (or their exponentials) that may exist at one time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogprobResult:
    """Results for T tokens, float32 (float64 for float64 inputs)."""

    logprobs: torch.Tensor
    """[T], differentiable, never above 0."""
    entropy: torch.Tensor | None
    """[T], of the whole distribution in nats, differentiable with `entropy="grad"`; None unless asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossResult:
    """A loss that was evaluated chunk by chunk."""

    loss: torch.Tensor
    """Scalar, differentiable once: the sum of the chunks' losses."""
    logprobs: torch.Tensor
    """[T], without gradient."""
    entropy: torch.Tensor | None
    """[T], without gradient; None unless asked for."""


ChunkLoss = Callable[[torch.Tensor, torch.Tensor | None, slice], torch.Tensor]
"""(log-probs [n], entropies [n], which tokens of the call these are) -> scalar loss; the chunks' losses add up."""


def check_arguments(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: float | torch.Tensor,
    *,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None,
    sequence_shards: Sequence[int] | None,
    accumulate_main_grad: bool,
    options: HeadOptions,
) -> None:
    """Checks that the arguments fit together.

    Raises:
        ValueError: names the argument.
    """
    tp_size = 1 if tp_group is None else dist.get_world_size(tp_group)
    _check_shapes(hidden, weight, targets, sequence_shards, tp_group)
    num_tokens = targets.shape[0]
    if not 1 <= vocab_size <= weight.shape[0] * tp_size:
        raise ValueError(f"vocab_size {vocab_size} does not fit {tp_size} shard(s) of {weight.shape[0]} rows")
    if options.workspace_bytes < 1:
        raise ValueError(f"options.workspace_bytes is {options.workspace_bytes} and must be at least 1")
    if isinstance(temperature, torch.Tensor) and temperature.shape not in ((), targets.shape):
        raise ValueError(f"temperature {list(temperature.shape)} must be one number or [T={num_tokens}]")
    if not bool(torch.as_tensor(temperature > 0).all()):
        raise ValueError("temperature must be positive")
    if num_tokens and not 0 <= int(targets.min()) <= int(targets.max()) < vocab_size:
        raise ValueError(f"targets span {int(targets.min())}..{int(targets.max())}, vocabulary is 0..{vocab_size - 1}")
    if accumulate_main_grad and weight.requires_grad and getattr(weight, "main_grad", None) is None:
        raise ValueError("accumulate_main_grad is set and weight has no main_grad; wrap the model for data parallelism")


def _check_shapes(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    sequence_shards: Sequence[int] | None,
    tp_group: dist.ProcessGroup | None,
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [T, d] and [V_local, d]")
    if hidden.dtype != weight.dtype or hidden.dtype not in (torch.float64, torch.float32, torch.bfloat16):
        raise ValueError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}: both must be float32, bfloat16 or float64"
        )
    if targets.dim() != 1 or targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets {list(targets.shape)} of {targets.dtype} must be [T] integers")
    if sequence_shards is None:
        if targets.shape != hidden.shape[:1]:
            raise ValueError(f"targets {list(targets.shape)} must be [T={hidden.shape[0]}], one for each row of hidden")
        return
    if tp_group is None:
        raise ValueError(
            "sequence_shards needs tp_group: without it there are no other ranks to share the sequence with"
        )
    rank, size = dist.get_rank(tp_group), dist.get_world_size(tp_group)
    if len(sequence_shards) != size or sequence_shards[rank] != hidden.shape[0]:
        raise ValueError(
            f"sequence_shards {list(sequence_shards)} must have {size} counts, and {hidden.shape[0]} for rank {rank}"
        )
    if sum(sequence_shards) != targets.shape[0]:
        raise ValueError(f"sequence_shards sum to {sum(sequence_shards)}, targets are {targets.shape[0]}")
