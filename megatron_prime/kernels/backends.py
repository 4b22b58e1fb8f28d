"""Selects the backend of a head by device and option."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal, Protocol

import torch

from megatron_prime.errors import ConfigError
from megatron_prime.kernels.contract import BackendName, HeadOptions
from megatron_prime.kernels.shard import Merged
from megatron_prime.kernels.tiles import Block, TokenGradients, TorchTiles

_LEAST_CAPABILITY = (8, 0)


class Backend(Protocol):
    """Computes one block of tokens; `TorchTiles` documents the methods."""

    def kept_itemsize(self, dtype: torch.dtype) -> int: ...

    def block_tokens(self, num_rows: int, itemsize: int) -> int: ...

    def statistics(
        self, block: Block, dtype: torch.dtype, *, with_entropy: bool, keep: bool
    ) -> tuple[torch.Tensor, Any]: ...

    def gradients(
        self,
        block: Block,
        merged: Merged,
        upstream: TokenGradients,
        kept: Any,
        grad_hidden: torch.Tensor | None,
        grad_weight: torch.Tensor | None,
    ) -> None: ...


def choose_backend(name: BackendName, device: torch.device) -> Literal["torch", "triton"]:
    """The backend for a device: with `auto` Triton where a GPU can run it, else torch.

    Raises:
        ConfigError: Triton is demanded where it cannot run.
    """
    problem = _triton_problem(device)
    if name == "triton" and problem is not None:
        raise ConfigError(f"head.backend: 'triton' {problem}; use 'auto' or 'torch'")
    if name == "torch" or problem is not None or (name == "auto" and device.type != "cuda"):
        return "torch"
    return "triton"


def make_backend(options: HeadOptions, dtype: torch.dtype, device: torch.device) -> Backend:
    """The backend of a head; float64 is torch's in any case."""
    if dtype != torch.float64 and choose_backend(options.backend, device) == "triton":
        from megatron_prime.kernels.triton_kernels import TritonKernels

        return TritonKernels(options.workspace_bytes)
    return TorchTiles(options.gemm, options.workspace_bytes)


def _triton_problem(device: torch.device) -> str | None:
    """Why Triton cannot run on a device; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "is not installed (pip install megatron-prime[gpu])"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return (
            None if capability >= _LEAST_CAPABILITY else f"needs compute capability 8.0, and this GPU has {capability}"
        )
    from triton import knobs

    return None if knobs.runtime.interpret else "has no compiler for CPUs (only its interpreter, TRITON_INTERPRET=1)"
