"""Selects optional libraries for the models: Transformer Engine for layers and FP8, it or apex for Adam.

Import this module only inside `cpu.megatron_platform`: it imports Megatron.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.utils import get_te_version, is_te_min_version

from megatron_prime.config.schema_model import ModelSection
from megatron_prime.errors import ConfigError

_FP8_CAPABILITY = (8, 9)
"""Compute capability of the first GPUs with FP8 matrix products."""
_PACKED_CAPABILITY = (9, 0)
"""Compute capability from which cuDNN's fused attention, which Transformer Engine brings, takes packed sequences."""
_FP8_TRANSFORMER_ENGINE = "2.2"
"""First version whose FP8 scales may come from the current values (Megatron's recipe ``tensorwise``)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Libraries:
    """The selected libraries, for the whole process."""

    transformer_engine: bool
    """Layers and attention; otherwise Megatron's local ones with our norm and attention."""
    adam: str
    """Package of the optimizer: Megatron takes Transformer Engine's, else apex's, else torch's."""

    hint: str = ""
    """Reason why an installed Transformer Engine is not used."""

    def __str__(self) -> str:
        layers = "Transformer Engine" if self.transformer_engine else "torch"
        return f"layers of {layers}{self.hint and f' ({self.hint})'}, Adam of {self.adam}"


def choose_libraries(model: ModelSection, *, packed: bool) -> Libraries:
    """Looks at what this machine has.

    Args:
        model: what is demanded.
        packed: micro-batches are packed sequences.

    Raises:
        ConfigError: Transformer Engine, or FP8, is demanded but cannot be had.
    """
    available = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
    if model.transformer_impl == "transformer_engine" and not available:
        raise ConfigError(
            "model.transformer_impl: 'transformer_engine' needs CUDA and the transformer_engine package; "
            "install megatron-prime[gpu] or use 'auto'"
        )
    if model.fp8 is not None and not (available and model.transformer_impl != "local"):
        raise ConfigError(
            f"model.fp8: {model.fp8!r} needs CUDA and the transformer_engine package; install megatron-prime[gpu] or "
            "set it to null"
        )
    if model.fp8 is not None:
        _check_fp8(model.fp8)
    adam = megatron_optimizer.Adam.__module__.partition(".")[0]
    if not available or model.transformer_impl == "local" or _means_local(model):
        return Libraries(transformer_engine=False, adam=adam)
    if packed and not _has_packed_attention():
        hint = "Transformer Engine's attention over packed sequences needs flash-attn on this GPU"
        if model.transformer_impl == "transformer_engine" or model.fp8 is not None:
            raise ConfigError(
                f"model.transformer_impl: {hint}; install flash-attn (docs/reference/dependencies.md), "
                "or use 'auto' without FP8"
            )
        return Libraries(transformer_engine=False, adam=adam, hint=hint)
    return Libraries(transformer_engine=True, adam=adam)


def _means_local(model: ModelSection) -> bool:
    # In float32 Transformer Engine's matrix products are TF32, and its attention keeps all scores.
    return model.transformer_impl == "auto" and model.dtype != "bfloat16"


def _has_packed_attention() -> bool:
    """Returns whether Transformer Engine has a packed attention here that does not store all attention scores."""
    return torch.cuda.get_device_capability() >= _PACKED_CAPABILITY or (
        importlib.util.find_spec("flash_attn") is not None
    )


def _check_fp8(fp8: str) -> None:
    if torch.cuda.get_device_capability() < _FP8_CAPABILITY:
        raise ConfigError(f"model.fp8: {fp8!r} needs GPUs of compute capability 8.9 or higher (H100); set it to null")
    if not is_te_min_version(_FP8_TRANSFORMER_ENGINE):
        raise ConfigError(
            f"model.fp8: {fp8!r} needs transformer_engine {_FP8_TRANSFORMER_ENGINE} or later, "
            f"found {get_te_version()}; install megatron-prime[gpu] or set it to null"
        )
